"""Warnings in words, each of them once a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

STALE = 0.1
"""Mean |log-prob in training - in sampling| of fresh samples that is no rounding any more."""


class Health:
    """Looks at the metrics of every step."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def warnings(self, metrics: Mapping[str, float], *, fresh: bool) -> Iterator[str]:
        """Yield what should be known of a step, unless it was said before.

        Args:
            metrics: of the step.
            fresh: the policy has not moved since its completions were sampled.
        """
        for name, text in self._found(metrics, fresh):
            if name not in self._said:
                self._said.add(name)
                yield f"warning: {text}"

    def _found(self, metrics: Mapping[str, float], fresh: bool) -> Iterator[tuple[str, str]]:
        difference = metrics.get("sampling/sampling_logp_difference/mean", 0.0)
        if fresh and difference > STALE:
            yield (
                "stale",
                f"log-probs in training are {difference:.2g} from those of the sampler, in the "
                "mean: does it have the weights of this step?",
            )
        if metrics.get("num_computed_sequences") == 0:
            yield (
                "silent",
                "no group of this step has a signal, the rewards in each are all equal: nothing "
                "was learned. Look at the rewards, or sample further with dynamic_sampling: true",
            )
