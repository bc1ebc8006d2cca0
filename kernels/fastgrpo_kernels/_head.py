"""The LM head of a call: its logits a chunk at a time, and its gradients as chunks add them up.

N tokens, C rows of a chunk, K counted rows, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import ModuleType

import torch
from torch import Tensor

from ._backend import MIB, chunk_rows_for
from ._inputs import ACTIVE, MASKED, TokenBatch, check_tensor
from ._layout import check_device, same_tokens

Tokens = int | Tensor  # the first token of a run of them, or their indices


class RowPlan:
    """The order in which rows are computed: with a gradient, then for their statistics only."""

    def __init__(
        self, batch: TokenBatch, wants_gradient: bool, statistics: str, skip_rows: bool
    ) -> None:
        state_N = batch.state_N
        total = len(state_N)
        self.order_N: Tensor | None = None
        capturing = state_N.is_cuda and torch.cuda.is_current_stream_capturing()
        self.skips_masked = skip_rows and not capturing
        if not self.skips_masked:
            self.num_gradient, self.num_computed = total if wants_gradient else 0, total
            return
        counts = torch.stack([(state_N == ACTIVE).sum(), (state_N != MASKED).sum()])
        num_active, num_counted = counts.tolist()  # the one host synchronisation
        self.num_gradient = num_active if wants_gradient else 0
        self.num_computed = num_active if statistics == "active" else num_counted
        if self.num_computed < total or 0 < self.num_gradient < total:
            order_N = state_N.argsort(descending=True, stable=True)
            self.order_N = order_N.to(batch.ids_N.device, non_blocking=True)

    @property
    def parts(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Rows with a gradient, and rows without, in the order of `order_N`."""
        return (0, self.num_gradient), (self.num_gradient, self.num_computed)


class Head:
    """Hidden states and LM head of a call, checked, and the chunks of their logits."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor | None,
        needs_gradient: tuple[bool, ...] | None = None,
    ) -> None:
        if ids is not None:
            check_tensor(hidden=hidden, weight=weight, ids=ids)
            if torch.is_autocast_enabled(hidden.device.type):
                dtype = torch.get_autocast_dtype(hidden.device.type)
                hidden, weight = _as_autocast(hidden, dtype), _as_autocast(weight, dtype)
                bias = None if bias is None else _as_autocast(bias, dtype)
            _check_head(hidden, weight, bias, ids)
        self.hidden, self.weight, self.bias = hidden, weight, bias
        self.hidden_size, self.vocabulary = hidden.shape[-1], weight.shape[0]
        self.dtype, self.device = hidden.dtype, hidden.device
        self.accumulator_dtype = torch.promote_types(hidden.dtype, torch.float32)
        if needs_gradient is None:
            enabled = torch.is_grad_enabled()
            needs_gradient = tuple(
                enabled and x is not None and x.requires_grad for x in (hidden, weight, bias)
            )
        self.needs_hidden, self.needs_weight, self.needs_bias = needs_gradient
        self.wants_gradient = any(needs_gradient)

    def chunk_rows(self, chunk_rows: int | None, num_rows: int, row_step: ModuleType) -> int:
        return chunk_rows_for(
            chunk_rows,
            num_rows=num_rows,
            hidden_size=self.hidden_size,
            vocabulary=self.vocabulary,
            dtype=self.dtype,
            device=self.device,
            backend=row_step,
            with_weight_gradient=self.needs_weight,
        )

    def chunks(
        self,
        parts: Sequence[tuple[int, int]],
        order_N: Tensor | None,
        chunk: int,
        kept_N: Tensor | None = None,
    ) -> Iterator[tuple[int, Tokens, Tensor, Tensor]]:
        """Yield part, tokens, hidden states and logits (in one reused buffer) of each chunk.

        Args:
            parts: from where to where to go through the rows; no chunk is in two parts.
            order_N: the order of the rows; None: as they are.
            chunk: rows of a chunk.
            kept_N: bool; the hidden states of the other rows are taken for 0.
        """
        buffer_CV = torch.empty(chunk, self.vocabulary, device=self.device, dtype=self.dtype)
        for part, (start, end) in enumerate(parts):
            for first in range(start, end, chunk):
                last = min(first + chunk, end)
                tokens = first if order_N is None else order_N[first:last]
                hidden_CH = self._rows(tokens, last - first)
                if kept_N is not None:
                    hidden_CH = hidden_CH.masked_fill(~kept_N[first:last, None], 0)
                logits_CV = buffer_CV[: last - first]
                if self.bias is None:
                    torch.mm(hidden_CH, self.weight.t(), out=logits_CV)
                else:
                    torch.addmm(self.bias, hidden_CH, self.weight.t(), out=logits_CV)
                yield part, tokens, hidden_CH, logits_CV

    def _rows(self, tokens: Tokens, count: int) -> Tensor:
        """Return the hidden states of some tokens without a copy of all of them."""
        hidden = self.hidden
        if hidden.dim() == 2 or hidden.is_contiguous():
            hidden_NH = hidden.view(-1, self.hidden_size) if hidden.dim() == 3 else hidden
            if isinstance(tokens, int):
                return hidden_NH[tokens : tokens + count]
            return hidden_NH.index_select(0, tokens)
        if isinstance(tokens, int):
            tokens = torch.arange(tokens, tokens + count, device=self.device)
        length = hidden.shape[1]
        return hidden[tokens // length, tokens % length]


class HeadGradients:
    """What the chunks add up to; only what is wanted exists."""

    def __init__(self, head: Head, scale: Tensor | None) -> None:
        self.head = head
        self.scale = scale  # of dhidden, applied in fp32 before it is rounded

        def zeros(*shape: int, dtype: torch.dtype = head.accumulator_dtype) -> Tensor:
            return torch.zeros(shape, device=head.device, dtype=dtype)

        self.dhidden = zeros(*head.hidden.shape, dtype=head.dtype) if head.needs_hidden else None
        self.dweight_VH = zeros(*head.weight.shape) if head.needs_weight else None
        self.dbias_V = zeros(head.vocabulary) if head.needs_bias else None

    def add(self, tokens: Tokens, dlogits_CV: Tensor, hidden_CH: Tensor) -> None:
        if self.dhidden is not None:
            dhidden_CH = _product(dlogits_CV, self.head.weight, self.head.accumulator_dtype)
            if self.scale is not None:
                dhidden_CH *= self.scale
            dhidden_NH = self.dhidden.view(-1, self.head.hidden_size)
            if isinstance(tokens, int):
                dhidden_NH[tokens : tokens + len(dhidden_CH)] = dhidden_CH
            else:
                dhidden_NH[tokens] = dhidden_CH.to(self.head.dtype)
        if self.dweight_VH is not None:
            _add_product(self.dweight_VH, dlogits_CV.t(), hidden_CH)
        if self.dbias_V is not None:
            self.dbias_V += dlogits_CV.sum(0, dtype=self.dbias_V.dtype)


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a @ b, accumulated and returned in `dtype`."""
    if a.dtype == dtype:
        return torch.mm(a, b)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=dtype)
    result = torch.zeros(a.shape[0], b.shape[1], dtype=dtype, device=a.device)
    step = _slice_rows(a.shape[0] + b.shape[1], dtype)
    for first in range(0, a.shape[1], step):
        part = slice(first, first + step)
        torch.addmm(result, a[:, part].to(dtype), b[part].to(dtype), out=result)
    return result


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to `total`, rounded once to its type."""
    if a.dtype == total.dtype:
        torch.addmm(total, a, b, out=total)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        # The CPU has no product of 16-bit matrices with an fp32 result: convert slice by slice.
        b = b.to(total.dtype)
        step = _slice_rows(a.shape[1], total.dtype)
        for first in range(0, a.shape[0], step):
            part = slice(first, first + step)
            torch.addmm(total[part], a[part].to(total.dtype), b, out=total[part])


def _slice_rows(width: int, dtype: torch.dtype) -> int:
    """Return how many rows of `width` make 32 MiB."""
    return max(1, 32 * MIB // (max(width, 1) * dtype.itemsize))


def scaled(gradient: Tensor | None, scale: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return gradient * scale, multiplied in fp32 and rounded once to `dtype`, slice by slice."""
    if gradient is None or (scale is None and gradient.dtype == dtype):
        return gradient
    result = torch.empty_like(gradient, dtype=dtype, memory_format=torch.contiguous_format)
    wide = torch.promote_types(gradient.dtype, torch.float32)
    flat, out = gradient.view(-1), result.view(-1)
    step = 16 * MIB
    for first in range(0, len(flat), step):
        part = flat[first : first + step].to(wide)
        out[first : first + step] = part if scale is None else part * scale
    return result


def _as_autocast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert as `F.linear` does under autocast: float64 stays."""
    return x if x.dtype == torch.float64 else x.to(dtype)


def _check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor) -> None:
    if hasattr(weight, "full_tensor"):
        raise NotImplementedError(
            "weight is a DTensor, which is not built yet: pass "
            "weight.full_tensor(grad_placements=[Partial('avg')])"
        )
    if weight.dim() != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"weight must be (V, {hidden.shape[-1]}) for hidden states {tuple(hidden.shape)}, "
            f"got {tuple(weight.shape)}"
        )
    if not same_tokens(hidden.shape[:-1], ids.shape):
        raise ValueError(
            f"hidden must be {(*ids.shape, 'H')} for ids {tuple(ids.shape)}, "
            f"got {tuple(hidden.shape)}"
        )
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"bias must be ({weight.shape[0]},), got {tuple(bias.shape)}")
    check_device(hidden.device, weight=weight, bias=bias)
    if not hidden.is_floating_point() or weight.dtype != hidden.dtype:
        raise ValueError(
            f"hidden and weight must be of one floating-point type, got {hidden.dtype} and "
            f"{weight.dtype}: convert one, or call under autocast"
        )
    if bias is not None and bias.dtype != hidden.dtype:
        raise ValueError(f"bias must be {hidden.dtype} as hidden is, got {bias.dtype}")
