"""How good a policy is on prompts it was not trained on.

P prompts, G completions of each, B = P * G completions, K reward functions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from .config import TrainConfig
from .metrics import completion_metrics, reward_metrics
from .prompt_order import prompt_seeds
from .rollout import SamplingParams
from .samples import Sample, Sampler

if TYPE_CHECKING:
    from datasets import Dataset


class Evaluator:
    """Measures the policy of a run on one dataset, with the same random numbers every time.

    Each prompt has its own, however many are sampled at once (of a `rollout_fn` see `Engine`).
    """

    def __init__(
        self,
        config: TrainConfig,
        sampler: Sampler,
        dataset: Dataset,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Take what is measured.

        Args:
            config: the run.
            sampler: of its policy.
            dataset: the prompts.
            check: called before each batch; what it raises ends the evaluation.
        """
        self.config, self.sampler, self.dataset, self.check = config, sampler, dataset, check

    def batches(
        self, num_generations: int = 1, sampling: SamplingParams | None = None
    ) -> Iterator[list[Sample]]:
        """Yield completions of some prompts after the others.

        Args:
            num_generations: completions of each prompt, next to each other.
            sampling: None for that of the run.
        """
        sampler, at_once = self.sampler, self._prompts_at_once(num_generations)
        sampler.rollout.update_weights(sampler.policy.model)
        with sampler.policy.whole():
            for first in range(0, len(self.dataset), at_once):
                self.check()
                rows = self.dataset[first : first + at_once]
                seeds = prompt_seeds(self.config.seed, first, len(rows["prompt"]), "eval")
                yield sampler.sample(
                    rows, num_generations, seeds, times={}, sampling=sampling, evaluation=True
                )
        sampler.rollout.sleep()

    def num_batches(self, num_generations: int = 1) -> int:
        """Return how many batches there are."""
        return math.ceil(len(self.dataset) / self._prompts_at_once(num_generations))

    def sample(
        self, num_generations: int = 1, sampling: SamplingParams | None = None
    ) -> list[Sample]:
        """Return completions of all prompts; the arguments are those of `batches`."""
        return [one for some in self.batches(num_generations, sampling) for one in some]

    def accuracy(self, temperature: float | None = None) -> float:
        """Return the first reward function's mean, one completion a prompt; 0 decodes greedily."""
        sampling = self.sampler.sampling
        if temperature is not None:
            sampling = replace(sampling, temperature=temperature)
        judged = [one.rewards_K[0] for one in self.sample(sampling=sampling)]
        self.sampler.take_logged()  # it is of no step
        return float(torch.stack(judged).double().nanmean())

    def metrics(self) -> dict[str, float]:
        """Return the metrics of an evaluation during training: TRL's names, with `eval_`.

        If the first reward function gave nothing but 0 and 1, `eval_pass@G` is the share of prompts
        with a right one among their G completions.
        """
        count = self.config.num_generations_eval or self.config.num_generations
        samples = self.sample(count)
        metrics = self.sampler.take_logged() | self.averages(samples)
        judged_PG = torch.stack([one.rewards_K[0] for one in samples]).view(-1, count)
        if count > 1 and bool(((judged_PG == 0) | (judged_PG == 1)).all()):
            metrics[f"pass@{count}"] = judged_PG.amax(1).mean().item()
        return {f"eval_{name}": value for name, value in metrics.items()}

    def averages(self, samples: Sequence[Sample]) -> dict[str, float]:
        """Return rewards and lengths of some completions, named as TRL names them."""
        judges = self.sampler.judges
        rewards_BK = torch.stack([one.rewards_K for one in samples])
        return reward_metrics(judges.names, judges.weights, rewards_BK) | completion_metrics(
            [one.num_counted for one in samples], [one.drawn.finished for one in samples]
        )

    def _prompts_at_once(self, num_generations: int) -> int:
        config = self.config
        completions = config.per_device_eval_batch_size or config.completions_per_process
        return max(1, completions // num_generations) * self.sampler.world.size


def evaluator_of(
    config: TrainConfig,
    sampler: Sampler,
    dataset: Dataset | None,
    check: Callable[[], None] = lambda: None,
) -> Evaluator | None:
    """Return what measures the first `max_eval_samples` prompts of a test split, if any."""
    if dataset is None:
        return None
    count = min(config.max_eval_samples or len(dataset), len(dataset))
    return Evaluator(config, sampler, dataset.select(range(count)), check)
