"""The curves of a run as a picture."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..durable import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

SIZE_INCHES = (12.0, 7.0)
DPI = 120

_COLOURS = {"a": "#2563a8", "b": "#1b8a5a", "c": "#a8502a", "d": "#6b4fa0", "e": "#80650f"}


def save_curves(
    metrics: Sequence[Mapping[str, Any]],
    path: str | Path,
    *,
    title: str,
    accuracy_key: str,
    share: bool,
) -> None:
    """Draw both rewards, entropy, length and KL over the steps into a PNG.

    Args:
        metrics: the lines of metrics.jsonl.
        path: of the PNG.
        title: above the panels.
        accuracy_key: the metric of the first reward, for example `rewards/exact_match/mean`.
        share: it is a mean of nothing but 0 and 1, an accuracy.

    Raises:
        WriteError: the disk is full, for example.
    """
    figure = curves_figure(metrics, title=title, accuracy_key=accuracy_key, share=share)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=DPI)
    write_whole(Path(path), picture.getvalue())


def curves_figure(
    metrics: Sequence[Mapping[str, Any]], *, title: str, accuracy_key: str, share: bool
) -> Figure:
    """Return the figure that `save_curves` saves; the arguments are the same.

    A panel has every step's value in a light line and their running mean in a dark one. Every
    axis includes zero, so that a small change does not look like a large one; an accuracy has the
    whole range.
    """
    # A Figure of its own, not pyplot: nothing global, no display, no figure left open.
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE_INCHES, layout="constrained")
    figure.suptitle(title, fontsize=14, fontweight="bold", parse_math=False)
    panels = figure.subplot_mosaic("aaabbb;ccddee")
    contents = {
        "a": ("reward", "Reward", "weighted sum of rewards", "not recorded"),
        "b": (
            accuracy_key,
            f"{'Accuracy' if share else 'First reward'} ({accuracy_key})",
            "sampled completions that are right" if share else "mean reward",
            "not recorded",
        ),
        "c": ("entropy", "Entropy", "nats per token", "not recorded"),
        "d": ("completions/mean_length", "Completion length", "tokens", "not recorded"),
        "e": ("kl", "KL to the reference", "nats per token", "not computed (beta = 0)"),
    }
    steps = np.array([line.get("step", i) for i, line in enumerate(metrics, 1)], dtype=float)
    for place, (key, heading, unit, absence) in contents.items():
        axes = panels[place]
        axes.set_title(heading, loc="left", fontsize=11, parse_math=False)
        axes.set(xlabel="optimisation step", ylabel=unit)
        axes.spines[["top", "right"]].set_visible(False)
        values = np.array([line.get(key) for line in metrics], dtype=float)  # None becomes NaN
        if np.isnan(values).all():
            axes.set(xticks=[], yticks=[])
            axes.text(0.5, 0.5, absence, ha="center", color="0.45", transform=axes.transAxes)
            continue
        _draw(axes, steps, values, _COLOURS[place])
        low, high = min(0.0, np.nanmin(values)), max(0.0, np.nanmax(values))
        if key == accuracy_key and share:
            axes.set_ylim(0, 1.02)
            axes.yaxis.set_major_formatter("{x:.0%}")
        else:
            margin = 0.08 * (high - low) or 1.0
            axes.set_ylim(low - margin if low < 0 else 0.0, high + margin)
    return figure


def _draw(axes: Axes, steps: NDArray[np.float64], values: NDArray[np.float64], colour: str) -> None:
    """Draw every step's value light and their running mean dark."""
    from matplotlib.ticker import MaxNLocator

    # Dots, because a value between two missing ones has no line.
    axes.plot(steps, values, ".-", color=colour, alpha=0.3, lw=1, ms=3, label="each step")
    reach = len(steps) // 24
    label = f"mean of {2 * reach + 1} steps"
    axes.plot(steps, running_mean(values, reach), color=colour, lw=2, label=label)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.grid(color="0.9", lw=0.8)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=8)


def running_mean(values: NDArray[np.float64], reach: int) -> NDArray[np.float64]:
    """Return the mean of what is there among a value and `reach` on either side, else NaN."""
    there = ~np.isnan(values)
    totals = np.concatenate([[0.0], np.cumsum(np.where(there, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(there)])
    i = np.arange(len(values))
    first, end = np.maximum(i - reach, 0), np.minimum(i + reach + 1, len(values))
    counted = counts[end] - counts[first]
    means = np.full(len(values), np.nan)
    return np.divide(totals[end] - totals[first], counted, out=means, where=counted > 0)
