"""Metrics: one value a step from what its micro-batches report."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch import Tensor

from fastgrpo_kernels import GRPOLossConfig

SUMMED = frozenset(
    {"loss", "num_tokens", "num_sequences", "num_computed_rows", "num_gradient_rows"}
)
"""Counts, and the loss, of which a micro-batch has a share: these are added up."""

CLIP_RATIOS = frozenset(
    {
        "clip_ratio/low_mean",
        "clip_ratio/high_mean",
        "clip_ratio/region_mean",
        "cispo_clip_ratio",
    }
)


def sequence_means(config: GRPOLossConfig) -> frozenset[str]:
    """Return the metrics of the loss that are means over sequences, not over tokens."""
    by_sequence = config.importance_sampling_level == "sequence"
    return (CLIP_RATIOS if by_sequence else frozenset()) | {"vespo/phi_seq_mean"}


class StepMetrics:
    """Gathers what the micro-batches of one optimisation step report.

    Counts and the loss are summed, names that end in `min` or `max` keep their extreme, everything
    else becomes the weighted mean of the step. All stays on the device the metrics came from until
    `result`, so that adding costs no host synchronisation.
    """

    def __init__(self, sequence_means: frozenset[str] = frozenset()) -> None:
        """Make an empty step.

        Args:
            sequence_means: names that are weighed by `num_sequences` of their micro-batch.
        """
        self._sequence_means = sequence_means
        self._sums: dict[str, Tensor] = {}
        self._weights: dict[str, Tensor] = {}
        self._extremes: dict[str, Tensor] = {}

    def add(self, metrics: Mapping[str, Tensor | float], weight: Tensor | float) -> None:
        """Add one micro-batch.

        Args:
            metrics: 0-d tensors, all on one device, or numbers. A name that some micro-batches
                lack is the mean over those that have it.
            weight: of the means, usually the number of counted tokens. A micro-batch of weight 0
                changes no mean and no extreme, even if it reports 0 / 0.
        """
        tensors = [value for value in (*metrics.values(), weight) if isinstance(value, Tensor)]
        device = tensors[0].device if tensors else torch.device("cpu")
        weight = _scalar(weight, device)
        for name, number in metrics.items():
            value = _scalar(number, device)
            if name in SUMMED:
                self._accumulate(self._sums, name, value)
            elif name.endswith(("min", "max")):
                self._keep_extreme(name, value, weight)
            else:
                own_weight = weight
                if name in self._sequence_means:
                    own_weight = _scalar(metrics["num_sequences"], device)
                # A product with 0 would keep the NaN of an empty micro-batch.
                share = torch.where(own_weight > 0, value * own_weight, 0.0)
                self._accumulate(self._sums, name, share)
                self._accumulate(self._weights, name, own_weight)

    def result(self, gather: Callable[[_Totals], list[_Totals]] | None = None) -> dict[str, float]:
        """Return the step's values; this is the one host synchronisation.

        The mean of nothing is NaN, its minimum and maximum are infinite.

        Args:
            gather: returns what all ranks have called it with; None: this one is all there are.
        """
        own = _to_host([self._sums, self._weights, self._extremes])
        totals = [own] if gather is None else gather(own)
        sums, weights = (_added([each[part] for each in totals]) for part in (0, 1))
        extremes: dict[str, float] = {}
        for each in totals:
            for name, value in each[2].items():
                choose = min if name.endswith("min") else max
                extremes[name] = choose(value, extremes.get(name, value))
        return extremes | {
            name: _ratio(total, weights[name]) if name in weights else total
            for name, total in sums.items()
        }

    @staticmethod
    def _accumulate(totals: dict[str, Tensor], name: str, value: Tensor) -> None:
        totals[name] = totals[name] + value if name in totals else value

    def _keep_extreme(self, name: str, value: Tensor, weight: Tensor) -> None:
        choose, worst = (
            (torch.minimum, math.inf) if name.endswith("min") else (torch.maximum, -math.inf)
        )
        value = torch.where(weight > 0, value, worst)
        seen = self._extremes.get(name)
        self._extremes[name] = value if seen is None else choose(seen, value)


_Totals: TypeAlias = list[dict[str, float]]
"""Sums, the weights of those that are of means, and extremes."""


def _to_host(parts: list[dict[str, Tensor]]) -> _Totals:
    tensors = [value for part in parts for value in part.values()]
    values = iter(torch.stack(tensors).tolist() if tensors else [])
    return [{name: next(values) for name in part} for part in parts]


def _added(parts: Sequence[dict[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: sum(part.get(name, 0.0) for part in parts) for name in names}


def _ratio(total: float, weight: float) -> float:
    return total / weight if weight else math.nan


def reward_metrics(
    names: Sequence[str], weights: Sequence[float], rewards_BK: Tensor
) -> dict[str, float]:
    """Return mean and standard deviation of rewards, named as TRL names them.

    Args:
        names: of the K reward functions.
        weights: theirs in the sum.
        rewards_BK: (B, K) what each gave each completion, NaN where it did not judge.
    """
    weighted_BK = rewards_BK.double() * torch.tensor(weights, dtype=torch.float64)
    totals_B = weighted_BK.nansum(1).masked_fill(weighted_BK.isnan().all(1), math.nan)
    metrics: dict[str, float] = {}
    metrics["reward"], metrics["reward_std"] = _mean_and_std(totals_B)
    for k, name in enumerate(names):
        mean, std = _mean_and_std(rewards_BK[:, k])
        metrics |= {f"rewards/{name}/mean": mean, f"rewards/{name}/std": std}
    return metrics


def completion_metrics(lengths: Sequence[int], finished: Sequence[bool]) -> dict[str, float]:
    """Return how long completions are, named as TRL names it.

    Args:
        lengths: tokens of each that the policy has written.
        finished: whether it ended by itself; of those that did, there are lengths apart.
    """
    ended = [length for length, end in zip(lengths, finished, strict=True) if end]
    metrics = {"completions/clipped_ratio": 1 - len(ended) / len(lengths)}
    for kind, some in (("", lengths), ("_terminated", ended or [0])):
        metrics[f"completions/mean{kind}_length"] = sum(some) / len(some)
        metrics[f"completions/min{kind}_length"] = float(min(some))
        metrics[f"completions/max{kind}_length"] = float(max(some))
    return metrics


def advantage_metrics(advantages: Tensor) -> dict[str, float]:
    """Return mean and standard deviation of what is trained on."""
    mean, std = _mean_and_std(advantages)
    return {"advantages/mean": mean, "advantages/std": std}


def _mean_and_std(values_B: Tensor) -> tuple[float, float]:
    """Return mean and sample standard deviation of what is no NaN; NaN where there is none.

    The mean of nothing is NaN, and so is the deviation of fewer than two, as in TRL.
    """
    known = values_B[~values_B.isnan()]
    return known.mean().item(), known.std().item() if len(known) > 1 else math.nan


@contextmanager
def timed(times: dict[str, float], name: str) -> Generator[None]:
    """Add the seconds that the block takes, and what it left running on a GPU, to `times`."""
    start = time.perf_counter()
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    times[name] = times.get(name, 0.0) + time.perf_counter() - start


def peak_memory_gib(device: torch.device) -> float:
    """Return the most memory used so far: allocated on the GPU, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def _scalar(value: Tensor | float, device: torch.device) -> Tensor:
    """Return a 0-d float64 tensor: counts stay exact; filling on the device needs no copy."""
    if isinstance(value, Tensor):
        return value.detach().to(device, torch.float64)
    return torch.full((), value, dtype=torch.float64, device=device)
