"""Follows a trainer through its run: checks what it reports, times its phases, sees its memory.

A step lasts until the next begins, with the loop, the data and the log. Of it,

- generation is from prompts as text to completions as token ids;
- scoring is all that comes then before the training: decoding, rewards, advantages, batches, and
  old and reference log-probs if the loss needs them (with num_iterations 1 and beta 0 it does not);
- training is forward, backward, clipping and the optimizer's step, of all micro-batches.

Memory is the absolute peak: weights, gradients and the optimizer's state with all that comes and
goes. On a GPU it is the allocator's, of the whole run. On a CPU it is that of one more step, under
the profiler, and an upper bound: the profiler does not see what is freed of what is older than
itself.
"""

from __future__ import annotations

import functools
import gc
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .measure import CpuAllocations
from .timing import summary
from .trainer_cells import TrainerCell

TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-1}
"""Of the first gradient as a vector, relative to fp64: ten times or more what rounding does.

On a CPU it does 1e-2 in bfloat16 and 2e-6 in float32; a flipped sign does 2.
"""

MAX_GRAD_NORM = 1.0
"""What both trainers clip at."""

WARM_UP = 2
"""Steps before those that are timed: the one that is checked, and one that samples as they do."""


class WrongResult(Exception):
    """A trainer did not do what it was asked to do; the message says what it did."""


class Recorder:
    """What an adapter tells of a trainer, step by step."""

    def __init__(
        self,
        cell: TrainerCell,
        device: str,
        plan: list[int | None],
        exact: dict[str, Tensor] | None = None,
    ) -> None:
        """Prepare.

        Args:
            cell: what is measured.
            device: where.
            plan: of each step, the length of the completions that are given instead of sampled, or
                None where the trainer samples.
            exact: the first step's gradient, by the name of the parameter; None: not checked.
        """
        self.cell, self.device, self.plan, self.exact = cell, device, plan, exact
        self.grad_norm = None if exact is None else _norm(exact.values())
        self.error: float | None = None
        self.peak = 0
        self.steps: list[dict[str, float]] = []
        self.reported = 0
        self._start = 0.0
        self._alive = 0
        self._memory: CpuAllocations | None = None

    def begin(self) -> None:
        """A step begins, and the one before has ended."""
        self.end()
        if self.device == "cpu" and len(self.steps) == len(self.plan) - 1:
            self._alive, self._memory = alive_bytes(), CpuAllocations()  # slows this last step
        self.steps.append(defaultdict(float))
        self._start = self._now()

    def end(self) -> None:
        """The last step has ended."""
        if self.steps and "total" not in self.steps[-1]:
            self.steps[-1]["total"] = self._now() - self._start
        if self._memory is not None:
            self.peak = self._alive + self._memory.stop()
            self._memory = None
        elif self.device == "cuda":
            self.peak = torch.cuda.max_memory_allocated()

    def given_length(self) -> int | None:
        """Return the length of this step's completions if they are given, None if sampled."""
        return self.plan[len(self.steps) - 1]

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that adds its time to a part of the step."""

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            start = self._now()
            result = function(*args, **kwargs)
            self.steps[-1][name] += self._now() - start
            return result

        return wrapper

    def trained(self) -> None:
        """The optimizer has made its step: what was not the rollout was training."""
        step = self.steps[-1]
        step["training"] = self._now() - self._start - step["rollout"]

    def check_gradient(self, model: nn.Module) -> None:
        """Compare the first gradient, as the optimizer is about to use it, with the exact one.

        By then it has been clipped, so the exact one is clipped as well. What that hides, a wrong
        scale, the logged norm shows.

        Raises:
            WrongResult: it is another vector.
        """
        if self.exact is None or self.grad_norm is None:
            return
        exact, self.exact = self.exact, None  # from now on its memory would count
        scale = min(1.0, MAX_GRAD_NORM / self.grad_norm)
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        if found.keys() != exact.keys():
            odd = sorted(found.keys() ^ exact.keys())
            raise WrongResult(f"the first gradient lacks, or has in excess, {odd}")
        difference = _norm(found[name].cpu() - scale * x for name, x in exact.items())
        self.error = difference / (scale * self.grad_norm)
        if not self.error <= TOLERANCE[self.cell.dtype]:
            raise WrongResult(f"the first gradient is off by {self.error:.2g} of its norm")

    def report(self, metrics: Mapping[str, Any]) -> None:
        """Check what the trainer logs of a step, in the names that both trainers use.

        Raises:
            WrongResult: not the work that was asked for, or the first gradient was not checked or
                its norm, before clipping, is wrong.
        """
        cell, length = self.cell, self.plan[self.reported] or self.cell.completion_length
        wanted = {
            "completions/min_length": length,
            "completions/max_length": length,
            "frac_reward_zero_std": 1 - cell.rho,
        }
        for name, value in wanted.items():
            if metrics[name] != value:
                raise WrongResult(f"{name} is {metrics[name]}, wanted {value}")
        for name in ("loss", "grad_norm"):
            if not math.isfinite(metrics[name]):
                raise WrongResult(f"{name} is {metrics[name]}")
        if self.reported == 0 and self.grad_norm is not None:
            if self.error is None:
                raise WrongResult("the optimizer made no step with the first gradient")
            if abs(metrics["grad_norm"] / self.grad_norm - 1) > TOLERANCE[cell.dtype]:
                raise WrongResult(
                    f"the first gradient has norm {metrics['grad_norm']}, exact {self.grad_norm}"
                )
        self.reported += 1

    def times(self) -> dict[str, list[float]]:
        """Return `[min, median, max]` in milliseconds of each phase, and of the whole step."""
        steps = self.steps[WARM_UP : WARM_UP + self.cell.steps]
        for step in steps:
            step["scoring"] = step["rollout"] - step["generation"]
        return {
            f"ms_{name}": summary([1e3 * step[name] for step in steps])
            for name in ("generation", "scoring", "training", "total")
        }

    def _now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def _norm(parts: Iterable[Tensor]) -> float:
    """Return the norm of a vector that comes in parts."""
    return math.hypot(*(torch.linalg.vector_norm(x, dtype=torch.float64).item() for x in parts))


def alive_bytes() -> int:
    """Return the bytes of all tensors there are."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if type(x) in (Tensor, torch.nn.Parameter)]
    return sum({(s := x.untyped_storage()).data_ptr(): s.nbytes() for x in tensors}.values())
