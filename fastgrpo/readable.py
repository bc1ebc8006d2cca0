"""Numbers, names and other people's texts as a person can read them in a terminal."""

from __future__ import annotations

import json
import math
import re
import reprlib
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Any

Metrics = Mapping[str, float | None]

KEPT = 3000
"""Characters kept of either end of a text: more than a terminal shows."""

SPARKS = "▁▂▃▄▅▆▇█"

_OBEYED = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff"
    r"\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]"
)


def plain(text: str) -> str:
    """Return a text without what a terminal or a page would obey; all of it that is to be read.

    Control characters but line breaks and tabs, lone surrogates, and what reorders the text around
    it become U+FFFD.
    """
    return _OBEYED.sub("\ufffd", text.replace("\r\n", "\n"))


QUOTED = 100
"""Characters of what someone else wrote, where a sentence quotes it."""

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = QUOTED


def shown(value: Any, *, quoted: bool = True, most: int = QUOTED) -> str:
    """Return a value for a sentence: in one line, what is invisible as escapes, not too long.

    Args:
        value: anything.
        quoted: texts in quotes.
        most: characters.
    """
    if value is None or isinstance(value, bool):
        return json.dumps(value)  # as YAML has it
    if not isinstance(value, str | int | float | bytes | list | tuple | Mapping):
        value = str(value)  # a date, for example
    if isinstance(value, str) and not quoted:
        words = " ".join(value[: 10 * most].split())
        text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in words)
    else:
        try:
            text = _SHORT.repr(value)
        except ValueError:
            text = "a number of too many digits to be shown"
    return text if len(text) <= most else f"{text[: most - 30]}...{text[-27:]}"


def named(key: Any) -> str:
    """Return a key as a sentence begins with it."""
    text = str(key)
    return text if re.fullmatch(r"[\w.-]{1,60}", text) else shown(text)


def printable(text: str) -> str:
    """Return what the live area can draw of a text: nothing wider in some terminals than in others.

    Control and unassigned characters and lone surrogates become U+FFFD. Joiners, directions and
    other invisible formats, variation selectors and skin tones are dropped, and so are combining
    marks after the second on a character. Of a long text both ends are kept.
    """
    if len(text) > 2 * KEPT:
        text = f"{text[:KEPT]}\n…\n{text[-KEPT:]}"
    shown: list[str] = []
    marks = 0
    for character in text.replace("\r\n", "\n").replace("\t", "    "):
        category = unicodedata.category(character)
        marks = marks + 1 if category in ("Mn", "Me") else 0
        if character == "\n" or category in ("Zl", "Zp"):
            shown.append("\n")
        elif marks > 2 or category == "Cf" or character in _VARIANTS:
            continue
        elif category[0] == "C":
            shown.append("\ufffd")
        else:
            shown.append(" " if category == "Zs" else character)
    return "".join(shown)


_VARIANTS = frozenset(map(chr, [*range(0xFE00, 0xFE10), *range(0x1F3FB, 0x1F400)]))


def number(value: float | None) -> str:
    """Return three significant digits, or all digits of the whole part of a large number."""
    if value is None or math.isnan(value):
        return "-"
    return f"{value:,.0f}" if 1000 <= abs(value) < math.inf else f"{value:.3g}"


def changes(
    found: Mapping[str, Mapping[str, float | None]], *, share: bool
) -> Iterator[tuple[str, str, str, str]]:
    """Yield name, `before`, `after` and their difference, as text; "-" where there is none.

    Args:
        found: by name.
        share: they are means of nothing but 0 and 1, and shown as percents.
    """

    def text(value: float, form: str) -> str:
        return "-" if math.isnan(value) else format(value, form)

    for name, pair in found.items():
        before, after = (
            math.nan if v is None else v for v in (pair.get("before"), pair.get("after"))
        )
        form, difference = (".1%", 100 * (after - before)) if share else (".4g", after - before)
        by = text(difference, "+.1f" if share else "+.4g")
        unit = " points" if share and by != "-" else ""
        yield name, text(before, form), text(after, form), by + unit


def sparkline(values: Sequence[float | None], width: int) -> str:
    """Return the course of numbers between their extremes, each character the mean of some."""
    known = [v for v in values if v is not None and math.isfinite(v)]
    count = min(width, len(known))
    if count < 2:
        return ""
    edges = [i * len(known) // count for i in range(count + 1)]
    means = [sum(known[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    rounding = 1e-9 * max(abs(low), abs(high))  # of the means of equal numbers
    scale = (len(SPARKS) - 1) / (high - low) if high - low > rounding else 0.0
    return "".join(SPARKS[round((mean - low) * scale)] for mean in means)


def matching(metrics: Metrics, patterns: Iterable[str]) -> Iterator[tuple[str, float | None]]:
    """Yield the metrics whose names match, in the order of the patterns."""
    for pattern in patterns:
        yield from ((n, value) for n, value in metrics.items() if fnmatchcase(n, pattern))


def short_name(name: str) -> str:
    """Return the name of a metric without what its place says."""
    return name.removeprefix("rewards/").removesuffix("/mean").removeprefix("completions/")
