"""From judged completions to pass@k and maj@k.

n samples of each of P prompts, next to each other.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..rewards import Judges
from ..rewards.answers import answer_of
from ..rewards.contract import content
from ..samples import Sample
from .estimates import Estimate, estimate, majority_at_k, pass_at_k
from .votes import group_answers


@dataclass(frozen=True)
class Verdict:
    """What is held of a completion."""

    answer: str
    """What it votes for."""
    right: bool | None
    """None: the judge did not judge it."""


class Judge:
    """One of a run's reward functions, which says what is right."""

    def __init__(self, judges: Judges, name: str | None, threshold: float | None) -> None:
        """Choose it.

        Args:
            judges: of the run.
            name: of the function; None: the first.
            threshold: least reward of a right answer; None: rewards must be 0 and 1.

        Raises:
            ValueError: there is no such function.
        """
        self.name, self.threshold = judges.names[0] if name is None else name, threshold
        if self.name not in judges.names:
            raise ValueError(
                f"--judge: the run has no reward function {name!r}; it has "
                f"{', '.join(judges.names)}"
            )
        self.index = judges.names.index(self.name)

    def judge(self, sample: Sample) -> Verdict:
        """Say whether a completion is right.

        Raises:
            ValueError: its reward is neither 0 nor 1, and there is no threshold.
        """
        reward = float(sample.rewards_K[self.index])
        right = None
        if not math.isnan(reward):
            if self.threshold is None and reward not in (0, 1):
                raise ValueError(
                    f"the reward {reward:g} of {self.name!r} is neither wrong (0) nor right (1); "
                    "say with --threshold from which reward on an answer is right, or name another "
                    "function with --judge"
                )
            right = reward >= (1 if self.threshold is None else self.threshold)
        return Verdict(answer_of(content(sample.text)), right)


def measure(
    verdicts: Sequence[Verdict], num_samples: int, ks: Sequence[int]
) -> dict[str, Estimate]:
    """Return pass@k, and maj@k of k above 1, over the prompts with k judged completions.

    Completions that were not judged neither count nor vote. In a majority vote completions with
    the same answer (`group_answers`) vote together.

    Args:
        verdicts: (P * n,) those of a prompt next to each other.
        num_samples: n.
        ks: none above n.
    """
    prompts = [list(votes) for votes in _votes(verdicts, num_samples)]
    found: dict[str, Estimate] = {}
    for k in ks:
        enough = [votes for votes in prompts if sum(given for given, _ in votes) >= k]
        if not enough:
            continue
        found[f"pass@{k}"] = estimate(
            [
                pass_at_k(sum(given for given, _ in votes), sum(right for _, right in votes), k)
                for votes in enough
            ]
        )
        if k > 1:
            found[f"maj@{k}"] = estimate([majority_at_k(votes, k) for votes in enough])
    return found


def _votes(verdicts: Sequence[Verdict], num_samples: int) -> Iterator[Iterator[tuple[int, int]]]:
    """Yield of each prompt how often each answer was given, and how often it was right."""
    for start in range(0, len(verdicts), num_samples):
        judged = [v for v in verdicts[start : start + num_samples] if v.right is not None]
        groups = group_answers([verdict.answer for verdict in judged])
        given = Counter(groups)
        right = Counter(g for g, verdict in zip(groups, judged, strict=True) if verdict.right)
        yield ((count, right[group]) for group, count in given.items())
