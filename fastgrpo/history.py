"""The metrics of a run so far, as far as a look at its health needs them.

A generation is a batch of sampled completions. Its rewards, lengths and advantages stand in the
metrics of every optimisation step that it serves; here they count once.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from statistics import fmean, variance

from .config import TrainConfig

Metrics = Mapping[str, float | None]

WINDOW = 100
"""Steps, and generations, that are remembered."""
COMPARED = 20
"""Generations whose mean is compared with that of as many others."""


class History:
    """The last steps of a run, and its first."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.fresh = False
        self.num_generations = 0
        self.steps: deque[Metrics] = deque(maxlen=WINDOW)
        self.generations: deque[Metrics] = deque(maxlen=WINDOW)
        self.first_generations: list[Metrics] = []
        self.first_entropies: list[float] = []

    def add(self, metrics: Metrics, *, fresh: bool) -> None:
        """Remember a step."""
        self.fresh = fresh
        self.steps.append(metrics)
        if fresh:
            self.num_generations += 1
            self.generations.append(metrics)
            if len(self.first_generations) < COMPARED:
                self.first_generations.append(metrics)
        if len(self.first_entropies) < 10:
            self.first_entropies += finite([metrics], "entropy")

    def now(self, name: str) -> float:
        """Return a metric of this step; NaN, which is in no range, if it has none."""
        value = self.steps[-1].get(name)
        return math.nan if value is None else value

    def of_steps(self, name: str, count: int) -> list[float]:
        """Return a metric's last finite values, oldest first; none if they are fewer."""
        values = finite(self.steps, name)
        return values[-count:] if len(values) >= count else []

    def of_generations(self, name: str, count: int) -> list[float]:
        """Return the same of generations."""
        values = finite(self.generations, name)
        return values[-count:] if len(values) >= count else []

    def judges(self) -> list[str]:
        """Return the names of the reward functions; the first is what the run is for."""
        ends = ("rewards/", "/mean")
        names = [n for n in self.steps[-1] if n.startswith(ends[0]) and n.endswith(ends[1])]
        return [name.removeprefix(ends[0]).removesuffix(ends[1]) for name in names]


def finite(rows: Iterable[Metrics], name: str) -> list[float]:
    """Return the finite values of a metric."""
    values = (row.get(name) for row in rows)
    return [value for value in values if value is not None and math.isfinite(value)]


def deviation(old: list[float], new: list[float]) -> float:
    """Return by how many standard errors the mean of `new` is above that of `old`.

    Infinite if neither has a spread and they differ; NaN if one has fewer than two values.
    """
    if min(len(old), len(new)) < 2:
        return math.nan
    difference = fmean(new) - fmean(old)
    error = math.sqrt(variance(old) / len(old) + variance(new) / len(new))
    if error == 0:
        return math.copysign(math.inf, difference) if difference else 0.0
    return difference / error
