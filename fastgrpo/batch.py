"""What was sampled, as tensors the model can be trained on.

Prompts with their completions stand one after the other, with nothing between. What is known of a
token (log-prob, advantage, whether it counts) stands at the position that predicts it, one before
its own.

B sequences, N tokens of all of them, L tokens of the longest.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import ClassVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastgrpo_kernels import GRPOLossConfig


@dataclass
class Batch:
    """Sequences of some length each; tensors are on the model's device unless said otherwise."""

    input_ids: Tensor  # (N,) int64
    mask: Tensor  # (N,) bool, on the CPU: what is predicted here is a completion token that counts
    advantages: Tensor  # (N,) fp32, on the CPU
    sampling_logps: Tensor  # (N,) fp32, as the sampler saw them
    lengths: list[int]  # B, prompt and completion together
    old_logps: Tensor | None = None  # (N,) fp32; None = the policy has not moved since sampling
    ref_logps: Tensor | None = None  # (N,) fp32; None = beta is 0
    importance_weights: Tensor | None = None  # (N,) fp32; None = the policy itself has sampled

    ON_CPU: ClassVar[tuple[str, ...]] = ("mask", "advantages")

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def num_completion_tokens(self) -> int:
        """Counted tokens: the denominator of the token mean."""
        return int(self.mask.sum())

    @property
    def num_nonempty(self) -> int:
        """Sequences with a counted token."""
        return sum(bool(part.any()) for part in self.mask.split(self.lengths))

    @property
    def sequence_advantages(self) -> Tensor:
        """(B,) mean advantage of the counted tokens of each sequence, 0 if there are none."""
        parts = zip(self.advantages.split(self.lengths), self.mask.split(self.lengths), strict=True)
        means = [part.sum() / mask.sum().clamp(min=1) for part, mask in parts]
        return torch.stack(means).to(self.input_ids.device, non_blocking=True)

    @property
    def starts(self) -> list[int]:
        """Where each sequence begins."""
        return [0, *accumulate(self.lengths)][:-1]

    @property
    def position_ids(self) -> Tensor:
        """(N,) position of each token in its sequence."""
        positions = torch.cat([torch.arange(length) for length in self.lengths])
        return positions.to(self.input_ids.device, non_blocking=True)

    @property
    def cu_seqlens(self) -> Tensor:
        """(B + 1,) int32: where sequences begin and end."""
        ends = torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32)
        return ends.to(self.input_ids.device, non_blocking=True)

    @property
    def targets(self) -> Tensor:
        """(N,) the token that each position predicts; at the end of a sequence, any."""
        return self.input_ids.roll(-1)

    def padded_index(self) -> tuple[Tensor, Tensor]:
        """Return where among the N tokens those of a right-padded (B, L) are, and which are real.

        Padding repeats the last token of its sequence.
        """
        device = self.input_ids.device
        starts_B1 = torch.tensor(self.starts)[:, None]
        lengths_B1 = torch.tensor(self.lengths)[:, None]
        columns_L = torch.arange(max(self.lengths))
        index_BL = starts_B1 + torch.minimum(columns_L, lengths_B1 - 1)
        return index_BL.to(device), (columns_L < lengths_B1).to(device)

    def tokens_of(self, rows: Sequence[int]) -> Tensor:
        """Return the indices of the tokens of some sequences, on the CPU."""
        starts = self.starts
        return torch.cat([torch.arange(starts[i], starts[i] + self.lengths[i]) for i in rows])

    def select(self, rows: Sequence[int]) -> Batch:
        """Return the batch of some sequences."""
        index = self.tokens_of(rows)
        there = index.to(self.input_ids.device, non_blocking=True)
        tensors = {name: x for name, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(
            self,
            lengths=[self.lengths[i] for i in rows],
            **{name: x[index if x.device.type == "cpu" else there] for name, x in tensors.items()},
        )

    def without_effect(self) -> Batch:
        """Return the batch of the shortest sequence, of which nothing counts."""
        batch = self.select([min(range(len(self)), key=lambda i: self.lengths[i])])
        nothing = torch.zeros_like(batch.mask)
        return replace(batch, mask=nothing, advantages=torch.zeros_like(batch.advantages))

    def contributing(self, config: GRPOLossConfig) -> list[int]:
        """Return the sequences that have a gradient; the others may be left out, exactly.

        The denominators of the loss are those of the whole optimisation step all the same. One
        whose importance weight is 0 has none either and is run for all that: how far its log-probs
        are from the sampler's is what tells of a sampler gone wrong.
        """
        active = self.mask
        if config.beta == 0 and config.entropy_coef == 0:
            active = active & (self.advantages != 0)
        return [i for i, part in enumerate(active.split(self.lengths)) if part.any()]


def make_batch(
    prompt_ids: Sequence[Sequence[int]],  # B
    completion_ids: Sequence[Sequence[int]],  # B
    logps: Sequence[Tensor],  # B, each (length of the completion,)
    advantages: Tensor | Sequence[Tensor],  # (B,), or B, each (length of the completion,)
    counted: Sequence[Sequence[bool] | None] | None = None,  # B, each (length of the completion,)
    *,
    device: torch.device | str,
) -> Batch:
    """Put each completion behind its prompt, and the sequences behind each other.

    Args:
        prompt_ids: B prompts.
        completion_ids: their completions.
        logps: log-probs of the completions' tokens, as the sampler saw them; on any device.
        advantages: of each completion, or of each of their tokens.
        counted: which tokens of a completion count, tool output for example does not; None: all.
        device: of the batch: the model's.
    """
    both = list(zip(prompt_ids, completion_ids, strict=True))
    lengths = [len(prompt) + len(completion) for prompt, completion in both]
    completion_lengths = torch.tensor([len(completion) for completion in completion_ids])
    mask_N = torch.zeros(sum(lengths), dtype=torch.bool)
    begin = 0
    for prompt, completion in both:
        first = begin + len(prompt) - 1
        mask_N[first : first + len(completion)] = True
        begin += len(prompt) + len(completion)
    where = mask_N.nonzero()[:, 0]
    if isinstance(advantages, Tensor):
        advantages = advantages.cpu().repeat_interleave(completion_lengths)
    else:
        advantages = torch.cat(list(advantages)).cpu()
    if counted is not None:
        each = zip(counted, completion_ids, strict=True)
        whole = [[True] * len(ids) if tokens is None else tokens for tokens, ids in each]
        flat = [token for tokens in whole for token in tokens]
        mask_N[where] = torch.tensor(flat, dtype=torch.bool)
    advantages_N = torch.zeros(len(mask_N)).index_copy(0, where, advantages.float())
    there = where.to(device, non_blocking=True)
    logps_N = torch.zeros(len(mask_N), device=device)
    ids = [token for pair in both for part in pair for token in part]
    return Batch(
        input_ids=torch.tensor(ids, device=device),
        mask=mask_N,
        advantages=torch.where(mask_N, advantages_N, 0),
        sampling_logps=logps_N.index_copy(
            0, there, torch.cat([one.to(device, torch.float32) for one in logps])
        ),
        lengths=lengths,
    )


def micro_batches(
    lengths: Sequence[int], *, size: int, max_tokens: int | None, padded: bool
) -> list[list[int]]:
    """Divide sequences among forward passes.

    Args:
        lengths: tokens of each sequence.
        size: sequences in each pass, where there is no budget.
        max_tokens: tokens a pass may have; a longer sequence gets a pass of its own.
        padded: a pass has as many tokens as its longest sequence, for each.

    Returns:
        The sequences of each pass, by their place in `lengths`, the longest first: those of one
        length attend together. With a budget by first fit, which takes at most 11/9 of the fewest
        possible passes (Johnson 1973).
    """
    order = range(len(lengths))
    if max_tokens is None:
        cuts = [order[first : first + size] for first in range(0, len(order), size)]
        return [sorted(rows, key=lambda i: -lengths[i]) for rows in cuts]
    passes: list[list[int]] = []
    used: list[int] = []
    for i in sorted(order, key=lambda i: -lengths[i]):
        for k, rows in enumerate(passes):
            cost = lengths[rows[0]] if padded else lengths[i]  # the first is the longest
            if used[k] + cost <= max_tokens:
                rows.append(i)
                used[k] += cost
                break
        else:
            passes.append([i])
            used.append(lengths[i])
    return passes


def save_batches(path: Path, batches: Sequence[Batch]) -> None:
    """Write batches to a file (safetensors), to the last bit."""
    tensors = {
        f"{i}.{name}": value.contiguous()
        for i, batch in enumerate(batches)
        for name, value in vars(batch).items()
        if isinstance(value, Tensor)
    }
    save_file(tensors, path, {"lengths": json.dumps([batch.lengths for batch in batches])})


def load_batches(path: Path, device: torch.device) -> list[Batch]:
    """Return what `save_batches` has written.

    Args:
        path: the file.
        device: of the model.
    """
    with safe_open(path, framework="pt") as file:
        lengths: list[list[int]] = json.loads(file.metadata()["lengths"])
        named = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    for name, value in named.items():
        if not name.endswith(Batch.ON_CPU):
            named[name] = value.to(device)
    return [
        Batch(
            lengths=each,
            **{
                name.partition(".")[2]: value
                for name, value in named.items()
                if name.startswith(f"{i}.")
            },
        )
        for i, each in enumerate(lengths)
    ]
