"""The same PyTorch through `torch.compile`."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable

import torch
from torch import Tensor

from ..cells import Inputs
from . import Method, naive, torch_loss


def absent(device: str) -> str | None:
    if device == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
        return "failed: torch.compile needs a C++ compiler on a CPU"
    return None


unavailable = absent


def _loss(rows: Tensor, weight: Tensor | None, inputs: Inputs) -> Tensor:
    logits = torch.nn.functional.linear(rows, weight) if weight is not None else rows
    return torch_loss(naive.logps_of(logits, inputs.ids), inputs)


@functools.lru_cache(maxsize=1)
def _compiled(*cell: object) -> Callable[..., Tensor]:
    """Compile for one cell, from scratch: a ninth shape would silently run uncompiled."""
    torch._dynamo.reset()
    return torch.compile(_loss, dynamic=False, fullgraph=True)


def _run(rows: Tensor, weight: Tensor | None, inputs: Inputs) -> Tensor:
    frozen = weight is not None and not weight.requires_grad
    of_weight = None if weight is None else weight.shape
    return _compiled(rows.shape, rows.dtype, of_weight, frozen)(rows, weight, inputs)


def linear(inputs: Inputs) -> Tensor:
    return _run(inputs.hidden, inputs.weight, inputs)


def from_logits(inputs: Inputs) -> Tensor:
    assert inputs.logits is not None
    return _run(inputs.logits, None, inputs)


METHODS = [
    Method("compiled", ("linear",), linear, lambda cell: cell.products),
    Method("compiled", ("logits",), from_logits, lambda cell: 0),
]
