"""Which charts a run has of what adds up: rewards by value, seconds by what they went into."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

from .chart import Chart, Series, tenths
from .files import Line, RunFiles, number
from .panels import bin_width, column, names_of, steps_of

MOST_VALUES = 12
"""Distinct rewards that have a bar each; more of them are counted in intervals."""
NUM_INTERVALS = 20


def histograms(run: RunFiles) -> Iterator[Chart]:
    """Yield how often each reward was given, in the first and the last tenth of the run."""
    if not run.rewards:
        return
    first, last = tenths(run.rewards)
    parts = [first] if len(run.rewards) == 1 else [first, last]
    titles = ["the only generation"] if len(parts) == 1 else ["first tenth", "last tenth"]
    for name in dict.fromkeys(n for line in run.rewards for n in line.get("rewards", {})):
        given = [
            [v for line in part for v in (line.get("rewards", {}).get(name) or [])]
            for part in parts
        ]
        judged = [[float(v) for v in values if number(v)] for values in given]
        silent = [len(a) - len(j) for a, j in zip(given, judged, strict=True)]
        places, texts, of = intervals([v for values in judged for v in values])
        counts = [[0] * len(places) for _ in parts]
        for k, values in enumerate(judged):
            for value in values:
                counts[k][of(value)] += 1
        yield Chart(
            title=name,
            unit="completions",
            x=places,
            series=[
                Series(
                    name=f"{title}, {_steps(part)}: {len(j):,} judged"
                    + (f", {none:,} not" if none else ""),
                    key=f"{name}/{title}",
                    values=count,
                )
                for title, part, j, none, count in zip(
                    titles, parts, judged, silent, counts, strict=True
                )
            ],
            style="bars",
            x_label="reward",
            x_text=texts,
            named=len(texts) <= MOST_VALUES,
            note="" if places else "It judged no completion in these steps.",
        )


def _steps(lines: Sequence[Line]) -> str:
    first, last = lines[0]["step"], lines[-1]["step"]
    return f"step {first}" if first == last else f"steps {first} to {last}"


def intervals(values: Sequence[float]) -> tuple[list[tuple[float, float]], list[str], Any]:
    """Return where the bars are, what each counts, and the function from a value to its bar."""
    distinct = sorted(set(values))
    if len(distinct) <= MOST_VALUES:
        places = [(i - 0.5, i + 0.5) for i in range(len(distinct))]
        return places, [f"{v:.4g}" for v in distinct], distinct.index
    low, high = distinct[0], distinct[-1]
    width = (high - low) / NUM_INTERVALS
    edges = [low + i * width for i in range(NUM_INTERVALS)] + [high]
    places = list(pairwise(edges))

    def of(value: float) -> int:
        return min(int((value - low) / width), NUM_INTERVALS - 1)

    return places, [f"{a:.4g} to {b:.4g}" for a, b in places], of


@dataclass(frozen=True)
class Timing:
    """Where the time of a run's steps went."""

    name: str
    median: float  # seconds a step, of the steps that have it
    total: float
    share: float


def timings(run: RunFiles) -> tuple[Chart | None, list[Timing]]:
    """Return the shares of each step's seconds, and what they come to."""
    lines = run.training
    names = names_of(lines, "time/*")
    if not names:
        return None, []
    columns = {name: column(lines, name) for name in names}
    totals = {name: sum(v or 0.0 for v in values) for name, values in columns.items()}
    whole = sum(totals.values()) or 1.0
    table = [
        Timing(
            name.removeprefix("time/"),
            median([v for v in values if v is not None]),
            totals[name],
            totals[name] / whole,
        )
        for name, values in columns.items()
    ]
    width = bin_width(len(lines))
    # Shares of the seconds of all steps in a bin: long steps weigh more.
    sums = {
        name: [sum(v or 0.0 for v in values[i : i + width]) for i in range(0, len(values), width)]
        for name, values in columns.items()
    }
    every = [sum(parts) or 1.0 for parts in zip(*sums.values(), strict=True)]
    chart = Chart(
        title="Where the time goes",
        unit="share of each step's seconds",
        x=steps_of(lines),
        series=[
            Series(
                name=name.removeprefix("time/"),
                key=name,
                values=[a / b for a, b in zip(values, every, strict=True)],
            )
            for name, values in sums.items()
        ],
        style="areas",
        whole=True,
        percent=True,
    )
    return chart, table
