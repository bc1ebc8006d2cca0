"""What the fused loss needs for a moment, beyond what it keeps: its formulas are the kernels'.

`kernels/README.md` derives them. N tokens, C rows of a chunk, H hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastgrpo_kernels import _recompute, _row_torch

from .passes import LossKind

MIB = 2**20
_SLICE = 16 * MIB  # elements of a gradient that backward scales at a time


@dataclass(frozen=True)
class LossShape:
    """The loss of a model, on a device of some memory."""

    hidden_size: int
    vocabulary: int
    dtype: torch.dtype
    """Of its products."""
    weight_dtype: torch.dtype
    """Of the head."""
    trains_head: bool
    on_gpu: bool
    total_memory: int
    """Of the device."""

    def kind(self, rows: int) -> LossKind:
        """Return what the loss of some counted tokens keeps between forward and backward."""
        sum_bytes = 4 * self.vocabulary * self.hidden_size
        alone = self.weight_dtype == self.dtype == torch.bfloat16 and rows <= self.chunk_rows(rows)
        return LossKind(
            dtype=self.dtype,
            sum_dtype=torch.bfloat16 if alone else torch.float32,
            recompute=self.on_gpu and self.trains_head and sum_bytes > self.total_memory // 8,
        )

    def forward(self, tokens: int, rows: int, *, with_gradient: bool = True) -> int:
        """Return the bytes of a forward pass over some tokens, of which `rows` are counted."""
        per_token = 32 * tokens  # results, masks, the order of the rows
        if with_gradient and self.kind(rows).recompute:
            return per_token + _recompute.TILE_BYTES
        count, size = self.chunk_rows(rows, with_gradient=with_gradient), self.dtype.itemsize
        wide = 4 if self.on_gpu else size  # the product that makes the gradient of hidden states
        chunk = count * (self.vocabulary * size + self.hidden_size * (size + wide))
        if not self.on_gpu:  # two fp32 matrices of a slab, of the four there may be with a softcap
            slab = _row_torch.temporary_bytes(torch.device("cpu")) // 4
            chunk += 2 * min(slab, 4 * count * self.vocabulary)
        return per_token + chunk

    def backward(self, tokens: int, rows: int) -> int:
        """Return the bytes of a backward pass, beyond the gradients themselves."""
        if self.kind(rows).recompute:
            return 4 * tokens * self.hidden_size + _recompute.TILE_BYTES
        largest = max(tokens, self.vocabulary * self.trains_head) * self.hidden_size
        return 4 * min(largest, _SLICE)

    def chunk_rows(self, rows: int, *, with_gradient: bool = True) -> int:
        """Return how many rows have logits at once, as `chunk_rows_for` of the kernels does."""
        budget = 256 * MIB
        if self.on_gpu and self.trains_head and with_gradient:
            budget = min(max(self.total_memory // 32, budget), 4096 * MIB)
        if not self.on_gpu:
            budget -= _row_torch.temporary_bytes(torch.device("cpu"))
        size = self.dtype.itemsize
        row = self.vocabulary * size + self.hidden_size * (size + 4)
        fitting = budget // row
        return max(1, min(fitting - fitting % 16 if fitting >= 16 else fitting, max(rows, 1)))
