"""What options are held to: each check yields a sentence for every value that fails it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


class ConfigError(ValueError):
    """Something in the configuration is wrong; the message says what and what to do."""


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
