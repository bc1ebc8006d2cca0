"""The loss, and log-probs, from hidden states: the head's logits never exist in full.

`_single_pass.py` and `_recompute.py` are the two ways to the gradients.

B sequences, T positions, N tokens (B * T, or packed), C rows of a chunk, H hidden, V vocabulary.
"""

from __future__ import annotations

import logging
import math
from typing import Literal, Unpack

import torch
from torch import Tensor

from ._autograd import once_differentiable
from ._backend import MIB, check_chunk_rows, row_backend
from ._checks import check_choice, check_ids, check_statistics, check_tensor
from ._compiled import Expected, Memo, opaque_when_compiled
from ._head import Head, HeadGradients
from ._inputs import flat_mask, flatten, upstream_vectors
from ._layout import Layout, check_device, flat
from ._plan import RowPlan, pieces
from ._products import scaled
from ._recompute import Recompute, RecomputedGradients
from ._reduce import Statistics, reduce_rows
from ._single_pass import KnownGradients, SinglePass, needs_whole_sequences
from .config import GRPOLossConfig, GRPOLossOutput, LossArguments

logger = logging.getLogger(__package__)


def _expect_loss(
    hidden: Tensor,
    weight: Tensor,
    completion_ids: Tensor,
    *,
    bias: Tensor | None = None,
    method: str,
    **_: object,
) -> Expected:
    head = Head(hidden, weight, bias, completion_ids)
    if not head.wants_gradient or _way(method, head, None) == "recompute":
        return Expected(head.accumulator_dtype)
    factor = hidden.new_empty((), dtype=head.accumulator_dtype)
    return Expected(head.accumulator_dtype, [factor, *HeadGradients(head).tensors()])


@opaque_when_compiled(_expect_loss)
def linear_grpo_loss(  # noqa: D417 - the memo is not the caller's
    memo: Memo,
    hidden: Tensor,  # (B, T, H) or packed (N, H)
    weight: Tensor,  # (V, H)
    completion_ids: Tensor,  # (B, T) or (N,) int64
    advantages: Tensor,  # (B,) one a sequence, or (B, T) / (N,) one a token
    *,
    bias: Tensor | None = None,  # (V,)
    method: Literal["auto", "single_pass", "recompute"] = "auto",
    chunk_rows: int | None = None,
    statistics: Literal["all", "active"] = "all",
    skip_rows: bool = True,
    fp32_logits: bool = False,
    grad_buffer: Tensor | None = None,
    grad_scale: float = 1.0,
    backend: Literal["auto", "triton", "torch"] = "auto",
    config: GRPOLossConfig = GRPOLossConfig(),
    **arguments: Unpack[LossArguments],
) -> GRPOLossOutput:
    """Compute the GRPO loss of an LM head, and its gradients, without the logits of all tokens.

    `hidden[:, t]` predicts `completion_ids[:, t]`: the caller has shifted. The call returns its
    share of the optimisation step's loss: the sum over micro-batches and ranks is the step's.

    Args:
        hidden: (B, T, H), or packed (N, H) or (1, N, H): last hidden states, bf16, fp16 or fp32;
            strided views are fine.
        weight: (V, H), the LM head in the same type (any under autocast); a frozen one costs no
            product.
        completion_ids: (B, T) or (N,) int64, the tokens that were sampled.
        advantages: (B,) one a sequence, or (B, T) / (N,) one a token; may be on the CPU. A token
            whose advantage is 0 gets no gradient products when beta and entropy_coef are 0.
        bias: (V,), of the LM head.
        method: "single_pass": gradients in the forward pass, 6NHV, and an fp32 tensor of the size
            of the head (8NHV for rows of sequences that couple their rows and are longer than a
            chunk). "recompute": 8NHV, logits by slices of the vocabulary and again in backward; 4NH
            bytes and 128 MiB beside what is returned. "auto": "recompute" on a GPU where that fp32
            tensor would take more than an eighth of the memory, else "single_pass"; says which to
            the logger `fastgrpo_kernels` at level DEBUG.
        chunk_rows: rows whose logits exist at a time; None: as many as fit the byte budget
            (256 MiB on a CPU, 1/32 of a GPU's memory). With "recompute", rows of a tile.
        statistics: "all": log-prob and entropy of every counted token. "active": only of those
            with a gradient; the rest is NaN, the metrics are means over the computed rows.
        skip_rows: leave out what cannot contribute, at the price of one host synchronisation
            (none if mask and advantages are on the CPU). False: compute every row.
        fp32_logits: keep the products' fp32 results as logits; they are not rounded to 16 bits.
        grad_buffer: (V, H), takes `grad_scale` times the gradient of the weight, added to what is
            there; the weight then gets no gradient from autograd, and no second tensor of its size
            is made: micro-batches add up in one place. What the caller gives up with "single_pass":
            the gradient is added in the forward pass, before it is known whether backward will run
            and with which upstream gradient, so the final factor of the loss has to be
            `grad_scale`, and the buffer must be of the accumulator's type (fp32), since it is
            rounded after every chunk; inside of activation checkpointing, which runs the forward
            pass twice, it would be added twice. With "recompute" it is added in backward, times the
            upstream gradient, and may be of any type. Hooks on the weight do not see it. The
            gradient of a tied embedding still goes through autograd: with `grad_buffer=weight.grad`
            both meet. A graph of `torch.compile` breaks here, or with fullgraph=True says so.
        grad_scale: multiplies what is added to `grad_buffer`, and nothing else.
        backend: "triton", "torch" or "auto": Triton on a GPU.
        config: the mathematics.
        **arguments: by keyword, all optional (`LossArguments` has them with their types):
            completion_mask: (B, T) or (N,) of 0 and 1: tokens that count; may be on the CPU.
            cu_seqlens: (B + 1,) int32, packed layout: where sequences begin and end.
            old_logps: like completion_ids, fp32: log-probs at the start of the optimisation step;
                None = on-policy, all ratios are 1.
            ref_logps: like completion_ids, fp32: log-probs of the reference, for beta > 0.
            importance_sampling_ratio, policy_weight, entropy_mask: like completion_ids, the first
                two also (B,) or (B, 1): multiply the policy term, not the KL.
            num_items_in_batch: counted tokens of the whole optimisation step, for `dapo`, `cispo`
                and `vespo`.
            num_sequences_in_batch: sequences of the whole step, for the other losses but `bnpo`.
            entropy_denominator: of the entropy bonus, over the whole step.

    Returns:
        The loss (differentiable to hidden, weight and bias), log-probs, entropies and metrics.

    Raises:
        ValueError: shapes, types, devices or values that do not fit; the message holds them.
        TypeError: an unknown argument, or something else than a tensor.
        RuntimeError: in backward, if a second derivative is asked for (create_graph=True).
    """
    check_choice("method", method, ("auto", "single_pass", "recompute"))
    check_statistics(statistics, skip_rows)
    head = Head(hidden, weight, bias, completion_ids, fp32_logits=fp32_logits)
    _check_grad_buffer(head, grad_buffer, grad_scale)
    head.needs_weight |= grad_buffer is not None and torch.is_grad_enabled()
    batch = flatten(
        completion_ids, advantages, head.device, head.accumulator_dtype, config=config, **arguments
    )
    check_ids(batch.ids_N, batch.mask_N, head.vocabulary)
    row_step = row_backend(backend, head.device, head.dtype)
    way = _way(method, head, grad_buffer)
    only_active = statistics == "active"
    plan = RowPlan(
        batch,
        wants_gradient=head.wants_gradient,
        only_active=only_active,
        skip_rows=skip_rows,
        coupled=way == "single_pass" and needs_whole_sequences(batch, config),
    )
    seen = batch.active_only() if only_active else batch
    with torch.no_grad(), torch.autocast(head.device.type, enabled=False):
        if way == "single_pass":
            chunk = head.chunk_rows(chunk_rows, plan.num_computed, row_step)
            call = SinglePass(
                head, seen, plan, config, chunk, row_step, grad_buffer, grad_scale, memo.in_graph
            )
        else:
            check_chunk_rows(chunk_rows)
            call = Recompute(
                head, seen, plan, config, chunk_rows, row_step, grad_buffer, grad_scale,
                memo.statistics,
            )  # fmt: skip
        rows = call.rows
        loss, metrics = reduce_rows(
            rows,
            seen,
            config,
            num_computed_rows=plan.num_computed,
            num_gradient_rows=plan.num_gradient,
            mean_over=seen.num_counted if only_active else None,
        )
        if only_active:
            rows = rows.without_skipped(batch)
    if head.wants_gradient:
        if isinstance(call, SinglePass):
            memo.gradients = [call.power, *call.gradients.tensors()]
            loss = KnownGradients.apply(loss, *head.leaves, call.power, call.gradients)
        else:
            memo.statistics = call.found
            loss = RecomputedGradients.apply(loss, *head.leaves, call)
    shape = completion_ids.shape
    return GRPOLossOutput(loss, rows.logps_N.view(shape), rows.entropy_N.view(shape), metrics)


def _expect_logps(
    hidden: Tensor, weight: Tensor, ids: Tensor, *, bias: Tensor | None = None, **_: object
) -> Expected:
    return Expected(Head(hidden, weight, bias, ids).accumulator_dtype)


@opaque_when_compiled(_expect_logps)
def linear_logps(  # noqa: D417 - the memo is not the caller's
    memo: Memo,
    hidden: Tensor,  # (B, T, H) or packed (N, H)
    weight: Tensor,  # (V, H)
    ids: Tensor,  # (B, T) or (N,) int64
    *,
    bias: Tensor | None = None,  # (V,)
    mask: Tensor | None = None,  # like ids; may be on the CPU
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    chunk_rows: int | None = None,
    fp32_logits: bool = False,
    backend: Literal["auto", "triton", "torch"] = "auto",
) -> tuple[Tensor, Tensor]:
    """Compute log-prob of each id and entropy of each distribution, a chunk of logits at a time.

    The building block for losses that are not here: both results are differentiable to hidden,
    weight and bias. Forward 2NHV; backward computes the logits again, 6NHV.

    Args:
        hidden: last hidden states, bf16, fp16 or fp32; `hidden[:, t]` predicts `ids[:, t]`.
        weight: the LM head in the same type (any under autocast).
        ids: the tokens.
        bias: of the LM head.
        mask: tokens that count; None: all.
        temperature: divides the logits.
        logit_scale: multiplies the logits before softcap and temperature.
        logit_softcap: cap c of c * tanh(logit / c); None: none.
        chunk_rows: rows whose logits exist at a time; None: as many as fit the byte budget.
        fp32_logits: keep the products' fp32 results as logits; they are not rounded to 16 bits.
        backend: "triton", "torch" or "auto".

    Returns:
        Log-probs and entropies (in nats), fp32, like `ids`, 0 where masked.

    Raises:
        ValueError: shapes, types, devices or values that do not fit; the message holds them.
    """
    config = GRPOLossConfig(
        temperature=temperature, logit_scale=logit_scale, logit_softcap=logit_softcap
    )
    head = Head(hidden, weight, bias, ids, fp32_logits=fp32_logits)
    mask_N = flat_mask(Layout(ids), "mask", mask)
    check_device(head.device, ids=ids)
    tokens_K = None if mask_N is None else mask_N.nonzero()[:, 0].to(head.device)
    mask_N = None if mask_N is None else mask_N.to(head.device)
    check_ids(ids.reshape(-1), mask_N, head.vocabulary, "ids")
    row_step = row_backend(backend, head.device, head.dtype)
    num_rows = ids.numel() if tokens_K is None else len(tokens_K)
    logps_N, entropy_N = _LinearLogps.apply(
        *head.leaves,
        head,
        flat(ids),
        tokens_K,
        num_rows,
        config,
        head.chunk_rows(chunk_rows, num_rows, row_step),
        row_step,
        memo,
    )  # pyright: ignore[reportGeneralTypeIssues]
    return logps_N.view(ids.shape), entropy_N.view(ids.shape)


class _LinearLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden, weight, bias, head, ids_N, tokens_K, num_rows, config, chunk_rows, row_step,
        memo,
    ):  # fmt: skip
        found = memo.statistics
        if found is None:
            logps_N = torch.zeros(ids_N.shape, device=head.device, dtype=head.accumulator_dtype)
            found = memo.statistics = Statistics.beside(logps_N, torch.zeros_like(logps_N))
            with torch.autocast(head.device.type, enabled=False):
                buffers = head.buffers(chunk_rows * head.vocabulary)
                for run in pieces((0, num_rows), chunk_rows):
                    chunk = head.chunk(run, tokens_K, buffers)
                    row_step.statistics_rows(
                        chunk.logits_CV, chunk.tokens, ids_N, None, config, found
                    )
        # Autograd frees what is saved after backward, and notices if somebody overwrites it.
        ctx.save_for_backward(ids_N, *head.release(), *found.tensors())
        ctx.call = head, tokens_K, num_rows, config, chunk_rows, row_step
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        ctx.set_materialize_grads(False)  # a loss without the entropy does not pay for its gradient
        return found.logps_N, found.entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx, dlogps_N, dentropy_N):
        head, tokens_K, num_rows, config, chunk_rows, row_step = ctx.call
        ids_N, hidden, weight, bias, *statistics = ctx.saved_tensors
        found = Statistics(*statistics)
        dlogps_N, dentropy_N = upstream_vectors(dlogps_N, dentropy_N)
        with (
            head.holding(hidden, weight, bias),
            torch.autocast(head.device.type, enabled=False),
        ):
            num_chunks = -(-num_rows // chunk_rows)
            dtype = head.sum_dtype(num_chunks, ctx.dtypes[1])
            gradients = HeadGradients(head, has_chunks=num_chunks > 0, sum_dtype=dtype)
            buffers = head.buffers(chunk_rows * head.vocabulary)
            for run in pieces((0, num_rows), chunk_rows):
                chunk = head.chunk(run, tokens_K, buffers)
                row_step.dlogits_rows(
                    chunk.logits_CV, chunk.dlogits_CV, chunk.tokens, ids_N, None, config, found,
                    dlogps_N, dentropy_N,
                )  # fmt: skip
                gradients.add(chunk)
        sums = (gradients.dhidden, gradients.dweight_VH, gradients.dbias_V)
        found = [scaled(x, None, dtype) for x, dtype in zip(sums, ctx.dtypes, strict=True)]
        return *found, *[None] * 8


def _way(method: str, head: Head, grad_buffer: Tensor | None) -> str:
    """Return which way to the gradients is taken; from shapes, types and total memory alone."""
    rounds_each_chunk = grad_buffer is not None and grad_buffer.dtype != head.accumulator_dtype
    if grad_buffer is not None and method == "single_pass" and rounds_each_chunk:
        raise ValueError(
            f"grad_buffer is {grad_buffer.dtype} and would be rounded after every chunk: make it "
            f"{head.accumulator_dtype}, or use method='recompute'"
        )
    if method != "auto":
        return method
    why = "gradients in the forward pass"
    if grad_buffer is not None and rounds_each_chunk:
        method, why = "recompute", f"grad_buffer is {grad_buffer.dtype}"
    elif head.device.type == "cuda" and head.needs_weight and grad_buffer is None:
        accumulator = head.weight.numel() * head.accumulator_dtype.itemsize
        total = torch.cuda.get_device_properties(head.device).total_memory
        if accumulator > total // 8:
            method = "recompute"
            why = f"an fp32 gradient of the head takes {accumulator // MIB} of {total // MIB} MiB"
    method = "single_pass" if method == "auto" else method
    logger.debug("linear_grpo_loss: method %s (%s)", method, why)
    return method


def _check_grad_buffer(head: Head, grad_buffer: Tensor | None, grad_scale: float) -> None:
    if grad_buffer is None:
        if grad_scale != 1.0:
            raise ValueError(f"grad_scale={grad_scale} belongs to grad_buffer, which was not given")
        return
    check_tensor(grad_buffer=grad_buffer)
    if grad_buffer.shape != head.weight.shape or not grad_buffer.is_floating_point():
        raise ValueError(
            f"grad_buffer must be floating-point {tuple(head.weight.shape)} as weight is, got "
            f"{tuple(grad_buffer.shape)} {grad_buffer.dtype}"
        )
    check_device(head.device, grad_buffer=grad_buffer)
    if not math.isfinite(grad_scale):
        raise ValueError(f"grad_scale must be a finite number, got {grad_scale}")
