"""Liger's fused scaled cross-entropy for Hopper (CuTe-DSL), then a GRPO loss in torch."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..cells import Inputs
from . import Method, broken, missing, needs_gpu, recomputes_always, torch_loss

CAPABILITY = (9, 0)


def absent(device: str) -> str | None:
    return missing("liger_kernel", "cutlass") or needs_gpu(device)  # cutlass: nvidia-cutlass-dsl


def unavailable(device: str) -> str | None:
    return absent(device) or _other_gpu() or broken(_kernels)


def _other_gpu() -> str | None:
    # On other devices the same call is answered by chunked PyTorch.
    found = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    wanted = "failed: needs a GPU of compute capability {}.{}".format(*CAPABILITY)
    return None if found == CAPABILITY else wanted


def _kernels() -> None:
    from liger_kernel.ops.cutedsl.ops import fused_scaled_cross_entropy_sm90  # noqa: F401


def _imports() -> Callable[..., Any]:
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import (
        LigerFusedLinearScaledCrossEntropyFunction,
    )

    return LigerFusedLinearScaledCrossEntropyFunction.apply


def logps(inputs: Inputs) -> Tensor:
    # By itself it asks the device at every call whether the targets are in range.
    os.environ.setdefault("LIGER_SCALED_CE_SM90_VALIDATE_TARGETS", "0")
    hidden = inputs.hidden.view(-1, inputs.hidden.shape[-1])
    nll = _imports()(hidden, inputs.weight, inputs.ids.view(-1), temperature=1.0)
    return -nll.view(inputs.ids.shape)


# One kernel writes dX and dW (`fused_backward_one_kernel`); nothing asks whether dW is wanted.
METHODS = [
    Method(
        "scaled_ce_sm90",
        ("linear",),
        lambda inputs: torch_loss(logps(inputs), inputs),
        recomputes_always,
    ),
    Method("scaled_ce_sm90", ("logps",), logps, recomputes_always),
]
