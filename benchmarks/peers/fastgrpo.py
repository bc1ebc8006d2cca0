"""This package."""

from __future__ import annotations

from torch import Tensor

from fastgrpo_kernels import grpo_loss, linear_grpo_loss, linear_logps

from ..cells import Inputs
from . import CONFIG, Method


def unavailable(device: str) -> str | None:
    return None


def linear(inputs: Inputs, **options: str) -> Tensor:
    return linear_grpo_loss(
        inputs.hidden,
        inputs.weight,
        inputs.ids,
        inputs.advantages,
        completion_mask=inputs.mask,
        old_logps=inputs.old_logps,
        config=CONFIG,
        **options,  # pyright: ignore[reportArgumentType]
    ).loss


def from_logits(inputs: Inputs) -> Tensor:
    assert inputs.logits is not None
    return grpo_loss(
        inputs.logits,
        inputs.ids,
        inputs.advantages,
        completion_mask=inputs.mask,
        old_logps=inputs.old_logps,
        config=CONFIG,
        inplace=True,
    ).loss


def logps(inputs: Inputs) -> Tensor:
    return linear_logps(inputs.hidden, inputs.weight, inputs.ids, mask=inputs.mask)[0]


METHODS = [
    Method("single_pass", ("linear",), lambda inputs: linear(inputs, method="single_pass")),
    Method("recompute", ("linear",), lambda inputs: linear(inputs, method="recompute")),
    Method("logits", ("logits",), from_logits),
    Method("logps", ("logps",), logps),
]
