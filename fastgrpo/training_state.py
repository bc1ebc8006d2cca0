"""What a run needs to go on, beside its model: the directory `state` of a checkpoint.

Tensors are in safetensors files, from each process its part (PyTorch's distributed checkpoints),
which any number of processes can read; numbers are in JSON. Nothing is pickled.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer

from .batch import load_batches, save_batches
from .checkpoint import nameless_base, point_to_base, without_adapters
from .distributed import World
from .learner import Learner
from .optimizer_state import load_optimizer, save_optimizer, set_rates

if TYPE_CHECKING:
    from .trainer import Trainer

_NUMBERS = "trainer_state.json"
_BATCHES = "batches.safetensors"


def _save_tensors(path: Path, learner: Learner) -> None:
    """Write what is trained, the optimizer's states and the reference; all ranks call it.

    Args:
        path: a directory that all ranks see.
        learner: whose.
    """
    writer = HuggingFaceStorageWriter(str(path), save_distributed=True)
    with _alone() as no_dist:
        save(_tensors(learner), storage_writer=writer, no_dist=no_dist)


def _load_tensors(path: Path, learner: Learner) -> None:
    """Take back what `_save_tensors` has written, by as many processes as there are now."""
    reader = HuggingFaceStorageReader(str(path))
    with _alone() as no_dist:
        load(_tensors(learner), storage_reader=reader, no_dist=no_dist)


def load_base(path: Path, model: Any) -> None:
    """Take back what adapters were put on, if it has no name; all ranks call it.

    Args:
        path: where `keep_base` has left it.
        model: with adapters, or without.
    """
    base = nameless_base(model)
    if base is None:
        return
    named = {name: p.detach() for name, p in base.named_parameters()}
    with _alone() as no_dist:
        reader = HuggingFaceStorageReader(str(path))
        load(without_adapters(named), storage_reader=reader, no_dist=no_dist)
    point_to_base(path, model)


@contextmanager
def _alone() -> Generator[bool]:
    """Say whether this process is the only one, which PyTorch would otherwise warn of.

    Raises:
        BaseException: what has ended the reading or writing in any process, a signal before all
            else. PyTorch's own, which holds it, is no Exception.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        try:
            yield not dist.is_initialized()
        except CheckpointException as error:
            found = [each for each, _ in error.failures.values()]
            signals = [each for each in found if isinstance(each, KeyboardInterrupt)]
            raise (signals or found)[0] from error


def _tensors(learner: Learner) -> dict[str, Tensor]:
    """Return what changes in a run, by name: the very tensors, to be read or written."""
    model = learner.policy.model
    learner.policy.reshard()  # the parts are what stays
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return {
        **{f"model.{name}": x for name, x in trained.items()},
        **{f"optimizer.{name}": x for name, x in _states(learner).items()},
        **{f"reference.{name}": x for name, x in _reference(learner).items()},
    }


def _has_own_file(learner: Learner) -> bool:
    """Say whether the optimizer's states are anything but a few plain tensors a parameter.

    Then they stay with the process that has them, see `optimizer_state`.
    """
    return type(learner.optimizer) is not AdamW


def _states(learner: Learner) -> dict[str, Tensor]:
    """Return the optimizer's states, by parameter; it has some from now on."""
    if _has_own_file(learner):
        return {}
    _complete(learner.optimizer)
    flat = StateDictOptions(flatten_optimizer_state_dict=True)
    states = get_optimizer_state_dict(learner.policy.model, learner.optimizer, options=flat)
    return {name: x for name, x in states.items() if isinstance(x, Tensor)}


def _complete(optimizer: Optimizer) -> None:
    """Give states to parameters that no step has reached: all have some once they are read.

    PyTorch would take a step for them, which a run that is not saved does not take.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter not in optimizer.state:
                optimizer.state[parameter] = {
                    "step": torch.zeros((), device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }


def _reference(learner: Learner) -> dict[str, Tensor]:
    """Return the reference; nothing, if it is the policy without its adapters, or there is none."""
    if learner.reference is None:
        return {}
    named = list(learner.policy.model.named_parameters())
    parts = learner.reference.own_parts()
    if not parts:
        return {}
    return {
        name: DTensor.from_local(
            part, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
        )
        if isinstance(p, DTensor)
        else part
        for (name, p), part in zip(named, parts, strict=True)
    }


def save_state(path: Path, trainer: Trainer) -> None:
    """Write all that a run needs to go on after the step it has just taken; all ranks call it.

    Args:
        path: a directory that all ranks see; it is made.
        trainer: whose run.
    """
    learner, world = trainer.learner, trainer.world
    _save_tensors(path, learner)
    if _has_own_file(learner):
        world.on_each(lambda: save_optimizer(_own_file(path, world), learner.optimizer))
    batches = list({id(batch): batch for batch in trainer.waiting}.values())
    numbers = {
        "step": trainer.step,
        "seconds": time.perf_counter() - trainer.started,
        "num_tokens": trainer.tokens_seen,
        "prompts": trainer.collector.prompts.state_dict(),
        "scheduler": learner.scheduler.state_dict(),
        "entropy_bonus": learner.entropy_bonus.state_dict(),
        "token_budget": learner.budget.state_dict(),
        "bad_steps": learner.bad_steps.state_dict(),
        "saver": trainer.saver.state_dict(),
        "failures": world.gather(trainer.judges.failures.state_dict()),
        "before": trainer.before,
        "generation_metrics": trainer.generation_metrics,
        "taken": trainer.taken,
        "waiting": [[batch is one for one in batches].index(True) for batch in trainer.waiting],
    }

    def write() -> None:
        # torchao has learning rates in tensors
        text = json.dumps(numbers | {"sizes": trainer.run.sizes()}, indent=2, default=float)
        (path / _NUMBERS).write_text(text + "\n", encoding="utf-8")
        save_batches(path / _BATCHES, batches)

    world.on_main(write)


def load_state(path: Path, trainer: Trainer) -> dict[str, int]:
    """Put a trainer where `save_state` has left one, maybe of another number of processes.

    Returns:
        The sizes that the files of lines had, see `RunDirectory.cut`.

    Raises:
        ValueError: the optimizer's states are those of another number.
    """
    learner = trainer.learner
    _load_tensors(path, learner)
    if _has_own_file(learner):
        load_optimizer(_written_file(path, trainer.world), learner.optimizer)
    numbers: dict[str, Any] = json.loads((path / _NUMBERS).read_text(encoding="utf-8"))
    trainer.step = trainer.sampler.state.global_step = numbers["step"]
    trainer.seconds, trainer.tokens_seen = numbers["seconds"], numbers["num_tokens"]
    trainer.collector.prompts.load_state_dict(numbers["prompts"])
    del numbers["scheduler"]["base_lrs"]  # are the configuration's, of the optimizer's own type
    learner.scheduler.load_state_dict(numbers["scheduler"])
    set_rates(learner.optimizer, learner.scheduler.get_last_lr())
    learner.entropy_bonus.load_state_dict(numbers["entropy_bonus"])
    learner.budget.load_state_dict(numbers["token_budget"])
    learner.bad_steps.load_state_dict(numbers["bad_steps"])
    failures, is_main = trainer.judges.failures, trainer.world.is_main
    failures.load_state_dict(numbers["failures"], is_main=is_main)
    trainer.before = numbers["before"]
    trainer.generation_metrics = numbers["generation_metrics"]
    trainer.taken = numbers["taken"]
    trainer.saver.load_state_dict(numbers["saver"])
    batches = load_batches(path / _BATCHES, learner.policy.device)
    trainer.waiting = [batches[i] for i in numbers["waiting"]]
    return numbers["sizes"]


def _own_file(path: Path, world: World) -> Path:
    """Return where a process has the states of its optimizer."""
    return path / f"optimizer-{world.rank + 1}-of-{world.size}.safetensors"


def _written_file(path: Path, world: World) -> Path:
    """Return `_own_file`, which is there.

    Raises:
        ValueError: there are those of another number of processes.
    """
    file = _own_file(path, world)
    if not file.exists():
        count = next(path.glob("optimizer-*")).stem.rpartition("-")[2]
        raise ValueError(
            f"{path}: the states of this optimizer are kept by process, of {count} of them, and "
            f"now there are {world.size}; start {count}, or take optim: adamw_torch_fused in a "
            "new run"
        )
    return file
