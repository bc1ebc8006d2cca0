"""How good a policy is on prompts it was not trained on."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from .config import TrainConfig
from .metrics import completion_metrics, reward_metrics
from .rollout import SamplingParams
from .samples import Sample, Sampler

if TYPE_CHECKING:
    from datasets import Dataset


class Evaluator:
    """Measures the policy of a run on one dataset, with the same random numbers every time."""

    def __init__(self, config: TrainConfig, sampler: Sampler, dataset: Dataset) -> None:
        self.config, self.sampler, self.dataset = config, sampler, dataset

    def sample(
        self, num_generations: int = 1, sampling: SamplingParams | None = None
    ) -> list[Sample]:
        """Sample completions of every prompt and have them judged.

        Args:
            num_generations: completions of each prompt, next to each other in the result.
            sampling: None for that of the run.
        """
        config, sampler = self.config, self.sampler
        at_once = config.per_device_eval_batch_size
        at_once = at_once or max(1, config.completions_per_step // num_generations)
        generator = torch.Generator(sampler.policy.device).manual_seed(config.seed)
        sampler.rollout.update_weights(sampler.policy.model)
        samples: list[Sample] = []
        for first in range(0, len(self.dataset), at_once):
            rows = self.dataset[first : first + at_once]
            found, _ = sampler.sample(rows, num_generations, generator, times={}, sampling=sampling)
            samples += found
        sampler.rollout.sleep()
        return samples

    def accuracy(self, temperature: float | None = None) -> float:
        """Return the first reward function's mean, one completion a prompt; 0 decodes greedily."""
        sampling = self.sampler.sampling
        if temperature is not None:
            sampling = replace(sampling, temperature=temperature)
        judged = [one.rewards_K[0] for one in self.sample(sampling=sampling)]
        return float(torch.stack(judged).double().nanmean())

    def metrics(self) -> dict[str, float]:
        """Return the metrics of an evaluation during training: TRL's names, with `eval_`."""
        count = self.config.num_generations_eval or self.config.num_generations
        samples, judges = self.sample(count), self.sampler.judges
        rewards_BK = torch.stack([one.rewards_K for one in samples])
        metrics = reward_metrics(judges.names, judges.weights, rewards_BK) | completion_metrics(
            [one.num_counted for one in samples], [one.drawn.finished for one in samples]
        )
        return {f"eval_{name}": value for name, value in metrics.items()}
