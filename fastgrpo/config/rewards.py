"""How completions are judged, and how rewards become advantages."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from ..readable import shown
from .checks import above_zero, at_least


@dataclass(frozen=True, kw_only=True)
class RewardOptions:
    """The part of a `TrainConfig` that is about rewards and advantages."""

    reward_funcs: list[str] = field(default_factory=lambda: ["accuracy"])
    """Built-in names, `module:function`, `package.module.function`, `path.py:function`, TRL's own
    (accuracy_reward ...), or a reward model: a sequence-classification checkpoint by its directory
    or Hub name."""
    reward_weights: list[float] | None = None
    """Weight of each reward function; None: 1 each."""
    reward_timeout: float | None = 300.0
    """Seconds a reward function may take over a batch, in a process of its own; for `accuracy`,
    those of math-verify. None: it runs in the training process, without a limit."""
    reward_errors: Literal["stop", "none"] = "stop"
    """What follows if a reward function raises, ends its process, takes too long or returns what
    are no rewards: the run stops; or that is counted, and None for the completions of the batch."""
    soft_punish_cache: int | None = None
    """Of the reward `soft_overlong_punishment`: the last tokens before max_completion_length, over
    which the punishment goes from 0 to -1."""

    scale_rewards: Literal["group", "batch", "none"] = "group"
    """What advantages are divided by: the standard deviation of the group, of the batch, or 1."""
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = (
        "sum_then_normalize"
    )
    """Add up the rewards, then compare within the group; or compare each reward within the group
    first (GDPO)."""
    advantage_baseline: Literal["mean", "leave_one_out"] = "mean"
    """What a completion is compared with: the mean of its group, or of the others in it (RLOO)."""
    advantage_std: Literal["sample", "population"] = "sample"
    """Divisor of the variance: n - 1 or n."""
    advantage_eps: float = 1e-4
    """Added to the standard deviation."""

    def reward_problems(self) -> Iterator[str]:
        """Yield what is wrong with these values."""
        if not self.reward_funcs:
            yield "reward_funcs: at least one is required, for example [accuracy]"
        for name in self.reward_funcs:
            if not isinstance(name, str):
                names = "names such as 'my_rewards.py:brevity'"
                yield f"reward_funcs: must be {names}, got {shown(name)}"
        if not all(map(math.isfinite, self.reward_weights or [])):
            yield f"reward_weights: must be finite, got {shown(self.reward_weights)}"
        yield from above_zero(self, "reward_timeout")
        yield from at_least(self, 0, "advantage_eps")
        yield from at_least(self, 1, "soft_punish_cache")
