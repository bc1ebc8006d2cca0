"""What of the loss the trainer does around `GRPOLossConfig`: masks, and its entropy bonus."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .checks import at_least, share


@dataclass(frozen=True, kw_only=True)
class LossOptions:
    """The part of a `TrainConfig` that is about which tokens count, and how much."""

    mask_truncated_completions: bool = False
    """Leave completions that did not end by themselves out of the loss and its denominators."""
    top_entropy_quantile: float = 1.0
    """Share of a micro-batch's tokens, those of the highest entropy, that the policy term and the
    entropy bonus are over; 1: all (arxiv.org/abs/2506.01939)."""
    off_policy_mask_threshold: float | None = None
    """Leave a completion with a negative advantage out of the policy term where the sampler's
    log-probs are in the mean this much above those of the policy (DeepSeek-V3.2)."""
    use_adaptive_entropy: bool = False
    """Let entropy_coef follow the entropy: up by `entropy_coef_delta` after a step with less than
    `entropy_target`, else down (Skywork-OR1)."""
    entropy_coef_min: float = 0.0
    """Least entropy_coef."""
    entropy_coef_max: float = 1.0
    """Largest entropy_coef."""
    entropy_coef_delta: float = 0.005
    """What entropy_coef moves by after each optimisation step."""
    entropy_target: float = 0.2
    """Entropy, in nats per token, that is to be kept."""

    @property
    def need_statistics(self) -> bool:
        """A mask of the loss depends on the policy's own log-probs or entropies."""
        return self.top_entropy_quantile < 1 or self.off_policy_mask_threshold is not None

    def loss_problems(self, *, entropy_coef: float) -> Iterator[str]:
        """Yield what is wrong with these values."""
        yield from share(self, "top_entropy_quantile")
        yield from at_least(
            self,
            0,
            "off_policy_mask_threshold",
            "entropy_coef_min",
            "entropy_coef_max",
            "entropy_coef_delta",
            "entropy_target",
        )
        if self.use_adaptive_entropy and self.top_entropy_quantile < 1:
            yield (
                "use_adaptive_entropy: follows the entropy of all tokens, and top_entropy_quantile "
                "gives a bonus to some; leave one of them out"
            )
        low, high = self.entropy_coef_min, self.entropy_coef_max
        if self.use_adaptive_entropy and not low <= entropy_coef <= high:
            yield (
                f"entropy_coef: must be between entropy_coef_min and entropy_coef_max, {low} and "
                f"{high}, got {entropy_coef}"
            )
