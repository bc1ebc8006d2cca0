"""From the arguments of the public functions to flat vectors with one value per token.

B sequences, T positions, N tokens (B * T, or packed), V vocabulary.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .config import GRPOLossConfig, LossArguments, Number

# What a row is: nothing, in the denominators and metrics only, or with a gradient as well.
MASKED, COUNTED, ACTIVE = 0, 1, 2


@dataclass(frozen=True)
class TokenBatch:
    """All a row of logits needs to know about its token, and what the sum of rows is divided by.

    loss = sum over counted tokens of row_weight * (policy_weight * l + beta * kl) / denominator
    """

    ids_N: Tensor  # int64
    mask_N: Tensor | None  # bool; None = all count
    advantages_N: Tensor
    old_logps_N: Tensor | None
    ref_logps_N: Tensor | None
    policy_weight_N: Tensor | None
    row_weight_N: Tensor | None  # grpo: mean length of the call's sequences / length of this one
    denominator: Tensor  # 0-d
    num_tokens: Tensor  # 0-d int64: counted tokens of the call
    num_sequences: int | None  # None = packed without cu_seqlens
    state_N: Tensor  # int8 MASKED, COUNTED or ACTIVE; on the CPU when mask and advantages are


class Layout:
    """Where the sequences are: rows of (B, T), or slices of a packed (N,) by `cu_seqlens`."""

    def __init__(self, completion_ids: Tensor, cu_seqlens: Tensor | None = None) -> None:
        shape = completion_ids.shape
        if cu_seqlens is not None and not (len(shape) == 1 or (len(shape) == 2 and shape[0] == 1)):
            raise ValueError(
                "cu_seqlens belongs to the packed layout, completion_ids (N,) or (1, N); "
                f"got {tuple(shape)}"
            )
        if len(shape) not in (1, 2):
            raise ValueError(f"completion_ids must be (B, T) or packed (N,), got {tuple(shape)}")
        self.shape = shape
        self.num_tokens = completion_ids.numel()
        self.cu_seqlens = cu_seqlens
        self.packed = len(shape) == 1 or cu_seqlens is not None
        if cu_seqlens is not None:
            self.num_sequences = _check_cu_seqlens(cu_seqlens, self.num_tokens, completion_ids)
        else:
            self.num_sequences = None if self.packed else shape[0]

    def like_tokens(self, name: str, value: Tensor) -> Tensor:
        """Flatten a value per token to (N,)."""
        shapes = [tuple(self.shape)]
        if self.packed:
            shapes = [(self.num_tokens,), (1, self.num_tokens)]
        if tuple(value.shape) not in shapes:
            raise _shape_error(name, value, shapes)
        return flat(value)

    def per_token(self, name: str, value: Tensor) -> Tensor:
        """Flatten a value per token, or spread one per sequence over its tokens, to (N,)."""
        shape, sequences, tokens = tuple(value.shape), self.num_sequences, self.num_tokens
        if sequences is not None and (shape == (sequences,) or shape == (sequences, 1)):
            if not self.packed:
                return flat(value.reshape(-1, 1).expand(self.shape))
            if shape == (sequences,) or sequences != tokens:
                assert self.cu_seqlens is not None
                ends = self.cu_seqlens[1:]
                position = torch.arange(tokens, device=ends.device, dtype=ends.dtype)
                sequence_of_token = torch.searchsorted(ends, position, right=True)
                return value.reshape(-1).to(ends.device, non_blocking=True)[sequence_of_token]
        if self.packed and shape == (tokens, 1):
            return flat(value)
        try:
            return self.like_tokens(name, value)
        except ValueError:
            a_sequence = [] if sequences is None else [(sequences,), (sequences, 1)]
            a_token = [(tokens,), (tokens, 1)] if self.packed else [tuple(self.shape)]
            raise _shape_error(name, value, a_sequence + a_token) from None

    def sum_sequences(self, value_N: Tensor) -> Tensor:
        """Sum a value per token over each sequence: (N,) to (B,); no atomics."""
        assert self.num_sequences is not None
        if self.cu_seqlens is None:
            return value_N.view(self.shape).sum(1)
        lengths_B = self.cu_seqlens.diff().long()
        sums_B = torch.segment_reduce(value_N.double(), "sum", lengths=lengths_B, unsafe=True)
        return sums_B.to(value_N.dtype)


def flatten(
    completion_ids: Tensor,
    advantages: Tensor,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    *,
    completion_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    old_logps: Tensor | None = None,
    ref_logps: Tensor | None = None,
    importance_sampling_ratio: Tensor | None = None,
    policy_weight: Tensor | None = None,
    entropy_mask: Tensor | None = None,
    num_items_in_batch: Number | None = None,
    num_sequences_in_batch: Number | None = None,
    entropy_denominator: Number | None = None,
    config: GRPOLossConfig,
    **unknown: object,
) -> TokenBatch:
    """Check the arguments of a loss function and bring them to one value per token.

    Raises:
        TypeError: an argument that no loss function has.
        ValueError: a shape, device or value does not fit; says which and what would.
    """
    for name in unknown:
        nearest = difflib.get_close_matches(name, LossArguments.__annotations__, 1)
        suggestion = f": did you mean {nearest[0]}?" if nearest else ""
        raise TypeError(f"unexpected keyword argument {name!r}{suggestion}")
    layout = Layout(completion_ids, cu_seqlens)
    if layout.num_sequences is None and config.loss_type in ("grpo", "dr_grpo"):
        raise ValueError(
            f"loss_type={config.loss_type!r} averages over sequences: give cu_seqlens, "
            "or completion_ids as (B, T)"
        )
    if config.beta == 0:
        ref_logps = None  # not read
    elif ref_logps is None:
        raise ValueError(f"beta={config.beta} needs ref_logps, the reference's log-probs")
    check_device(device, completion_ids=completion_ids, cu_seqlens=cu_seqlens)
    check_device(device, old_logps=old_logps, ref_logps=ref_logps)
    check_device(device, importance_sampling_ratio=importance_sampling_ratio)
    check_device(device, policy_weight=policy_weight, entropy_mask=entropy_mask)
    check_number(num_items_in_batch=num_items_in_batch)
    check_number(num_sequences_in_batch=num_sequences_in_batch)
    check_number(entropy_denominator=entropy_denominator)

    mask_N = flat_mask(layout, "completion_mask", completion_mask)
    advantages_N = layout.per_token("advantages", advantages.detach()).to(dtype)
    factors = [
        layout.per_token(name, value.detach()).to(dtype)
        for name, value in (
            ("importance_sampling_ratio", importance_sampling_ratio),
            ("policy_weight", policy_weight),
            ("entropy_mask", entropy_mask),
        )
        if value is not None
    ]
    policy_weight_N = None
    for factor_N in factors:
        policy_weight_N = factor_N if policy_weight_N is None else policy_weight_N * factor_N

    # Decided where mask and advantages live: on the CPU this needs no synchronisation later.
    if policy_weight_N is not None or not (mask_N is None or advantages_N.device == mask_N.device):
        advantages_N = advantages_N.to(device, non_blocking=True)
        mask_N = None if mask_N is None else mask_N.to(device, non_blocking=True)
    if policy_weight_N is not None:
        # An advantage of 0 times an infinite ratio is 0.
        harmless_N = (advantages_N == 0) & policy_weight_N.isinf()
        policy_weight_N = policy_weight_N.masked_fill(harmless_N, 0)
    state_N = torch.full_like(advantages_N, ACTIVE, dtype=torch.int8)
    if config.beta == 0:
        factor_N = advantages_N if policy_weight_N is None else advantages_N * policy_weight_N
        state_N.masked_fill_(factor_N == 0, COUNTED)
    if mask_N is not None:
        state_N.masked_fill_(~mask_N, MASKED)
        mask_N = mask_N.to(device, non_blocking=True)
    num_tokens = (
        torch.full((), layout.num_tokens, device=device) if mask_N is None else mask_N.sum()
    )
    row_weight_N, denominator = _aggregation(
        layout, mask_N, num_tokens, num_items_in_batch, num_sequences_in_batch, config, dtype
    )
    return TokenBatch(
        ids_N=flat(completion_ids),
        mask_N=mask_N,
        advantages_N=advantages_N.to(device, non_blocking=True),
        old_logps_N=_flat_logps(layout, "old_logps", old_logps, dtype),
        ref_logps_N=_flat_logps(layout, "ref_logps", ref_logps, dtype),
        policy_weight_N=policy_weight_N,
        row_weight_N=row_weight_N,
        denominator=denominator,
        num_tokens=num_tokens,
        num_sequences=layout.num_sequences,
        state_N=state_N,
    )


def flat(value: Tensor) -> Tensor:
    """Flatten; kernels read token after token, and reshape may return a view with any stride."""
    return value.reshape(-1).contiguous()


def flat_mask(layout: Layout, name: str, mask: Tensor | None) -> Tensor | None:
    """Bring a 0/1 mask of any type to (N,) bool."""
    if mask is None:
        return None
    mask_N = layout.like_tokens(name, mask.detach())
    if mask_N.dtype == torch.bool:
        return mask_N
    if mask_N.device.type == "cpu" and not ((mask_N == 0) | (mask_N == 1)).all():
        raise ValueError(f"{name} must hold 0 and 1 only, got {mask_N.unique()[:4].tolist()} ...")
    return mask_N != 0


def same_tokens(rows: torch.Size, ids: torch.Size) -> bool:
    """Say whether rows of hidden states or logits belong to ids: (1, N) and (N,) are the same."""
    return len(rows) in (1, 2) and (rows == ids or (1, *rows) == ids or rows == (1, *ids))


def upstream_vectors(
    dlogps_N: Tensor | None, dentropy_N: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Bring the gradients that autograd hands to backward, or does not, to what kernels read."""
    if dlogps_N is None:
        assert dentropy_N is not None
        dlogps_N = torch.zeros_like(dentropy_N)
    return dlogps_N.contiguous(), None if dentropy_N is None else dentropy_N.contiguous()


def check_ids(ids_N: Tensor, mask_N: Tensor | None, vocabulary: int) -> None:
    """Refuse ids that count and are outside the vocabulary; on a GPU if FASTGRPO_DEBUG is set."""
    if ids_N.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"completion_ids must be int64, got {ids_N.dtype}")
    if ids_N.device.type != "cpu" and not os.environ.get("FASTGRPO_DEBUG"):
        return
    wrong = (ids_N < 0) | (ids_N >= vocabulary)
    if mask_N is not None:
        wrong &= mask_N
    if wrong.any():
        where = int(wrong.nonzero()[0])
        raise ValueError(
            f"completion_ids holds {int(ids_N[where])} at token {where}, outside [0, {vocabulary}):"
            " mask it, or use the tokenizer that belongs to this head"
        )


def check_device(device: torch.device, **tensors: Tensor | None) -> None:
    """Refuse tensors on another device than the hidden states or logits."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, the rest is on {device}: move it")


def check_number(**numbers: Number | None) -> None:
    """Refuse a denominator that is negative, not finite or not 0-d."""
    for name, number in numbers.items():
        if isinstance(number, Tensor):
            if number.numel() != 1:
                raise ValueError(f"{name} must be a number, got shape {tuple(number.shape)}")
        elif number is not None and not 0 <= number < float("inf"):
            raise ValueError(f"{name} must be a finite number, 0 or more, got {number}")


def _aggregation(
    layout: Layout,
    mask_N: Tensor | None,
    num_tokens: Tensor,
    num_items_in_batch: Number | None,
    num_sequences_in_batch: Number | None,
    config: GRPOLossConfig,
    dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor]:
    """Return the weight of each row and the denominator (FORMULAS: per-token loss, aggregation).

    Weights average 1, so that the gradients of rows keep their magnitude whatever the length:
    the small number 1 / (sequences * length) would underflow in fp16.
    """
    device = num_tokens.device
    items = num_tokens if num_items_in_batch is None else num_items_in_batch
    sequences = layout.num_sequences if num_sequences_in_batch is None else num_sequences_in_batch
    if config.loss_type == "dapo":
        return None, _at_least_one(items, device, dtype)
    if config.loss_type == "bnpo":
        return None, _at_least_one(num_tokens, device, dtype)
    assert layout.num_sequences is not None and sequences is not None
    if config.loss_type == "dr_grpo":
        assert config.max_completion_length is not None
        return None, _at_least_one(sequences, device, dtype) * config.max_completion_length
    counted_N = (
        torch.ones(layout.num_tokens, dtype=torch.int64, device=device)
        if mask_N is None
        else mask_N.long()
    )
    length_B = layout.sum_sequences(counted_N).clamp(min=1).to(dtype)
    mean_length = _at_least_one(num_tokens, device, dtype) / max(layout.num_sequences, 1)
    row_weight_N = layout.per_token("row_weight", mean_length / length_B)
    return row_weight_N, _at_least_one(sequences, device, dtype) * mean_length


def _at_least_one(number: Number, device: torch.device, dtype: torch.dtype) -> Tensor:
    if isinstance(number, Tensor):
        return number.detach().reshape(()).to(device, dtype, non_blocking=True).clamp(min=1)
    return torch.full((), max(float(number), 1.0), dtype=dtype, device=device)


def _flat_logps(
    layout: Layout, name: str, value: Tensor | None, dtype: torch.dtype
) -> Tensor | None:
    return None if value is None else layout.like_tokens(name, value.detach()).to(dtype)


def _check_cu_seqlens(cu_seqlens: Tensor, num_tokens: int, ids: Tensor) -> int:
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2 or cu_seqlens.is_floating_point():
        raise ValueError(
            f"cu_seqlens must be (B + 1,) integers, got {tuple(cu_seqlens.shape)} "
            f"{cu_seqlens.dtype}"
        )
    check_device(ids.device, cu_seqlens=cu_seqlens)
    if cu_seqlens.device.type == "cpu":
        first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
        if first != 0 or last != num_tokens or (cu_seqlens.diff() < 0).any():
            raise ValueError(
                f"cu_seqlens must rise from 0 to the number of tokens {num_tokens}, got "
                f"{cu_seqlens.tolist()[:8]} ... {last}"
            )
    return len(cu_seqlens) - 1


def _shape_error(name: str, value: Tensor, shapes: Sequence[tuple[int, ...]]) -> ValueError:
    wanted = " or ".join(map(str, shapes))
    return ValueError(f"{name} must have shape {wanted}, got {tuple(value.shape)}")
