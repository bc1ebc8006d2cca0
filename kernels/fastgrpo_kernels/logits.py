"""The loss from logits that exist already: one kernel, read once and, if allowed, written in place.

B sequences, T positions, N tokens (B * T, or packed), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Literal, Unpack

import torch
from torch import Tensor

from ._autograd import once_differentiable
from ._backend import row_backend
from ._checks import check_ids, check_inplace, check_logits, check_statistics
from ._compiled import Expected, Memo, opaque_when_compiled
from ._inputs import ACTIVE, TokenBatch, flat_mask, flatten, upstream_vectors
from ._layout import Layout, check_device, flat
from ._reduce import RowResults, Statistics, reduce_rows
from ._single_pass import linear_surrogate, needs_whole_sequences
from .config import GRPOLossConfig, GRPOLossOutput, LossArguments


def _expect(logits: Tensor, **_: object) -> Expected:
    return Expected(torch.promote_types(logits.dtype, torch.float32))


@opaque_when_compiled(_expect)
def grpo_loss(  # noqa: D417 - the memo is not the caller's
    memo: Memo,
    logits: Tensor,  # (B, T, V) or (N, V)
    completion_ids: Tensor,  # (B, T) or (N,) int64
    advantages: Tensor,  # (B,) one a sequence, or (B, T) / (N,) one a token
    *,
    inplace: bool = False,
    statistics: Literal["all", "active"] = "all",
    skip_rows: bool = True,
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
            gradient is a new tensor, written in backward, as always under `torch.compile`.
        statistics: "all": log-prob and entropy of every counted token. "active": the rows of tokens
            without a gradient are not read; theirs are NaN, the metrics are means over the rest.
        skip_rows: as in `linear_grpo_loss`. Here rows are left out on the device, which never costs
            a host synchronisation: False only excludes statistics="active".
        backend: "triton", "torch" or "auto": Triton on a GPU.
        config: the mathematics.
        **arguments: mask, log-probs, denominators: as in `linear_grpo_loss`.

    Returns:
        The loss (differentiable to logits), log-probs, entropies and metrics.

    Raises:
        ValueError: shapes, types, devices or values that do not fit; the message holds them.
        RuntimeError: in backward, if a second derivative is asked for (create_graph=True).
    """
    check_logits(logits, completion_ids)
    check_statistics(statistics, skip_rows)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    batch = flatten(completion_ids, advantages, logits.device, dtype, config=config, **arguments)
    check_ids(batch.ids_N, batch.mask_N, logits.shape[-1])
    row_step = row_backend(backend, logits.device, logits.dtype)
    wants_gradient = torch.is_grad_enabled() and logits.requires_grad
    if inplace and wants_gradient:
        check_inplace(logits)
    only_active = statistics == "active"
    seen = batch.active_only() if only_active else batch
    with torch.no_grad():
        num_active = (batch.state_N == ACTIVE).sum().to(logits.device, non_blocking=True)
        call = _Call(logits, seen, config, row_step, wants_gradient, inplace, memo.statistics)
        memo.statistics, rows = call.found, call.rows
        loss, metrics = reduce_rows(
            rows,
            seen,
            config,
            num_computed_rows=num_active if only_active else batch.num_tokens,
            num_gradient_rows=num_active if wants_gradient else 0,
            mean_over=num_active if only_active else None,
        )
        if only_active:
            rows = rows.without_skipped(batch)
    if wants_gradient and inplace:
        # Autograd must notice if somebody else still needs the values that were here.
        torch.autograd.graph.increment_version(logits)
        loss = _WrittenGradient.apply(logits, loss, row_step)
    elif wants_gradient:
        loss = _LossOfLogits.apply(logits, loss, call)
    shape = completion_ids.shape
    return GRPOLossOutput(loss, rows.logps_N.view(shape), rows.entropy_N.view(shape), metrics)


@opaque_when_compiled(_expect)
def selective_logps(  # noqa: D417 - the memo is not the caller's
    memo: Memo,
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
        logit_scale: multiplies the logits before softcap and temperature.
        logit_softcap: cap c of c * tanh(logit / c); None: none.
        backend: "triton", "torch" or "auto".

    Returns:
        Log-probs and entropies (in nats), fp32, like `ids`, 0 where masked.

    Raises:
        ValueError: shapes, types, devices or values that do not fit; the message holds them.
        RuntimeError: in backward, if a second derivative is asked for (create_graph=True).
    """
    config = GRPOLossConfig(
        temperature=temperature, logit_scale=logit_scale, logit_softcap=logit_softcap
    )
    check_logits(logits, ids)
    check_device(logits.device, ids=ids, mask=mask)
    mask_N = flat_mask(Layout(ids), "mask", mask)
    check_ids(ids.reshape(-1), mask_N, logits.shape[-1], "ids")
    row_step = row_backend(backend, logits.device, logits.dtype)
    logps_N, entropy_N = _SelectiveLogps.apply(logits, flat(ids), mask_N, config, row_step, memo)  # pyright: ignore[reportGeneralTypeIssues]
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
        for _, matrix, _ in _matrices(gradient, None):
            ctx.row_step.scale_rows(matrix, upstream)
        return gradient, None, None


class _LossOfLogits(torch.autograd.Function):
    """A loss whose gradient is written, upstream factor included, when it is asked for."""

    @staticmethod
    def forward(ctx, logits, loss, call):
        ctx.save_for_backward(logits, call.batch.ids_N)
        ctx.call = call
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        logits, _ = ctx.saved_tensors
        gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
        ctx.call.write_gradient(logits, gradient, upstream)
        return gradient, None, None


class _Call:
    """What a loss of logits found, and how it writes its gradient."""

    def __init__(
        self,
        logits: Tensor,
        batch: TokenBatch,
        config: GRPOLossConfig,
        row_step: ModuleType,
        wants_gradient: bool,
        inplace: bool,
        known: Statistics | None = None,
    ) -> None:
        self.batch, self.config, self.row_step = batch, config, row_step
        self.rows = rows = RowResults.zeros(batch, batch.advantages_N.dtype)
        self.found = Statistics.beside(rows.logps_N, rows.entropy_N)
        self.dlogps_N = torch.zeros_like(rows.logps_N) if wants_gradient else None
        if known is not None:
            self.found = known
            rows.logps_N, rows.entropy_N = known.logps_N, known.entropy_N
            row_step.objective_rows(batch, rows, config, self.dlogps_N)
            return
        self._forward(logits, inplace)
        # Copies: those returned are the caller's, to do with as he likes.
        rows.logps_N, rows.entropy_N = rows.logps_N.clone(), rows.entropy_N.clone()

    def _forward(self, logits: Tensor, inplace: bool) -> None:
        batch, config, row_step, rows = self.batch, self.config, self.row_step, self.rows
        wants_gradient = self.dlogps_N is not None
        if needs_whole_sequences(batch, config) or (config.couples_rows and not inplace):
            for first, logits_CV, _ in _matrices(logits, None):
                row_step.statistics_rows(
                    logits_CV, first, batch.ids_N, batch.mask_N, config, self.found
                )
            row_step.objective_rows(batch, rows, config, self.dlogps_N)
            if wants_gradient and inplace:
                self.write_gradient(logits, logits)
            return
        # One kernel: each row is read, and if allowed overwritten at once.
        row_batch, row_config = batch, config
        if config.couples_rows:
            row_batch, row_config = linear_surrogate(batch, config, row_step)
        written = logits if wants_gradient and inplace else None
        scale = None if written is None else 1 / batch.denominator
        kept = self.found if wants_gradient and not inplace else None
        for first, logits_CV, dlogits_CV in _matrices(logits, written):
            row_step.loss_rows(
                logits_CV, dlogits_CV, first, row_batch, rows, row_config, scale, kept,
                self.dlogps_N,
            )  # fmt: skip
        if config.couples_rows:
            row_step.objective_rows(batch, rows, config, None)

    def write_gradient(
        self, logits: Tensor, gradient: Tensor, upstream: Tensor | None = None
    ) -> None:
        """Write the gradient of logits, over them if they are the same tensor."""
        batch = self.batch
        scale = (1 if upstream is None else upstream) / batch.denominator
        weight_N = batch.entropy_weight_N
        dentropy_N = None if weight_N is None else -weight_N
        for first, logits_CV, dlogits_CV in _matrices(logits, gradient):
            self.row_step.dlogits_rows(
                logits_CV, dlogits_CV, first, batch.ids_N, batch.mask_N, self.config, self.found,
                self.dlogps_N, dentropy_N, scale,
            )  # fmt: skip


class _SelectiveLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, ids_N, mask_N, config, row_step, memo):
        found = memo.statistics
        if found is None:
            dtype = torch.promote_types(logits.dtype, torch.float32)
            logps_N = torch.zeros(ids_N.shape, device=logits.device, dtype=dtype)
            found = memo.statistics = Statistics.beside(logps_N, torch.zeros_like(logps_N))
            for first, logits_CV, _ in _matrices(logits, None):
                row_step.statistics_rows(logits_CV, first, ids_N, mask_N, config, found)
        ctx.save_for_backward(logits, ids_N, mask_N, *found.tensors())
        ctx.options = config, row_step
        ctx.set_materialize_grads(False)  # a loss without the entropy does not pay for its gradient
        return found.logps_N, found.entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx, dlogps_N, dentropy_N):
        logits, ids_N, mask_N, *found = ctx.saved_tensors
        config, row_step = ctx.options
        gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
        dlogps_N, dentropy_N = upstream_vectors(dlogps_N, dentropy_N)
        for first, logits_CV, dlogits_CV in _matrices(logits, gradient):
            row_step.dlogits_rows(
                logits_CV, dlogits_CV, first, ids_N, mask_N, config, Statistics(*found), dlogps_N,
                dentropy_N,
            )  # fmt: skip
        return gradient, *[None] * 5


def _matrices(
    logits: Tensor, dlogits: Tensor | None
) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """Cut logits into matrices: one, or one a sequence if they are a strided view."""
    vocabulary = logits.shape[-1]
    mergeable = logits.dim() == 2 or logits.is_contiguous()
    matrices = [logits.view(-1, vocabulary)] if mergeable else list(logits.unbind(0))
    dlogits_NV = None if dlogits is None or dlogits is logits else dlogits.view(-1, vocabulary)
    first = 0
    for matrix in matrices:
        if dlogits is None:
            dmatrix = None
        elif dlogits_NV is None:
            dmatrix = matrix
        else:
            dmatrix = dlogits_NV[first : first + len(matrix)]
        yield first, matrix, dmatrix
        first += len(matrix)
