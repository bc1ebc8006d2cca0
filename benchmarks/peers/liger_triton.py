"""Liger's `triton_grpo_loss`: from logits, which it overwrites with their gradient."""

from __future__ import annotations

from torch import Tensor

from ..cells import Inputs
from . import Method, missing


def unavailable(device: str) -> str | None:
    return missing("liger_kernel") or (None if device == "cuda" else "failed: needs a GPU")


def from_logits(inputs: Inputs) -> Tensor:
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    loss, _ = triton_grpo_loss(
        inputs.logits,
        inputs.old_logps,
        None,
        inputs.ids,
        inputs.advantages,
        inputs.mask.long(),
        temperature=1.0,
        beta=0.0,
        eps_low=0.2,
        eps_high=0.28,
        inplace=True,
        loss_type="dapo",
        reduce=True,
    )
    return loss


METHODS = [Method("triton_grpo_loss", ("logits",), from_logits, extra_position=True)]
