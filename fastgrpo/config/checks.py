"""What options are held to: each check yields a sentence for every value that fails it."""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Iterator
from typing import Any


class ConfigError(ValueError):
    """Something in the configuration is wrong; the message says what and what to do."""


LONGEST = 100
"""Characters of what someone else wrote, where a sentence quotes it."""

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = LONGEST


def shown(value: Any, *, quoted: bool = True) -> str:
    """Return a value for a sentence: in one line, what is invisible as escapes, not too long.

    Args:
        value: anything.
        quoted: texts in quotes.
    """
    if value is None or isinstance(value, bool):
        return json.dumps(value)  # as YAML has it
    if isinstance(value, str) and not quoted:
        words = " ".join(value[: 10 * LONGEST].split())
        text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in words)
    else:
        try:
            text = _SHORT.repr(value)
        except ValueError:
            text = "a number of too many digits to be shown"
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 30]}...{text[-27:]}"


def named(key: Any) -> str:
    """Return a key as a sentence begins with it."""
    text = str(key)
    return text if re.fullmatch(r"[\w.-]{1,60}", text) else shown(text)


def at_least(options: Any, least: float, *names: str) -> Iterator[str]:
    """Hold options that are not None to `least` or more."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not value >= least:
            yield (
                f"{name}: must be {least} or more, got {value}"
                if least == 0
                else f"{name}: must be at least {least}, got {value}"
            )


def above_zero(options: Any, *names: str) -> Iterator[str]:
    """Hold options that are not None to more than 0."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not value > 0:
            yield f"{name}: must be above 0, got {value}"


def share(options: Any, *names: str) -> Iterator[str]:
    """Hold options that are not None to more than 0 and at most 1."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not 0 < value <= 1:
            yield f"{name}: must be above 0 and at most 1, got {value}"


def below_one(options: Any, *names: str) -> Iterator[str]:
    """Hold options that are not None to 0 or more and less than 1."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not 0 <= value < 1:
            yield f"{name}: must be 0 or more and below 1, got {value}"
