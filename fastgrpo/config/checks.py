"""What options are held to: each check yields a sentence for every value that fails it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, cast

from ..readable import named

_SECRET = re.compile(
    r"hf_[a-z]+_\w{10,}\.|(hf|gh[pousr])_[A-Za-z0-9]{30,}|github_pat_\w{20,}"
    r"|\bsk-([a-z]+-[\w-]{20,}|[A-Za-z0-9]{20,})|://[^/\s]*@|[?&](\w*token|\w*key|password)=",
)
"""A token of the Hub, GitHub or a provider of models, or one, or a password, in an address."""


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


def secrets(values: Mapping[Any, Any]) -> Iterator[str]:
    """Refuse keys whose values hold a token or a password, without saying it.

    Configurations are kept with the run, sent to trackers and shown in reports.
    """
    for name, value in values.items():
        if any(map(_SECRET.search, _texts(value))):
            yield (
                f"{named(name)}: holds what looks like a token or a password, which would be kept "
                "with the run and shown in reports; give it in the environment (HF_TOKEN, "
                "WANDB_API_KEY) or with hf auth login"
            )


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _texts([*cast("Mapping[Any, Any]", value).items()])
    elif isinstance(value, list | tuple):
        for item in cast("list[Any]", value):
            yield from _texts(item)
