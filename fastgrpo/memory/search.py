"""What else would fit, and what would help: by planning again with one thing changed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from fastgrpo.config import ConfigError, TrainConfig
from fastgrpo.data import narrowest

from .plan import Plan, Planner

_GROUPS = 1024  # completions of a prompt: nobody asks for more


@dataclass(frozen=True)
class Largest:
    """The largest value of a key that fits, all others as they are."""

    key: str
    now: int | None
    value: int | None
    """None: none fits."""
    limit: str | None = None
    """What allows no larger one; None: memory."""


@dataclass(frozen=True)
class Switch:
    """A change of the configuration, and what it saves."""

    changes: dict[str, Any]
    peak: int
    saved: int
    fits: bool


def largest_values(planner: Planner, config: TrainConfig) -> list[Largest]:
    """Return the largest completions, groups and micro-batches that fit, each alone."""
    limit, room = narrowest(planner.limits(config))
    return [
        _largest(
            planner,
            config,
            "max_completion_length",
            lambda n: {"max_completion_length": n},
            config.max_completion_length,
            range(1, room - planner.prompt_length + 1),
            limit,
        ),
        _largest_group(planner, config),
        _largest(
            planner,
            config,
            "max_tokens_per_microbatch",
            lambda n: {"max_tokens_per_microbatch": n},
            config.max_tokens_per_microbatch,
            range(planner.sequence_length(config), planner.step_tokens(config) + 1),
            "a whole step",
        ),
    ]


def switches(planner: Planner, config: TrainConfig, now: Plan) -> list[Switch]:
    """Return what saves memory, the most first: single changes that a configuration may have."""
    found: list[Switch] = []
    for changes in _changes(planner, config, now):
        if all(getattr(config, key) == value for key, value in changes.items()):
            continue
        plan = _try(planner, config, changes)
        if plan is not None and now.peak - plan.peak > now.peak // 200:
            found.append(Switch(changes, plan.peak, now.peak - plan.peak, plan.fits))
    return sorted(found, key=lambda switch: -switch.saved)


def _changes(planner: Planner, config: TrainConfig, now: Plan) -> Iterator[dict[str, Any]]:
    yield {"gradient_checkpointing": True}
    yield {"activation_offloading": True}
    adapters = {"use_peft": True, "bf16_updates": None}
    reference = {"offload_ref_model": False, "sync_ref_model": False}
    yield adapters | reference
    yield adapters | reference | {"load_in_4bit": True}
    if config.use_peft:
        yield {"dtype": "bfloat16"}
    else:
        yield {"dtype": "bfloat16", "bf16_updates": "master_weights"}
        yield {"dtype": "bfloat16", "bf16_updates": "stochastic_rounding"}
    yield {"optim": "adamw_8bit"}
    yield {"offload_optimizer": True}
    yield {"offload_ref_model": True}
    yield {"vllm_enable_sleep_mode": True}
    if now.rows_decoded > config.num_generations:
        yield {"max_generation_batch_size": config.num_generations}
    yield {
        "max_tokens_per_microbatch": max(
            now.microbatch_tokens // 2, planner.sequence_length(config)
        )
    }


def _largest(
    planner: Planner,
    config: TrainConfig,
    key: str,
    changes: Callable[[int], dict[str, Any]],
    now: int | None,
    values: range,
    limit: str,
) -> Largest:
    """Halve the range until what fits and what does not are close; a round number that fits."""

    def fits(value: int) -> bool:
        plan = _try(planner, config, changes(value))
        return plan is not None and plan.fits

    if not values:
        return Largest(key, now, None, limit)
    if not fits(values[0]):
        plan = _try(planner, config, changes(values[0]))
        return Largest(key, now, None, "the configuration" if plan is None else plan.limit)
    if fits(values[-1]):
        return Largest(key, now, values[-1], limit)
    low, high = values[0], values[-1]
    while high - low > max(1, low // 64):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return Largest(key, now, max(_round_down(low), values[0]))


def _largest_group(planner: Planner, config: TrainConfig) -> Largest:
    """Double the group while it fits; the prompts of a step stay as many, so a step grows."""
    key, size = "num_generations", config.num_generations
    best = None
    for group in (2**k for k in range(1, _GROUPS.bit_length())):
        completions = group * config.prompts_per_step
        batch = math.gcd(config.per_device_train_batch_size, completions)
        passes = completions // batch
        changes = {
            key: group,
            "per_device_train_batch_size": batch,
            "gradient_accumulation_steps": passes,
            "steps_per_generation": passes * config.optimizer_steps_per_generation,
        }
        plan = _try(planner, config, changes)
        if plan is not None and plan.fits:
            best = group
    return Largest(key, size, best, "this search" if best == _GROUPS else planner.limit(config))


def _try(planner: Planner, config: TrainConfig, changes: dict[str, Any]) -> Plan | None:
    """Plan a changed configuration; None if there may be none like it."""
    try:
        changed = dataclasses.replace(config, **changes)
    except ConfigError:
        return None
    plan = planner.plan(changed, like=config)
    return plan if plan.peak_phase == "training" else planner.plan(changed)


def _round_down(value: int) -> int:
    """Drop what nobody would write: all but six bits."""
    shift = max(value.bit_length() - 6, 0)
    return value >> shift << shift
