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


@dataclass
class Samples:
    """Completions and what is known of them before training; every field has B entries."""

    prompts: list[Any]
    prompt_ids: list[list[int]]
    texts: list[Completion]
    completion_ids: list[list[int]]
    logps: list[Tensor]  # each (length of the completion,)
    finished: list[bool]
    rewards_BK: Tensor

    def __len__(self) -> int:
        return len(self.prompts)

    def select(self, rows: Sequence[int]) -> Samples:
        """Return some completions, in the order given."""
        return Samples(
            *(
                x[list(rows)] if isinstance(x, Tensor) else [x[i] for i in rows]
                for x in vars(self).values()
            )
        )

    def __add__(self, other: Samples) -> Samples:
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Samples(*(torch.cat([a, b]) if isinstance(a, Tensor) else a + b for a, b in pairs))


@dataclass(frozen=True)
class Experience:
    """What some optimisation steps are made from."""

    batch: Batch
    samples: Samples
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
        names = [reward.name for reward in self.rewards]
        lengths = [len(ids) for ids in everything.completion_ids]
        metrics |= rollout_metrics(
            names, everything.rewards_BK, whole, lengths, everything.finished
        )
        if config.dynamic_sampling:
            metrics["dynamic_sampling/frac_without_signal"] = (
                advantages.zero_std.float().mean().item()
            )
        batch = make_batch(
            samples.prompt_ids, samples.completion_ids, samples.logps, advantages.advantages
        )
        num_tokens = sum(map(len, everything.prompt_ids)) + sum(lengths)
        return Experience(batch, samples, advantages.advantages, metrics, num_tokens)

    def _sample(self, num_prompts: int, times: dict[str, float]) -> Samples:
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
        pairs = zip(completions.logps, completion_ids, strict=True)
        return Samples(
            prompts=prompts,
            prompt_ids=[ids for ids in prompt_ids for _ in range(config.num_generations)],
            texts=texts,
            completion_ids=completion_ids,
            logps=[logps[: len(ids)] for logps, ids in pairs],
            finished=completions.finished.tolist(),
            rewards_BK=rewards_BK,
        )

    def _resample(self, samples: Samples, times: dict[str, float]) -> tuple[Samples, Samples, int]:
        """Return as many completions with signal as can be had, all that were seen, and rounds."""
        size, everything, rounds = self.config.num_generations, samples, 0
        wanted = len(samples) // size
        good, rest = self._by_signal(samples)
        while len(good) < wanted and rounds < self.config.max_resample_rounds:
            rounds += 1
            more = self._sample(wanted - len(good), times)
            first = len(everything) // size
            everything = everything + more
            for groups, found in zip((good, rest), self._by_signal(more), strict=True):
                groups.extend(first + group for group in found)
        kept = sorted((good + rest)[:wanted])
        rows = [group * size + i for group in kept for i in range(size)]
        return everything.select(rows), everything, rounds

    def _by_signal(self, samples: Samples) -> tuple[list[int], list[int]]:
        """Return the groups whose rewards differ, and those whose rewards are all equal."""
        equal = self._compare(samples).zero_std.tolist()
        groups = range(len(equal))
        return [i for i in groups if not equal[i]], [i for i in groups if equal[i]]

    def _compare(self, samples: Samples) -> Advantages:
        return group_advantages(
            samples.rewards_BK,
            torch.tensor([reward.weight for reward in self.rewards]),
            self.config.num_generations,
            scale_rewards=self.config.scale_rewards,
            std=self.config.advantage_std,
            advantage_eps=self.config.advantage_eps,
        )
