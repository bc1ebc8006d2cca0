"""What a run needs to go on, beside its model: the directory `state` of a checkpoint.

Tensors are in safetensors files, from each process its part (PyTorch's distributed checkpoints),
which any number of processes can read; numbers are in JSON. Nothing is pickled.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
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
from .learner import Learner

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
    """Say whether this process is the only one, which PyTorch would otherwise warn of."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield not dist.is_initialized()


def _tensors(learner: Learner) -> dict[str, Tensor]:
    """Return all that changes in a run, by name: the very tensors, to be read or written."""
    model, optimizer = learner.policy.model, learner.optimizer
    learner.policy.reshard()  # the parts are what stays
    _complete(optimizer)
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    # It makes the states that an optimizer has from its first step on.
    flat = StateDictOptions(flatten_optimizer_state_dict=True)
    states = get_optimizer_state_dict(model, optimizer, options=flat)
    return {
        **{f"model.{name}": x for name, x in trained.items()},
        **{f"optimizer.{name}": x for name, x in states.items() if isinstance(x, Tensor)},
        **{f"reference.{name}": x for name, x in _reference(learner).items()},
    }


def _complete(optimizer: Optimizer) -> None:
    """Give states to parameters that no step has reached: all have some once they are read."""
    for group in optimizer.param_groups if optimizer.state else ():
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


def can_be_saved(learner: Learner) -> bool:
    """Say whether the states of a run's optimizer are plain tensors, one for each parameter."""
    return type(learner.optimizer) is AdamW


def save_state(path: Path, trainer: Trainer) -> None:
    """Write all that a run needs to go on after the step it has just taken; all ranks call it.

    Args:
        path: a directory that all ranks see; it is made.
        trainer: whose run.
    """
    learner = trainer.learner
    _save_tensors(path, learner)
    batches = list({id(batch): batch for batch in trainer.waiting}.values())
    numbers = {
        "step": trainer.step,
        "num_tokens": trainer.tokens_seen,
        "prompts": trainer.collector.prompts.state_dict(),
        "scheduler": learner.scheduler.state_dict(),
        "entropy_bonus": learner.entropy_bonus.state_dict(),
        "token_budget": learner.budget.state_dict(),
        "bad_steps": learner.bad_steps.state_dict(),
        "saver": trainer.saver.state_dict(),
        "before": trainer.before,
        "generation_metrics": trainer.generation_metrics,
        "taken": trainer.taken,
        "waiting": [[batch is one for one in batches].index(True) for batch in trainer.waiting],
    }

    def write() -> None:
        (path / _NUMBERS).write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
        save_batches(path / _BATCHES, batches)

    trainer.world.on_main(write)


def load_state(path: Path, trainer: Trainer) -> None:
    """Put a trainer where `save_state` has left one, maybe of another number of processes."""
    learner = trainer.learner
    _load_tensors(path, learner)
    numbers: dict[str, Any] = json.loads((path / _NUMBERS).read_text(encoding="utf-8"))
    trainer.step = trainer.sampler.state.global_step = numbers["step"]
    trainer.tokens_seen = numbers["num_tokens"]
    trainer.collector.prompts.load_state_dict(numbers["prompts"])
    learner.scheduler.load_state_dict(numbers["scheduler"])
    for group, rate in zip(
        learner.optimizer.param_groups, learner.scheduler.get_last_lr(), strict=True
    ):
        group["lr"] = rate
    learner.entropy_bonus.load_state_dict(numbers["entropy_bonus"])
    learner.budget.load_state_dict(numbers["token_budget"])
    learner.bad_steps.load_state_dict(numbers["bad_steps"])
    trainer.saver.load_state_dict(numbers["saver"])
    trainer.before = numbers["before"]
    trainer.generation_metrics = numbers["generation_metrics"]
    trainer.taken = numbers["taken"]
    batches = load_batches(path / _BATCHES, learner.policy.device)
    trainer.waiting = [batches[i] for i in numbers["waiting"]]
