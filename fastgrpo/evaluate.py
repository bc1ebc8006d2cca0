"""How good a policy is on prompts it was not trained on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .data import encode_prompt
from .model import Policy
from .rewards import Reward, decode_completions, score
from .rollout import Rollout, SamplingParams

if TYPE_CHECKING:
    from datasets import Dataset


def evaluate(
    policy: Policy,
    rollout: Rollout,
    dataset: Dataset,
    reward: Reward,
    sampling: SamplingParams,
    *,
    batch_size: int,
    system_prompt: str | None = None,
    seed: int = 0,
) -> float:
    """Sample one completion of every prompt and return the mean of a reward function.

    Args:
        policy: the model.
        rollout: samples from it.
        dataset: prompts and the columns the reward function reads.
        reward: the judge; prompts for which it returns None are left out of the mean.
        sampling: temperature 0 decodes greedily.
        batch_size: prompts decoded together.
        system_prompt: put before every prompt.
        seed: of the sampling: two calls are comparable.
    """
    generator = torch.Generator(policy.device).manual_seed(seed)
    rewards = []
    rollout.update_weights(policy.model)
    for first in range(0, len(dataset), batch_size):
        columns = dataset[first : first + batch_size]
        prompts = columns.pop("prompt")
        prompt_ids = [
            encode_prompt(prompt, policy.tokenizer, system_prompt=system_prompt)
            for prompt in prompts
        ]
        with policy.sampling():
            completions = rollout.generate(prompt_ids, 1, sampling, generator)
        token_lists = completions.token_lists()
        rewards_BK = score(
            [reward],
            prompts=prompts,
            completions=decode_completions(prompts, token_lists, policy.tokenizer),
            completion_ids=token_lists,
            columns=columns,
        )
        rewards.append(rewards_BK[:, 0])
    rollout.sleep()
    return torch.cat(rewards).double().nanmean().item()
