"""Which samples give the same answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..rewards.answers import answer_of, is_right


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
