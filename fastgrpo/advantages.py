"""Rewards to advantages: how much better a completion is than its group (FORMULAS "Advantages").

P prompts, G completions of one prompt (its group), B = P * G completions, K reward functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

ScaleRewards = Literal["group", "batch", "none"]
Std = Literal["sample", "population"]


@dataclass(frozen=True, kw_only=True)
class Advantages:
    """The advantages of a batch and the statistics they came from, all detached."""

    advantages: Tensor
    """(B,) fp32; 0 where no reward function judged the completion."""
    rewards: Tensor
    """(B,) fp32, weighted sum of the rewards; NaN where no reward function judged."""
    group_mean: Tensor
    """(P,) fp32, over the judged completions; NaN for a group without one."""
    group_std: Tensor
    """(P,) fp32; 0 for a group with fewer than two judged completions."""
    zero_std: Tensor
    """(P,) bool: the group's rewards are all equal, so that it teaches nothing."""


def group_advantages(
    rewards_BK: Tensor,
    weights_K: Sequence[float] | Tensor,
    num_generations: int,
    *,
    scale_rewards: ScaleRewards = "group",
    std: Std = "sample",
    advantage_eps: float = 1e-4,
) -> Advantages:
    """Compare every completion with the mean of its group (DeepSeekMath; Dr. GRPO with "none").

    A NaN reward means that the function does not judge this completion: it is left out of the sum,
    and a completion that no function judges counts in no statistic.

    Args:
        rewards_BK: (B, K) rewards, the completions of one prompt next to each other.
        weights_K: (K,) the weight of every reward function.
        num_generations: G, the completions per prompt.
        scale_rewards: divide by the std of the "group", of the "batch", or by nothing ("none").
        std: "sample" (divide by n - 1, as TRL and verl) or "population" (divide by n).
        advantage_eps: added to the std before the division.

    Returns:
        The advantages and the statistics of the groups.

    Raises:
        ValueError: a shape, an option or a value that does not fit, by name.
    """
    weights_K = torch.as_tensor(weights_K, dtype=torch.float64, device=rewards_BK.device)
    _check(rewards_BK, weights_K, num_generations, scale_rewards, std, advantage_eps)
    num_rewards = weights_K.numel()

    weighted_BK = rewards_BK.double() * weights_K
    judged_PG = ~weighted_BK.isnan().all(dim=1).view(-1, num_generations)
    totals_PG = weighted_BK.nansum(dim=1).view(-1, num_generations)
    count_P = judged_PG.sum(dim=1)
    mean_P = totals_PG.sum(dim=1) / count_P  # 0 / 0 = NaN: the mean of nothing
    centred_PG = torch.where(judged_PG, totals_PG - mean_P[:, None], 0.0)

    # Maximum against minimum: the std of equal rewards whose mean is rounded is not 0. Equal totals
    # of several rewards may differ by their roundings, which a division by the std would blow up.
    infinity = float("inf")
    max_P = totals_PG.masked_fill(~judged_PG, -infinity).amax(dim=1)
    min_P = totals_PG.masked_fill(~judged_PG, infinity).amin(dim=1)
    size_P = weighted_BK.abs().nansum(dim=1).view(-1, num_generations).amax(dim=1)
    rounding_P = 4 * (num_rewards - 1) * torch.finfo(rewards_BK.dtype).eps * size_P
    zero_std_P = max_P - min_P <= rounding_P

    ddof = 1 if std == "sample" else 0
    std_P = (centred_PG.square().sum(dim=1) / (count_P - ddof).clamp(min=1)).sqrt()
    std_P = std_P.masked_fill(zero_std_P, 0.0)
    if scale_rewards == "group":
        advantages_PG = centred_PG / (std_P[:, None] + advantage_eps)
    elif scale_rewards == "batch":
        judged_N = totals_PG[judged_PG]
        deviation_N = judged_N - judged_N.mean()
        std_batch = (deviation_N.square().sum() / max(judged_N.numel() - ddof, 1)).sqrt()
        advantages_PG = centred_PG / (std_batch + advantage_eps)
    else:
        advantages_PG = centred_PG
    # A fill, not a product: with advantage_eps = 0 an equal group is 0 / 0 here.
    advantages_PG = advantages_PG.masked_fill(zero_std_P[:, None] | ~judged_PG, 0.0)

    return Advantages(
        advantages=advantages_PG.flatten().float(),
        rewards=totals_PG.masked_fill(~judged_PG, float("nan")).flatten().float(),
        group_mean=mean_P.float(),
        group_std=std_P.float(),
        zero_std=zero_std_P,
    )


def _check(
    rewards_BK: Tensor,
    weights_K: Tensor,
    num_generations: int,
    scale_rewards: str,
    std: str,
    advantage_eps: float,
) -> None:
    if rewards_BK.ndim != 2 or not rewards_BK.is_floating_point():
        raise ValueError(
            "rewards_BK must be a floating (completions, functions) tensor, got "
            f"{tuple(rewards_BK.shape)} of {rewards_BK.dtype}"
        )
    if weights_K.shape != rewards_BK.shape[1:] or not weights_K.isfinite().all():
        raise ValueError(
            f"weights_K must be one finite number per reward function "
            f"({rewards_BK.shape[1]}), got {weights_K}"
        )
    if rewards_BK.isinf().any():
        raise ValueError("rewards_BK holds an infinite reward; bound the reward function")
    if num_generations < 2:
        raise ValueError(
            f"num_generations must be at least 2, got {num_generations}: "
            "a group of one has nothing to be compared with"
        )
    if rewards_BK.shape[0] == 0 or rewards_BK.shape[0] % num_generations:
        raise ValueError(
            f"rewards_BK has {rewards_BK.shape[0]} completions, "
            f"which is not a positive multiple of num_generations = {num_generations}"
        )
    if scale_rewards not in get_args(ScaleRewards):
        raise ValueError(
            f"scale_rewards must be one of {get_args(ScaleRewards)}, got {scale_rewards!r}"
        )
    if std not in get_args(Std):
        raise ValueError(f"std must be one of {get_args(Std)}, got {std!r}")
    if not 0 <= advantage_eps < float("inf"):
        raise ValueError(f"advantage_eps must be a number of at least 0, got {advantage_eps}")
