"""What can be asked of the loss, and what it gives back."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Literal, TypedDict, get_args

from torch import Tensor

Number = int | float | Tensor

# Exponents stop here, in value and derivative: more is not needed to see that policies have drifted
# apart, and overflows soon.
MAX_EXPONENT = 60.0
# VESPO's bounds of a log-ratio.
LOG_MIN, LOG_MAX = math.log(1e-8), 20.0

LossType = Literal[
    "grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo", "gmpo"
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class GRPOLossConfig:
    """The mathematics of the loss; how it is computed is said by the arguments of the functions.

    Raises:
        ValueError: a value is outside its range, or two values exclude each other; names both.
    """

    loss_type: LossType = "dapo"
    """What a token contributes and how tokens are averaged.

    Clipped ratios: `grpo`, mean over sequences of the mean over their tokens (arXiv 2402.03300);
    `dapo`, mean over all tokens of the optimisation step (2503.14476); `bnpo`, mean over the tokens
    of this call; `dr_grpo`, sum over tokens, divided by sequences times `max_completion_length`
    (2503.20783); `luspo`, mean over sequences of the sum over their tokens (2602.05261).

    Others: `cispo`, log-prob times the capped, detached ratio, averaged as `dapo` (2506.13585);
    `sapo`, a sigmoid gate in place of the clip, averaged as `grpo` (2511.20347); `vespo`, log-prob
    times a detached weight of the sequence, averaged as `dapo` (2602.10693); `gmpo`, the geometric
    mean of the sequence's clipped ratios, averaged as `grpo` (2507.20673)."""
    importance_sampling_level: Literal["token", "sequence"] = "token"
    """Ratio of each token, or of the whole sequence (GSPO, 2507.18071). `vespo` and `gmpo` weigh
    sequences by themselves: "token" only."""
    epsilon_low: float = 0.2
    """The ratio is clipped below at 1 - epsilon_low."""
    epsilon_high: float = 0.2
    """The ratio is clipped above at 1 + epsilon_high (DAPO's clip-higher: 0.28)."""
    delta: float | None = None
    """Upper bound of the ratio in the unclipped branch of the clipped losses (INTELLECT-2); above
    1 + epsilon_high. The others have no such branch."""
    beta: float = 0.0
    """Weight of the KL divergence to the reference policy; at 0 the reference is never read."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of the KL divergence (joschu.net/blog/kl-approx.html); k3 is never negative."""
    use_bias_correction_kl: bool = False
    """Multiply the KL estimate by the ratio, with its gradient and without clipping
    (DeepSeek-V3.2). TRL's default is on, ours is off."""
    temperature: float = 1.0
    """Divides the logits; the temperature the completions were sampled with."""
    logit_scale: float = 1.0
    """Multiplies the logits before softcap and temperature (Cohere, Granite)."""
    logit_softcap: float | None = None
    """Cap c of c * tanh(logit / c) (Gemma)."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus: the mean entropy times this is subtracted from the loss."""
    max_completion_length: int | None = None
    """Tokens a completion may have; the constant in the denominator of `dr_grpo`."""
    cispo_bounds: Literal["trl", "verl"] = "trl"
    """CISPO caps the ratio at epsilon_high itself (TRL; 5 for example) or clips it to
    [1 - epsilon_low, 1 + epsilon_high] (verl)."""
    sapo_temperature_pos: float = 1.0
    """SAPO's temperature where the advantage is positive."""
    sapo_temperature_neg: float = 1.05
    """SAPO's temperature elsewhere."""
    vespo_k_pos: float = 2.0
    """VESPO's exponent where the advantage is not negative."""
    vespo_lambda_pos: float = 3.0
    """VESPO's rate where the advantage is not negative."""
    vespo_k_neg: float = 3.0
    """VESPO's exponent where the advantage is negative."""
    vespo_lambda_neg: float = 2.0
    """VESPO's rate where the advantage is negative."""
    gmpo_clip: float = 0.4
    """GMPO's bound on the log-ratio of a token."""
    skip_empty_sequences: bool = False
    """Leave sequences without a counted token out of the number of sequences (verl)."""

    def __post_init__(self) -> None:
        for field, choices in _CHOICES.items():
            hint = " (GSPO: importance_sampling_level='sequence')" if field == "loss_type" else ""
            must_be = f"one of {', '.join(choices)}{hint}"
            _check(self, field, getattr(self, field) in choices, must_be)
        for field in ("use_bias_correction_kl", "skip_empty_sequences"):
            _check(self, field, isinstance(getattr(self, field), bool), "True or False")
        for field in ("epsilon_low", "epsilon_high", "beta"):
            value = getattr(self, field)
            _check(self, field, _is_number(value) and value >= 0, "a finite number, 0 or more")
        for field in _POSITIVE:
            value = getattr(self, field)
            _check(self, field, _is_number(value) and value > 0, "a finite number above 0")
        _check(self, "epsilon_low", self.epsilon_low <= 1, "at most 1: ratios are never negative")
        _check(self, "entropy_coef", _is_number(self.entropy_coef), "a finite number")
        if self.delta is not None and self.loss_type not in ("cispo", "sapo", "vespo", "gmpo"):
            bound = 1 + self.epsilon_high
            holds = _is_number(self.delta) and self.delta > bound
            _check(self, "delta", holds, f"a finite number above 1 + epsilon_high = {bound}")
        if self.logit_softcap is not None:
            holds = _is_number(self.logit_softcap) and self.logit_softcap > 0
            _check(self, "logit_softcap", holds, "a finite number above 0, or None for no cap")
        if self.max_completion_length is not None:
            length = self.max_completion_length
            holds = _is_number(length) and length >= 1 and length == int(length)
            _check(self, "max_completion_length", holds, "a whole number, 1 or more")
        elif self.loss_type == "dr_grpo":
            raise ValueError("loss_type='dr_grpo' divides by max_completion_length: set it")
        if self.importance_sampling_level == "sequence" and self.loss_type in ("vespo", "gmpo"):
            raise ValueError(
                f"importance_sampling_level='sequence' is not defined for loss_type="
                f"{self.loss_type!r}, which weighs whole sequences by itself: use 'token'"
            )
        if self.loss_type == "cispo" and self.cispo_bounds == "trl" and self.epsilon_high < 1:
            warnings.warn(
                f"loss_type='cispo' caps ratios at epsilon_high itself, and {self.epsilon_high} is "
                "below the ratio of an unchanged policy: 5 is usual, or cispo_bounds='verl'",
                stacklevel=3,
            )

    @property
    def couples_rows(self) -> bool:
        """Whether a token's gradient depends on the log-probs of its whole sequence."""
        return self.importance_sampling_level == "sequence" or self.loss_type in ("vespo", "gmpo")


class LossArguments(TypedDict, total=False):
    """The arguments that every loss function takes, by keyword; all may be left out."""

    completion_mask: Tensor | None
    """(B, T) or (N,) bool, int or float 0/1: tokens that count. What stands behind a 0 may be
    anything, NaN included. May be on the CPU. None: all count."""
    cu_seqlens: Tensor | None
    """(B + 1,) int32, packed layout only: sequence i is tokens cu_seqlens[i] to cu_seqlens[i + 1].
    Without it the packed layout allows the token means (dapo, bnpo) only."""
    old_logps: Tensor | None
    """Like completion_ids, fp32: log-probs under the policy that starts the optimisation step.
    None: the call is on-policy, every ratio is exactly 1."""
    ref_logps: Tensor | None
    """Like completion_ids, fp32: log-probs under the reference; read if and only if beta > 0."""
    importance_sampling_ratio: Tensor | None
    """Like completion_ids, (B,) or (B, 1): correction for a sampler that is not the policy;
    multiplies the policy term (`vespo`: part of the sequence's weight)."""
    policy_weight: Tensor | None
    """Like completion_ids, (B,) or (B, 1): multiplies the policy term, not the KL nor the entropy
    (an off-policy mask)."""
    entropy_mask: Tensor | None
    """Like completion_ids: multiplies the policy term and the entropy bonus (`gmpo`: leaves tokens
    out of the geometric mean)."""
    num_items_in_batch: Number | None
    """Counted tokens of the whole optimisation step, for `dapo`, `cispo` and `vespo`; None: of this
    call. All three denominators are taken as 1 at least."""
    num_sequences_in_batch: Number | None
    """Sequences of the whole optimisation step, for `grpo`, `dr_grpo`, `luspo`, `sapo` and `gmpo`;
    None: of this call."""
    entropy_denominator: Number | None
    """Divides the entropy bonus; None: the sum of mask times entropy mask of this call."""


@dataclass(frozen=True)
class GRPOLossOutput:
    """What a call returns; everything but the loss is detached.

    The metrics are means over the call's counted tokens, named as TRL names them: `policy_loss`;
    `entropy`; with beta > 0 `kl`; for the clipped losses and gmpo `clip_ratio/low_mean`,
    `clip_ratio/high_mean`, `clip_ratio/region_mean` and their extremes over sequences,
    `clip_ratio/low_min` and `clip_ratio/high_max` (ratios of sequences are counted by sequence);
    `cispo_clip_ratio`; `vespo/phi_seq_mean`; `entropy_coef`. Counts: `num_tokens`, `num_sequences`,
    `num_computed_rows` (their logits were computed), `num_gradient_rows`.
    """

    loss: Tensor  # 0-d fp32
    logps: Tensor  # shape of completion_ids, fp32: log-prob of each token, 0 where masked
    entropy: Tensor  # shape of completion_ids, fp32: entropy of each distribution, 0 where masked
    metrics: dict[str, Tensor]  # 0-d each


_CHOICES: dict[str, tuple[str, ...]] = {
    "loss_type": get_args(LossType),
    "importance_sampling_level": ("token", "sequence"),
    "kl_estimator": ("k1", "k2", "k3"),
    "cispo_bounds": ("trl", "verl"),
}
_POSITIVE = (
    "temperature",
    "logit_scale",
    "sapo_temperature_pos",
    "sapo_temperature_neg",
    "vespo_k_pos",
    "vespo_lambda_pos",
    "vespo_k_neg",
    "vespo_lambda_neg",
    "gmpo_clip",
)


def _is_number(value: object) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return -math.inf < value < math.inf  # the compiler cannot ask a symbol `math.isfinite`


def _check(config: GRPOLossConfig, field: str, holds: bool, must_be: str) -> None:
    if not holds:
        raise ValueError(f"{field} must be {must_be}, got {getattr(config, field)!r}")
