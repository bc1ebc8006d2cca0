"""From judged completions to pass@k and maj@k.

n samples of each of P prompts.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
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


def count_votes(verdicts: Sequence[Verdict], *, by_answer: bool = True) -> list[tuple[int, int]]:
    """Return how often each answer to a prompt was given, and how often it was right.

    Completions that were not judged neither count nor vote. Those with the same answer
    (`group_answers`) vote together.

    Args:
        verdicts: (n,) those of the prompt.
        by_answer: False counts all answers as one, which is enough for pass@k.
    """
    judged = [verdict for verdict in verdicts if verdict.right is not None]
    answers = [verdict.answer for verdict in judged]
    groups = group_answers(answers) if by_answer else [0] * len(judged)
    right = Counter(g for g, verdict in zip(groups, judged, strict=True) if verdict.right)
    return [(count, right[group]) for group, count in Counter(groups).items()]


def measure(votes: Sequence[Sequence[tuple[int, int]]], ks: Sequence[int]) -> dict[str, Estimate]:
    """Return pass@k, and maj@k of k above 1, over the prompts with k judged completions.

    Args:
        votes: (P,) of each prompt what `count_votes` returns; by answer if a k is above 1.
        ks: none above n.
    """
    found: dict[str, Estimate] = {}
    for k in ks:
        enough = [each for each in votes if sum(given for given, _ in each) >= k]
        if not enough:
            continue
        found[f"pass@{k}"] = estimate(
            [
                pass_at_k(sum(given for given, _ in each), sum(right for _, right in each), k)
                for each in enough
            ]
        )
        if k > 1:
            found[f"maj@{k}"] = estimate([majority_at_k(each, k) for each in enough])
    return found
