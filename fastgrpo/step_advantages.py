"""Rewards of steps to advantages of tokens: process supervision (DeepSeekMath 4.1.3, FORMULAS).

A token's advantage is the sum of the normalised rewards of the steps that end there or later. The
reward of an outcome is that of a single step which ends with the completion.

P prompts, G completions of one prompt (its group), B = P * G completions, K reward functions,
S tokens of a completion with a reward, at most, plus 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from .advantages import (
    Advantages,
    Baseline,
    MultiObjectiveAggregation,
    ScaleRewards,
    Std,
    check_groups,
    check_options,
    check_rewards,
    compare,
    rounding,
)

Step = tuple[int, float]
"""Where a step ends, as the index of its last token in the completion, and its reward."""


def merge_steps(
    rewards_BK: Tensor,
    weights_K: Sequence[float] | Tensor,
    steps: Mapping[int, Sequence[Sequence[Step]]],
    lengths: Sequence[int],
) -> list[list[Step]]:
    """Put the rewards of outcomes and of steps together, times the weights of their functions.

    An outcome reward stands at the last token of its completion; of an empty one, which counts in
    its group without having a token to train, at -1. Rewards at one token stay apart:
    `step_advantages` adds them up, and knows then how much of a difference is rounding.

    Args:
        rewards_BK: (B, K) rewards of outcomes, NaN where a function does not judge a completion.
        weights_K: (K,) the weight of every reward function.
        steps: those of the functions that return steps, by their place among the K: B lists each,
            empty where the function does not judge. Their columns of `rewards_BK` are not used.
            Their rewards are rounded to its type, so that 0.1 + 0.2 is 0.3 here as well.
        lengths: B, tokens of each completion.

    Returns:
        The steps of each completion, as `step_advantages` takes them.

    Raises:
        ValueError: a shape or a number that does not fit, by name.
    """
    weights = check_rewards(rewards_BK, weights_K).tolist()
    num_completions = len(rewards_BK)
    for k, per_completion in steps.items():
        if k not in range(len(weights)):
            raise ValueError(f"steps are of function {k}, but there are {len(weights)} functions")
        if len(per_completion) != num_completions:
            raise ValueError(
                f"function {k} has steps of {len(per_completion)} completions, "
                f"but there are {num_completions}; give an empty list where it does not judge"
            )
    _check_lengths(lengths, num_completions)
    merged: list[list[Step]] = [[] for _ in lengths]
    for k, (rewards, weight) in enumerate(zip(rewards_BK.T.tolist(), weights, strict=True)):
        outcomes = [
            [] if math.isnan(reward) else [(length - 1, reward)]
            for reward, length in zip(rewards, lengths, strict=True)
        ]
        for to, own in zip(merged, steps.get(k, outcomes), strict=True):
            rounded = torch.tensor([reward for _, reward in own], dtype=rewards_BK.dtype).tolist()
            to += [(end, weight * x) for (end, _), x in zip(own, rounded, strict=True)]
    return merged


def step_advantages(
    steps: Sequence[Sequence[Step]],
    lengths: Sequence[int],
    num_generations: int,
    *,
    scale_rewards: ScaleRewards = "group",
    std: Std = "sample",
    advantage_eps: float = 1e-4,
    baseline: Baseline = "mean",
    multi_objective_aggregation: MultiObjectiveAggregation = "sum_then_normalize",
) -> Advantages:
    """Compare all steps of a group with each other, and give every token those that it leads to.

    A completion without steps was not judged: it counts in no statistic and its advantages are 0.

    Args:
        steps: of each of the B completions, those of one prompt next to each other. They may be in
            any order; rewards at one token are added, and are then one.
        lengths: B, tokens of each completion.
        num_generations: G, the completions per prompt.
        scale_rewards: divide by the std of the steps of the "group", of the "batch", or by nothing.
        std: "sample" or "population".
        advantage_eps: added to the std.
        baseline: the "mean" of all steps of the group, or of all those of the other completions
            ("leave_one_out"), so that a completion does not move what it is compared with.
        multi_objective_aggregation: "sum_then_normalize".

    Returns:
        As `group_advantages`, but for the advantages, which are of tokens: (sum of the lengths,),
        those of all completions behind each other. `rewards` are the sums of the steps.

    Raises:
        ValueError: a step, a number of entries or an option that does not fit, by name.
    """
    check_groups(len(steps), num_generations)
    options: dict[str, Any] = {"std": std, "advantage_eps": advantage_eps, "baseline": baseline}
    check_options(scale_rewards, multi_objective_aggregation, **options)
    if multi_objective_aggregation != "sum_then_normalize":
        raise ValueError(
            f"multi_objective_aggregation = {multi_objective_aggregation!r} cannot compare steps, "
            "which need not stand at the same tokens for every function; "
            "use 'sum_then_normalize', or return one reward per completion"
        )
    _check_lengths(lengths, len(steps))

    rewards_at = [_by_token(i, *both) for i, both in enumerate(zip(steps, lengths, strict=True))]
    table_M6 = torch.tensor(
        [
            (i, s, end, math.fsum(terms), math.fsum(map(abs, terms)), len(terms))
            for i, rewards in enumerate(rewards_at)
            for s, (end, terms) in enumerate(sorted(rewards.items()))
        ],
        dtype=torch.float64,
    ).view(-1, 6)
    i_M, s_M, end_M = table_M6[:, :3].long().unbind(1)

    def spread(values_M: Tensor, elsewhere_B: Tensor) -> Tensor:
        """Put values at their place among (B, S)."""
        return elsewhere_B[:, None].repeat(1, S).index_put((i_M, s_M), values_M)

    # One more than there are, at the end of the completion and without a reward: the tokens behind
    # the last step are then a step as well, with nothing to come.
    B, P, S = len(steps), len(steps) // num_generations, 1 + max(map(len, rewards_at))
    end_BS = spread(end_M, torch.tensor(lengths) - 1)
    reward_BS, size_BS, count_BS = (
        spread(table_M6[:, column], torch.full((B,), elsewhere, dtype=torch.float64))
        for column, elsewhere in ((3, torch.nan), (4, 0.0), (5, 1.0))
    )
    # The type in which reward functions are read.
    eps = torch.finfo(torch.float32).eps
    compared = compare(
        reward_BS.view(P, num_generations, S),
        rounding(size_BS.view(P, -1), count_BS.view(P, -1).amax(dim=1), eps),
        scale_rewards=scale_rewards,
        **options,
    )
    unknown_BS = reward_BS.isnan()
    value_BS = compared.values_PGS.view(B, S).masked_fill(unknown_BS, 0.0)
    to_come_BS = value_BS.flip(1).cumsum(dim=1).flip(1)
    tokens_BS = end_BS.diff(dim=1, prepend=torch.full((B, 1), -1))
    return Advantages(
        advantages=to_come_BS.flatten().repeat_interleave(tokens_BS.flatten()).float(),
        rewards=reward_BS.nansum(dim=1).masked_fill(unknown_BS.all(dim=1), torch.nan).float(),
        group_mean=compared.mean_P.float(),
        group_std=compared.std_P.float(),
        zero_std=compared.silent_P,
    )


def _by_token(index: int, steps: Sequence[Step], length: int) -> dict[int, list[float]]:
    """Collect the rewards of a completion by the token they stand at."""
    rewards: dict[int, list[float]] = {}
    for end, reward in steps:
        # Of an empty completion the last token is -1.
        if not isinstance(end, Integral) or not min(0, length - 1) <= end < length:
            raise ValueError(
                f"completion {index} has a step that ends at token {end!r}, but its tokens are "
                f"0 to {length - 1}"
                if length
                else f"completion {index} is empty, but a step of it ends at token {end!r}; "
                "the reward of an empty completion stands at -1"
            )
        if not math.isfinite(reward):
            raise ValueError(
                f"completion {index} has the step reward {reward} at token {end}; "
                "give a finite number, or leave out a step that is not judged"
            )
        rewards.setdefault(end, []).append(reward)
    return rewards


def _check_lengths(lengths: Sequence[int], num_completions: int) -> None:
    if len(lengths) != num_completions or min(lengths, default=0) < 0:
        raise ValueError(
            f"lengths must be the tokens, 0 or more, of each of {num_completions} completions; "
            f"got {len(lengths)} numbers, the least being {min(lengths, default=None)}"
        )
