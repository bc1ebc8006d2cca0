"""The loss from logits that exist already: one kernel, read once and, if allowed, written in place.

B sequences, T positions, N tokens (B * T, or packed), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Literal, Unpack

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._backend import chunk_rows_for, row_backend, runs_eagerly
from ._inputs import (
    ACTIVE,
    TokenBatch,
    check_ids,
    flat_mask,
    flatten,
    upstream_vectors,
)
from ._layout import Layout, check_device, flat, same_tokens
from ._reduce import RowResults, reduce_rows
from .config import GRPOLossConfig, GRPOLossOutput, LossArguments


@runs_eagerly
def grpo_loss(
    logits: Tensor,  # (B, T, V) or (N, V)
    completion_ids: Tensor,  # (B, T) or (N,) int64
    advantages: Tensor,  # (B,) one a sequence, or (B, T) / (N,) one a token
    *,
    inplace: bool = False,
    backend: Literal["auto", "triton", "torch"] = "auto",
    config: GRPOLossConfig = GRPOLossConfig(),
    **arguments: Unpack[LossArguments],
) -> GRPOLossOutput:
    """Compute the GRPO loss from logits.

    `logits[:, t]` predicts `completion_ids[:, t]`: the caller has shifted.

    Args:
        logits: bf16, fp16 or fp32; strided views are fine as long as V has stride 1.
        completion_ids: the tokens that were sampled.
        advantages: may be on the CPU.
        inplace: overwrite `logits` with their gradient in the forward pass: one read and one write
            in all, no second tensor. The logits are gone, and backward can run once. False: the
            gradient is a new tensor, written in backward.
        backend: "triton", "torch" or "auto": Triton on a GPU.
        config: the mathematics.
        **arguments: mask, log-probs, denominators: as in `linear_grpo_loss`.

    Returns:
        The loss (differentiable to logits), log-probs, entropies and metrics.

    Raises:
        ValueError: shapes, types, devices or values that do not fit; the message holds them.
        NotImplementedError: an option that is not built yet, by name.
    """
    _check_logits(logits, completion_ids)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    batch = flatten(completion_ids, advantages, logits.device, dtype, config=config, **arguments)
    check_ids(batch.ids_N, batch.mask_N, logits.shape[-1])
    row_step = row_backend(backend, logits.device, logits.dtype)
    wants_gradient = torch.is_grad_enabled() and logits.requires_grad
    if inplace and wants_gradient and logits.is_leaf:
        raise ValueError(
            "inplace=True would overwrite a leaf that requires its gradient: use inplace=False"
        )
    rows = RowResults.zeros(
        batch.ids_N.numel(), batch.ref_logps_N is not None, logits.device, dtype
    )
    write_now = inplace and wants_gradient
    with torch.no_grad():
        _loss_rows(row_step, logits, logits if write_now else None, batch, rows, config)
        loss, metrics = reduce_rows(
            rows,
            batch,
            num_computed_rows=batch.num_tokens,
            num_gradient_rows=(batch.state_N == ACTIVE).sum() if wants_gradient else 0,
        )
    if write_now:
        # Autograd must notice if somebody else still needs the values that were here.
        torch.autograd.graph.increment_version(logits)
        loss = _WrittenGradient.apply(logits, loss, row_step)
    elif wants_gradient:
        loss = _LossOfLogits.apply(logits, loss, batch, config, row_step)
    shape = completion_ids.shape
    return GRPOLossOutput(loss, rows.logps_N.view(shape), rows.entropy_N.view(shape), metrics)


@runs_eagerly
def selective_logps(
    logits: Tensor,  # (B, T, V) or (N, V)
    ids: Tensor,  # (B, T) or (N,) int64
    *,
    mask: Tensor | None = None,  # like ids
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    backend: Literal["auto", "triton", "torch"] = "auto",
) -> tuple[Tensor, Tensor]:
    """Compute log-prob of each id and entropy of each distribution; differentiable to logits.

    Args:
        logits: bf16, fp16 or fp32; `logits[:, t]` predicts `ids[:, t]`.
        ids: the tokens.
        mask: tokens that count; None: all.
        temperature: divides the logits.
        logit_scale: only 1 is built yet.
        logit_softcap: only None is built yet.
        backend: "triton", "torch" or "auto".

    Returns:
        Log-probs and entropies (in nats), fp32, like `ids`, 0 where masked.

    Raises:
        ValueError: shapes, types, devices or values that do not fit; the message holds them.
        NotImplementedError: an option that is not built yet, by name.
    """
    GRPOLossConfig(temperature=temperature, logit_scale=logit_scale, logit_softcap=logit_softcap)
    _check_logits(logits, ids)
    check_device(logits.device, ids=ids, mask=mask)
    mask_N = flat_mask(Layout(ids), "mask", mask)
    check_ids(ids.reshape(-1), mask_N, logits.shape[-1])
    row_step = row_backend(backend, logits.device, logits.dtype)
    logps_N, entropy_N = _SelectiveLogps.apply(logits, flat(ids), mask_N, temperature, row_step)  # pyright: ignore[reportGeneralTypeIssues]
    return logps_N.view(ids.shape), entropy_N.view(ids.shape)


class _WrittenGradient(torch.autograd.Function):
    """A loss whose gradient stands in the memory of the logits."""

    @staticmethod
    def forward(ctx, logits, loss, row_step):
        ctx.gradient, ctx.row_step = logits.detach(), row_step
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        if ctx.gradient is None:
            raise RuntimeError(
                "grpo_loss(inplace=True) gave its gradient away in the first backward: use "
                "inplace=False to run backward twice"
            )
        gradient, ctx.gradient = ctx.gradient, None
        for _, piece, _ in _pieces(gradient, None, ctx.row_step):
            ctx.row_step.scale_rows(piece, upstream)
        return gradient, None, None


class _LossOfLogits(torch.autograd.Function):
    """A loss whose gradient is written, upstream factor included, when it is asked for."""

    @staticmethod
    def forward(ctx, logits, loss, batch, config, row_step):
        ctx.save_for_backward(logits)
        ctx.inputs = batch, config, row_step
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        (logits,) = ctx.saved_tensors
        batch, config, row_step = ctx.inputs
        gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
        rows = RowResults.zeros(
            batch.ids_N.numel(), batch.ref_logps_N is not None, logits.device, upstream.dtype
        )
        _loss_rows(row_step, logits, gradient, batch, rows, config, upstream)
        return gradient, None, None, None, None


class _SelectiveLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, ids_N, mask_N, temperature, row_step):
        ctx.save_for_backward(logits, ids_N, mask_N)
        ctx.options = temperature, row_step
        ctx.set_materialize_grads(False)  # a loss without the entropy does not pay for its gradient
        dtype = torch.promote_types(logits.dtype, torch.float32)
        logps_N = torch.zeros(ids_N.shape, device=logits.device, dtype=dtype)
        entropy_N = torch.zeros_like(logps_N)
        for first, logits_CV, _ in _pieces(logits, None, row_step):
            row_step.logps_rows(logits_CV, first, ids_N, mask_N, temperature, logps_N, entropy_N)
        return logps_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx, dlogps_N, dentropy_N):
        logits, ids_N, mask_N = ctx.saved_tensors
        temperature, row_step = ctx.options
        gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
        dlogps_N, dentropy_N = upstream_vectors(dlogps_N, dentropy_N)
        for first, logits_CV, dlogits_CV in _pieces(logits, gradient, row_step):
            row_step.dlogits_rows(
                logits_CV, dlogits_CV, first, ids_N, mask_N, temperature, dlogps_N, dentropy_N
            )
        return gradient, None, None, None, None


def _loss_rows(
    row_step: ModuleType,
    logits: Tensor,
    dlogits: Tensor | None,
    batch: TokenBatch,
    rows: RowResults,
    config: GRPOLossConfig,
    upstream: Tensor | None = None,
) -> None:
    scale = None
    if dlogits is not None:
        scale = (1 if upstream is None else upstream) / batch.denominator
    for first, logits_CV, dlogits_CV in _pieces(logits, dlogits, row_step):
        row_step.loss_rows(logits_CV, dlogits_CV, first, batch, rows, config, scale)


def _pieces(
    logits: Tensor, dlogits: Tensor | None, row_step: ModuleType
) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """Cut logits into matrices: one, or one a sequence if they are a strided view.

    A row step that needs temporaries gets no more rows at a time than their budget allows.
    """
    vocabulary = logits.shape[-1]
    mergeable = logits.dim() == 2 or logits.is_contiguous()
    matrices = [logits.view(-1, vocabulary)] if mergeable else list(logits.unbind(0))
    dlogits_NV = None if dlogits is None or dlogits is logits else dlogits.view(-1, vocabulary)
    first = 0
    for matrix in matrices:
        step = len(matrix)
        if row_step.TEMPORARY_BYTES:
            step = chunk_rows_for(
                None,
                num_rows=len(matrix),
                hidden_size=0,
                vocabulary=vocabulary,
                dtype=logits.dtype,
                device=logits.device,
                backend=row_step,
                with_weight_gradient=False,
            )
        for start in range(0, len(matrix), max(step, 1)):
            piece = matrix[start : start + step]
            if dlogits is None:
                dpiece = None
            elif dlogits_NV is None:
                dpiece = piece
            else:
                dpiece = dlogits_NV[first : first + len(piece)]
            yield first, piece, dpiece
            first += len(piece)


def _check_logits(logits: Tensor, ids: Tensor) -> None:
    if not same_tokens(logits.shape[:-1], ids.shape):
        raise ValueError(
            f"logits must be {(*ids.shape, 'V')} for ids {tuple(ids.shape)}, "
            f"got {tuple(logits.shape)}"
        )
    if not logits.is_floating_point():
        raise ValueError(f"logits must be floating-point, got {logits.dtype}")
    if logits.stride(-1) != 1:
        raise ValueError(
            f"logits must have stride 1 along the vocabulary, got strides {logits.stride()}: "
            "call .contiguous()"
        )
