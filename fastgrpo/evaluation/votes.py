"""Which samples give the same answer."""

from __future__ import annotations

from collections.abc import Sequence

from ..rewards.answers import (
    answer_of,
    bare,
    is_mathematics,
    is_right,
)


def is_unmarked_prose(completion: str) -> bool:
    """Say whether a completion has several words and nothing tells which of them is its answer."""
    text = completion.strip()
    return len(text.split()) > 1 and answer_of(text) == text


def group_answers(answers: Sequence[str]) -> list[int]:
    """Return for each answer the index of the first that is the same, possibly its own.

    Two are the same where each is right by the rule of `rewards.accuracy` if the other is:
    equal text, equal numbers, or formulas that are equal by math-verify. An empty answer is one
    like any other. An answer that is the same as another is not compared any further, the other
    stands for both: math-verify takes milliseconds for a pair.
    """
    first: dict[str, int] = {}
    formulas: list[int] = []  # the first of those that another text may be the same as
    for i, answer in enumerate(answers):
        if answer not in first:
            first[answer] = i
            if is_mathematics(bare(answer.rpartition("####")[2])):
                first[answer] = next((j for j in formulas if _same(answers[j], answer)), i)
                formulas += [i] if first[answer] == i else []
    return [first[answer] for answer in answers]


def _same(one: str, other: str) -> bool:
    return is_right(one, other) and is_right(other, one)
