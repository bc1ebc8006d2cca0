"""From a batch to the fused loss: the only caller of the kernels in the trainer.

N tokens of a batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fastgrpo_kernels import (
    GRPOLossConfig,
    GRPOLossOutput,
    importance_weights,
    linear_grpo_loss,
    linear_logps,
    off_policy_mask,
    top_entropy_mask,
)

from .batch import Batch
from .config.loss import LossOptions
from .config.rollout import RolloutOptions
from .model import Policy

SAMPLING_DIFFERENCE = (
    "sampling/sampling_logp_difference/mean",
    "sampling/sampling_logp_difference/max",
)


def batch_loss(
    policy: Policy,
    batch: Batch,
    config: GRPOLossConfig,
    step: Batch,
    *,
    options: LossOptions | None = None,
    num_passes: int = 1,
) -> GRPOLossOutput:
    """Return a micro-batch's share of the step's loss, with its graph.

    Args:
        policy: the model being trained, in its context `packing`.
        batch: the micro-batch.
        config: the mathematics of the loss; scale and softcap of the logits are the model's.
        step: the batch of the whole optimisation step, whose counts are the denominators.
        options: which tokens count; None: all.
        num_passes: micro-batches of the step, each of which has that share of a bonus over the
            tokens of the highest entropy.
    """
    head, tokens = policy.head, step.num_completion_tokens
    config = replace(config, logit_scale=head.logit_scale, logit_softcap=head.logit_softcap)
    with policy.autocast():  # and out of it, where the body's weights in bf16 are forgotten
        hidden_NH = policy.hidden_states(batch)
    # The entropy of bnpo is, as its loss, a mean of the micro-batch.
    entropy_denominator = None if config.loss_type == "bnpo" else tokens
    entropy_mask = policy_weight = None
    with policy.autocast():
        if options is not None and options.need_statistics:
            logps, entropy = _statistics(policy, hidden_NH.detach(), batch, config.temperature)
            mask = batch.mask.to(logps.device, non_blocking=True)
            if options.top_entropy_quantile < 1:
                entropy_mask = top_entropy_mask(
                    entropy, quantile=options.top_entropy_quantile, completion_mask=mask
                )
                if config.loss_type != "bnpo":
                    entropy_denominator = entropy_mask.sum() * num_passes
            if options.off_policy_mask_threshold is not None:
                policy_weight = off_policy_mask(
                    logps,
                    batch.sampling_logps.where(
                        # Of a token whose log-prob the sampler did not tell: that of its time.
                        ~batch.sampling_logps.isnan(),
                        logps if batch.old_logps is None else batch.old_logps,
                    ),
                    batch.sequence_advantages,
                    threshold=options.off_policy_mask_threshold,
                    completion_mask=mask,
                    cu_seqlens=batch.cu_seqlens,
                )
        return linear_grpo_loss(
            hidden_NH,
            head.weight,
            batch.targets,
            batch.advantages,
            bias=head.bias,
            completion_mask=batch.mask,
            cu_seqlens=batch.cu_seqlens,
            old_logps=batch.old_logps,
            ref_logps=batch.ref_logps,
            importance_sampling_ratio=batch.importance_weights,
            policy_weight=policy_weight,
            entropy_mask=entropy_mask,
            num_items_in_batch=tokens,
            num_sequences_in_batch=step.num_nonempty if config.skip_empty_sequences else len(step),
            entropy_denominator=entropy_denominator,
            config=config,
        )


@torch.no_grad()
def batch_logps(
    policy: Policy, batch: Batch, passes: Iterable[list[int]], temperature: float
) -> Tensor:
    """Return the log-probs (N,) of a batch's completions, 0 where masked.

    Args:
        policy: the model, or the reference.
        batch: the completions.
        passes: the sequences of each forward pass; those in none get 0. One without sequences runs
            for the sake of other ranks.
        temperature: divides the logits.
    """
    policy.model.eval()  # as when sampling: no dropout
    logps_N = torch.zeros_like(batch.sampling_logps)
    for rows in passes:
        micro = batch.select(rows) if rows else batch.without_effect()
        with policy.packing(), policy.autocast():
            logps, _ = _statistics(policy, policy.hidden_states(micro), micro, temperature)
        if rows:
            logps_N[batch.tokens_of(rows).to(logps_N.device, non_blocking=True)] = logps
    return logps_N


@torch.no_grad()
def _statistics(
    policy: Policy, hidden_NH: Tensor, batch: Batch, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return the log-prob of each target and the entropy it was drawn with, both (N,)."""
    head = policy.head
    return linear_logps(
        hidden_NH,
        head.weight,
        batch.targets,
        bias=head.bias,
        mask=batch.mask,
        temperature=temperature,
        logit_scale=head.logit_scale,
        logit_softcap=head.logit_softcap,
    )


def sampler_correction(batch: Batch, options: RolloutOptions) -> Tensor:
    """Return the weight (N,) of each token for a sampler that was not the policy (FORMULAS).

    `importance_weights` has the formula; by sequence every token has its sequence's weight.
    """
    assert batch.old_logps is not None
    low = options.vllm_importance_sampling_clip_min
    high = options.vllm_importance_sampling_clip_max
    weights = importance_weights(
        batch.old_logps,
        batch.sampling_logps,
        completion_mask=batch.mask.to(batch.old_logps.device),
        cu_seqlens=batch.cu_seqlens,
        mode=options.vllm_importance_sampling_mode,
        clip_min=0.0 if low is None else low,
        clip_max=torch.inf if high is None else high,
    )
    if options.vllm_importance_sampling_mode.startswith("token"):
        return weights
    lengths = torch.tensor(batch.lengths, device=weights.device)
    return weights.repeat_interleave(lengths, output_size=len(batch.input_ids))


def sampling_difference(logps: Tensor, batch: Batch) -> dict[str, Tensor]:
    """Return how far the log-probs (N,) in training are from those of the sampler.

    About 0.01 is rounding under bf16; much more means that the sampler ran on other weights.
    """
    mask_N = batch.mask.to(logps.device, non_blocking=True)
    difference_N = (logps - batch.sampling_logps).abs().masked_fill(~mask_N, 0.0)
    values = (difference_N.sum() / batch.num_completion_tokens, difference_N.max())
    return dict(zip(SAMPLING_DIFFERENCE, values, strict=True))


def importance_metrics(batch: Batch, rows: Sequence[int]) -> dict[str, float]:
    """Return the smallest, mean and largest importance weight of the tokens of some sequences."""
    if batch.importance_weights is None or not rows:
        return {}
    batch = batch.select(rows)
    assert batch.importance_weights is not None
    weights = batch.importance_weights[batch.mask.to(batch.importance_weights.device)]
    name = "sampling/importance_sampling_ratio"
    return {f"{name}/{what}": getattr(weights, what)().item() for what in ("min", "mean", "max")}
