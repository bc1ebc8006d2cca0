"""The loss from log-probs on, in torch: the one torch text of every loss.

B sequences, T positions, N tokens (B * T, or packed). The formulas are those of the papers named
in `GRPOLossConfig`; `kernels/README.md` derives the gradients.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple, Unpack

import torch
from torch import Tensor

from ._checks import check_tensor
from ._inputs import ACTIVE, TokenBatch, flatten
from ._layout import check_device
from ._reduce import RowResults, reduce_rows
from .config import LOG_MAX, LOG_MIN, MAX_EXPONENT, GRPOLossConfig, GRPOLossOutput, LossArguments


class _CapExponent(torch.autograd.Function):
    """min(x, MAX_EXPONENT) with derivative 1: exp and its derivative stop growing together."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clamp(max=MAX_EXPONENT)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad


def _cap_exponent(x: Tensor) -> Tensor:
    return _CapExponent.apply(x)  # pyright: ignore[reportReturnType]


class Objective(NamedTuple):
    """What a loss type says of a token, given its log-ratio or that of its sequence."""

    loss_N: Tensor
    report_N: Tensor  # -1 clipped below, +1 clipped above, 0 not clipped; vespo: the weight


def clip_objective(
    log_ratio_N: Tensor,
    token_log_ratio_N: Tensor,
    logps_N: Tensor,
    advantages_N: Tensor,
    config: GRPOLossConfig,
) -> Objective:
    """Return -min(min(r, delta) A, clip(r, 1 - epsilon_low, 1 + epsilon_high) A).

    PPO's clipped surrogate (arXiv 1707.06347) with separate bounds (DAPO) and INTELLECT-2's delta.
    """
    low, high = 1 - config.epsilon_low, 1 + config.epsilon_high
    ratio_N = _exp(log_ratio_N)
    unclipped_N = ratio_N if config.delta is None else ratio_N.clamp(max=config.delta)
    loss_N = -torch.minimum(unclipped_N * advantages_N, ratio_N.clamp(low, high) * advantages_N)
    return Objective(loss_N, _clipped(ratio_N, low, high, advantages_N))


def cispo_objective(
    log_ratio_N: Tensor,
    token_log_ratio_N: Tensor,
    logps_N: Tensor,
    advantages_N: Tensor,
    config: GRPOLossConfig,
) -> Objective:
    """Return -sg(bounded r) A lp: a clipped token keeps a gradient (MiniMax-M1)."""
    low, high = _cispo_bounds(config)
    ratio_N = _exp(log_ratio_N.detach())
    loss_N = -ratio_N.clamp(low, high) * advantages_N * logps_N
    return Objective(loss_N, _clipped(ratio_N, low, high, advantages_N))


def sapo_objective(
    log_ratio_N: Tensor,
    token_log_ratio_N: Tensor,
    logps_N: Tensor,
    advantages_N: Tensor,
    config: GRPOLossConfig,
) -> Objective:
    """Return -A sigmoid(tau (r - 1)) 4 / tau: a gate that closes softly (SAPO)."""
    tau_N = torch.full_like(advantages_N, config.sapo_temperature_neg)
    tau_N.masked_fill_(advantages_N > 0, config.sapo_temperature_pos)
    gate_N = torch.sigmoid(tau_N * (_exp(log_ratio_N) - 1)) * 4 / tau_N
    return Objective(-gate_N * advantages_N, torch.zeros_like(advantages_N))


def vespo_objective(
    log_ratio_N: Tensor,
    token_log_ratio_N: Tensor,
    logps_N: Tensor,
    advantages_N: Tensor,
    config: GRPOLossConfig,
) -> Objective:
    """Return -sg(phi) A lp, phi = exp(lambda + k log w - lambda w) of the sequence's w (VESPO)."""
    log_w_N = log_ratio_N.detach().clamp(LOG_MIN, LOG_MAX)
    not_negative_N = advantages_N >= 0
    k_N = torch.full_like(log_w_N, config.vespo_k_neg)
    k_N.masked_fill_(not_negative_N, config.vespo_k_pos)
    lambda_N = torch.full_like(log_w_N, config.vespo_lambda_neg)
    lambda_N.masked_fill_(not_negative_N, config.vespo_lambda_pos)
    phi_N = (k_N * log_w_N - lambda_N * log_w_N.expm1()).exp()
    return Objective(-phi_N * advantages_N * logps_N, phi_N)


def gmpo_objective(
    log_ratio_N: Tensor,
    token_log_ratio_N: Tensor,
    logps_N: Tensor,
    advantages_N: Tensor,
    config: GRPOLossConfig,
) -> Objective:
    """Return -exp(mean of the clipped log-ratios) A: their geometric mean (GMPO)."""
    clip = config.gmpo_clip
    clipped_N = _clipped(token_log_ratio_N, -clip, clip, advantages_N)
    return Objective(-_exp(log_ratio_N) * advantages_N, clipped_N)


OBJECTIVES = {
    "grpo": clip_objective,
    "bnpo": clip_objective,
    "dr_grpo": clip_objective,
    "dapo": clip_objective,
    "luspo": clip_objective,
    "cispo": cispo_objective,
    "sapo": sapo_objective,
    "vespo": vespo_objective,
    "gmpo": gmpo_objective,
}


def sequence_log_ratios(log_ratio_N: Tensor, batch: TokenBatch, config: GRPOLossConfig) -> Tensor:
    """Return the log-ratio of each token's sequence.

    GSPO: the mean over counted tokens. GMPO: the mean of clipped ones over the tokens of the
    entropy mask. VESPO: the sum, bounded token by token, plus the sampler correction.
    """
    layout, weight_N = batch.layout, batch.mask_N
    if config.loss_type == "vespo":
        bounded_N = log_ratio_N.detach().clamp(-LOG_MAX, LOG_MAX)
        sum_B = layout.sum_sequences(_counted(bounded_N, batch.mask_N))
        if batch.log_correction_B is not None:
            sum_B = sum_B + batch.log_correction_B
        return layout.spread(sum_B)
    if config.loss_type == "gmpo":
        clip = config.gmpo_clip
        log_ratio_N = torch.where(
            batch.advantages_N > 0, log_ratio_N.clamp(max=clip), log_ratio_N.clamp(min=-clip)
        )
        if batch.ratio_mask_N is not None:
            weight_N = _counted(batch.ratio_mask_N, batch.mask_N)
    if weight_N is None:
        weight_N = torch.ones_like(log_ratio_N)
    weight_N = weight_N.to(log_ratio_N.dtype)
    length_B = layout.sum_sequences(weight_N).clamp(min=1)
    mean_B = layout.sum_sequences(_counted(log_ratio_N, batch.mask_N) * weight_N) / length_B
    # In fp64, since the derivative of this is a sum over the tokens, one after the other.
    return layout.spread(mean_B.double()).to(mean_B.dtype)


def kl_divergence(ref_logps_N: Tensor, logps_N: Tensor, config: GRPOLossConfig) -> Tensor:
    """Return an estimate with x = ref - logp (joschu.net/blog/kl-approx.html).

    k1 = -x, k2 = x^2 / 2, k3 = exp(x) - x - 1.
    """
    x_N = ref_logps_N - logps_N
    if config.kl_estimator == "k1":
        return -x_N
    if config.kl_estimator == "k2":
        return x_N.square() / 2
    return _cap_exponent(x_N).expm1() - x_N


def policy_loss(
    logps: Tensor,  # (B, T) or (N,), with the graph
    advantages: Tensor,  # (B,) one a sequence, or (B, T) / (N,) one a token
    *,
    entropy: Tensor | None = None,  # like logps, with the graph if entropy_coef is not 0
    config: GRPOLossConfig = GRPOLossConfig(),
    **arguments: Unpack[LossArguments],
) -> GRPOLossOutput:
    """Compute the GRPO loss from log-probs, by torch autograd: for trainers that have them already.

    Args:
        logps: log-probs of the completion's tokens under the policy, temperature applied.
        advantages: of each sequence, or of each token.
        entropy: of each token's distribution; needed for an entropy bonus, else only reported.
        config: the mathematics; temperature, scale and softcap are in `logps` already.
        **arguments: mask, log-probs, denominators: as in `linear_grpo_loss`.

    Returns:
        The loss, differentiable to `logps`, and the metrics; `.logps` and `.entropy` are the
        inputs, detached, 0 where masked.

    Raises:
        ValueError: a shape, device or value does not fit.
    """
    check_tensor(logps=logps)
    dtype = torch.promote_types(logps.dtype, torch.float32)
    batch = flatten(logps, advantages, logps.device, dtype, config=config, **arguments)
    if entropy is None and config.entropy_coef:
        raise ValueError(f"entropy_coef={config.entropy_coef} needs the entropies of the tokens")
    check_device(logps.device, entropy=entropy)
    entropy_N = torch.zeros_like(logps) if entropy is None else entropy
    rows = policy_rows(
        logps.reshape(-1).to(dtype),
        batch.layout.like_tokens("entropy", entropy_N).to(dtype),
        batch,
        config,
    )
    wants_gradient = logps.requires_grad and torch.is_grad_enabled()
    gradient_rows = (batch.state_N == ACTIVE).sum() if wants_gradient else 0
    loss, metrics = reduce_rows(
        rows, batch, config, num_computed_rows=logps.numel(), num_gradient_rows=gradient_rows
    )
    if entropy is None:
        del metrics["entropy"]
    return GRPOLossOutput(
        loss, rows.logps_N.view(logps.shape), rows.entropy_N.view(logps.shape), metrics
    )


def policy_rows(
    logps_N: Tensor, entropy_N: Tensor, batch: TokenBatch, config: GRPOLossConfig
) -> RowResults:
    """Return what every row contributes, 0 where masked, `loss_N` with its graph.

    A loss that couples rows needs whole sequences, those of `batch.layout`.
    """
    # What stands behind the mask is replaced before anything is computed from it: the derivative
    # of a NaN is NaN even where its value is not used.
    vectors = {
        name: None if value is None else _counted(value, batch.mask_N)
        for name, value in vars(batch).items()
        if name in ("advantages_N", "old_logps_N", "ref_logps_N", "policy_weight_N")
    }
    batch = replace(batch, **vectors)
    logps_N = _counted(logps_N, batch.mask_N)
    entropy_N = _counted(entropy_N, batch.mask_N)
    old_logps_N = logps_N.detach() if batch.old_logps_N is None else batch.old_logps_N
    token_log_ratio_N = log_ratio_N = logps_N - old_logps_N
    if config.couples_rows:
        log_ratio_N = sequence_log_ratios(token_log_ratio_N, batch, config)
    policy_N, report_N = OBJECTIVES[config.loss_type](
        log_ratio_N, token_log_ratio_N, logps_N, batch.advantages_N, config
    )
    if batch.policy_weight_N is not None:
        policy_N = policy_N * batch.policy_weight_N
    loss_N, kl_N = policy_N, None
    if batch.ref_logps_N is not None:
        kl_N = kl_divergence(batch.ref_logps_N, logps_N, config)
        if config.use_bias_correction_kl:
            by_sequence = config.importance_sampling_level == "sequence"
            kl_N = kl_N * _exp(log_ratio_N if by_sequence else token_log_ratio_N)
        loss_N = loss_N + config.beta * kl_N
        kl_N = _counted(kl_N.detach(), batch.mask_N)
    if batch.row_weight_N is not None:
        loss_N = loss_N * batch.row_weight_N
    if batch.entropy_weight_N is not None:
        loss_N = loss_N - batch.entropy_weight_N * entropy_N
    return RowResults(
        logps_N=logps_N.detach(),
        entropy_N=entropy_N.detach(),
        loss_N=_counted(loss_N, batch.mask_N),
        policy_N=_counted(policy_N.detach(), batch.mask_N),
        kl_N=kl_N,
        report_N=_counted(report_N.detach(), batch.mask_N),
    )


def _counted(values_N: Tensor, mask_N: Tensor | None) -> Tensor:
    return values_N if mask_N is None else torch.where(mask_N, values_N, 0)


def _exp(log_ratio_N: Tensor) -> Tensor:
    return _cap_exponent(log_ratio_N).exp()


def _clipped(values_N: Tensor, low: float, high: float, advantages_N: Tensor) -> Tensor:
    """Return -1 where the lower bound holds a token back, +1 where the upper one does."""
    below_N = (values_N < low) & (advantages_N < 0)
    above_N = (values_N > high) & (advantages_N > 0)
    return above_N.to(advantages_N.dtype) - below_N.to(advantages_N.dtype)


def _cispo_bounds(config: GRPOLossConfig) -> tuple[float, float]:
    if config.cispo_bounds == "trl":
        return 0.0, config.epsilon_high
    return 1 - config.epsilon_low, 1 + config.epsilon_high
