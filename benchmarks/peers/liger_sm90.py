"""Liger's fused scaled cross-entropy for Hopper (CuTe-DSL), then a GRPO loss in torch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..cells import Inputs
from . import Method, missing, recomputes, torch_loss


def unavailable(device: str) -> str | None:
    if missing("liger_kernel", "cutlass"):
        return "not installed"  # cutlass: the package nvidia-cutlass-dsl
    if device != "cuda" or torch.cuda.get_device_capability() != (9, 0):
        return "failed: needs a GPU of compute capability 9.0"
    return None


def logps(inputs: Inputs) -> Tensor:
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import (
        LigerFusedLinearScaledCrossEntropyFunction,
    )

    hidden = inputs.hidden.view(-1, inputs.hidden.shape[-1])
    nll = LigerFusedLinearScaledCrossEntropyFunction.apply(
        hidden, inputs.weight, inputs.ids.view(-1), 1.0
    )
    return -(nll[0] if isinstance(nll, tuple) else nll).view(inputs.ids.shape)


METHODS = [
    Method("scaled_ce_sm90", ("linear",), lambda i: torch_loss(logps(i), i), recomputes),
    Method("scaled_ce_sm90", ("logps",), logps, recomputes),
]
