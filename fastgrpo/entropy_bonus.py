"""The entropy bonus of the loss, and how its coefficient follows the entropy."""

from __future__ import annotations

import math
from dataclasses import replace

from fastgrpo_kernels import GRPOLossConfig

from .config import TrainConfig


class EntropyBonus:
    """Adaptive entropy control (Skywork-OR1, arxiv.org/abs/2505.22312, section 4; as TRL's).

    After each optimisation step the coefficient rises by `entropy_coef_delta` if the entropy was
    at most `entropy_target`, else it falls, within its bounds. It is applied only while the entropy
    of the step before was at most the target. Without `use_adaptive_entropy` it does not change.
    """

    def __init__(self, config: TrainConfig) -> None:
        self._config = config
        self.coefficient = config.loss.entropy_coef
        """Of the next step in which a bonus is due."""
        self._due = not config.use_adaptive_entropy

    @property
    def loss(self) -> GRPOLossConfig:
        """The mathematics of the next step's loss."""
        loss, coefficient = self._config.loss, self.coefficient if self._due else 0.0
        # What is not replaced does not warn of its values again.
        return loss if coefficient == loss.entropy_coef else replace(loss, entropy_coef=coefficient)

    def update(self, entropy: float | None) -> None:
        """Take note of the mean entropy of the tokens of a step, in nats; None, NaN: not known."""
        config = self._config
        if not config.use_adaptive_entropy or entropy is None or math.isnan(entropy):
            return
        self._due = entropy <= config.entropy_target
        change = config.entropy_coef_delta if self._due else -config.entropy_coef_delta
        self.coefficient = min(
            max(self.coefficient + change, config.entropy_coef_min), config.entropy_coef_max
        )

    def state_dict(self) -> dict[str, float]:
        """Return what has changed since the start of the run."""
        return {"coefficient": self.coefficient, "due": self._due}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on where `state_dict` was called."""
        self.coefficient, self._due = state["coefficient"], bool(state["due"])
