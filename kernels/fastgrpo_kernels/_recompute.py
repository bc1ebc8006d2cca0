"""The loss with the least memory: logits by slices of the vocabulary, and again in backward.

8NHV. A slice of the head's gradient is finished before the next begins and goes to its place in the
weight's own type: there is no fp32 tensor of the size of the head. What remains is one fp32 sum of
the gradient of the hidden states, and tiles.

N tokens, C rows of a tile, S columns of a tile, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from ._autograd import once_differentiable
from ._backend import MIB
from ._head import Chunk, Head, early_and_late
from ._inputs import TokenBatch
from ._plan import RowPlan, Run, pieces
from ._products import add_product
from ._reduce import RowResults, Statistics
from .config import GRPOLossConfig

TILE_BYTES = 88 * MIB
"""All that a tile needs: its logits, hidden states, slice of the head's gradient, temporaries."""


class Recompute:
    """What the forward pass finds, and how the backward pass makes the gradients."""

    def __init__(
        self,
        head: Head,
        batch: TokenBatch,
        plan: RowPlan,
        config: GRPOLossConfig,
        chunk_rows: int | None,
        row_step: ModuleType,
        grad_buffer: Tensor | None = None,
        grad_scale: float = 1.0,
        known: Statistics | None = None,
    ) -> None:
        self.head, self.batch, self.plan, self.config = head, batch, plan, config
        self.row_step, self.grad_buffer, self.grad_scale = row_step, grad_buffer, grad_scale
        temporary_bytes = row_step.temporary_bytes(head.device)
        self.shape = tile_shape(head, plan.num_computed, chunk_rows, temporary_bytes)
        self.kept_N = None if plan.skips else batch.mask_N
        self.rows = RowResults.zeros(batch, head.accumulator_dtype)
        self.found = self._statistics() if known is None else known
        # Copies: those returned are the caller's, to do with as he likes.
        self.rows.logps_N, self.rows.entropy_N = (
            x.clone() for x in (self.found.logps_N, self.found.entropy_N)
        )
        self.dlogps_N = torch.zeros_like(self.rows.logps_N) if head.wants_gradient else None
        row_step.objective_rows(batch, self.rows, config, self.dlogps_N)

    def _statistics(self) -> Statistics:
        """Know the log-probs: the forward pass, unless a graph has kept what was found in it."""
        batch = self.batch
        found = Statistics.beside(self.rows.logps_N, self.rows.entropy_N, in_parts=True)
        for columns, tile in self._tiles((0, self.plan.num_computed)):
            self.row_step.statistics_rows(
                tile.logits_CV, tile.tokens, batch.ids_N, batch.mask_N, self.config, found,
                columns[0], columns[1] == self.head.vocabulary,
            )  # fmt: skip
        return Statistics(*found.tensors())

    def gradients(self, upstream: Tensor, dtypes: list[torch.dtype | None]) -> list[Tensor | None]:
        """Return the gradients of hidden states, weight and bias in the given types."""
        head, batch = self.head, self.batch
        early, power = early_and_late(upstream / batch.denominator)
        weight_N = batch.entropy_weight_N
        dentropy_N = None if weight_N is None else -weight_N
        run = self.plan.gradient

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, device=head.device, dtype=head.accumulator_dtype)

        dhidden_KH = zeros(run[1], head.hidden_size) if head.needs_hidden else None
        dweight_VH = dbias_V = None
        if head.needs_weight and self.grad_buffer is None:
            dweight_VH = torch.empty_like(
                head.weight, dtype=dtypes[1], memory_format=torch.contiguous_format
            )
        if head.needs_bias:
            dbias_V = zeros(head.vocabulary)
        buffers = head.buffers(self.shape[0] * self.shape[1])
        sum_dtype = head.accumulator_dtype
        # A GPU may split a product this small along its inner dimension and add up the parts in
        # bf16; and a buffer would round the slice a second time.
        if dweight_VH is not None and head.device.type == "cpu":
            sum_dtype = head.sum_dtype(-(-run[1] // self.shape[0]), dweight_VH.dtype)
        for columns in pieces((0, head.vocabulary), self.shape[1]):
            part = slice(*columns)
            dweight_SH = None
            if head.needs_weight:
                shape = columns[1] - columns[0], head.hidden_size
                dweight_SH = torch.zeros(shape, device=head.device, dtype=sum_dtype)
            for run_C, tile in self._rows_of(run, columns, buffers):
                self.row_step.dlogits_rows(
                    tile.logits_CV, tile.dlogits_CV, tile.tokens, batch.ids_N, batch.mask_N,
                    self.config, self.found, self.dlogps_N, dentropy_N, early, columns[0],
                )  # fmt: skip
                if dhidden_KH is not None:
                    add_product(dhidden_KH[slice(*run_C)], tile.dlogits_CV, head.weight[part])
                if dweight_SH is not None:
                    add_product(dweight_SH, tile.dlogits_CV.t(), tile.hidden_CH)
                if dbias_V is not None:
                    dbias_V[part] += tile.dlogits_CV.sum(0, dtype=dbias_V.dtype)
            if dweight_SH is not None and dweight_VH is not None:
                dweight_VH[part] = dweight_SH.mul_(power)
            elif dweight_SH is not None and self.grad_buffer is not None:
                self.grad_buffer[part] += dweight_SH.mul_(power * self.grad_scale)
        dbias = None if dbias_V is None else dbias_V.mul_(power).to(dtypes[2])
        return [self._in_place(dhidden_KH, power, dtypes[0]), dweight_VH, dbias]

    def _in_place(
        self, dhidden_KH: Tensor | None, power: Tensor, dtype: torch.dtype | None
    ) -> Tensor | None:
        """Return the gradient of all hidden states, from that of the rows in their order."""
        if dhidden_KH is None:
            return None
        dhidden_KH *= power
        shape, order_N = self.head.hidden.shape, self.plan.order_N
        if order_N is None and len(dhidden_KH) == self.batch.layout.num_tokens:
            return dhidden_KH.view(shape).to(dtype)
        dhidden = torch.zeros(shape, device=dhidden_KH.device, dtype=dtype)
        dhidden_NH = dhidden.view(-1, shape[-1])
        for run in pieces((0, len(dhidden_KH)), self.shape[0]):
            tokens = slice(*run) if order_N is None else order_N[slice(*run)]
            dhidden_NH[tokens] = dhidden_KH[slice(*run)].to(dtype)
        return dhidden

    def _tiles(self, run: Run) -> Iterator[tuple[Run, Chunk]]:
        buffers = self.head.buffers(self.shape[0] * self.shape[1])
        for columns in pieces((0, self.head.vocabulary), self.shape[1]):
            for _, tile in self._rows_of(run, columns, buffers):
                yield columns, tile

    def _rows_of(
        self, run: Run, columns: Run, buffers: tuple[Tensor, Tensor]
    ) -> Iterator[tuple[Run, Chunk]]:
        for piece in pieces(run, self.shape[0]):
            yield piece, self.head.chunk(piece, self.plan.order_N, buffers, columns, self.kept_N)


def tile_shape(
    head: Head, num_rows: int, chunk_rows: int | None, temporary_bytes: int
) -> tuple[int, int]:
    """Return rows and columns of a tile such that all it needs stays within `TILE_BYTES`.

    The row step's temporaries have their share. Rows are as many as leave room for 1,024 columns,
    since each pass over the rows re-reads them; fewer columns where the hidden size is such that
    they would take more than half of the tile.
    """
    wide, narrow = head.accumulator_dtype.itemsize, head.dtype.itemsize
    budget = TILE_BYTES - temporary_bytes
    per_logit = head.logits_dtype.itemsize
    per_logit += narrow if head.logits_dtype != head.dtype else 0
    # Hidden states of the rows, and beside them those of the tile before, if rows are gathered, or
    # the converted ones that the CPU's products need.
    per_row = head.hidden_size * (narrow + wide)
    per_column = head.hidden_size * (wide + (wide if narrow < wide else 0))
    columns = _power_of_two(min(1024, budget // 2 // per_column))
    if chunk_rows is None:
        rows = (budget - columns * per_column) // (per_row + columns * per_logit)
        chunk_rows = max(1, min(rows, num_rows))
    columns = (budget - chunk_rows * per_row) // (per_column + chunk_rows * per_logit)
    return min(chunk_rows, max(num_rows, 1)), min(_power_of_two(columns), head.vocabulary)


def _power_of_two(columns: int) -> int:
    """Round down, to 16 at least: kernels are compiled for a width, and these are few."""
    return max(16, 1 << (max(columns, 1).bit_length() - 1))


class RecomputedGradients(torch.autograd.Function):
    """A loss whose gradients are made when they are asked for."""

    @staticmethod
    def forward(ctx, loss, hidden, weight, bias, call):
        # Autograd frees what is saved after backward, and notices if somebody overwrites it.
        ctx.save_for_backward(*call.head.release(), call.batch.ids_N)
        ctx.call = call
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        *tensors, ids_N = ctx.saved_tensors
        device = ids_N.device.type
        with ctx.call.head.holding(*tensors), torch.autocast(device, enabled=False):
            return None, *ctx.call.gradients(upstream, ctx.dtypes), None
