"""The pictures of a run of the loss: time and memory by peer, and how near the roof they come."""

from __future__ import annotations

import hashlib
import json
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

from .facts import (
    Record,
    Run,
    ceiling,
    cells,
    device,
    is_ok,
    label,
    number,
    products_ms,
    rate,
)

KINDS = ("loss_cpu", "loss_gpu")
DPI = 120
INK, PALE = "#222222", "#8a8a8a"
COLOURS = {
    "fastgrpo": "#0b5cad",
    "naive": "#4d4d4d",
    "compiled": "#a6a6a6",
    "trl": "#d1495b",
    "liger_triton": "#7cb518",
    "liger_linear": "#2e8b57",
    "liger_sm90": "#0f5132",
    "cce": "#9b5de5",
    "verl": "#e09f3e",
}
MS, MEMORY = "ms, forward and backward: median", "MiB at the peak, beyond inputs and gradients"
MARKERS = ("o", "s", "^", "D")
HEAD = ("H", "V", "dtype")


@dataclass(frozen=True)
class Drawing:
    """A picture to be: what it is called, what it shows, how it is drawn, and of which run."""

    name: str
    caption: str
    draw: Callable[[], Figure]
    run: Run

    @property
    def link(self) -> str:
        return f"![{self.caption}](results/{self.name})"

    def save(self, results: Path) -> None:
        # Without the version of matplotlib: the same run gives the same file.
        metadata = {"Software": None, "Description": self.digest}
        self.draw().savefig(results / self.name, dpi=DPI, metadata=metadata)

    @property
    def digest(self) -> str:
        """Return what the file says it shows: the SHA-256 of its name and its run."""
        shown = json.dumps([self.name, self.run], sort_keys=True)
        return hashlib.sha256(shown.encode()).hexdigest()


def drawings(run: Run, kind: str) -> list[Drawing]:
    """Return the pictures of a run: one for each head and type, and one of their roofs."""
    linear = [record for record in run["records"] if record["op"] == "linear"]
    found = []
    for records in cells(linear, HEAD):
        first = records[0]
        lengths = {r["N"] for r in records if is_ok(r) and _is_full(r)}
        draw, what = (_lines, " against N") if len(lengths) > 1 else (_bars, "")
        head = f"H = {first['H']:,}, V = {first['V']:,}, {first['dtype']}"
        found.append(
            Drawing(
                f"{kind}_H{first['H']}_V{first['V']}_{first['dtype']}.png",
                f"Time and extra memory{what} by peer, {head}",
                lambda draw=draw, records=records, head=head: draw(run, records, head),
                run,
            )
        )
    if any(is_ok(r) and _is_full(r) and ceiling(run, r) for r in linear):
        roofs = Drawing(
            f"{kind}_roofline.png",
            "FLOP/s against FLOPs a byte, by peer",
            lambda: _roofs(run, linear),
            run,
        )
        found.append(roofs)
    return found


def _is_full(record: Record) -> bool:
    return record["rho"] == 1 and not record["frozen"]


def _lines(run: Run, records: list[Record], head: str) -> Figure:
    """Draw time and memory against N, a line for each method that has two points or more."""
    full = [record for record in records if _is_full(record)]
    figures: dict[str, tuple[str, Callable[[Record], float | None]]] = {
        "Time": (MS, lambda r: r["ms_total"][1]),
        "Time over the bare products": ("times", lambda r: r.get("ratio_to_ceiling")),
        "Memory": (MEMORY, lambda r: r["peak_extra_bytes"] / 2**20),
    }
    if all(record.get("ratio_to_ceiling") is None for record in full):
        del figures["Time over the bare products"]
    title = f"{head}, trainable head, rho = 1"
    figure, panels = _figure(title, run, (4.3 * len(figures) + 2.9, 4.6), list(figures))
    handles = []
    for mine in cells(full, ("peer", "method")):
        points = sorted((r for r in mine if is_ok(r)), key=lambda r: r["N"])
        if not points:
            said = f"{label(mine[0])}: {_shortened(mine[0])}"
            handles.append(Line2D([], [], linestyle="none", label=said))
            continue
        style = _style(mine[0], records) | {"linestyle": "-" if len(points) > 1 else "none"}
        for axes, (_, value) in zip(panels, figures.values(), strict=True):
            drawn = [(r["N"], y) for r in points if (y := value(r)) is not None and y > 0]
            axes.plot([N for N, _ in drawn], [y for _, y in drawn], **style)
        panels[0].vlines(
            [r["N"] for r in points],
            [r["ms_total"][0] for r in points],
            [r["ms_total"][2] for r in points],
            color=style["color"],
            linewidth=1,
        )
        handles.append(Line2D([], [], **style, label=label(mine[0])))
    least = {r["N"]: products_ms(c["ms_products"], r) for r in full if (c := ceiling(run, r))}
    if least:
        (line,) = panels[0].plot(*zip(*sorted(least.items()), strict=True), "--", color=INK)
        line.set(label="the three bare products", linewidth=1)
        handles.append(line)
    for axes, (unit, _) in zip(panels, figures.values(), strict=True):
        axes.set(xscale="log", yscale="log", xlabel="N, tokens", ylabel=unit)
        axes.set_xticks(sorted({record["N"] for record in full}))
        axes.xaxis.set_minor_locator(NullLocator())
        _plain_numbers(axes.xaxis)
        _log_numbers(axes.yaxis, (1, 2, 5))
    for axes, heading in zip(panels, figures, strict=True):
        if heading.endswith("products"):
            axes.axhline(1, color=INK, linestyle="--", linewidth=1)
            _log_numbers(axes.yaxis, (1, 1.2, 1.5, 2, 3, 4, 5, 7))
    figure.legend(handles=handles, loc="outside right center", frameon=False, fontsize=9)
    return figure


def _bars(run: Run, records: list[Record], head: str) -> Figure:
    """Draw time and memory of one N, a bar for each method and kind of cell."""
    length = next((r["N"] for r in records if is_ok(r) and _is_full(r)), records[0]["N"])
    records = [record for record in records if record["N"] == length]
    names = list(dict.fromkeys(map(label, records)))
    kinds = [(cell[0]["rho"], cell[0]["frozen"]) for cell in cells(records, ("rho", "frozen"))]
    height = 1.8 + 0.21 * len(names) * max(len(kinds), 1.5)
    title = f"N = {length:,}, {head}"
    figure, (time, memory) = _figure(title, run, (12.0, height), ["Time", "Memory"], sharey=True)
    said = set()
    thick = 0.82 / len(kinds)
    for record in records:
        kind = kinds.index((record["rho"], record["frozen"]))
        y = names.index(label(record)) + (kind - (len(kinds) - 1) / 2) * thick
        if not is_ok(record):
            text = _shortened(record)
            if not any(is_ok(r) for r in records if label(r) == label(record)):
                y = names.index(label(record))
            for axes in (time, memory) if (label(record), text) not in said else ():
                _say(axes, 0, y, text, PALE)
            said.add((label(record), text))
            continue
        low, middle, high = record["ms_total"]
        size = record["peak_extra_bytes"] / 2**20
        for axes, value, end in ((time, middle, high), (memory, size, size)):
            colour = COLOURS.get(record["peer"], PALE)
            axes.barh(y, value, thick * 0.9, color=colour, alpha=_alpha(kind), linewidth=0)
            _say(axes, end, y, number(value), INK)
        time.hlines(y, low, high, color=INK, linewidth=1, zorder=3)
    handles = [Patch(color=INK, alpha=_alpha(i), linewidth=0) for i in range(len(kinds))]
    words = [f"rho = {rho:g}" + (", frozen head" if frozen else "") for rho, frozen in kinds]
    least = [products_ms(c["ms_products"], r) for r in records if (c := ceiling(run, r))]
    if least:
        handles.append(time.axvline(max(least), color=INK, linestyle="--", linewidth=1, zorder=1))
        words.append("the bare products")
    time.set_yticks(range(len(names)), names)
    time.set_ylim(len(names) - 0.4, -0.6)
    for axes, unit in ((time, f"{MS}, with least and most"), (memory, MEMORY)):
        axes.set(xlabel=unit)
        axes.margins(x=0.14)
        axes.set_xlim(left=0)
        axes.grid(visible=False, axis="y")
        _plain_numbers(axes.xaxis)
    figure.legend(
        handles, words, loc="outside lower right", ncols=len(words), frameon=False, fontsize=9
    )
    return figure


def _roofs(run: Run, records: list[Record]) -> Figure:
    """Draw FLOP/s against FLOPs a byte, a panel for each head and type.

    The bytes are the least that any method can move: hidden states and head are read once, their
    gradients written once. Real traffic is higher, so a method stands further left than its point.
    """
    full = [record for record in records if is_ok(record) and _is_full(record)]
    panels = [[r for r in cell if ceiling(run, r)] for cell in cells(full, HEAD)]
    panels = [panel for panel in panels if panel]
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure((4.2 * columns + 2.6, 3.9 * rows + 0.5), layout="constrained")
    _title(figure, "Roofline, trainable head, rho = 1", run)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    shown: dict[str, Any] = {}
    for axes, panel in zip(grid.flat, panels, strict=False):
        _roof(run, axes, panel, shown)
    shown |= {
        "filled: the 6NHV that are needed": _marker(INK, INK),
        "hollow: all that it computes": _marker(INK, "white"),
        "roof: a copy, the fastest product": Line2D([], [], color=INK, linewidth=1.5),
        "the three products together": Line2D([], [], color=INK, linewidth=1, linestyle="--"),
    }
    for name, handle in shown.items():
        handle.set_label(name)
    figure.legend(
        handles=list(shown.values()), loc="outside right center", frameon=False, fontsize=9
    )
    return figure


def _roof(run: Run, axes: Axes, panel: list[Record], shown: dict[str, Any]) -> None:
    found = {record["N"]: (record, c) for record in panel if (c := ceiling(run, record))}
    roof = max(_needed(r) / 3 / min(c["ms_products"].values()) for r, c in found.values()) * 1e3
    together = max(_needed(r) / products_ms(c["ms_products"], r) for r, c in found.values()) * 1e3
    copy = max(c["copy_bytes_per_second"] for _, c in found.values())
    points = []
    for record in panel:
        style = _style(record, run["records"])
        works = [_needed(record), record.get("flops") or _needed(record)]
        xs = [work / _least_bytes(record) for work in works]
        ys = [work / record["ms_total"][1] * 1e3 for work in works]
        points += zip(xs, ys, strict=True)
        axes.plot(xs, ys, "-", color=style["color"], linewidth=1)
        axes.plot(xs[1:], ys[1:], **style | {"markerfacecolor": "white", "linestyle": "none"})
        axes.plot(xs[:1], ys[:1], **style | {"linestyle": "none"})
        shown.setdefault(label(record), _marker(style["color"], style["color"], style["marker"]))
    floor = min(roof / 4, *(y / 1.5 for _, y in points))
    start, ridge, end = floor / copy, roof / copy, max(x for x, _ in points) * 2
    axes.plot([start, ridge, end], [floor, roof, roof], color=INK, linewidth=1.5)
    axes.plot([together / copy, end], [together, together], color=INK, linewidth=1, linestyle="--")
    axes.set(xscale="log", yscale="log", xlim=(start, end), ylim=(floor, roof * 1.6))
    axes.set(xlabel="FLOPs a byte, at most", ylabel="FLOP/s")
    first = panel[0]
    axes.set_title(
        f"H = {first['H']:,}, V = {first['V']:,}, {first['dtype']}\n"
        f"products {rate(roof)}, copy {number(copy / 1e9)} GB/s",
        fontsize=9, loc="left", parse_math=False,
    )  # fmt: skip
    _plain_numbers(axes.xaxis)
    _log_numbers(axes.yaxis, (1, 2, 5))
    scale, letter = (1e12, "T") if roof >= 1e12 else (1e9, "G")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value / scale:,g} {letter}")
    axes.grid(alpha=0.25)


def _needed(record: Record) -> float:
    return 6.0 * record["N"] * record["H"] * record["V"]


def _least_bytes(record: Record) -> float:
    size = getattr(torch, record["dtype"]).itemsize
    return 2.0 * size * record["H"] * (record["N"] + record["V"])


def _figure(
    title: str, run: Run, size: tuple[float, float], headings: list[str], **options: Any
) -> tuple[Figure, Any]:
    # A Figure of its own, not pyplot: nothing global, no display, no figure left open.
    figure = Figure(size, layout="constrained")
    _title(figure, title, run)
    panels = figure.subplots(1, len(headings), **options)
    for axes, heading in zip(panels, headings, strict=True):
        axes.set_title(heading, loc="left", fontsize=10, fontweight="bold")
        axes.grid(alpha=0.25)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def _title(figure: Figure, title: str, run: Run) -> None:
    text = f"{title} · {device(run)}, {run['date']}"
    figure.suptitle(text, x=0.01, ha="left", fontsize=11, parse_math=False)


def _style(record: Record, records: Sequence[Record]) -> dict[str, Any]:
    """Return colour by peer, and marker by method of the peer."""
    methods = dict.fromkeys(r["method"] for r in records if r["peer"] == record["peer"])
    which = list(methods).index(record["method"])
    colour = COLOURS.get(record["peer"], PALE)
    return {
        "color": colour if which == 0 else _lighter(colour),
        "marker": MARKERS[which % len(MARKERS)],
        "markersize": 6,
    }


def _lighter(colour: str) -> str:
    parts = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{(part + 255) // 2:02x}" for part in parts)


def _alpha(kind: int) -> float:
    return (1.0, 0.55, 0.3)[min(kind, 2)]


def _marker(edge: str, face: str, marker: str = "o") -> Any:
    return Line2D([], [], color=edge, markerfacecolor=face, marker=marker, linestyle="none")


def _shortened(record: Record) -> str:
    return textwrap.shorten(record["status"], 40, placeholder=" ...")


def _say(axes: Axes, x: float, y: float, text: str, colour: str) -> None:
    """Write behind a point, legible over lines."""
    paper = {"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.85}
    axes.annotate(
        text, (x, y), (5, 0), textcoords="offset points", va="center", fontsize=8, color=colour,
        bbox=paper, parse_math=False,
    )  # fmt: skip


def _plain_numbers(axis: Any) -> None:
    axis.set_major_formatter(lambda value, _: f"{value:,g}")


def _log_numbers(axis: Any, steps: Sequence[float]) -> None:
    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_minor_formatter(NullFormatter())
    _plain_numbers(axis)
