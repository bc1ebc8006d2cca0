"""The loss in OpenRLHF (0.11.2): its `PolicyLoss`, computed with ours.

OpenRLHF has no registry of losses: in `openrlhf/trainer/ray/ppo_actor.py`, `PolicyLoss` has to be
imported from here.

    from fastgrpo.integrations.openrlhf import PolicyLoss

OpenRLHF itself is not imported here.

B sequences, T positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from fastgrpo_kernels import GRPOLossConfig, policy_loss

from .clip_options import clip_options

# Probabilities stay this far from 0 and 1, that the logs of a divergence be finite (OpenRLHF's).
_CHANCE = 1e-6
# Stands for a denominator of 0.
_TINY = torch.finfo(torch.float32).tiny


class PolicyLoss(nn.Module):
    """OpenRLHF's PolicyLoss: the same arguments, attributes and results.

    Args:
        clip_eps_low: the ratio is clipped below at 1 - clip_eps_low.
        clip_eps_high: the ratio is clipped above at 1 + clip_eps_high.
        dual_clip: cap of the ratio where the advantage is negative (arXiv 1912.09729): our delta.
        token_level_loss: mean over tokens (our `dapo`), or over sequences of the means over their
            tokens (our `grpo`; always so with `policy_loss_type="gspo"`).
        policy_loss_type: ratio of each token, or "gspo": of the whole sequence (2507.18071).
        is_correction_level: correct for a sampler that is not the policy, judged by token or by
            sequence. With "gspo" any but "off" takes the ratio to the sampler's log-probs instead.
        is_correction_mode: tokens or sequences outside of the threshold count nothing and the
            others their ratio to the sampler ("mask"), or the ratio is clamped ("clip").
        is_correction_gating: what the threshold is of: the ratio, or a divergence between the two
            probabilities of the token, as of a coin with that chance: "binary_kl" or "tv".
        is_correction_threshold: (low, high), both still inside.

    Raises:
        ValueError: a value, or two together, that OpenRLHF refuses or that our loss is not defined
            for: dual_clip must be above 1 + clip_eps_high.
    """

    def __init__(
        self,
        clip_eps_low: float = 0.2,
        clip_eps_high: float = 0.2,
        dual_clip: float | None = None,
        token_level_loss: bool = True,
        policy_loss_type: Literal["ppo", "gspo"] = "ppo",
        is_correction_level: Literal["off", "token", "seq"] = "off",
        is_correction_mode: Literal["mask", "clip"] = "mask",
        is_correction_gating: Literal["ratio", "binary_kl", "tv"] = "ratio",
        is_correction_threshold: Sequence[float] = (0.5, 5.0),
    ) -> None:
        super().__init__()
        self.clip_eps_low = clip_eps_low
        self.clip_eps_high = clip_eps_high
        self.dual_clip = dual_clip
        self.token_level_loss = token_level_loss and policy_loss_type != "gspo"
        self.policy_loss_type = policy_loss_type
        self.is_correction_level = is_correction_level
        self.is_correction_mode = is_correction_mode
        self.is_correction_gating = is_correction_gating
        self.is_correction_threshold = is_correction_threshold
        self._options()

    def _options(self) -> GRPOLossConfig:
        """Check the attributes, which may be changed at any time, and return our options."""
        for name, choices in (
            ("policy_loss_type", ("ppo", "gspo")),
            ("is_correction_level", ("off", "token", "seq")),
            ("is_correction_mode", ("mask", "clip")),
            ("is_correction_gating", ("ratio", "binary_kl", "tv")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}"
                )
        level, gating = self.is_correction_level, self.is_correction_gating
        if self.is_correction_mode == "clip" and (level == "seq" or gating != "ratio"):
            raise ValueError(
                "is_correction_mode='clip' clamps ratios of tokens: it needs "
                "is_correction_level='token' and is_correction_gating='ratio', got "
                f"{level!r} and {gating!r}"
            )
        low, high = self.is_correction_threshold
        if level != "off" and gating != "ratio" and low > 0:
            raise ValueError(
                f"is_correction_gating={gating!r} is bounded from above only: "
                f"is_correction_threshold must start with 0, got {(low, high)}"
            )
        return GRPOLossConfig(
            loss_type="dapo" if self.token_level_loss else "grpo",
            importance_sampling_level="sequence" if self.policy_loss_type == "gspo" else "token",
            skip_empty_sequences=True,
            **clip_options(
                ("clip_eps_low", self.clip_eps_low),
                ("clip_eps_high", self.clip_eps_high),
                ("dual_clip", self.dual_clip),
            ),
        )

    def forward(
        self,
        log_probs: Tensor,  # (B, T), with the graph
        old_log_probs: Tensor,  # (B, T)
        advantages: Tensor,  # (B, T)
        action_mask: Tensor | None = None,  # (B, T) of 0 and 1
        rollout_log_probs: Tensor | None = None,  # (B, T)
        dp_size: int = 1,
        batch_num_tokens: float | Tensor | None = None,
        global_batch_size: float | Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """Compute a rank's share of the loss, times the ranks that its gradient is averaged over.

        Args:
            log_probs: under the policy.
            old_log_probs: at the start of the optimisation step.
            advantages: of each token.
            action_mask: tokens that count, what stands behind a 0 may be anything; None: all.
            rollout_log_probs: of the sampler; needed by a correction.
            dp_size: ranks; multiplies the loss where the denominator is given.
            batch_num_tokens: counted tokens of the optimisation step; may be a fraction (OpenRLHF
                divides them by DeepSpeed's micro-batches). None: of this call.
            global_batch_size: the same of sequences, in place of tokens if `token_level_loss` is
                off.

        Returns:
            The loss, differentiable to `log_probs`; share of tokens whose clip holds; mean of old
            minus new log-probs; and, None without correction: mean of the sampler's minus old
            log-probs, and share of tokens (of non-empty sequences) outside of the threshold.

        Raises:
            ValueError: shapes or attributes that do not fit, or a correction without
                `rollout_log_probs`.
        """
        mask_BT = torch.ones_like(log_probs, dtype=torch.bool)
        if action_mask is not None:
            mask_BT = action_mask != 0
        ppo_kl = _mean(old_log_probs - log_probs.detach(), mask_BT)
        coefficient_BT = vllm_kl = filtered = None
        if self.is_correction_level != "off":
            if rollout_log_probs is None:
                raise ValueError(
                    f"is_correction_level={self.is_correction_level!r} needs rollout_log_probs, "
                    "the sampler's, got None"
                )
            if self.policy_loss_type == "gspo":
                old_log_probs = rollout_log_probs
            else:
                coefficient_BT, vllm_kl, filtered = self._correction(
                    old_log_probs, rollout_log_probs, mask_BT
                )
        log_ratio_BT = log_probs - old_log_probs
        if self.policy_loss_type == "ppo":
            # OpenRLHF's cut, in value and gradient.
            log_ratio_BT = log_ratio_BT.clamp(-20, 20)
        by_token = self.token_level_loss
        denominator = batch_num_tokens if by_token else global_batch_size
        given = denominator is not None
        output = policy_loss(
            # The loss reads nothing of log-probs but their ratio, which may so stand for them.
            log_ratio_BT,
            advantages,
            config=self._options(),
            completion_mask=mask_BT,
            old_logps=torch.zeros_like(log_ratio_BT),
            importance_sampling_ratio=coefficient_BT,
            # Denominators that are below 1 come afterwards.
            num_items_in_batch=1 if given and by_token else None,
            num_sequences_in_batch=1 if given and not by_token else None,
        )
        loss = output.loss
        if given:
            # Of a step without tokens the share is 0, not 0 / 0.
            loss = loss * dp_size / torch.as_tensor(denominator).clamp(min=_TINY)
        clipped = self._clipped(log_ratio_BT.detach(), advantages, mask_BT)
        return loss, clipped, ppo_kl, vllm_kl, filtered

    def _clipped(self, log_ratio_BT: Tensor, advantages_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Return the share of tokens whose clip holds."""
        if self.policy_loss_type == "gspo":
            log_ratio_BT = _mean(log_ratio_BT, mask_BT, dim=-1).expand_as(log_ratio_BT)
        ratio_BT = log_ratio_BT.exp()
        clipped_BT = ratio_BT.clamp(1 - self.clip_eps_low, 1 + self.clip_eps_high)
        holds_BT = clipped_BT * advantages_BT < ratio_BT * advantages_BT
        return _mean(holds_BT.to(ratio_BT), mask_BT)

    def _correction(
        self, old_log_probs: Tensor, rollout_log_probs: Tensor, mask_BT: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the factors of the tokens, (B, T), and the last two results of `forward`."""
        low, high = self.is_correction_threshold
        log_ratio_BT = old_log_probs - rollout_log_probs
        if self.is_correction_gating == "ratio":
            judged = log_ratio_BT
        else:
            ours_BT, theirs_BT = (
                logps_BT.exp().clamp(_CHANCE, 1 - _CHANCE)
                for logps_BT in (old_log_probs, rollout_log_probs)
            )
            judged = (theirs_BT - ours_BT).abs()
            if self.is_correction_gating == "binary_kl":
                judged = theirs_BT * (theirs_BT / ours_BT).log()
                judged += (1 - theirs_BT) * ((1 - theirs_BT) / (1 - ours_BT)).log()
        counted = mask_BT
        if self.is_correction_level == "seq":
            judged = _mean(judged, mask_BT, dim=-1)  # (B, 1); of log-ratios: the geometric mean
            counted = mask_BT.any(-1, keepdim=True)
        if self.is_correction_gating == "ratio":
            judged = judged.exp()
        outside = (judged < low) | (judged > high)
        if self.is_correction_mode == "clip":
            factor_BT = judged.clamp(low, high)
        else:
            factor_BT = log_ratio_BT.exp().masked_fill(outside, 0)
        filtered = _mean(outside.to(log_ratio_BT), counted)
        return factor_BT, -_mean(log_ratio_BT, mask_BT), filtered


def _mean(values_BT: Tensor, mask_BT: Tensor, dim: int | None = None) -> Tensor:
    """Return the mean of what counts, of all (0-d) or along a dimension (kept); 0 of nothing."""
    keep = dim is not None
    sums = values_BT.where(mask_BT, 0).sum(dim, keepdim=keep)
    return sums / mask_BT.sum(dim, keepdim=keep).clamp(min=1)
