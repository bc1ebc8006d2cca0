"""Liger's `LigerFusedLinearGRPOLoss`: sequences one by one, gradients in the forward pass."""

from __future__ import annotations

import functools
import shutil
from typing import Any

from torch import Tensor

from ..cells import Inputs
from . import Method, missing


def unavailable(device: str) -> str | None:
    return missing("liger_kernel")


@functools.cache
def _loss(compiled: bool) -> Any:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    return LigerFusedLinearGRPOLoss(
        beta=0.0,
        compiled=compiled,
        use_ref_model=False,
        epsilon_low=0.2,
        epsilon_high=0.28,
        loss_type="dapo",
        temperature=1.0,
    )


def linear(inputs: Inputs) -> Tensor:
    # Its compiled form needs a C++ compiler on a CPU; it is the default, so it is what is measured.
    compiled = inputs.hidden.is_cuda or bool(shutil.which("g++"))
    loss, _ = _loss(compiled)(
        inputs.hidden,
        inputs.weight,
        inputs.ids,
        inputs.mask.long(),
        inputs.advantages,
        old_per_token_logps=inputs.old_logps,
    )
    return loss


METHODS = [Method("chunked", ("linear",), linear, lambda cell: 3 if cell.frozen else 4)]
