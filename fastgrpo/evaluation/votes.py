"""Which samples give the same answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

# pyright: ignore is for the lines until `answers.answer_of` is public.
from ..rewards.answers import (
    _bare,  # pyright: ignore[reportPrivateUsage]
    is_right,
)


def answer_of(completion: str) -> str:
    """Return a completion's answer, as `rewards.accuracy` reads it."""
    end = completion.rfind("</answer>")
    start = completion.rfind("<answer>", 0, end) if end >= 0 else -1
    return _bare(completion[start + len("<answer>") : end] if start >= 0 else completion)


def is_unmarked_prose(completion: str) -> bool:
    """Say whether a completion has several words and nothing tells which of them is its answer."""
    text = completion.strip()
    return len(text.split()) > 1 and answer_of(text) == text


def group_answers(answers: Sequence[str]) -> list[int]:
    """Return for each answer the index of the first that is the same, possibly its own.

    Two are the same where each is right by the rule of `rewards.accuracy` if the other is:
    equal text, equal numbers, or formulas that are equal by math-verify. An empty answer is one
    like any other.
    """
    first: dict[str, int] = {}
    for i, answer in enumerate(answers):
        if answer not in first:
            first[answer] = next(_same(answer, first), i)
    return [first[answer] for answer in answers]


def _same(answer: str, known: dict[str, int]) -> Iterator[int]:
    """Yield the indices of known answers that an answer is the same as."""
    for other, i in known.items():
        if is_right(other, answer) and is_right(answer, other):
            yield i
