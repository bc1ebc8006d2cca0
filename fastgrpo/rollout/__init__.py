"""Rollouts: token ids of prompts in, token ids and log-probs of completions out.

P prompts, G completions a prompt, B = P * G completions, T positions.
"""

from __future__ import annotations

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


@dataclass(frozen=True)
class Completions:
    """What was sampled; the G completions of a prompt are adjacent, prompts in the order given."""

    ids: torch.Tensor  # (B, T) int64, padded on the right with the pad token; T = longest here
    mask: torch.Tensor  # (B, T) bool: up to and including the end-of-sequence token
    logps: torch.Tensor  # (B, T) fp32: log-prob of each token at this temperature over the whole
    # vocabulary (before top_p and top_k), so that it compares with the policy's own; 0 if masked
    finished: torch.Tensor  # (B,) bool: ended with an end-of-sequence token, not by length

    def token_lists(self) -> list[list[int]]:
        """Return the counted token ids of each completion."""
        lengths = self.mask.sum(1).tolist()
        return [row[:length] for row, length in zip(self.ids.tolist(), lengths, strict=True)]


def longest_prompt(prompt_ids: list[list[int]], num_generations: int) -> int:
    """Return the tokens of the longest prompt, after checking what an engine is asked for.

    Raises:
        ValueError: there is no prompt, a prompt is empty, or `num_generations` is below 1.
    """
    if not prompt_ids:
        raise ValueError("prompt_ids is empty: give at least one prompt")
    if [] in prompt_ids:
        raise ValueError(f"prompt {prompt_ids.index([])} is empty: give it at least one token")
    if num_generations < 1:
        raise ValueError(f"num_generations must be at least 1, got {num_generations}")
    return max(map(len, prompt_ids))


class Rollout(Protocol):
    """Anything that samples completions from the current policy."""

    is_policy: bool
    """It samples with the very weights that are trained: its log-probs are the policy's."""

    def generate(
        self,
        prompt_ids: list[list[int]],  # P prompts of any length
        num_generations: int,
        sampling: SamplingParams,
        generator: torch.Generator | None = None,
    ) -> Completions:
        """Sample `num_generations` completions of each prompt."""
        ...

    def update_weights(self, model: PreTrainedModel) -> None:
        """Take the weights of the policy after an optimisation step."""
        ...

    def sleep(self) -> None:
        """Give memory back before training; again, it does nothing; `generate` wakes up."""
        ...
