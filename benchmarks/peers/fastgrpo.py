"""This package."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgrpo_kernels import grpo_loss, linear_grpo_loss, linear_logps
from fastgrpo_kernels._backend import chunk_rows_for, row_backend

from ..cells import Cell, Inputs
from . import CONFIG, Method


def absent(device: str) -> str | None:
    return None


unavailable = absent


def _arguments(inputs: Inputs) -> dict[str, Any]:
    names = {"completion_mask": inputs.mask, "old_logps": inputs.old_logps, "config": CONFIG}
    return {"completion_ids": inputs.ids, "advantages": inputs.advantages, **names}


def linear(inputs: Inputs, **options: Any) -> Tensor:
    return linear_grpo_loss(inputs.hidden, inputs.weight, **_arguments(inputs), **options).loss


def from_logits(inputs: Inputs) -> Tensor:
    assert inputs.logits is not None
    return grpo_loss(inputs.logits, **_arguments(inputs), inplace=True).loss


def logps(inputs: Inputs) -> Tensor:
    return linear_logps(inputs.hidden, inputs.weight, inputs.ids, mask=inputs.mask)[0]


def chunk_rows(cell: Cell, device: str) -> int:
    """Ask how many rows the single pass takes at a time."""
    dtype = getattr(torch, cell.dtype)
    return chunk_rows_for(
        None,
        num_rows=cell.N,
        hidden_size=cell.H,
        vocabulary=cell.V,
        dtype=dtype,
        logits_dtype=dtype,
        device=torch.device(device),
        backend=row_backend("auto", torch.device(device), dtype),
        with_weight_gradient=cell.op == "linear" and not cell.frozen,
    )


METHODS = [
    Method(
        "single_pass",
        ("linear",),
        lambda inputs: linear(inputs, method="single_pass"),
        chunk_rows=chunk_rows,
    ),
    Method("recompute", ("linear",), lambda inputs: linear(inputs, method="recompute")),
    Method("logits", ("logits",), from_logits),
    Method("logps", ("logps",), logps, chunk_rows=chunk_rows),
]
