"""Check what a reward function returns: numbers, and as many as there are completions.

As `functions.py` does, it imports nothing but the standard library.
"""

from __future__ import annotations

import json
import math
import operator
import reprlib
from collections.abc import Mapping, Sequence, Set
from typing import Any

Value = float | list[tuple[int, float]] | None
"""A reward; the rewards of a completion's steps, each with the index of its last token; or none."""

MOST_CHARACTERS = 1000
"""Of a value or an error that a sentence shows."""

_LARGEST = 3.4028234663852886e38  # of fp32


class Refused(Exception):
    """What a function returned does not keep to the contract."""


def checked(values: Any, lengths: Sequence[int]) -> list[Value]:
    """Return rewards as plain numbers.

    Args:
        values: what a function returned.
        lengths: tokens of each completion.

    Raises:
        Refused: they are none; says what they are.
        Exception: whatever the methods of such an object raise.
    """
    count = len(lengths)
    # Of a mapping, a set and bytes the entries are numbers, too, but no rewards in order.
    listed = hasattr(values, "__len__") and not isinstance(values, Mapping | Set | str | bytes)
    entries = list(values) if listed and len(values) == count else []
    if not listed or len(entries) != count:
        returned = f"{len(values)} values" if listed else shown(values)
        raise Refused(
            f"returned {returned} for {count} completions; "
            "return a list with one number or None for each"
        )
    return [_value(x, i, lengths[i]) for i, x in enumerate(entries)]


def _value(value: Any, index: int, length: int) -> Value:
    if value is None:
        return None
    if isinstance(value, list | tuple) and all(isinstance(x, list | tuple) for x in value):
        steps = [_step(step, index, length) for step in value]
        if abs(math.fsum(reward for _, reward in steps)) > _LARGEST:
            raise Refused(
                f"returned the steps {shown(value)} for completion {index}, whose sum is beyond "
                f"{_LARGEST:.3g}; return smaller rewards"
            )
        return steps
    number = _number(value)
    if number is None:
        raise Refused(
            f"returned {shown(value)} for completion {index}; return a finite number, None for a "
            "completion it does not judge, or a list of (index of a step's last token, reward)"
        )
    return number


def _step(step: Sequence[Any], index: int, length: int) -> tuple[int, float]:
    try:
        end, number = operator.index(step[0]), _number(step[1])
        good = len(step) == 2 and number is not None and 0 <= end < length
    except (IndexError, TypeError):
        good, end, number = False, 0, None
    if not good or number is None:
        raise Refused(
            f"returned the step {shown(step)} for completion {index}, which has {length} tokens; "
            "return (index of the step's last token, finite reward)"
        )
    return end, number


def _number(value: Any) -> float | None:
    # float() would also take strings, and arrays of one element.
    if isinstance(value, str | bytes) or getattr(value, "ndim", 0) != 0:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if abs(number) <= _LARGEST else None  # a NaN is not


def encoded(reply: Any) -> bytes:
    """Return a reply as JSON; arrays and tensors are numbers or lists, other objects text.

    Raises:
        Exception: JSON has nothing for it.
    """
    return json.dumps(reply, default=_plain).encode()


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)


def brief(text: str, most: int = MOST_CHARACTERS) -> str:
    """Return a text, or the beginning and the end of one that is longer than `most` characters."""
    half = most // 2
    return text if len(text) <= most else f"{text[:half]} ... {text[-half:]}"


def shown(value: Any) -> str:
    """Return a value as a sentence shows it, however large it is, and if it cannot say itself."""
    return brief(_repr.repr(value))


_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = 80
