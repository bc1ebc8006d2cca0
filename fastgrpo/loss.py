"""From a batch to the fused loss: the only caller of the kernels in the trainer."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgrpo_kernels import GRPOLossConfig, GRPOLossOutput, linear_grpo_loss, linear_logps

from .batch import Batch
from .model import Policy


def batch_loss(
    policy: Policy,
    batch: Batch,
    config: GRPOLossConfig,
    step: Batch,
) -> GRPOLossOutput:
    """Return a micro-batch's share of the step's loss, with its graph.

    Args:
        policy: the model being trained.
        batch: the micro-batch.
        config: the mathematics of the loss.
        step: the batch of the whole optimisation step, whose counts are the denominators.
    """
    lengths = step.completion_lengths
    counted = sum(length > 0 for length in lengths) if config.skip_empty_sequences else len(lengths)
    with policy.autocast():
        return linear_grpo_loss(
            _completion_states(policy, batch),
            policy.head_weight,
            batch.completion_ids,
            batch.advantages,
            bias=policy.head_bias,
            completion_mask=batch.completion_mask,
            old_logps=batch.old_logps,
            ref_logps=batch.ref_logps,
            num_items_in_batch=step.num_completion_tokens,
            num_sequences_in_batch=counted,
            # The entropy of bnpo is, as its loss, a mean of the micro-batch.
            entropy_denominator=None if config.loss_type == "bnpo" else step.num_completion_tokens,
            config=config,
        )


@torch.no_grad()
def batch_logps(policy: Policy, batch: Batch, micro_batch_size: int, temperature: float) -> Tensor:
    """Return the log-probs (B, T) of a batch's completions, 0 where masked."""
    policy.model.eval()  # as when sampling: no dropout
    logps_BT = torch.zeros_like(batch.sampling_logps)
    first = 0
    for micro in batch.split(micro_batch_size):
        with policy.autocast():
            logps, _ = linear_logps(
                _completion_states(policy, micro),
                policy.head_weight,
                micro.completion_ids,
                bias=policy.head_bias,
                mask=micro.completion_mask,
                temperature=temperature,
            )
        logps_BT[first : first + len(micro), : logps.shape[1]] = logps
        first += len(micro)
    return logps_BT


def sampling_difference(logps: Tensor, batch: Batch) -> dict[str, Tensor]:
    """Return how far the log-probs (B, T) in training are from those of the sampler.

    About 0.01 is rounding under bf16; much more means that the sampler ran on other weights.
    """
    difference_BT = (logps - batch.sampling_logps).abs()
    return {
        "sampling/sampling_logp_difference/mean": difference_BT.sum() / batch.num_completion_tokens,
        "sampling/sampling_logp_difference/max": difference_BT.max(),
    }


def _completion_states(policy: Policy, batch: Batch) -> Tensor:
    """Return the hidden states (B, T, H) that predict the completion's tokens: a strided view."""
    hidden_BLH = policy.hidden_states(batch.input_ids, batch.attention_mask)
    return hidden_BLH[:, -batch.completion_ids.shape[1] - 1 : -1]
