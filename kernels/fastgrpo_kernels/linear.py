"""The loss from hidden states: a chunk loop around the matrix products and the row step.

For every chunk of rows: logits into one reused buffer, the row step writes their gradient over
them, and two more products take it to the hidden states and to the weight. The gradient is known
when the loss is, so nothing is recomputed: 6NHV FLOPs in all, 2NHV each. Autograd's backward only
multiplies by the upstream scalar.

B sequences, T positions, N tokens (B * T, or packed), C rows of a chunk, H hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Literal, Unpack

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._backend import row_backend, runs_eagerly
from ._head import Head, HeadGradients, RowPlan, scaled
from ._inputs import COUNTED, check_ids, flat_mask, flatten, upstream_vectors
from ._layout import Layout, check_device, flat
from ._reduce import RowResults, reduce_rows
from .config import GRPOLossConfig, GRPOLossOutput, LossArguments


@runs_eagerly
def linear_grpo_loss(
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
        hidden: last hidden states, bf16, fp16 or fp32; strided views are fine.
        weight: the LM head in the same type (any under autocast); a frozen one costs no product.
        completion_ids: the tokens that were sampled.
        advantages: may be on the CPU. A token whose advantage is 0 gets no gradient products when
            beta is 0.
        bias: of the LM head.
        method: "single_pass" (6NHV); "auto" is that. "recompute" is not built yet.
        chunk_rows: rows whose logits exist at a time; None: as many as fit the byte budget
            (256 MiB on a CPU, 1/32 of a GPU's memory).
        statistics: "all": log-prob and entropy of every counted token. "active": only of those
            with a gradient; the rest is NaN, the metrics are means over the computed rows.
        skip_rows: leave out what cannot contribute, at the price of one host synchronisation
            (none if mask and advantages are on the CPU). False: compute every row.
        fp32_logits: not built yet.
        grad_buffer: not built yet.
        grad_scale: belongs to grad_buffer.
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
            num_items_in_batch: counted tokens of the whole optimisation step, for `dapo`.
            num_sequences_in_batch: sequences of the whole step, for `grpo` and `dr_grpo`.
            entropy_denominator: of the entropy bonus.

    Returns:
        The loss (differentiable to hidden, weight and bias), log-probs, entropies and metrics.

    Raises:
        ValueError: shapes, types, devices or values that do not fit; the message holds them.
        TypeError: an unknown argument, or something else than a tensor.
        NotImplementedError: an option that is not built yet, by name.
    """
    _check_choice("method", method, ("auto", "single_pass", "recompute"))
    _check_choice("statistics", statistics, ("all", "active"))
    if statistics == "active" and not skip_rows:
        raise ValueError("statistics='active' skips rows: it needs skip_rows=True")
    _refuse_unbuilt(
        method=method == "recompute", fp32_logits=fp32_logits, grad_buffer=grad_buffer is not None
    )
    if grad_scale != 1.0:
        raise ValueError(f"grad_scale={grad_scale} belongs to grad_buffer, which was not given")
    head = Head(hidden, weight, bias, completion_ids)
    batch = flatten(
        completion_ids, advantages, head.device, head.accumulator_dtype, config=config, **arguments
    )
    check_ids(batch.ids_N, batch.mask_N, head.vocabulary)
    row_step = row_backend(backend, head.device, head.dtype)
    plan = RowPlan(batch, head.wants_gradient, statistics, skip_rows)
    chunk = head.chunk_rows(chunk_rows, plan.num_computed, row_step)

    rows = RowResults.zeros(
        batch.ids_N.numel(), batch.ref_logps_N is not None, head.device, head.accumulator_dtype
    )
    with torch.no_grad(), torch.autocast(head.device.type, enabled=False):
        # dX is rounded to its type with the mantissa of 1 / denominator on it; the power of two,
        # which would take fp16 below its smallest number, is exact and waits for the upstream.
        weight_scale = 1 / batch.denominator
        mantissa, exponent = torch.frexp(weight_scale)
        gradients = HeadGradients(head, mantissa)
        # Computed or not, a masked row must not reach the gradient of the weight: 0 * NaN is NaN.
        kept_N = None if plan.skips_masked else batch.mask_N
        for part, tokens, hidden_CH, logits_CV in head.chunks(
            plan.parts, plan.order_N, chunk, kept_N
        ):
            with_gradient = part == 0
            dlogits_CV = logits_CV if with_gradient else None
            row_step.loss_rows(logits_CV, dlogits_CV, tokens, batch, rows, config)
            if with_gradient:
                gradients.add(tokens, logits_CV, hidden_CH)
        loss, metrics = reduce_rows(
            rows,
            batch,
            num_computed_rows=plan.num_computed,
            num_gradient_rows=plan.num_gradient,
            mean_over=plan.num_computed if statistics == "active" else None,
        )
        if statistics == "active":
            skipped_N = (batch.state_N == COUNTED).to(head.device)
            rows.logps_N.masked_fill_(skipped_N, torch.nan)
            rows.entropy_N.masked_fill_(skipped_N, torch.nan)
    if head.wants_gradient:
        loss = _KnownGradients.apply(
            loss,
            torch.ldexp(torch.ones_like(mantissa), exponent),
            weight_scale,
            hidden,
            weight,
            bias,
            gradients,
        )
    shape = completion_ids.shape
    return GRPOLossOutput(loss, rows.logps_N.view(shape), rows.entropy_N.view(shape), metrics)


@runs_eagerly
def linear_logps(
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
        logit_scale: only 1 is built yet.
        logit_softcap: only None is built yet.
        chunk_rows: rows whose logits exist at a time; None: as many as fit the byte budget.
        backend: "triton", "torch" or "auto".

    Returns:
        Log-probs and entropies (in nats), fp32, like `ids`, 0 where masked.

    Raises:
        ValueError: shapes, types, devices or values that do not fit; the message holds them.
        NotImplementedError: an option that is not built yet, by name.
    """
    GRPOLossConfig(temperature=temperature, logit_scale=logit_scale, logit_softcap=logit_softcap)
    head = Head(hidden, weight, bias, ids)
    mask_N = flat_mask(Layout(ids), "mask", mask)
    check_device(head.device, ids=ids)
    tokens_K = None if mask_N is None else mask_N.nonzero()[:, 0].to(head.device)
    mask_N = None if mask_N is None else mask_N.to(head.device)
    check_ids(ids.reshape(-1), mask_N, head.vocabulary)
    row_step = row_backend(backend, head.device, head.dtype)
    num_rows = ids.numel() if tokens_K is None else len(tokens_K)
    logps_N, entropy_N = _LinearLogps.apply(
        head.hidden,
        head.weight,
        head.bias,
        flat(ids),
        tokens_K,
        num_rows,
        temperature,
        head.chunk_rows(chunk_rows, num_rows, row_step),
        row_step,
    )  # pyright: ignore[reportGeneralTypeIssues]
    return logps_N.view(ids.shape), entropy_N.view(ids.shape)


class _KnownGradients(torch.autograd.Function):
    """A loss whose gradients were computed with it; backward scales them by the upstream."""

    @staticmethod
    def forward(ctx, loss, hidden_scale, weight_scale, hidden, weight, bias, gradients):
        ctx.save_for_backward(
            hidden_scale, weight_scale, gradients.dhidden, gradients.dweight_VH, gradients.dbias_V
        )
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        hidden_scale, weight_scale, dhidden, dweight_VH, dbias_V = ctx.saved_tensors
        hidden_dtype, weight_dtype, bias_dtype = ctx.dtypes
        return (
            None,
            None,
            None,
            scaled(dhidden, upstream * hidden_scale, hidden_dtype),
            scaled(dweight_VH, upstream * weight_scale, weight_dtype),
            scaled(dbias_V, upstream * weight_scale, bias_dtype),
            None,
        )


class _LinearLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, ids_N, tokens_K, num_rows, temperature, chunk, row_step):
        ctx.save_for_backward(hidden, weight, bias, ids_N, tokens_K)
        ctx.options = num_rows, temperature, chunk, row_step
        ctx.set_materialize_grads(False)  # a loss without the entropy does not pay for its gradient
        head = Head(hidden, weight, bias, None)
        logps_N = torch.zeros(ids_N.shape, device=head.device, dtype=head.accumulator_dtype)
        entropy_N = torch.zeros_like(logps_N)
        with torch.autocast(head.device.type, enabled=False):
            for _, tokens, _, logits_CV in head.chunks([(0, num_rows)], tokens_K, chunk):
                row_step.logps_rows(logits_CV, tokens, ids_N, None, temperature, logps_N, entropy_N)
        return logps_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx, dlogps_N, dentropy_N):
        hidden, weight, bias, ids_N, tokens_K = ctx.saved_tensors
        num_rows, temperature, chunk, row_step = ctx.options
        head = Head(hidden, weight, bias, None, ctx.needs_input_grad[:3])
        gradients = HeadGradients(head, None)
        dlogps_N, dentropy_N = upstream_vectors(dlogps_N, dentropy_N)
        with torch.autocast(head.device.type, enabled=False):
            for _, tokens, hidden_CH, logits_CV in head.chunks([(0, num_rows)], tokens_K, chunk):
                row_step.dlogits_rows(
                    logits_CV, logits_CV, tokens, ids_N, None, temperature, dlogps_N, dentropy_N
                )
                gradients.add(tokens, logits_CV, hidden_CH)
        dweight = scaled(gradients.dweight_VH, None, weight.dtype)
        dbias = None if bias is None else scaled(gradients.dbias_V, None, bias.dtype)
        return gradients.dhidden, dweight, dbias, None, None, None, None, None, None


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def _refuse_unbuilt(**asked_for: bool) -> None:
    for name, asked in asked_for.items():
        if asked:
            raise NotImplementedError(f"{name} is not built yet: leave it at its default")
