"""From the arguments of the public functions to flat vectors with one value per token.

B sequences, T positions, N tokens (B * T, or packed), V vocabulary.
"""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass

import torch
from torch import Tensor

from ._layout import Layout, check_device, flat
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
        known = list(LossArguments.__annotations__)
        nearest = [k for k in known if name in k] or difflib.get_close_matches(name, known, 1, 0.4)
        suggestion = f": did you mean {nearest[0]}?" if nearest else ""
        raise TypeError(f"unexpected keyword argument {name!r}{suggestion}")
    check_tensor(completion_ids=completion_ids, advantages=advantages)
    if not isinstance(config, GRPOLossConfig):
        raise TypeError(f"config must be a GRPOLossConfig, got {type(config).__name__}")
    layout = Layout(completion_ids, cu_seqlens)
    if (
        config.loss_type in ("grpo", "dr_grpo")
        and num_items_in_batch is not None
        and num_sequences_in_batch is None
    ):
        raise ValueError(
            f"loss_type={config.loss_type!r} is divided by sequences, not tokens: give "
            "num_sequences_in_batch, those of the whole optimisation step"
        )
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


def check_tensor(**tensors: object) -> None:
    """Refuse what is no tensor, a module for example."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            remedy = ": pass its .weight" if isinstance(tensor, torch.nn.Module) else ""
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}{remedy}")


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
