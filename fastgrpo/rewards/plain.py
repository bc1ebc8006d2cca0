"""The entry points of before `Judges`, for callers that have not switched."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .built_in import accuracy
from .contract import Completion, RewardFunction
from .judges import Judges, refuse_own_arguments


@dataclass(frozen=True)
class Reward:
    """A reward function under the name its metrics carry, and its weight in the sum."""

    name: str
    function: RewardFunction
    weight: float = 1.0


def load_rewards(
    reward_funcs: Sequence[str | RewardFunction], reward_weights: Sequence[float] | None = None
) -> list[Reward]:
    """Pair reward functions with their weights, None meaning 1 each."""
    with Judges(reward_funcs, reward_weights, reward_timeout=None) as judges:
        return [
            Reward(name, judges.functions[k], weight)
            for k, (name, weight) in enumerate(zip(judges.names, judges.weights, strict=True))
        ]


def check_columns(rewards: Sequence[Reward], columns: Sequence[str]) -> None:
    """Refuse reward functions that cannot be called with the columns of a dataset."""
    refuse_own_arguments(columns)
    own = {"prompts", "completions", "completion_ids"}
    arguments: dict[str, Any] = {name: [] for name in own.union(columns) - {"prompt"}}
    for reward in rewards:
        try:
            inspect.signature(reward.function).bind(**arguments)
        except TypeError as error:
            raise ValueError(
                f"reward function {reward.name!r} cannot be called with the dataset's columns "
                f"{', '.join(columns)}: {error}; take what is not needed as **columns"
            ) from None
        if reward.function is accuracy:
            accuracy(**arguments)  # looks for its column


def score(
    rewards: Sequence[Reward],
    *,
    prompts: Sequence[Any],
    completions: Sequence[Completion],
    completion_ids: Sequence[Sequence[int]],
    columns: dict[str, list[Any]],
) -> Tensor:
    """Call every reward function on a batch of completions: (B, K), NaN where it did not judge."""
    functions = [reward.function for reward in rewards]
    with Judges(functions, reward_timeout=None) as judges:
        return judges.score(
            prompts=prompts, completions=completions, completion_ids=completion_ids, columns=columns
        ).rewards_BK
