"""Metrics: the mean of an optimisation step over its micro-batches, and `metrics.jsonl`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import torch

SUMMED = frozenset({"num_tokens", "num_sequences", "num_computed_rows", "num_gradient_rows"})
"""Counts: added up over the micro-batches of a step."""

_EXTREMES = {
    "clip_ratio/low_min": ("clip_ratio/low_mean", torch.minimum),
    "clip_ratio/high_max": ("clip_ratio/high_mean", torch.maximum),
}


class StepMetrics:
    """Gathers what the micro-batches of one optimisation step report, as means of the whole step.

    Everything stays on the device the metrics came from until `result`, so that adding costs no
    host synchronisation.
    """

    def __init__(self) -> None:
        self._totals: dict[str, torch.Tensor] = {}
        self._weights: dict[str, torch.Tensor] = {}
        self._extremes: dict[str, torch.Tensor] = {}

    def add(
        self, metrics: Mapping[str, torch.Tensor | float], weight: torch.Tensor | float
    ) -> None:
        """Add one micro-batch.

        Args:
            metrics: 0-d tensors or numbers; a key that some micro-batches lack is the mean over
                those that have it.
            weight: of the means, usually the number of counted tokens. A micro-batch of weight 0
                leaves every mean and extreme alone, whatever it reports.
        """
        for key, value in metrics.items():
            value = _detached(value)
            if key in SUMMED:
                self._totals[key] = self._totals.get(key, 0.0) + value
                continue
            weight_here = _detached(weight).to(value.device)
            counts = weight_here > 0
            # An empty micro-batch may report 0 / 0, and 0 * NaN would spoil the step.
            share = torch.where(counts, value * weight_here, 0.0)
            self._totals[key] = self._totals.get(key, 0.0) + share
            self._weights[key] = self._weights.get(key, 0.0) + weight_here
            for name, (source, choose) in _EXTREMES.items():
                if key == source:
                    seen = self._extremes.get(name, torch.full_like(value, math.nan))
                    self._extremes[name] = torch.where(
                        counts, torch.where(seen.isnan(), value, choose(seen, value)), seen
                    )

    def result(self) -> dict[str, float]:
        """Return sums, weighted means, `clip_ratio/low_min` and `clip_ratio/high_max` as floats.

        A mean of nothing (total weight 0) is NaN.
        """
        means = {
            key: total / self._weights[key] if key in self._weights else total
            for key, total in self._totals.items()
        }
        return {key: float(value) for key, value in (means | self._extremes).items()}


class MetricsWriter:
    """Appends one JSON object a line to a file, each on the disk as soon as it is written.

    Args:
        path: the file; it is made, or continued where a previous run left it.
    """

    def __init__(self, path: str | Path) -> None:
        self._file: TextIO = Path(path).open("a", encoding="utf-8")

    def write(self, metrics: Mapping[str, Any]) -> None:
        """Write one line; tensors and numpy scalars become numbers, NaN and infinities null."""
        plain = {key: _json_value(value) for key, value in metrics.items()}
        self._file.write(json.dumps(plain, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Read the lines that `MetricsWriter` wrote; null is None."""
    with Path(path).open(encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


def _detached(value: torch.Tensor | float) -> torch.Tensor:
    """Return a 0-d float64 tensor, so that token counts add up exactly."""
    if isinstance(value, torch.Tensor):
        return value.detach().to(torch.float64)
    return torch.tensor(value, dtype=torch.float64)


def _json_value(value: Any) -> Any:
    # Tensors and numpy scalars of one element, without importing numpy.
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
