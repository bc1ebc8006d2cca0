"""A chart as paths: where its lines, bars and labels are, and the numbers behind them.

The template turns a `Drawing` into SVG, whose text stays text and whose colours follow the page.
Every vertical axis includes zero, so that a small change does not look like a large one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from .curves import running_mean

WIDTH, HEIGHT = 420, 225
"""Units of a chart's view box, which is scaled to the page."""

FONT = 13
NUM_COLOURS = 8
"""Colours that the style sheet has; of more series some share one."""

Values = Sequence[float | None]


@dataclass(frozen=True, kw_only=True)
class Series:
    """Values over the common horizontal axis of a chart; None is a gap."""

    name: str
    key: str  # what metrics.jsonl calls it
    values: Values
    low: Values | None = None  # of the band or the error bars around the values
    high: Values | None = None


@dataclass(frozen=True, kw_only=True)
class Chart:
    """What is to be drawn."""

    title: str
    unit: str
    x: Sequence[tuple[float, float]]  # first and last of what each value stands for
    series: Sequence[Series]
    style: str = "lines"  # "lines", "points" (few, with error bars), "bars" or "areas" (stacked)
    x_label: str = "optimisation step"
    x_text: Sequence[str] | None = None  # what the values stand for, if not for steps
    named: bool = False  # these texts stand below their values
    whole: bool = False  # a share: the axis goes to 100%
    percent: bool = False
    smooth: bool = True
    note: str = ""


@dataclass(frozen=True)
class Drawing:
    """Paths and labels in units of the view box, and what the read-out needs."""

    chart: Chart
    left: float
    right: float
    top: float
    bottom: float
    y_ticks: list[tuple[float, str]]
    x_ticks: list[tuple[float, str]]
    marks: list[tuple[str, int, str]] = field(default_factory=list)  # kind, colour, path
    data: dict[str, Any] = field(default_factory=dict)


def draw(chart: Chart) -> Drawing:
    """Return where everything of a chart is; it has a value at least."""
    low, high = _range(chart)
    if chart.whole:
        low, high = min(low, 0.0), max(high, 1.0)
    y_values = _nice(low, high, 4, whole=chart.style == "bars")
    # An axis ends at a round number beyond the data, and is never shorter than the data.
    low, high = min(low, y_values[0]) if low < 0 else 0.0, max(high, y_values[-1])
    y_values = [t for t in y_values if low <= t <= high]
    texts = _ticks(y_values, percent=chart.percent)
    left = 14 + 0.6 * FONT * max(map(len, texts))
    right, top, bottom = WIDTH - 20.0, 10.0, HEIGHT - 40.0
    x_low, x_high = _x_range(chart)

    def to_x(value: float) -> float:
        return left + (value - x_low) / (x_high - x_low) * (right - left)

    def to_y(value: float) -> float:
        return bottom - (value - low) / (high - low) * (bottom - top)

    middles = [(first + last) / 2 for first, last in chart.x]
    xs = [to_x(x) for x in middles]
    paths = {"lines": _lines, "points": _points, "areas": _areas}
    if chart.style == "bars":
        edges = [(to_x(first), to_x(last)) for first, last in chart.x]
        marks = _bars(chart, edges, to_y)
    else:
        marks = paths[chart.style](chart, xs, to_y)
    return Drawing(
        chart,
        left,
        right,
        top,
        bottom,
        [(to_y(t), text) for t, text in zip(y_values, texts, strict=True)],
        _x_ticks(chart, x_low, x_high, to_x, right - left),
        [(kind, i % NUM_COLOURS, path) for kind, i, path in marks],
        _data(chart, xs, {"top": top, "bottom": bottom, "low": low, "high": high}),
    )


def tenths(values: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
    """Return the first and the last tenth of a run, each one item at least."""
    count = max(1, len(values) // 10)
    return values[:count], values[-count:]


def _range(chart: Chart) -> tuple[float, float]:
    every = [
        v for s in chart.series for part in (s.values, s.low or (), s.high or ()) for v in part
    ]
    known = [v for v in every if v is not None]
    low, high = min(0.0, *known, 0.0), max(0.0, *known, 0.0)
    return (low, high) if high > low else (0.0, 1.0)


def _x_range(chart: Chart) -> tuple[float, float]:
    first, last = chart.x[0][0], chart.x[-1][1]
    if chart.style == "bars":
        return first, last
    return min(first, 0.0), last if last > first or last > 0 else 1.0


def _x_ticks(
    chart: Chart, low: float, high: float, to_x: Any, width: float
) -> list[tuple[float, str]]:
    if chart.x_text and chart.named:
        longest = max(map(len, chart.x_text)) * 0.6 * FONT + 8
        every = math.ceil(longest * len(chart.x) / width)  # as many as there is room for
        return [
            (to_x((first + last) / 2), text)
            for (first, last), text in list(zip(chart.x, chart.x_text, strict=True))[::every]
        ]
    values = _nice(low, high, 6, whole=chart.style != "bars")
    values = [t for t in values if low <= t <= high]
    return list(zip(map(to_x, values), _ticks(values), strict=True))


def _nice(low: float, high: float, count: int, *, whole: bool) -> list[float]:
    """Return about `count` round numbers that reach from below `low` to above `high`."""
    ticks = MaxNLocator(nbins=count, steps=[1, 2, 2.5, 5, 10], integer=whole).tick_values(low, high)
    return [0.0 if abs(t) < 1e-12 * (high - low) else float(t) for t in ticks]


def _ticks(values: Sequence[float], *, percent: bool = False) -> list[str]:
    """Return the labels of an axis, all in the same unit."""
    if percent:
        return [f"{100 * value:.3g}%" for value in values]
    most = max((abs(value) for value in values), default=0.0)
    for least, size, letter in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if most >= least:
            return [f"{value / size:g}{letter}" if value else "0" for value in values]
    parts = [f"{value:.6g}".partition("e") for value in values]
    return [f"{digits}e{int(power)}" if power else digits for digits, _, power in parts]


def _lines(chart: Chart, xs: list[float], to_y: Any) -> list[tuple[str, int, str]]:
    marks: list[tuple[str, int, str]] = []
    reach = smoothing(len(xs)) // 2 if chart.smooth else 0
    for i, series in enumerate(chart.series):
        if series.low and series.high:
            marks += [("band", i, d) for d in _band(xs, series.low, series.high, to_y)]
        marks.append(("each" if reach else "line", i, _path(xs, series.values, to_y)))
        if reach:
            smooth = running_mean(np.array(series.values, dtype=float), reach).tolist()
            marks.append(
                ("line", i, _path(xs, [None if math.isnan(v) else v for v in smooth], to_y))
            )
    # What is thick lies above what is thin, whichever series it is of.
    order = ("band", "each", "line")
    return sorted(marks, key=lambda mark: order.index(mark[0]))


def smoothing(count: int) -> int:
    """Return of how many values, an odd number, the thick line is the mean."""
    return 2 * (count // 24) + 1


def _points(chart: Chart, xs: list[float], to_y: Any) -> list[tuple[str, int, str]]:
    marks: list[tuple[str, int, str]] = []
    for i, series in enumerate(chart.series):
        there = [(x, k) for k, x in enumerate(xs) if series.values[k] is not None]
        values = [series.values[k] for _, k in there]
        marks.append(("line", i, _path([x for x, _ in there], values, to_y)))
        bars = ""
        for x, k in there:
            low, high = (series.low or series.values)[k], (series.high or series.values)[k]
            if low is not None and high is not None and low < high:
                a, b = to_y(low), to_y(high)
                bars += f"M{x - 4:.1f} {a:.1f}h8m-4 0V{b:.1f}m-4 0h8"
        if bars:
            marks.append(("error", i, bars))
        dots = "".join(f"M{x:.1f} {to_y(v):.1f}h0" for (x, _), v in zip(there, values, strict=True))
        marks.append(("dot", i, dots))
    return marks


def _areas(chart: Chart, xs: list[float], to_y: Any) -> list[tuple[str, int, str]]:
    marks: list[tuple[str, int, str]] = []
    below = [0.0] * len(xs)
    # One step alone would have no width.
    wide = xs if len(xs) > 1 else [xs[0] - 20, xs[0]]
    for i, series in enumerate(chart.series):
        above = [b + (v or 0.0) for b, v in zip(below, series.values, strict=True)]
        edges = (below, above) if len(xs) > 1 else (below * 2, above * 2)
        marks += [("area", i, d) for d in _band(wide, *edges, to_y)]
        below = above
    return marks


def _bars(chart: Chart, edges: list[tuple[float, float]], to_y: Any) -> list[tuple[str, int, str]]:
    marks: list[tuple[str, int, str]] = []
    base, count = to_y(0.0), len(chart.series)
    for i, series in enumerate(chart.series):
        d = ""
        for (first, last), value in zip(edges, series.values, strict=True):
            width = 0.84 * (last - first) / count
            x = first + 0.08 * (last - first) + i * width
            if value:
                d += f"M{x:.1f} {base:.1f}V{to_y(value):.1f}h{width:.1f}V{base:.1f}z"
        marks.append(("bar", i, d))
    return marks


def _path(xs: Sequence[float], values: Values, to_y: Any) -> str:
    """Return a line with gaps; a value alone is a dot, for which the caps of lines are round."""
    parts: list[str] = []
    for run in _runs(values):
        points = [f"{xs[k]:.1f} {to_y(values[k]):.1f}" for k in run]
        parts.append(f"M{points[0]}h0" if len(run) == 1 else "M" + "L".join(points))
    return "".join(parts)


def _band(xs: Sequence[float], low: Values, high: Values, to_y: Any) -> list[str]:
    both = [None if a is None or b is None else a for a, b in zip(low, high, strict=True)]
    found: list[str] = []
    for run in _runs(both):
        there = [f"{xs[k]:.1f} {to_y(high[k]):.1f}" for k in run]
        back = [f"{xs[k]:.1f} {to_y(low[k]):.1f}" for k in reversed(run)]
        found.append("M" + "L".join(there + back) + "z")
    return found


def _runs(values: Values) -> list[list[int]]:
    """Return the places of values that follow one another without a gap."""
    runs: list[list[int]] = []
    for k, value in enumerate(values):
        if value is None:
            continue
        if runs and runs[-1][-1] == k - 1:
            runs[-1].append(k)
        else:
            runs.append([k])
    return runs


def _data(chart: Chart, xs: list[float], heights: dict[str, float]) -> dict[str, Any]:
    """Return the numbers of the read-out, to six digits."""
    texts = chart.x_text or [
        f"step {first:g}" if first == last else f"steps {first:g} to {last:g}"
        for first, last in chart.x
    ]
    return {
        "x": [round(x, 1) for x in xs],
        "labels": list(texts),
        "heights": heights,  # of the axis' ends: in the view box, and the values there
        "style": chart.style,
        "percent": chart.percent,
        "series": [
            {
                "colour": i % NUM_COLOURS,
                "values": _six(series.values),
                "low": series.low and _six(series.low),
                "high": series.high and _six(series.high),
            }
            for i, series in enumerate(chart.series)
        ],
    }


def _six(values: Values) -> list[float | None]:
    return [None if v is None else float(f"{v:.6g}") for v in values]


def binned(series: Series, width: int) -> Series:
    """Return a series of `width` values at a time: their mean, lowest and highest."""
    if width == 1:
        return series
    groups = [
        range(i, min(i + width, len(series.values))) for i in range(0, len(series.values), width)
    ]

    def of(values: Values, reduce: Any) -> list[float | None]:
        found = [[v for k in group if (v := values[k]) is not None] for group in groups]
        return [reduce(known) if known else None for known in found]

    return replace(
        series,
        values=of(series.values, fmean),
        low=of(series.low or series.values, min),
        high=of(series.high or series.values, max),
    )
