"""Liger's `LigerFusedLinearGRPOLoss`: chunks, gradients in the forward pass.

As a careful user sets it up. The batch in one piece: by itself it takes one sequence at a time, and
an fp32 gradient of the head for each; its own chunks of rows and of vocabulary bound the memory
either way. Not compiled: only the loss of (B, T) log-probs would be, and calling `torch.compile` at
each step costs more (12 ms a call instead of 2 on a CPU). TF32 for its products of gradients, which
are in fp32.
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


def unavailable(device: str) -> str | None:
    return missing("liger_kernel") or broken(_imports)


def _imports() -> Any:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    return LigerFusedLinearGRPOLoss


@functools.cache
def _loss(sequences: int) -> Any:
    return _imports()(
        beta=0.0,
        compiled=False,
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


def linear(inputs: Inputs) -> Tensor:
    with _tf32() if inputs.hidden.is_cuda else contextlib.nullcontext():
        loss, _metrics = _loss(len(inputs.ids))(
            inputs.hidden,
            inputs.weight,
            inputs.ids,
            inputs.mask.long(),
            inputs.advantages,
            old_per_token_logps=inputs.old_logps,
        )
    return loss


# `_ChunkedSelectiveLogProbFunction` computes the logits again in its backward, which is called in
# the forward pass, and leaves out the gradient of a frozen head.
METHODS = [Method("chunked", ("linear",), linear, recomputes)]
