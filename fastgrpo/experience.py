"""From prompts to a scored batch: sample, judge, compare within the groups.

B completions, those of a prompt (its group) next to each other; K reward functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .advantages import Advantages, group_advantages
from .batch import Batch, make_batch
from .config import TrainConfig
from .data import PromptSampler, encode_prompt
from .metrics import rollout_metrics, timed
from .model import Policy
from .rewards import Completion, Reward, decode_completions, score
from .rollout import Rollout, SamplingParams

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Sample:
    """A completion and what is known of it before training."""

    prompt: Any
    prompt_ids: list[int]
    text: Completion
    completion_ids: list[int]
    logps: Tensor  # (length of the completion,) fp32, on the model's device
    finished: bool
    rewards_K: Tensor  # NaN where a function did not judge


@dataclass(frozen=True)
class Experience:
    """What some optimisation steps are made from."""

    batch: Batch
    samples: list[Sample]  # B
    advantages: Tensor  # (B,)
    metrics: dict[str, float]
    num_tokens: int  # sampled and read, what was thrown away included


class Collector:
    """Turns the next prompts of a dataset into experience of the policy as it is."""

    def __init__(
        self,
        config: TrainConfig,
        policy: Policy,
        rollout: Rollout,
        rewards: Sequence[Reward],
        dataset: Dataset,
    ) -> None:
        self.config, self.policy, self.rollout, self.rewards = config, policy, rollout, rewards
        self.dataset = dataset
        self.prompts = PromptSampler(len(dataset), config.seed)
        self.generator = torch.Generator(policy.device).manual_seed(config.seed)
        self.sampling = SamplingParams(
            max_completion_length=config.max_completion_length,
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
        )

    def collect(self, num_prompts: int, times: dict[str, float]) -> Experience:
        """Sample completions of the next prompts, score them and compare them in their groups.

        With `dynamic_sampling` (DAPO, arxiv.org/abs/2503.14476) groups whose rewards are all equal
        make place for further prompts, `max_resample_rounds` times at most. The metrics are of all
        that was sampled: those of what is kept would flatter the policy.
        """
        config = self.config
        self.rollout.update_weights(self.policy.model)
        samples = everything = self._sample(num_prompts, times)
        metrics: dict[str, float] = {}
        if config.dynamic_sampling:
            samples, everything, rounds = self._resample(samples, times)
            metrics["dynamic_sampling/rounds"] = rounds
            metrics["dynamic_sampling/num_prompts"] = len(everything) // config.num_generations
        self.rollout.sleep()
        with timed(times, "reward"):
            advantages = self._compare(samples)
            whole = advantages if everything is samples else self._compare(everything)
        metrics |= rollout_metrics(
            [reward.name for reward in self.rewards],
            torch.stack([sample.rewards_K for sample in everything]),
            whole,
            lengths=[len(sample.completion_ids) for sample in everything],
            finished=[sample.finished for sample in everything],
        )
        if config.dynamic_sampling:
            metrics["dynamic_sampling/frac_without_signal"] = (
                advantages.zero_std.float().mean().item()
            )
        batch = make_batch(
            [sample.prompt_ids for sample in samples],
            [sample.completion_ids for sample in samples],
            [sample.logps for sample in samples],
            advantages.advantages,
        )
        num_tokens = sum(len(x.prompt_ids) + len(x.completion_ids) for x in everything)
        return Experience(batch, samples, advantages.advantages, metrics, num_tokens)

    def _sample(self, num_prompts: int, times: dict[str, float]) -> list[Sample]:
        config, tokenizer = self.config, self.policy.tokenizer
        rows = self.dataset[self.prompts.take(num_prompts)]
        columns = {
            name: [value for value in values for _ in range(config.num_generations)]
            for name, values in rows.items()
        }
        prompts = columns.pop("prompt")
        with timed(times, "generate"), self.policy.sampling():
            prompt_ids = [
                encode_prompt(prompt, tokenizer, system_prompt=config.system_prompt)
                for prompt in rows["prompt"]
            ]
            completions = self.rollout.generate(
                prompt_ids, config.num_generations, self.sampling, self.generator
            )
            completion_ids = completions.token_lists()
        with timed(times, "reward"):
            texts = decode_completions(prompts, completion_ids, tokenizer)
            rewards_BK = score(
                self.rewards,
                prompts=prompts,
                completions=texts,
                completion_ids=completion_ids,
                columns=columns,
            )
        finished = completions.finished.tolist()
        return [
            Sample(
                prompt=prompts[i],
                prompt_ids=prompt_ids[i // config.num_generations],
                text=texts[i],
                completion_ids=ids,
                logps=completions.logps[i, : len(ids)],
                finished=finished[i],
                rewards_K=rewards_BK[i],
            )
            for i, ids in enumerate(completion_ids)
        ]

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
        return group_advantages(
            torch.stack([sample.rewards_K for sample in samples]),
            torch.tensor([reward.weight for reward in self.rewards]),
            self.config.num_generations,
            scale_rewards=self.config.scale_rewards,
            std=self.config.advantage_std,
            advantage_eps=self.config.advantage_eps,
        )
