"""What was sampled, as tensors the model can be trained on.

P prompts, G completions a prompt, B = P * G completions, L positions (prompt and completion),
T positions of the completion alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .rollout import Completions


@dataclass
class Batch:
    """Prompts padded on the left, completions on the right: all completions start at L - T."""

    input_ids: Tensor  # (B, L) int64
    attention_mask: Tensor  # (B, L) int64
    completion_ids: Tensor  # (B, T) int64
    completion_mask: Tensor  # (B, T) bool
    sampling_logps: Tensor  # (B, T) fp32, as the sampler saw them
    advantages: Tensor  # (B,) fp32
    prompt_lengths: list[int]
    completion_lengths: list[int]
    old_logps: Tensor | None = None  # (B, T) fp32; None = the policy has not moved since sampling
    ref_logps: Tensor | None = None  # (B, T) fp32; None = beta is 0

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    @property
    def num_completion_tokens(self) -> int:
        """Counted tokens: the denominator of the token mean."""
        return sum(self.completion_lengths)

    def split(self, size: int) -> Iterator[Batch]:
        """Cut into micro-batches, each no longer than its own longest prompt and completion."""
        prompt_width = self.input_ids.shape[1] - self.completion_ids.shape[1]
        for first in range(0, len(self), size):
            rows = slice(first, first + size)
            length = max(self.completion_lengths[rows])
            both = slice(prompt_width - max(self.prompt_lengths[rows]), prompt_width + length)
            old_logps, ref_logps = self.old_logps, self.ref_logps
            yield Batch(
                input_ids=self.input_ids[rows, both],
                attention_mask=self.attention_mask[rows, both],
                completion_ids=self.completion_ids[rows, :length],
                completion_mask=self.completion_mask[rows, :length],
                sampling_logps=self.sampling_logps[rows, :length],
                advantages=self.advantages[rows],
                prompt_lengths=self.prompt_lengths[rows],
                completion_lengths=self.completion_lengths[rows],
                old_logps=None if old_logps is None else old_logps[rows, :length],
                ref_logps=None if ref_logps is None else ref_logps[rows, :length],
            )


def make_batch(
    prompt_ids: list[list[int]],  # P
    completions: Completions,  # B = P * G
    advantages: Tensor,  # (B,)
    pad_token_id: int,
) -> Batch:
    """Put prompts and completions side by side."""
    device = completions.ids.device
    group = len(completions.ids) // len(prompt_ids)
    width = max(map(len, prompt_ids))
    ids_PL = torch.full((len(prompt_ids), width), pad_token_id)
    mask_PL = torch.zeros_like(ids_PL)
    for row, ids in enumerate(prompt_ids):
        ids_PL[row, width - len(ids) :] = torch.tensor(ids)
        mask_PL[row, width - len(ids) :] = 1
    ids_BL = ids_PL.to(device).repeat_interleave(group, 0)
    mask_BL = mask_PL.to(device).repeat_interleave(group, 0)
    return Batch(
        input_ids=torch.cat([ids_BL, completions.ids], 1),
        attention_mask=torch.cat([mask_BL, completions.mask.long()], 1),
        completion_ids=completions.ids,
        completion_mask=completions.mask,
        sampling_logps=completions.logps,
        advantages=advantages.to(device),
        prompt_lengths=[len(ids) for ids in prompt_ids for _ in range(group)],
        completion_lengths=completions.mask.sum(1).tolist(),
    )
