"""The command `fastgrpo`, with a fault in the process of one rank; started by torchrun.

`faults.py FAULT DIRECTORY train config.yaml ...`: as the fault happens, its time is written to
DIRECTORY/fault. Of processes that torchrun starts again none has a fault.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastgrpo import learner, samples
from fastgrpo.cli import main

AT_STEP = 2
"""Steps that have been taken when something fails."""


def before(owner: Any, name: str, fault: Callable[..., None], calls: int) -> None:
    """Let a fault happen as a function is called, after so many calls of it."""
    function, left = getattr(owner, name), [calls]

    def called(*arguments: Any, **options: Any) -> Any:
        left[0] -= 1
        if left[0] == -1:
            note()
            fault(*arguments)
        return function(*arguments, **options)

    setattr(owner, name, called)


def note() -> None:
    (Path(sys.argv[2]) / "fault").write_text(str(time.time()))


def kill(*arguments: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def spoil(model: torch.nn.Module, max_norm: float) -> None:
    gradient: Any = next(p.grad for p in model.parameters() if p.grad is not None)
    gradient.to_local().fill_(float("nan"))


def overflow(learner: Any, batch: Any, step: int) -> None:
    """Let a layer give infinity, also as the step is looked at again, until the next one."""

    def spoil(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        wrong = torch.is_grad_enabled() and learner.scheduler.last_epoch == AT_STEP
        return output + float("inf") if wrong else output

    model = learner.policy.model
    model.get_submodule("model.layers.1.mlp.down_proj").register_forward_hook(spoil)


def run_out(*arguments: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def slip(*arguments: Any) -> None:
    raise KeyError("nobody's input")


def misname() -> None:
    note()
    sys.argv.append("model_name_or_path=/nowhere")


FAULTS: dict[str, Callable[[], None]] = {
    "none": lambda: None,
    "missing model": misname,
    "memory": lambda: before(learner.Learner, "optimise", run_out, AT_STEP),
    "gradient": lambda: before(learner, "clip_gradients", spoil, AT_STEP),
    "overflow": lambda: before(learner.Learner, "optimise", overflow, AT_STEP),
    "slip": lambda: before(learner.Learner, "optimise", slip, AT_STEP),
    "killed as it trains": lambda: before(learner, "clip_gradients", kill, AT_STEP),
    "killed as it samples": lambda: before(samples.Sampler, "_draw", kill, AT_STEP),
    "killed at once": lambda: before(learner, "clip_gradients", kill, 0),
}

if __name__ == "__main__":
    torch.use_deterministic_algorithms(True)
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        FAULTS[sys.argv[1]]()
    sys.exit(main(sys.argv[3:]))
