"""The LM head of a call: its logits a chunk at a time, and its gradients as chunks add them up.

N tokens, C rows of a chunk, K counted rows, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from ._backend import chunk_rows_for
from ._checks import check_tensor
from ._layout import check_device, same_tokens
from ._plan import Run
from ._products import add_product, product, product_into
from ._sharding import gathered

Tokens = int | Tensor  # the first token of a run of them, or their indices


class Chunk(NamedTuple):
    """Rows whose logits exist, and where their gradient may be written."""

    tokens: Tokens
    hidden_CH: Tensor
    logits_CV: Tensor
    dlogits_CV: Tensor  # the memory of logits_CV, unless the logits are wider than the gradient


class Head:
    """Hidden states and LM head of a call, checked, and the chunks of their logits."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        fp32_logits: bool = False,
    ) -> None:
        check_tensor(hidden=hidden, weight=weight, ids=ids)
        weight, bias = gathered(weight), gathered(bias)
        self.leaves = hidden, weight, bias  # in their own types: what gradients are returned to
        if torch.is_autocast_enabled(hidden.device.type):
            dtype = torch.get_autocast_dtype(hidden.device.type)
            hidden, weight = _as_autocast(hidden, dtype), _as_autocast(weight, dtype)
            bias = None if bias is None else _as_autocast(bias, dtype)
        _check_head(hidden, weight, bias, ids)
        self.hidden, self.weight, self.bias = hidden, weight, bias
        self.hidden_size, self.vocabulary = hidden.shape[-1], weight.shape[0]
        self.dtype, self.device = hidden.dtype, hidden.device
        self.accumulator_dtype = torch.promote_types(hidden.dtype, torch.float32)
        self.logits_dtype = self.accumulator_dtype if fp32_logits else self.dtype
        enabled = torch.is_grad_enabled()
        self.needs_hidden = enabled and hidden.requires_grad
        self.needs_weight = enabled and weight.requires_grad
        self.needs_bias = enabled and bias is not None and bias.requires_grad

    @property
    def wants_gradient(self) -> bool:
        return self.needs_hidden or self.needs_weight or self.needs_bias

    def release(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Hand out the tensors and keep none: who waits for a backward pass saves them there."""
        tensors = self.hidden, self.weight, self.bias
        del self.hidden, self.weight, self.bias, self.leaves
        return tensors

    @contextmanager
    def holding(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Generator[None]:
        """Have the tensors back for a while."""
        self.hidden, self.weight, self.bias = self.leaves = hidden, weight, bias
        try:
            yield
        finally:
            self.release()

    def sum_dtype(self, num_products: int, goal: torch.dtype) -> torch.dtype:
        """Return the type in which products that make up a gradient of type `goal` are added up.

        One bf16 product is rounded once, as it would be from fp32, whose range it has.
        """
        alone = num_products == 1 and self.dtype == goal == torch.bfloat16
        return goal if alone else self.accumulator_dtype

    def chunk_rows(self, chunk_rows: int | None, num_rows: int, row_step: ModuleType) -> int:
        return chunk_rows_for(
            chunk_rows,
            num_rows=num_rows,
            hidden_size=self.hidden_size,
            vocabulary=self.vocabulary,
            dtype=self.dtype,
            logits_dtype=self.logits_dtype,
            device=self.device,
            backend=row_step,
            with_weight_gradient=self.needs_weight,
        )

    def buffers(self, size: int) -> tuple[Tensor, Tensor]:
        """Make room for `size` logits and for their gradient, the same if both have one type."""
        logits = torch.empty(size, device=self.device, dtype=self.logits_dtype)
        if self.logits_dtype == self.dtype or not self.wants_gradient:
            return logits, logits
        return logits, torch.empty(size, device=self.device, dtype=self.dtype)

    def chunk(
        self,
        run: Run,
        order_N: Tensor | None,
        buffers: tuple[Tensor, Tensor],
        columns: Run | None = None,
        kept_N: Tensor | None = None,
    ) -> Chunk:
        """Compute the logits of some rows, in a buffer that is used again.

        Args:
            run: the rows.
            order_N: the order of the rows; None: as they are.
            buffers: from `buffers`.
            columns: of the vocabulary; None: all.
            kept_N: bool; the hidden states of the other rows are taken for 0.
        """
        tokens = run[0] if order_N is None else order_N[run[0] : run[1]]
        count = run[1] - run[0]
        hidden_CH = self._rows(tokens, count)
        if kept_N is not None:
            kept_C = kept_N[run[0] : run[1]] if order_N is None else kept_N[tokens]
            hidden_CH = hidden_CH.masked_fill(~kept_C[:, None], 0)
        first, last = columns or (0, self.vocabulary)
        weight_SH = self.weight[first:last]
        bias_S = None if self.bias is None else self.bias[first:last]
        shape = (count, last - first)
        logits_CS, dlogits_CS = (x[: shape[0] * shape[1]].view(shape) for x in buffers)
        product_into(logits_CS, hidden_CH, weight_SH.t(), bias_S)
        return Chunk(tokens, hidden_CH, logits_CS, dlogits_CS)

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
    """What the chunks of a single pass add up to; only what is wanted exists."""

    def __init__(
        self,
        head: Head,
        grad_buffer: Tensor | None = None,
        buffer_scale: Tensor | None = None,
        *,
        has_chunks: bool = True,
        sum_dtype: torch.dtype | None = None,
    ) -> None:
        """Make room for the gradients.

        Args:
            head: what they are of.
            grad_buffer: where that of the weight goes, if not into a tensor of its own.
            buffer_scale: its factor there.
            has_chunks: whether there will be any; the first is written, not added.
            sum_dtype: of the weight's; None: the accumulator's.
        """
        self.head, self.grad_buffer, self.buffer_scale = head, grad_buffer, buffer_scale
        self.num_added = 0

        def zeros(*shape: int, dtype: torch.dtype = head.accumulator_dtype) -> Tensor:
            return torch.zeros(shape, device=head.device, dtype=dtype)

        self.dhidden = zeros(*head.hidden.shape, dtype=head.dtype) if head.needs_hidden else None
        own_sum = head.needs_weight and grad_buffer is None
        self.dweight_VH = None
        if own_sum:
            make = torch.empty if has_chunks else torch.zeros
            dtype = sum_dtype or head.accumulator_dtype
            self.dweight_VH = make(head.weight.shape, device=head.device, dtype=dtype)
        self.dbias_V = zeros(head.vocabulary) if head.needs_bias else None

    def tensors(self) -> list[Tensor]:
        """Return those that exist."""
        return [x for x in (self.dhidden, self.dweight_VH, self.dbias_V) if x is not None]

    def add(self, chunk: Chunk) -> None:
        """Add what the gradient of a chunk's logits gives."""
        if self.dhidden is not None:
            dhidden_NH = self.dhidden.view(-1, self.head.hidden_size)
            dhidden_CH = product(chunk.dlogits_CV, self.head.weight)
            if isinstance(chunk.tokens, int):
                dhidden_NH[chunk.tokens : chunk.tokens + len(dhidden_CH)] = dhidden_CH
            else:
                dhidden_NH[chunk.tokens] = dhidden_CH.to(self.head.dtype)
        if self.grad_buffer is not None and self.head.needs_weight:
            assert self.buffer_scale is not None
            add_product(self.grad_buffer, chunk.dlogits_CV.t(), chunk.hidden_CH, self.buffer_scale)
        elif self.dweight_VH is not None:
            beta = 0 if self.num_added == 0 else 1
            add_product(self.dweight_VH, chunk.dlogits_CV.t(), chunk.hidden_CH, beta=beta)
        if self.dbias_V is not None:
            self.dbias_V += chunk.dlogits_CV.sum(0, dtype=self.dbias_V.dtype)
        self.num_added += 1


def early_and_late(factor: Tensor) -> tuple[Tensor, Tensor]:
    """Split a factor of the gradients: into what goes into that of the logits, and a power of two.

    The mantissa goes early, in fp32 before that gradient is rounded, where it costs no rounding.
    The exponent of 1 / 10^6 would take most of it below the smallest number of fp16, so it goes
    late, where a power of two costs none either; all but 6 bits, room for ratios of e^15.
    """
    mantissa, exponent = torch.frexp(factor)
    early = exponent.clamp(-6, 0)
    return torch.ldexp(mantissa, early), torch.ldexp(torch.ones_like(factor), exponent - early)


def _as_autocast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert as `F.linear` does under autocast: float64 stays."""
    return x if x.dtype == torch.float64 else x.to(dtype)


def _check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor) -> None:
    if hasattr(hidden, "full_tensor"):
        raise ValueError("hidden is a DTensor: pass the states of this rank's tokens (.to_local())")
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
