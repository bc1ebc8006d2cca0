"""The loss from log-probs on, in torch: the one torch text of every loss.

B sequences, T positions, N tokens (B * T, or packed). The formulas are those of the papers named
in `GRPOLossConfig`; `kernels/README.md` derives the gradients.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, Unpack

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._inputs import ACTIVE, TokenBatch, flat_mask, flatten
from ._layout import Layout, check_device
from ._reduce import RowResults, reduce_rows
from .config import GRPOLossConfig, GRPOLossOutput, LossArguments

# exp of more than this is not needed to see that policies have drifted apart, and overflows soon.
MAX_EXPONENT = 60.0


class TokenLosses(NamedTuple):
    """What a token contributes."""

    policy_N: Tensor  # the clipped policy-gradient term times its weight
    kl_N: Tensor | None
    clip_N: Tensor  # int8: -1 clipped below, +1 clipped above


class _CapExponent(torch.autograd.Function):
    """min(x, MAX_EXPONENT) with derivative 1: exp and its derivative stop growing together."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clamp(max=MAX_EXPONENT)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad


def _cap_exponent(x: Tensor) -> Tensor:
    return _CapExponent.apply(x)  # pyright: ignore[reportReturnType]


def clip_objective(
    log_ratio_N: Tensor, advantages_N: Tensor, config: GRPOLossConfig
) -> tuple[Tensor, Tensor]:
    """Return -min(min(r, delta) A, clip(r, 1 - epsilon_low, 1 + epsilon_high) A) and what clipped.

    PPO's clipped surrogate (arXiv 1707.06347) with separate bounds (DAPO) and INTELLECT-2's delta.
    """
    low, high = 1 - config.epsilon_low, 1 + config.epsilon_high
    ratio_N = _cap_exponent(log_ratio_N).exp()
    unclipped_N = ratio_N if config.delta is None else ratio_N.clamp(max=config.delta)
    loss_N = -torch.minimum(unclipped_N * advantages_N, ratio_N.clamp(low, high) * advantages_N)
    below_N = (ratio_N < low) & (advantages_N < 0)
    above_N = (ratio_N > high) & (advantages_N > 0)
    return loss_N, above_N.to(torch.int8) - below_N.to(torch.int8)


def kl_k3(ref_logps_N: Tensor, logps_N: Tensor) -> Tensor:
    """Return exp(x) - x - 1 with x = ref - logp, never negative (joschu.net/blog/kl-approx)."""
    x_N = ref_logps_N - logps_N
    return _cap_exponent(x_N).expm1() - x_N


def token_losses(
    logps_N: Tensor,
    advantages_N: Tensor,
    old_logps_N: Tensor | None,
    ref_logps_N: Tensor | None,
    policy_weight_N: Tensor | None,
    config: GRPOLossConfig,
) -> TokenLosses:
    """Return each token's contribution, differentiable to `logps_N`."""
    old_logps_N = logps_N.detach() if old_logps_N is None else old_logps_N
    policy_N, clip_N = clip_objective(logps_N - old_logps_N, advantages_N, config)
    if policy_weight_N is not None:
        policy_N = policy_N * policy_weight_N
    kl_N = None if ref_logps_N is None else kl_k3(ref_logps_N, logps_N)
    return TokenLosses(policy_N, kl_N, clip_N)


def policy_loss(
    logps: Tensor,  # (B, T) or (N,), with the graph
    advantages: Tensor,  # (B,) one a sequence, or (B, T) / (N,) one a token
    *,
    entropy: Tensor | None = None,  # like logps
    config: GRPOLossConfig = GRPOLossConfig(),
    **arguments: Unpack[LossArguments],
) -> GRPOLossOutput:
    """Compute the GRPO loss from log-probs, by torch autograd: for trainers that have them already.

    Args:
        logps: log-probs of the completion's tokens under the policy, temperature applied.
        advantages: of each sequence, or of each token.
        entropy: of each token's distribution; only reported.
        config: the mathematics; its temperature is in `logps` already.
        **arguments: mask, log-probs, denominators: as in `linear_grpo_loss`.

    Returns:
        The loss, differentiable to `logps`, and the metrics; `.logps` and `.entropy` are the
        inputs, detached, 0 where masked.

    Raises:
        ValueError: a shape, device or value does not fit.
    """
    dtype = torch.promote_types(logps.dtype, torch.float32)
    batch = flatten(logps, advantages, logps.device, dtype, config=config, **arguments)
    layout = Layout(logps, arguments.get("cu_seqlens"))
    entropy_N = torch.zeros_like(logps) if entropy is None else entropy.detach()
    rows = policy_rows(
        logps.reshape(-1).to(dtype),
        layout.like_tokens("entropy", entropy_N).to(dtype),
        batch,
        config,
    )
    wants_gradient = logps.requires_grad and torch.is_grad_enabled()
    gradient_rows = (batch.state_N == ACTIVE).sum() if wants_gradient else 0
    loss, metrics = reduce_rows(
        rows, batch, num_computed_rows=logps.numel(), num_gradient_rows=gradient_rows
    )
    if entropy is None:
        del metrics["entropy"]
    return GRPOLossOutput(
        loss, rows.logps_N.view(logps.shape), rows.entropy_N.view(logps.shape), metrics
    )


def policy_rows(
    logps_N: Tensor, entropy_N: Tensor, batch: TokenBatch, config: GRPOLossConfig
) -> RowResults:
    """Return what every row contributes, 0 where masked, `loss_N` with its graph."""

    def counted(values_N: Tensor) -> Tensor:
        return values_N if batch.mask_N is None else torch.where(batch.mask_N, values_N, 0)

    def counted_if_given(values_N: Tensor | None) -> Tensor | None:
        return None if values_N is None else counted(values_N)

    # What stands behind the mask is replaced before anything is computed from it: the derivative
    # of a NaN is NaN even where its value is not used.
    logps_N = counted(logps_N)
    policy_N, kl_N, clip_N = token_losses(
        logps_N,
        counted(batch.advantages_N),
        counted_if_given(batch.old_logps_N),
        counted_if_given(batch.ref_logps_N),
        counted_if_given(batch.policy_weight_N),
        config,
    )
    loss_N = policy_N if kl_N is None else policy_N + config.beta * kl_N
    if batch.row_weight_N is not None:
        loss_N = loss_N * batch.row_weight_N
    return RowResults(logps_N.detach(), counted(entropy_N), counted(loss_N), policy_N, kl_N, clip_N)


def importance_weights(
    logps: Tensor,  # (B, T) or (N,): log-probs of the trainer's model at sampling time
    sampling_logps: Tensor,  # like logps: log-probs the sampler reported; NaN = not known
    *,
    completion_mask: Tensor | None = None,  # like logps
    cu_seqlens: Tensor | None = None,  # (B + 1,), packed layout
    mode: Literal[
        "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"
    ] = "token_truncate",
    clip_min: float = 0.0,
    clip_max: float = 3.0,
) -> Tensor:
    """Return exp(logps - sampling_logps), bounded: corrects for a sampler that is not the policy.

    `truncate` clamps to [clip_min, clip_max] (TIS, fengyao.notion.site/off-policy-rl); `mask` sets
    what is outside to 0 (IcePop/MIS). `sequence` uses one ratio, that of all counted tokens of the
    sequence together, at each of its tokens.

    Returns:
        fp32, like `logps`, detached: an `importance_sampling_ratio`.

    Raises:
        ValueError: an unknown mode, bounds out of order or shapes that do not fit.
    """
    modes = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
    if mode not in modes:
        raise ValueError(f"mode must be one of {', '.join(modes)}, got {mode!r}")
    if not 0 <= clip_min < clip_max:
        raise ValueError(f"0 <= clip_min < clip_max must hold, got {clip_min} and {clip_max}")
    by_sequence = mode.startswith("sequence")
    difference_N, layout = _sampler_difference(
        logps, sampling_logps, completion_mask, cu_seqlens, by_sequence
    )
    if by_sequence:
        difference_N = layout.per_token("difference", layout.sum_sequences(difference_N))
    ratio_N = difference_N.clamp(max=MAX_EXPONENT).exp()
    if mode.endswith("truncate"):
        ratio_N = ratio_N.clamp(clip_min, clip_max)
    else:
        ratio_N = torch.where((ratio_N >= clip_min) & (ratio_N <= clip_max), ratio_N, 0)
    return ratio_N.view(logps.shape)


def off_policy_mask(
    logps: Tensor,  # (B, T) or (N,)
    sampling_logps: Tensor,  # like logps
    advantages: Tensor,  # (B,)
    *,
    threshold: float,
    completion_mask: Tensor | None = None,  # like logps
    cu_seqlens: Tensor | None = None,  # (B + 1,), packed layout
) -> Tensor:
    """Return 0 for sequences to drop, 1 for the rest (DeepSeek-V3.2, off-policy sequence masking).

    A sequence is dropped when its advantage is negative and the mean over its counted tokens of
    `sampling_logps - logps` is above `threshold` (in nats).

    Returns:
        (B,) fp32: a `policy_weight`.

    Raises:
        ValueError: shapes that do not fit.
    """
    difference_N, layout = _sampler_difference(
        logps, sampling_logps, completion_mask, cu_seqlens, by_sequence=True
    )
    if tuple(advantages.shape) != (layout.num_sequences,):
        raise ValueError(
            f"advantages must be one per sequence ({layout.num_sequences},), "
            f"got {tuple(advantages.shape)}"
        )
    mask_N = flat_mask(layout, "completion_mask", completion_mask)
    counted_N = torch.ones_like(difference_N) if mask_N is None else mask_N.to(torch.float32)
    length_B = layout.sum_sequences(counted_N).clamp(min=1)
    drift_B = -layout.sum_sequences(difference_N) / length_B
    return 1 - ((advantages < 0) & (drift_B > threshold)).to(torch.float32)


def top_entropy_mask(
    entropy: Tensor,  # (B, T) or (N,)
    *,
    quantile: float,
    completion_mask: Tensor | None = None,  # like entropy
) -> Tensor:
    """Return 1 for the share `quantile` of counted tokens with the highest entropy, else 0.

    Keeps tokens at or above the (1 - quantile) quantile of this call (arXiv 2506.01939).

    Returns:
        fp32, like `entropy`: an `entropy_mask`.

    Raises:
        ValueError: `quantile` outside (0, 1] or shapes that do not fit.
    """
    if not 0 < quantile <= 1:
        raise ValueError(f"quantile must be in (0, 1], got {quantile}")
    layout = Layout(entropy)
    mask_N = flat_mask(layout, "completion_mask", completion_mask)
    entropy_N = entropy.detach().reshape(-1).float()
    if mask_N is None:
        mask_N = torch.ones_like(entropy_N, dtype=torch.bool)
    if not mask_N.any():
        return torch.zeros_like(entropy, dtype=torch.float32)
    threshold = entropy_N[mask_N].nanquantile(1 - quantile)  # NaN: not computed
    return ((entropy_N >= threshold) & mask_N).to(torch.float32).view(entropy.shape)


def _sampler_difference(
    logps: Tensor,
    sampling_logps: Tensor,
    completion_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    by_sequence: bool,
) -> tuple[Tensor, Layout]:
    """Return logps - sampling_logps (N,) in fp32, 0 where masked or not known, and the layout."""
    check_device(
        logps.device,
        sampling_logps=sampling_logps,
        completion_mask=completion_mask,
        cu_seqlens=cu_seqlens,
    )
    layout = Layout(logps, cu_seqlens)
    if by_sequence and layout.num_sequences is None:
        raise ValueError("one weight per sequence needs cu_seqlens, or logps as (B, T)")
    sampling_N = layout.like_tokens("sampling_logps", sampling_logps.detach()).float()
    difference_N = logps.detach().reshape(-1).float() - sampling_N
    known_N = ~sampling_N.isnan()
    mask_N = flat_mask(layout, "completion_mask", completion_mask)
    if mask_N is not None:
        known_N &= mask_N
    return torch.where(known_N, difference_N, 0), layout
