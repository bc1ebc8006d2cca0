"""PyTorch as one writes it: all logits, log_softmax in fp32, autograd."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..cells import Inputs
from . import Method, torch_loss


def absent(device: str) -> str | None:
    return None


unavailable = absent


def logps_of(logits: Tensor, ids: Tensor) -> Tensor:
    return logits.float().log_softmax(-1).gather(-1, ids[..., None])[..., 0]


def linear(inputs: Inputs) -> Tensor:
    return torch_loss(logps_of(F.linear(inputs.hidden, inputs.weight), inputs.ids), inputs)


def from_logits(inputs: Inputs) -> Tensor:
    assert inputs.logits is not None
    return torch_loss(logps_of(inputs.logits, inputs.ids), inputs)


def logps(inputs: Inputs) -> Tensor:
    return logps_of(F.linear(inputs.hidden, inputs.weight), inputs.ids)


METHODS = [
    Method("naive", ("linear",), linear),
    Method("naive", ("logits",), from_logits),
    Method("naive", ("logps",), logps),
]
