"""From prompts to a scored batch: sample, judge, compare within the groups.

B completions, those of a prompt (its group) next to each other; K reward functions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .advantages import Advantages, group_advantages
from .batch import Batch, make_batch
from .config import TrainConfig
from .metrics import advantage_metrics, completion_metrics, reward_metrics, timed
from .prompt_order import PromptSampler, prompt_seeds
from .samples import Sample, Sampler
from .step_advantages import merge_steps, step_advantages

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Experience:
    """What some optimisation steps are made from."""

    batch: Batch
    samples: list[Sample]
    """All that were sampled, what dynamic sampling left out included."""
    advantages: list[Tensor]
    """Of each of the samples: one value, or one of each token; 0 if it was left out."""
    metrics: dict[str, float]
    num_tokens: int
    """Sampled and read, what was thrown away included."""


class Collector:
    """Turns the next prompts of a dataset into experience of the policy as it is."""

    def __init__(self, config: TrainConfig, sampler: Sampler, dataset: Dataset) -> None:
        self.config, self.sampler, self.dataset = config, sampler, dataset
        self.prompts = PromptSampler(len(dataset), config.seed, config.shuffle_dataset)

    def collect(self, num_prompts: int, times: dict[str, float]) -> Experience:
        """Sample completions of the next prompts, score them and compare them in their groups.

        With `dynamic_sampling` (DAPO, arxiv.org/abs/2503.14476) groups whose rewards are all equal
        make place for further prompts, `max_resample_rounds` times at most. The metrics are of all
        that was sampled: those of what is kept would flatter the policy.
        """
        config, judges = self.config, self.sampler.judges
        self.sampler.rollout.update_weights(self.sampler.policy.model)
        samples = everything = self._sample(num_prompts, times)
        rounds, size = 0, config.num_generations
        if config.dynamic_sampling:
            samples, everything, rounds = self._resample(samples, times)
        self.sampler.rollout.sleep()
        with timed(times, "reward"):
            advantages = self._compare(samples)
        silent = int(advantages.zero_std.sum())
        rewards_BK = torch.stack([one.rewards_K for one in everything])
        metrics = self.sampler.take_logged()
        metrics |= reward_metrics(judges.names, judges.weights, rewards_BK)
        metrics |= advantage_metrics(advantages.advantages)
        metrics |= completion_metrics(
            [one.num_counted for one in everything],
            [one.drawn.finished for one in everything],
        )
        num_prompts, kept = len(everything) // size, len(samples) // size
        # Groups that were left out have no signal, and all that have none may be among these.
        metrics["frac_reward_zero_std"] = (silent + num_prompts - kept) / num_prompts
        if config.dynamic_sampling:
            metrics["dynamic_sampling/rounds"] = rounds
            metrics["dynamic_sampling/num_prompts"] = num_prompts
            metrics["dynamic_sampling/frac_without_signal"] = silent / kept
        of_each = _of_each(samples, advantages)
        trained = {id(one): advantage for one, advantage in zip(samples, of_each, strict=True)}
        return Experience(
            self._batch(samples, of_each),
            everything,
            [trained.get(id(one), torch.zeros(1)) for one in everything],
            metrics,
            sum(len(x.drawn.prompt_ids) + len(x.drawn.completion_ids) for x in everything),
        )

    def _sample(self, num_prompts: int, times: dict[str, float]) -> list[Sample]:
        seeds = prompt_seeds(self.config.seed, self.prompts.num_taken, num_prompts, "train")
        rows = self.dataset[self.prompts.take(num_prompts)]
        return self.sampler.sample(rows, self.config.num_generations, seeds, times=times)

    def _batch(self, samples: list[Sample], advantages: list[Tensor]) -> Batch:
        masked = self.config.mask_truncated_completions
        return make_batch(
            [one.drawn.prompt_ids for one in samples],
            [one.drawn.completion_ids for one in samples],
            [one.drawn.logps for one in samples],
            [
                value.expand(len(one.drawn.completion_ids))
                for value, one in zip(advantages, samples, strict=True)
            ],
            [
                [False] * len(one.drawn.completion_ids)
                if masked and not one.drawn.finished
                else one.drawn.counted
                for one in samples
            ],
            device=self.sampler.policy.device,
        )

    def _resample(
        self, samples: list[Sample], times: dict[str, float]
    ) -> tuple[list[Sample], list[Sample], int]:
        """Return as many completions with signal as can be had, all that were seen, and rounds."""
        size, everything, rounds = self.config.num_generations, samples, 0
        wanted = len(samples) // size
        signal = self._have_signal(samples)
        while sum(signal) < wanted and rounds < self.config.max_resample_rounds:
            rounds += 1
            more = self._sample(wanted - sum(signal), times)
            everything = everything + more
            signal += self._have_signal(more)
        groups = sorted(range(len(signal)), key=lambda group: not signal[group])  # signal first
        kept = sorted(groups[:wanted])
        return (
            [everything[group * size + i] for group in kept for i in range(size)],
            everything,
            rounds,
        )

    def _have_signal(self, samples: list[Sample]) -> list[bool]:
        """Say of each group whether its rewards differ."""
        return (~self._compare(samples).zero_std).tolist()

    def _compare(self, samples: list[Sample]) -> Advantages:
        config, weights = self.config, self.sampler.judges.weights
        options: dict[str, Any] = {
            "scale_rewards": config.scale_rewards,
            "std": config.advantage_std,
            "advantage_eps": config.advantage_eps,
            "baseline": config.advantage_baseline,
            "multi_objective_aggregation": config.multi_objective_aggregation,
        }
        rewards_BK = torch.stack([one.rewards_K for one in samples])
        stepwise = {k for one in samples for k in one.steps_K}
        if not stepwise:
            return group_advantages(rewards_BK, weights, config.num_generations, **options)
        lengths = [len(one.drawn.completion_ids) for one in samples]
        steps = merge_steps(
            rewards_BK,
            weights,
            {k: [one.steps_of(k) for one in samples] for k in stepwise},
            lengths,
        )
        return step_advantages(steps, lengths, config.num_generations, **options)


def _of_each(samples: list[Sample], advantages: Advantages) -> list[Tensor]:
    """Return of each sample its advantage, (1,), or those of its tokens, (length,)."""
    if not any(one.steps_K for one in samples):
        return list(advantages.advantages.split(1))
    lengths = [len(one.drawn.completion_ids) for one in samples]
    return list(advantages.advantages.split(lengths))
