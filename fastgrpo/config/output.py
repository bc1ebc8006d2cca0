"""What is measured during a run, shown of it, and kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal

from .checks import at_least

Strategy = Literal["no", "steps", "epoch"]


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """The part of a `TrainConfig` that is about evaluations, logs and checkpoints."""

    output_dir: str | None = None
    """Run directory, which must not exist or be empty. None: a new one under `runs/`."""
    run_name: str | None = None
    """What trackers and the report call the run; None: the name of its directory."""
    report_to: list[str] = field(default_factory=list[str])
    """Trackers beside metrics.jsonl: tensorboard, wandb, trackio; `all`: those installed."""
    project: str = "huggingface"
    """What W&B and trackio file the run under."""

    logging_steps: int = 10
    """Steps between the plain log lines; metrics.jsonl has every step."""
    num_completions_to_log: int = 4
    """Completions written to completions.jsonl, of those sampled for each logged step."""

    eval_strategy: Strategy = "no"
    """Measure the rewards on the test split every `eval_steps`, once an epoch, or not at all. With
    a `dataset_test_split` it is measured before and after training in any case."""
    eval_steps: int | None = None
    """Optimisation steps between two evaluations; None: logging_steps."""
    eval_on_start: bool = False
    """Evaluate before the first step too."""
    per_device_eval_batch_size: int | None = None
    """Completions sampled together in evaluations, of `fastgrpo eval` too, those of one prompt at
    least; None: as many as a training step has."""
    num_generations_eval: int | None = None
    """Completions of each prompt in evaluations during training; None: num_generations."""
    max_eval_samples: int | None = None
    """Prompts of the test split that are measured; None: all."""

    save_strategy: Strategy = "steps"
    """Write checkpoints every `save_steps`, once an epoch, or only the final one."""
    save_steps: int = 500
    """Optimisation steps between two checkpoints, of the strategy `steps`."""
    save_only_model: bool = False
    """Leave out of checkpoints what a run needs to go on from them: three quarters of it all. A
    run that goes on cannot change it."""
    save_total_limit: int | None = None
    """Checkpoints that are kept; older ones are deleted when another is complete. Neither the best
    nor damaged ones are counted."""
    save_errors: Literal["stop", "none"] = "stop"
    """What a checkpoint does that cannot be written, to a full disk for example: it stops the run,
    or is told and counted, and the next is tried. Without a final one the run has failed."""
    metric_for_best_model: str | None = None
    """Metric of the evaluations, with or without `eval_`, by which the best model so far is kept in
    the directory `best`; None: none is."""
    greater_is_better: bool | None = None
    """Whether more of that metric is better; None: unless its name ends in `loss`."""

    def output_problems(self) -> Iterator[str]:
        """Yield what is wrong with these values."""
        yield from at_least(
            self,
            1,
            "logging_steps",
            "eval_steps",
            "per_device_eval_batch_size",
            "num_generations_eval",
            "max_eval_samples",
            "save_steps",
            "save_total_limit",
        )
        yield from at_least(self, 0, "num_completions_to_log")


def is_due(strategy: Strategy, every: int, step: int, steps_per_epoch: Fraction) -> bool:
    """Say whether something is to be done after a step.

    Args:
        strategy: when at all.
        every: steps between two times, of the strategy "steps".
        step: counted from 1.
        steps_per_epoch: optimisation steps that an epoch takes.
    """
    if strategy == "epoch":
        return int(step / steps_per_epoch) > int((step - 1) / steps_per_epoch)
    return strategy == "steps" and step % every == 0
