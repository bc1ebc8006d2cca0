"""Rollouts: token ids of prompts in, token ids and log-probs of completions out.

P prompts, G completions a prompt, B = P * G completions, T positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How completions are drawn."""

    max_completion_length: int
    """Tokens a completion may have at most."""
    temperature: float = 1.0
    """Divides the logits; 0 decodes greedily."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probability reaches this; 1 keeps all."""
    top_k: int = 0
    """Keep this many of the most likely tokens; 0 keeps all."""
    min_p: float | None = None
    """Of what is left, keep tokens at least this times as likely as the likeliest; None: all."""
    stop_token_ids: tuple[int, ...] = ()
    """Further tokens that end a completion, beside the end-of-sequence tokens."""

    def __post_init__(self) -> None:
        if self.max_completion_length < 1:
            raise ValueError(
                f"max_completion_length must be at least 1, got {self.max_completion_length}"
            )
        if self.temperature < 0:
            raise ValueError(f"temperature must be 0 (greedy) or more, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (all tokens) or more, got {self.top_k}")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be in [0, 1], or None for no bound, got {self.min_p}")
        if any(token < 0 for token in self.stop_token_ids):
            raise ValueError(f"stop_token_ids must be token ids, got {self.stop_token_ids}")


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """One completion and what its sampler knows of it; T tokens."""

    prompt_ids: list[int]
    completion_ids: list[int]  # T
    logps: torch.Tensor  # (T,) fp32, on the model's device: as in `Completions`; of tokens that do
    # not count, 0
    finished: bool
    """Ended by an end-of-sequence token (or one it was told to stop at), not by length."""
    counted: list[bool] | None = None  # T
    """False: a token of a tool or an environment, which is read but not learned from; None: every
    token is the model's own."""


@dataclass(frozen=True)
class Completions:
    """What was sampled; the G completions of a prompt are adjacent, prompts in the order given."""

    ids: torch.Tensor  # (B, T) int64, padded on the right with the pad token; T = longest here
    mask: torch.Tensor  # (B, T) bool: up to and including the end-of-sequence token
    logps: torch.Tensor  # (B, T) fp32: log-prob of each token at this temperature over the whole
    # vocabulary (before top_p and top_k), so that it compares with the policy's own; 0 if masked
    finished: torch.Tensor  # (B,) bool: ended with an end-of-sequence or stop token, not by length

    def token_lists(self) -> list[list[int]]:
        """Return the counted token ids of each completion."""
        lengths = self.mask.sum(1).tolist()
        return [row[:length] for row, length in zip(self.ids.tolist(), lengths, strict=True)]

    def drawn(self, prompt_ids: Sequence[list[int]], num_generations: int) -> list[Drawn]:
        """Return each completion with its prompt.

        Args:
            prompt_ids: the P prompts that were given to the engine.
            num_generations: completions of each (G).
        """
        finished = self.finished.tolist()
        return [
            Drawn(
                prompt_ids=prompt_ids[i // num_generations],
                completion_ids=ids,
                logps=self.logps[i, : len(ids)],
                finished=finished[i],
            )
            for i, ids in enumerate(self.token_lists())
        ]


def longest_request(
    prompt_ids: list[list[int]],
    num_generations: int,
    sampling: SamplingParams,
    seeds: Sequence[int] | None,
    max_lengths: Sequence[int] | None,
) -> tuple[int, int]:
    """Return the tokens of the prompt and of the completion that need most room together.

    Args: of `Rollout.generate`, which are checked.

    Raises:
        ValueError: there is no prompt, a prompt is empty, `num_generations` is below 1, `seeds`
            are not one a prompt, or `max_lengths` are not one length a prompt, from 1 to
            `sampling.max_completion_length`.
    """
    if not prompt_ids:
        raise ValueError("prompt_ids is empty: give at least one prompt")
    if [] in prompt_ids:
        raise ValueError(f"prompt {prompt_ids.index([])} is empty: give it at least one token")
    if num_generations < 1:
        raise ValueError(f"num_generations must be at least 1, got {num_generations}")
    if seeds is not None and len(seeds) != len(prompt_ids):
        raise ValueError(f"{len(seeds)} seeds for {len(prompt_ids)} prompts: give one for each")
    limit = sampling.max_completion_length
    lengths = [limit] * len(prompt_ids) if max_lengths is None else max_lengths
    if len(lengths) != len(prompt_ids):
        raise ValueError(f"max_lengths has {len(lengths)} entries for {len(prompt_ids)} prompts")
    if not all(1 <= length <= limit for length in lengths):
        raise ValueError(f"max_lengths must be from 1 to max_completion_length {limit}: {lengths}")
    return max(zip(map(len, prompt_ids), lengths, strict=True), key=sum)


def new_seeds(count: int, generator: torch.Generator | None = None) -> list[int]:
    """Draw a seed for each prompt.

    Args:
        count: prompts.
        generator: on the CPU; None: torch's own.
    """
    seeds_P: torch.Tensor = torch.randint(2**62, (count,), generator=generator)
    return seeds_P.tolist()


class Rollout(Protocol):
    """Anything that samples completions from the current policy.

    Randomness belongs to the prompt: what is sampled for it depends on its seed, not on the other
    prompts.
    """

    is_policy: bool
    """It samples with the very weights that are trained: its log-probs are the policy's."""

    def generate(
        self,
        prompt_ids: list[list[int]],  # P prompts of any length
        num_generations: int,
        sampling: SamplingParams,
        seeds: Sequence[int] | None = None,  # P; None: drawn from torch's CPU generator
        *,
        max_lengths: Sequence[int] | None = None,  # P, none above `sampling`'s
    ) -> Completions:
        """Sample `num_generations` completions of each prompt."""
        ...

    def update_weights(self, model: PreTrainedModel) -> None:
        """Take the weights of the policy after an optimisation step."""
        ...

    def take_problems(self) -> list[str]:
        """Return what went wrong since the last time, a sentence each."""
        ...

    def sleep(self) -> None:
        """Give memory back before training; again, it does nothing; `generate` wakes up."""
        ...
