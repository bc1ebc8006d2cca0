"""What of a run's configuration may be another when it goes on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from .config import TrainConfig

_MAY_DIFFER = frozenset(
    {
        *("parallel", "per_device_train_batch_size", "gradient_accumulation_steps"),
        *("steps_per_generation",),  # counts passes: see `check_same`
        *("max_tokens_per_microbatch", "max_generation_batch_size", "per_device_eval_batch_size"),
        *("gradient_checkpointing", "activation_offloading", "offload_ref_model", "torch_compile"),
        *("cuda_graph", "cpu_threads", "reward_timeout", "reward_errors", "max_bad_steps"),
        *("save_strategy", "save_steps", "save_total_limit", "save_errors"),
        *("logging_steps",),
        *("num_completions_to_log", "output_dir", "report_to", "project", "run_name"),
    }
)
"""Options of a resumed run that change how it is computed or shown, not what."""


def check_same(path: Path, values: Mapping[str, Any], config: TrainConfig) -> None:
    """Refuse to go on with a run that was configured in another way.

    Args:
        path: of the run.
        values: of the configuration of now, with the names of what was given as objects.
        config: it.

    Raises:
        ValueError: names the first key that differs, and both values.
    """
    before: dict[str, Any] = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
    now: dict[str, Any] = yaml.safe_load(yaml.safe_dump(dict(values)))
    may_differ = _MAY_DIFFER
    if is_longer(before, now):
        may_differ = may_differ | {"max_steps", "num_train_epochs"}
    if now["loss_type"] == "bnpo" or now["top_entropy_quantile"] < 1:  # means over micro-batches
        may_differ = may_differ - {"per_device_train_batch_size"}
    if now["eval_strategy"] == "steps" and now["eval_steps"] is None:  # which are as often
        may_differ = may_differ - {"logging_steps"}
    for key in [*now, *(before.keys() - now.keys())]:
        if key not in may_differ and before.get(key) != now.get(key):
            raise ValueError(
                f"{key}: is {now.get(key)!r} now, and {before.get(key)!r} in the run in {path}, "
                "which is to be resumed; give what it was, or another output_dir for a new run"
            )
    passes = before["gradient_accumulation_steps"]
    processes = math.prod((before.get("parallel") or {}).values())
    completions = before["per_device_train_batch_size"] * passes * processes
    if completions != config.completions_per_step:
        raise ValueError(
            f"gradient_accumulation_steps: a step of the run in {path} has {completions} "
            f"completions, from {processes} process{'es' if processes > 1 else ''}, and now it "
            f"would have {config.completions_per_step}; change it so that they are as many"
        )
    steps = (before["steps_per_generation"] or passes) // passes
    if steps != config.optimizer_steps_per_generation:
        raise ValueError(
            f"steps_per_generation: completions serve {steps} optimisation "
            f"step{'s' if steps > 1 else ''} in the run in {path}, and now they would serve "
            f"{config.optimizer_steps_per_generation}; set it to "
            f"{steps * config.gradient_accumulation_steps}"
        )


def is_longer(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Say whether a run is to have more steps than it had, and those it has taken are the same."""
    schedule, warmup = now["lr_scheduler_type"], now["warmup_steps"]
    ends_nowhere = schedule == "constant" or (
        schedule == "constant_with_warmup" and (warmup >= 1 or warmup == 0)
    )
    lengths = [(each["max_steps"], each["num_train_epochs"]) for each in (before, now)]
    same_unit = (lengths[0][0] > 0) == (lengths[1][0] > 0)
    return ends_nowhere and same_unit and lengths[1] > lengths[0]
