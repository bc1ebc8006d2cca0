"""What can be said of a policy from n samples of each of P prompts.

A value is a mean over prompts of what is expected of k samples drawn from a prompt's n without
replacement; its interval is over prompts, which are taken for a sample of those to come.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean


@dataclass(frozen=True)
class Estimate:
    """A share, between 0 and 1, and the bounds of its confidence interval."""

    value: float
    low: float
    high: float
    num_prompts: int
    """Prompts that it is over."""


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """Return the probability that some of k samples, out of `num_samples`, is right.

    It is the unbiased estimator of Chen et al. (arxiv.org/abs/2107.03374, equation 1),
    1 - C(n - c, k) / C(n, k), of n samples with c right.

    Raises:
        ValueError: k or the number of right ones is not possible.
    """
    _check_k(k, num_samples)
    if not 0 <= num_right <= num_samples:
        raise ValueError(f"num_right must be between 0 and {num_samples}, got {num_right}")
    return 1 - math.comb(num_samples - num_right, k) / math.comb(num_samples, k)


def majority_at_k(votes: Sequence[tuple[int, int]], k: int) -> float:
    """Return the probability that the answer most of k samples give is right.

    Exact: over all C(n, k) ways to draw k of the n samples, and over ties, which each of the
    answers given most often wins with the same probability. Where a judge does not hold all
    samples of an answer for right, or for wrong, one of those drawn speaks for the answer.

    Args:
        votes: for each answer how many samples give it, and how many of these are right.
        k: samples that vote.

    Raises:
        ValueError: k or a number of right ones is not possible.
    """
    given = sorted(count for count, _ in votes)
    _check_k(k, sum(given))
    total = 0.0
    for count, right in votes:
        if not 0 <= right <= count or count < 1:
            raise ValueError(f"{right} of {count} samples of an answer cannot be right")
        if right:
            others = given.copy()
            others.remove(count)
            total += right / count * _chance_to_win(count, tuple(others), k)
    return total


@functools.lru_cache(maxsize=4096)
def _chance_to_win(own: int, others: tuple[int, ...], k: int) -> float:
    """Return how likely an answer of `own` samples wins a vote of k against other answers."""
    total = 0.0
    all_ways = math.comb(own + sum(others), k)
    for most in range(1, min(own, k) + 1):
        # (samples drawn of the others, how many of these have as many as we) -> ways to draw them
        ways = Counter({(0, 0): 1})
        left = sum(others)
        for size in others:
            left -= size
            longer: Counter[tuple[int, int]] = Counter()
            for (drawn, ties), count in ways.items():
                room = k - most - drawn
                for part in range(max(0, room - left), min(size, most, room) + 1):
                    tied = ties + (part == most)
                    longer[drawn + part, tied] += count * math.comb(size, part)
            ways = longer
        shared = sum(
            count / ((ties + 1) * all_ways)
            for (drawn, ties), count in ways.items()
            if drawn == k - most
        )
        total += math.comb(own, most) * shared
    return total


def interval(shares: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Return bounds of the mean of which the P given shares, between 0 and 1, are a sample.

    Wilson's score interval (1927), for as many yes-or-no observations as would know the mean as
    well as these shares do: the effective sample size of surveys (Korn and Graubard 1998; Franco
    et al. 2019, doi.org/10.1093/jssam/smy019), P m (1 - m) / v with their mean m and variance v.

    For the sample size one share of 0 and one of 1 are added, as Agresti and Coull (1998) add
    observations to a proportion: the variance of a few shares, of none but 0 above all, is most
    often too small. Shares that are all 0 or 1, as of one sample a prompt, get Wilson's interval
    for P observations itself, and no interval is a point. It covers the mean about as often as it
    claims from 30 prompts on, more often where all prompts are alike.

    Raises:
        ValueError: there is no share, or one is not between 0 and 1.
    """
    if not shares or not all(0 <= share <= 1 for share in shares):
        raise ValueError("an interval needs shares between 0 and 1, and at least one")
    count = len(shares)
    mean = fmean(shares)
    with_both = [*shares, 0.0, 1.0]
    middle = fmean(with_both)
    variance = fmean((share - middle) ** 2 for share in with_both)
    size = count * middle * (1 - middle) / variance
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    centre = (mean + z * z / (2 * size)) / (1 + z * z / size)
    radius = z * math.sqrt(mean * (1 - mean) / size + (z / (2 * size)) ** 2) / (1 + z * z / size)
    # At 0 and 1 a bound is the mean itself, but for rounding.
    return max(0.0, min(centre - radius, mean)), min(1.0, max(centre + radius, mean))


def estimate(shares: Sequence[float]) -> Estimate:
    """Return the mean of shares, one a prompt, with its 95% interval."""
    return Estimate(fmean(shares), *interval(shares), num_prompts=len(shares))


def _check_k(k: int, num_samples: int) -> None:
    if not 1 <= k <= num_samples:
        raise ValueError(f"k must be between 1 and the {num_samples} samples, got {k}")
