"""Liger's `LigerFusedLinearGRPOLoss`: gradients in the forward pass, by chunks.

`default` is what one gets: compiled, one sequence at a time. `tuned` is what measures best: the
batch in one piece (its own chunks of rows and of vocabulary bound the memory either way, and there
is one fp32 gradient of the head instead of one a sequence), not compiled, and on a GPU TF32 for its
products of gradients, which are in fp32.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..cells import Inputs
from . import CONFIG, Method, broken, missing, recomputes


def absent(device: str) -> str | None:
    return missing("liger_kernel")


def unavailable(device: str) -> str | None:
    return absent(device) or broken(_imports)


def _imports() -> Any:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    return LigerFusedLinearGRPOLoss


@functools.cache
def _loss(sequences: int, compiled: bool) -> Any:
    return _imports()(
        beta=0.0,
        compiled=compiled,
        use_ref_model=False,
        chunk_size=sequences,
        epsilon_low=CONFIG.epsilon_low,
        epsilon_high=CONFIG.epsilon_high,
        loss_type="dapo",
        temperature=1.0,
    )


@contextlib.contextmanager
def _tf32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def linear(inputs: Inputs, *, sequences: int = 1, compiled: bool = True) -> Tensor:
    loss, _metrics = _loss(sequences, compiled)(
        inputs.hidden,
        inputs.weight,
        inputs.ids,
        inputs.mask.long(),
        inputs.advantages,
        old_per_token_logps=inputs.old_logps,
    )
    return loss


def tuned(inputs: Inputs) -> Tensor:
    with _tf32() if inputs.hidden.is_cuda else contextlib.nullcontext():
        return linear(inputs, sequences=len(inputs.ids), compiled=False)


# `_ChunkedSelectiveLogProbFunction` computes the logits again in its backward, which is called in
# the forward pass, and leaves out the gradient of a frozen head.
METHODS = [
    Method("default", ("linear",), linear, recomputes),
    Method("tuned", ("linear",), tuned, recomputes),
]
