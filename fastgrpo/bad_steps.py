"""Optimisation steps that are not taken, since the numbers have gone wrong.

A loss or a norm of the gradient that is infinite or NaN is bad, and, if the run says so, a norm far
above those before it. Parameters and the optimizer stay as they are; what is needed to run the step
again is kept in `bad_steps/step-N` of the run directory.
"""

from __future__ import annotations

import json
import math
import shutil
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .batch import Batch, load_batches, save_batches
from .config import TrainConfig
from .trace import Finding

BATCH, RANDOM, RECORD = "batch.safetensors", "random.safetensors", "bad_step.json"


@dataclass(frozen=True)
class BadStep:
    """What is told of a step that was not taken; the file `bad_step.json`."""

    step: int
    reason: str
    """In words."""
    loss: float
    grad_norm: float
    """Before it was clipped."""
    limit: float | None
    """Which the norm had to stay below, if there was one."""
    finding: Finding | None
    """Where it went wrong; None: no module has, as in a spike."""
    passes: list[list[list[int]]]
    """The sequences of each pass, of each rank."""
    entropy_bonus: dict[str, Any]
    """Its state in this step."""
    weights: str
    """The directory beside this one, `step-N`, that holds the parameters of this step."""


def random_states(device: torch.device) -> dict[str, Tensor]:
    """Return the states of PyTorch's random numbers, by type of device."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_states(states: dict[str, Tensor], device: torch.device) -> None:
    """Go on with the random numbers from where `random_states` was called."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


class BadSteps:
    """Decides which steps are not taken, and when there were too many."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.skipped = 0
        """Steps of the run that were not taken."""
        self.in_a_row = 0
        """The last of them, without one that was."""
        self.weights: str | None = None
        """The directory that holds the parameters of all of this row."""
        self._window = config.grad_norm_window
        self._norms: deque[float] = deque(maxlen=self._window)

    def reason(self, loss: float, grad_norm: float) -> str | None:
        """Return why a step must not be taken, in words; None: it may be.

        Args:
            loss: of all ranks.
            grad_norm: before clipping, of all ranks.
        """
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return f"the loss is {loss:.3g} and the norm of the gradient is {grad_norm:.3g}"
        if self.limit is not None and grad_norm > self.limit:
            return (
                f"the norm of the gradient is {grad_norm:.3g}, above {self.limit:.3g}, which is "
                f"max_grad_norm_ratio times the median of the {len(self._norms)} steps before"
            )
        return None

    @property
    def limit(self) -> float | None:
        """What the norm of the next gradient may be; None: there is none, or none yet."""
        ratio, norms = self.config.max_grad_norm_ratio, self._norms
        return None if ratio is None or len(norms) < self._window else ratio * median(norms)

    def took(self, grad_norm: float) -> None:
        """Note a step that was taken; one without a signal says nothing of the others."""
        self.in_a_row, self.weights = 0, None
        if grad_norm > 0:
            self._norms.append(grad_norm)

    def skip(self) -> None:
        """Note a step that was not taken."""
        self.skipped += 1
        self.in_a_row += 1

    def check(self, said: str, finding: Finding | None) -> None:
        """End the run if there were too many in a row.

        Args:
            said: of the last, in words.
            finding: where it went wrong.

        Raises:
            FloatingPointError: says what to do.
        """
        if self.in_a_row > self.config.max_bad_steps:
            count = "this step" if self.in_a_row == 1 else f"{self.in_a_row} steps in a row"
            raise FloatingPointError(
                f"{said}; {count} could not be taken, max_bad_steps is "
                f"{self.config.max_bad_steps}, and the weights are still those of the step before: "
                + (
                    "look at what the model was loaded from, or go on from an earlier checkpoint"
                    if finding and finding.is_parameter
                    else "look at the last rewards in rewards.jsonl, or begin a new run with a "
                    "lower learning_rate from a checkpoint, with model_name_or_path: "
                    "RUN/checkpoints/step-N"
                )
            )

    def state_dict(self) -> dict[str, Any]:
        """Return what has changed since the start of the run."""
        return {
            "skipped": self.skipped,
            "in_a_row": self.in_a_row,
            "weights": self.weights,
            "norms": list(self._norms),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was called."""
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]
        self.weights = state["weights"]
        self._norms = deque(state["norms"], maxlen=self._window)


def save_bad_step(
    folder: Path, bad: BadStep, batch: Batch, random: list[dict[str, Tensor]]
) -> None:
    """Write what a step was made from, all but the parameters.

    Args:
        folder: `step-N`; what it held is replaced.
        bad: the step.
        batch: its completions, of all ranks.
        random: the states of random numbers before its first pass, of each rank.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_batches(folder / BATCH, [batch])
    states = {f"{rank}.{name}": x for rank, each in enumerate(random) for name, x in each.items()}
    save_file(states, folder / RANDOM)
    record = asdict(bad) | {"loss": repr(bad.loss), "grad_norm": repr(bad.grad_norm)}  # or NaN
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def load_bad_step(
    folder: Path, device: torch.device
) -> tuple[BadStep, Batch, list[dict[str, Tensor]]]:
    """Return what `save_bad_step` has written.

    Raises:
        ValueError: it is not there.
    """
    bad = read_bad_step(folder)
    (batch,) = load_batches(folder / BATCH, device)
    random: list[dict[str, Tensor]] = [{} for _ in bad.passes]
    for name, state in load_file(folder / RANDOM).items():
        rank, _, kind = name.partition(".")
        random[int(rank)][kind] = state
    return bad, batch, random


def read_bad_step(folder: Path) -> BadStep:
    """Return what is told of a step.

    Raises:
        ValueError: it is no directory of a step that was not taken.
    """
    file = folder / RECORD
    if not file.is_file():
        raise ValueError(
            f"{folder} holds no {RECORD}: give a directory bad_steps/step-N of a run directory"
        )
    values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    for name in ("loss", "grad_norm"):
        values[name] = float(values[name])
    if values["finding"] is not None:
        values["finding"] = Finding(**values["finding"])
    return BadStep(**values)


def forget_other_weights(folder: Path) -> None:
    """Delete the parameters of all steps beside one: of a model there is one copy at most."""
    for other in folder.parent.glob("step-*/weights"):
        if other.parent != folder:
            shutil.rmtree(other, ignore_errors=True)  # what is in use goes with the next one
