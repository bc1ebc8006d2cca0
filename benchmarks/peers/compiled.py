"""The same PyTorch through `torch.compile`."""

from __future__ import annotations

import functools
import shutil

import torch
from torch import Tensor

from ..cells import Inputs
from . import Method, naive, torch_loss


def unavailable(device: str) -> str | None:
    if device == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
        return "failed: torch.compile needs a C++ compiler on a CPU"
    return None


@functools.cache
def _compiled(with_head: bool):
    def loss(rows: Tensor, weight: Tensor | None, inputs: Inputs) -> Tensor:
        logits = torch.nn.functional.linear(rows, weight) if weight is not None else rows
        return torch_loss(naive.logps_of(logits, inputs.ids), inputs)

    return torch.compile(loss, dynamic=False)


def linear(inputs: Inputs) -> Tensor:
    return _compiled(True)(inputs.hidden, inputs.weight, inputs)


def from_logits(inputs: Inputs) -> Tensor:
    return _compiled(False)(inputs.logits, None, inputs)


METHODS = [
    Method("compiled", ("linear",), linear, lambda cell: cell.products),
    Method("compiled", ("logits",), from_logits, lambda cell: 0),
]
