"""Rewards to advantages: how much better a completion is than its group (FORMULAS "Advantages").

P prompts, G completions of one prompt (its group), B = P * G completions, K reward functions,
S rewards that a completion has at most: 1 here, its steps in `step_advantages`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

ScaleRewards = Literal["group", "batch", "none"]
Std = Literal["sample", "population"]
Baseline = Literal["mean", "leave_one_out"]
MultiObjectiveAggregation = Literal["sum_then_normalize", "normalize_then_sum"]


@dataclass(frozen=True, kw_only=True)
class Advantages:
    """The advantages of a batch and the statistics they came from, all detached."""

    advantages: Tensor
    """(B,) fp32; 0 where no reward function judged the completion. Of `step_advantages`: one for
    each token, those of all completions behind each other."""
    rewards: Tensor
    """(B,) fp32, weighted sum of the rewards; NaN where no reward function judged."""
    group_mean: Tensor
    """(P,) fp32, over the rewards of the group, before GDPO's scaling; NaN for a group without."""
    group_std: Tensor
    """(P,) fp32, of the same; 0 for a group with fewer than two rewards."""
    zero_std: Tensor
    """(P,) bool: the group teaches nothing, because its rewards are all equal. For GDPO: because
    those of every function are, or because the functions outweigh each other exactly."""


def group_advantages(
    rewards_BK: Tensor,
    weights_K: Sequence[float] | Tensor,
    num_generations: int,
    *,
    scale_rewards: ScaleRewards = "group",
    std: Std = "sample",
    advantage_eps: float = 1e-4,
    baseline: Baseline = "mean",
    multi_objective_aggregation: MultiObjectiveAggregation = "sum_then_normalize",
) -> Advantages:
    """Compare every completion with its group (DeepSeekMath; Dr. GRPO with "none").

    A NaN reward means that the function does not judge this completion: it is left out of the sum,
    and a completion that no function judges counts in no statistic.

    Args:
        rewards_BK: (B, K) rewards, the completions of one prompt next to each other.
        weights_K: (K,) the weight of every reward function.
        num_generations: G, the completions per prompt.
        scale_rewards: divide by the std of the "group", of the "batch", or by nothing ("none").
        std: "sample" (divide by n - 1, as TRL and verl) or "population" (divide by n).
        advantage_eps: added to the std before every division.
        baseline: what a completion is compared with: the "mean" of its group, or that of the others
            in it ("leave_one_out", RLOO: arxiv.org/abs/2402.14740), n / (n - 1) as far away.
        multi_objective_aggregation: "sum_then_normalize" compares the weighted sums;
            "normalize_then_sum" (GDPO: arxiv.org/abs/2601.05242) divides the rewards of every
            function by their own std in the group, and the weighted sums by theirs in the batch.

    Returns:
        The advantages and the statistics of the groups.

    Raises:
        ValueError: a shape, an option or a value that does not fit, by name.
    """
    weights_K = check_rewards(rewards_BK, weights_K)
    check_groups(rewards_BK.shape[0], num_generations)
    options: dict[str, Any] = {"std": std, "advantage_eps": advantage_eps, "baseline": baseline}
    check_options(scale_rewards, multi_objective_aggregation, **options)

    rewards_PGK = rewards_BK.double().reshape(-1, num_generations, weights_K.numel())
    eps = torch.finfo(rewards_BK.dtype).eps
    totals_PG, rounding_P = _weighted_sum(rewards_PGK, weights_K, eps)
    compared = compare(totals_PG[..., None], rounding_P, scale_rewards=scale_rewards, **options)
    values_PG, silent_P = compared.values_PGS[..., 0], compared.silent_P
    if multi_objective_aggregation == "normalize_then_sum":
        scores_PGK = torch.cat(
            [
                compare(rewards_PG1, scale_rewards="group", **options).values_PGS
                for rewards_PG1 in rewards_PGK.split(1, dim=2)
            ],
            dim=2,
        )
        scores_PG, rounding_P = _weighted_sum(scores_PGK, weights_K, eps)
        # The scores of a group have the mean 0, whoever judged, and so has the batch: to compare
        # within the groups is to compare within the batch, and keeps the zeros of a group exact.
        whitened = compare(scores_PG[..., None], rounding_P, scale_rewards="batch", **options)
        values_PG, silent_P = whitened.values_PGS[..., 0], whitened.silent_P

    return Advantages(
        advantages=values_PG.masked_fill(totals_PG.isnan(), 0.0).flatten().float(),
        rewards=totals_PG.flatten().float(),
        group_mean=compared.mean_P.float(),
        group_std=compared.std_P.float(),
        zero_std=silent_P,
    )


def _weighted_sum(values_PGK: Tensor, weights_K: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return sums over the functions that judged, NaN where none did, and how far they round."""
    weighted_PGK = values_PGK * weights_K
    totals_PG = weighted_PGK.nansum(dim=2).masked_fill(weighted_PGK.isnan().all(dim=2), torch.nan)
    sizes_PG = weighted_PGK.abs().nansum(dim=2)
    return totals_PG, rounding(sizes_PG, len(weights_K), eps)


def rounding(sizes_PN: Tensor, count: Tensor | int, eps: float) -> Tensor:
    """Return how far sums of each group that are equal may be apart by their roundings, (P,).

    Args:
        sizes_PN: of each of the N sums, the absolute values that were added, added.
        count: how many they were at most, (P,) or of all groups; of one, nothing is rounded.
        eps: of the type the values came in.
    """
    return 4 * eps * (count - 1) * sizes_PN.amax(dim=1)


class Compared(NamedTuple):
    """Rewards that were compared in their groups."""

    values_PGS: Tensor  # NaN where there is no reward, 0 in silent groups
    mean_P: Tensor
    std_P: Tensor
    silent_P: Tensor  # bool: nothing differs, or there is nothing to differ from


def compare(
    rewards_PGS: Tensor,
    rounding_P: Tensor | float = 0.0,
    *,
    scale_rewards: ScaleRewards,
    std: Std,
    advantage_eps: float,
    baseline: Baseline,
) -> Compared:
    """Subtract the baseline from all rewards of a group and divide by their std.

    Args:
        rewards_PGS: fp64, NaN where there is no reward.
        rounding_P: how far apart rewards are equal nevertheless.
        scale_rewards: as in `group_advantages`, and so are the others.
        std: "sample" or "population", of all rewards of the group or the batch.
        advantage_eps: added to the std.
        baseline: the mean of all rewards of the group, or of those of its other completions.
    """
    there_PGS = ~rewards_PGS.isnan()
    count_P = there_PGS.sum(dim=(1, 2))
    mean_P = rewards_PGS.nansum(dim=(1, 2)) / count_P  # 0 / 0 = NaN: the mean of nothing
    values_PGS = rewards_PGS - mean_P[:, None, None]

    # Maximum against minimum: the std of equal rewards whose mean is rounded is not 0. Equal sums
    # of several rewards may differ by their roundings, which a division by the std would blow up.
    max_P = rewards_PGS.masked_fill(~there_PGS, -torch.inf).amax(dim=(1, 2))
    min_P = rewards_PGS.masked_fill(~there_PGS, torch.inf).amin(dim=(1, 2))
    silent_P = max_P - min_P <= rounding_P

    ddof = 1 if std == "sample" else 0
    std_P = (values_PGS.square().nansum(dim=(1, 2)) / (count_P - ddof).clamp(min=1)).sqrt()
    std_P = std_P.masked_fill(silent_P, 0.0)
    if baseline == "leave_one_out":
        # The mean of the others is as far below that of the group as the sum of a completion's own
        # distances from it, shared among the others.
        others_PG = count_P[:, None] - there_PGS.sum(dim=2)
        values_PGS = values_PGS + (values_PGS.nansum(dim=2) / others_PG)[..., None]
        silent_P = silent_P | (there_PGS.any(dim=2).sum(dim=1) < 2)
    if scale_rewards == "group":
        values_PGS = values_PGS / (std_P[:, None, None] + advantage_eps)
    elif scale_rewards == "batch":
        rewards_N = rewards_PGS[there_PGS]
        deviation_N = rewards_N - rewards_N.mean()
        std_batch = (deviation_N.square().sum() / max(rewards_N.numel() - ddof, 1)).sqrt()
        values_PGS = values_PGS / (std_batch + advantage_eps)
    # A fill, not a product: with advantage_eps = 0 an equal group is 0 / 0 here.
    values_PGS = values_PGS.masked_fill(silent_P[:, None, None] & there_PGS, 0.0)
    return Compared(values_PGS, mean_P, std_P, silent_P)


def check_rewards(rewards_BK: Tensor, weights_K: Sequence[float] | Tensor) -> Tensor:
    """Refuse rewards and weights that do not fit; return the weights as an fp64 tensor."""
    if rewards_BK.ndim != 2 or not rewards_BK.is_floating_point():
        raise ValueError(
            "rewards_BK must be a floating (completions, functions) tensor, got "
            f"{tuple(rewards_BK.shape)} of {rewards_BK.dtype}"
        )
    weights_K = torch.as_tensor(weights_K, dtype=torch.float64, device=rewards_BK.device)
    if weights_K.shape != rewards_BK.shape[1:] or not weights_K.isfinite().all():
        raise ValueError(
            f"weights_K must be one finite number per reward function "
            f"({rewards_BK.shape[1]}), got {weights_K}"
        )
    if rewards_BK.isinf().any():
        raise ValueError("rewards_BK holds an infinite reward; bound the reward function")
    return weights_K


def check_groups(num_completions: int, num_generations: int) -> None:
    """Refuse completions that cannot be divided into groups to be compared in."""
    if num_generations < 2:
        raise ValueError(
            f"num_generations must be at least 2, got {num_generations}: "
            "a group of one has nothing to be compared with"
        )
    if num_completions == 0 or num_completions % num_generations:
        raise ValueError(
            f"there are rewards of {num_completions} completions, "
            f"which is not a positive multiple of num_generations = {num_generations}"
        )


def check_options(
    scale_rewards: str,
    multi_objective_aggregation: str,
    *,
    std: str,
    advantage_eps: float,
    baseline: str,
) -> None:
    """Refuse options that do not exist, or that would be ignored."""
    for name, value, known in (
        ("scale_rewards", scale_rewards, ScaleRewards),
        ("std", std, Std),
        ("baseline", baseline, Baseline),
        ("multi_objective_aggregation", multi_objective_aggregation, MultiObjectiveAggregation),
    ):
        if value not in get_args(known):
            raise ValueError(f"{name} must be one of {get_args(known)}, got {value!r}")
    if not 0 <= advantage_eps < float("inf"):
        raise ValueError(f"advantage_eps must be a number of at least 0, got {advantage_eps}")
    if multi_objective_aggregation == "normalize_then_sum":
        for name, value, own in (
            ("scale_rewards", scale_rewards, "group"),
            ("baseline", baseline, "mean"),
        ):
            if value != own:
                raise ValueError(
                    f"{name} = {value!r} has no meaning with multi_objective_aggregation = "
                    f"'normalize_then_sum', which scales as GDPO does; leave it at {own!r}"
                )
