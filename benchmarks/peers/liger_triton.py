"""Liger's `triton_grpo_loss`: from logits, which it overwrites with their gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..cells import Inputs
from . import CONFIG, Method, broken, missing, needs_gpu


def absent(device: str) -> str | None:
    return missing("liger_kernel") or needs_gpu(device)


def unavailable(device: str) -> str | None:
    return absent(device) or broken(_imports)


def _imports() -> Callable[..., Any]:
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    return triton_grpo_loss


def from_logits(inputs: Inputs) -> Tensor:
    loss, _metrics = _imports()(
        inputs.logits,
        inputs.old_logps,
        None,  # no reference policy
        inputs.ids,
        inputs.advantages,
        inputs.mask.long(),
        temperature=1.0,
        beta=0.0,
        eps_low=CONFIG.epsilon_low,
        eps_high=CONFIG.epsilon_high,
        inplace=True,
        loss_type="dapo",
        reduce=True,
    )
    return loss


METHODS = [
    Method(
        "triton_grpo_loss", ("logits",), from_logits, lambda cell: 0, extra_position=True
    ),
]  # fmt: skip
