"""A step that was not taken, once more: through the same forward and backward passes, watched.

With several processes' steps, all their passes run in this one: what they add up to differs in its
last digits.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .adapters import load_adapters
from .bad_steps import BadStep, load_bad_step, read_bad_step, set_random_states
from .batch import Batch
from .config import TrainConfig, load_config
from .distributed import World
from .entropy_bonus import EntropyBonus
from .gradient import Passes, Step
from .loading import load_model, load_tokenizer
from .model import Policy
from .optim import clip_gradients
from .setup import make_policy, on_device
from .trace import Call, Finding, Range, Watched, bad_parameter, range_of, watch

AROUND = (6, 3)
"""Calls that are shown before and after the first bad one."""
LARGEST = 5
"""Parameters that are shown, by the norm of their gradients."""


@dataclass(frozen=True)
class Replayed:
    """What came of a step this time."""

    bad: BadStep
    """What came of it in its run."""
    loss: float
    grad_norm: float
    finding: Finding | None
    watched: Watched | None
    """The pass that went wrong; if none has, the one that had; None: there was no signal to run."""
    columns: dict[str, Range]
    """What the loss was given in that pass."""
    gradients: list[tuple[str, float]]
    """Parameters and the norms of their gradients, the largest first."""

    @property
    def came_again(self) -> bool:
        """Whether the step would not be taken now either."""
        values = torch.tensor([self.loss, self.grad_norm])
        limit = self.bad.limit
        return not values.isfinite().all() or (limit is not None and self.grad_norm > limit)


def replay(folder: str | Path, overrides: Sequence[str] = ()) -> Replayed:
    """Run a step again that was not taken.

    Args:
        folder: `bad_steps/step-N` of a run directory.
        overrides: `key=value` over the run's configuration, for example dtype=float32.

    Raises:
        ValueError: it is no such directory, or what it needs is gone; says what.
    """
    folder = Path(folder).expanduser().resolve()
    bad = read_bad_step(folder)
    run = folder.parent.parent
    config = _alone(load_config(run / "config.yaml", overrides))
    if config.cpu_threads is not None:
        torch.set_num_threads(config.cpu_threads)
    policy = _load_policy(config, folder.parent / bad.weights / "weights", run)
    bad, batch, random = load_bad_step(folder, policy.device)
    bonus = EntropyBonus(config)
    bonus.load_state_dict(bad.entropy_bonus)
    step = Step(policy, config, bonus.loss, batch, Passes(bad.passes), World())

    def passes() -> Iterator[list[int]]:
        for states, own in zip(random, bad.passes, strict=True):
            set_random_states(states, policy.device)
            yield from own

    totals, _ = step.accumulate(passes())
    gradients = _largest_gradients(policy)
    grad_norm = clip_gradients(policy.model, 0)
    rank, index = (0, 0) if bad.finding is None else (bad.finding.rank, bad.finding.index)
    wanted = sum(map(len, bad.passes[:rank])) + index
    finding, seen = bad_parameter(step), None
    for watched in watch(step, passes()):
        if watched.finding or watched.index == wanted:
            seen = watched
        if watched.finding:
            finding = finding or watched.finding
            break
    policy.model.zero_grad()
    columns: dict[str, Range] = {}
    if seen is not None:
        columns = _columns(batch.select([rows for own in bad.passes for rows in own][seen.index]))
    loss = totals.result()["loss"]
    return Replayed(bad, loss, grad_norm, finding, seen, columns, gradients)


def _alone(config: TrainConfig) -> TrainConfig:
    """Return the run as one process has it."""
    count, passes = config.num_processes, config.steps_per_generation
    return replace(
        config,
        parallel=None,
        gradient_accumulation_steps=config.gradient_accumulation_steps * count,
        steps_per_generation=None if passes is None else passes * count,
    )


def _load_policy(config: TrainConfig, weights: Path, run: Path) -> Policy:
    """Load the model of a step as it is trained.

    Raises:
        ValueError: its parameters are gone.
    """
    if not weights.is_dir():
        raise ValueError(
            f"{weights} is gone: of the steps that a run has not taken only the last in a row have "
            "their weights kept; replay one of these"
        )
    adapters = weights / "adapter_config.json"
    base = weights
    if adapters.is_file():
        named = json.loads(adapters.read_text(encoding="utf-8"))["base_model_name_or_path"]
        base = run / "base" if (run / "base").is_dir() else named
    source = replace(
        config,
        task=None,
        warm_start_accuracy=TrainConfig.warm_start_accuracy,
        model_name_or_path=str(base),
        model_revision=config.model_revision if adapters.is_file() else None,
    )
    model: Any = on_device(config, load_model(source))
    if adapters.is_file():
        model = load_adapters(model, weights, is_trainable=True)
    with _finite(model):
        return make_policy(config, model, load_tokenizer(source))


@contextmanager
def _finite(model: nn.Module) -> Generator[None]:
    """Have numbers alone in a model for a while, which is tried out before it is trained."""
    bad = [p.data for p in model.parameters() if not p.isfinite().all()]
    kept = [values.clone() for values in bad]
    for values in bad:
        values.nan_to_num_(0.0, 0.0, 0.0)
    yield
    for values, own in zip(bad, kept, strict=True):
        values.copy_(own)


def _largest_gradients(policy: Policy) -> list[tuple[str, float]]:
    named = policy.model.named_parameters()
    norms = [(n, float(p.grad.float().norm())) for n, p in named if p.grad is not None]
    # NaN is as large as can be.
    return sorted(norms, key=lambda one: -one[1] if one[1] == one[1] else float("-inf"))[:LARGEST]


def _columns(batch: Batch) -> dict[str, Range]:
    """Return what the loss is given of the tokens that count."""
    found: dict[str, Range] = {}
    for name in ("advantages", "sampling_logps", "old_logps", "ref_logps", "importance_weights"):
        column: Tensor | None = getattr(batch, name)
        if column is not None and (held := range_of([column[batch.mask.to(column.device)]])):
            found[name] = held
    return found


def show(replayed: Replayed) -> Iterator[str]:
    """Yield what came of a step, line by line."""
    bad, now = replayed.bad, replayed.finding
    yield f"step {bad.step} was not taken: {bad.reason}"
    yield f"{'':24}{'then':>14}{'now':>14}"
    yield f"{'loss':24}{bad.loss:>14.6g}{replayed.loss:>14.6g}"
    yield f"{'norm of the gradient':24}{bad.grad_norm:>14.6g}{replayed.grad_norm:>14.6g}"
    yield f"then: {bad.finding or 'no module was to blame'}"
    yield f"now:  {now or 'no module is to blame'}"
    yield ""
    yield f"{'':44}{'what goes in: least, largest':>34}{'what comes out':>34}"
    for call in _around(replayed):
        mark = ">" if call.is_bad else " "
        yield f"{mark} {call.module or 'the model':42}{_text(call.given):>34}{_text(call.made):>34}"
    for name, held in replayed.columns.items():
        yield f"  {name:42}{_text(held):>34}"
    yield ""
    yield "largest norms of gradients"
    for name, norm in replayed.gradients:
        yield f"  {name:60}{norm:>12.6g}"
    yield "the fault came again" if replayed.came_again else "the fault did not come again"


def _around(replayed: Replayed) -> list[Call]:
    """Return the calls next to the first bad module, be it the one of the run."""
    finding = replayed.finding or replayed.bad.finding
    if replayed.watched is None:
        return []
    trace = replayed.watched.trace
    calls = trace.backward if finding and finding.phase == "backward" else trace.forward
    before, after = AROUND
    at = len(calls) - 1  # the end of the body, where the loss begins
    if finding is not None:
        named = (i for i, call in enumerate(calls) if call.module == finding.module)
        at = next(named, at)
    return calls[max(0, at - before) : at + after + 1]


def _text(held: Range | None) -> str:
    if held is None:
        return "-"
    bad = "" if held.finite else f" ({held.not_finite:.2%} not finite)"
    return f"{held.low:.3g}, {held.high:.3g}{bad}"
