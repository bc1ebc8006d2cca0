"""From the arguments of the public functions to flat vectors with one value per token.

B sequences, T positions, N tokens (B * T, or packed), V vocabulary.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ._checks import check_number, check_tensor
from ._layout import Layout, check_device, flat
from .config import LOG_MAX, LOG_MIN, GRPOLossConfig, LossArguments, Number

# What a row is: nothing, in the denominators and metrics only, or with a gradient as well.
MASKED, COUNTED, ACTIVE = 0, 1, 2

# What the sum over tokens is divided by; `bnpo` differs from `dapo` in whose tokens it counts.
TOKEN_MEANS = ("dapo", "cispo", "vespo", "bnpo")
LENGTH_WEIGHTED = ("grpo", "sapo", "gmpo")  # mean over sequences of the mean over their tokens


@dataclass(frozen=True)
class TokenBatch:
    """All a row of logits needs to know about its token, and what the sum of rows is divided by.

    loss = sum over counted tokens of
           (row_weight * (policy_weight * l + beta * kl) - entropy_weight * entropy) / denominator
    """

    layout: Layout
    ids_N: Tensor  # int64
    mask_N: Tensor | None  # bool; None = all count
    advantages_N: Tensor
    old_logps_N: Tensor | None
    ref_logps_N: Tensor | None
    policy_weight_N: Tensor | None
    entropy_weight_N: Tensor | None
    row_weight_N: Tensor | None  # mean length of the call's sequences / length of this one, or none
    ratio_mask_N: Tensor | None  # gmpo: tokens in the geometric mean; None = all that count
    log_correction_B: Tensor | None  # vespo: log of the sequence's sampler correction
    denominator: Tensor  # 0-d
    num_tokens: Tensor  # 0-d int64: counted tokens of the call
    num_sequences: Tensor | None  # 0-d int64; None = packed without cu_seqlens
    state_N: Tensor  # int8 MASKED, COUNTED or ACTIVE; on the CPU when mask and advantages are

    def at(self, pick: slice | Tensor) -> TokenBatch:
        """Return the batch of some tokens only; its layout is still that of all."""
        vectors = {name: value for name, value in vars(self).items() if name.endswith("_N")}
        return replace(self, **{n: None if x is None else x[pick] for n, x in vectors.items()})

    @property
    def num_counted(self) -> int | Tensor:
        """How many rows are not masked."""
        return self.layout.num_tokens if self.mask_N is None else self.mask_N.sum()

    def active_only(self) -> TokenBatch:
        """Return the batch with inactive rows masked; its denominators still know them."""
        return replace(self, mask_N=(self.state_N == ACTIVE).to(self.ids_N.device))

    def sequences(self, first: int, last: int) -> tuple[TokenBatch, slice]:
        """Return the batch of some consecutive sequences, and which tokens theirs are."""
        pick = slice(*self.layout.tokens_of(first, last))
        part, cu_seqlens = self.at(pick), self.layout.cu_seqlens
        if cu_seqlens is None:
            layout = Layout(part.ids_N.view(last - first, -1))
        else:
            layout = Layout(part.ids_N, cu_seqlens[first : last + 1] - pick.start)
        correction_B = self.log_correction_B
        correction_B = None if correction_B is None else correction_B[first:last]
        return replace(part, layout=layout, log_correction_B=correction_B), pick


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
        if name in GRPOLossConfig.__dataclass_fields__:
            raise TypeError(f"{name} belongs in the config: config=GRPOLossConfig({name}=...)")
        known = list(LossArguments.__annotations__)
        nearest = [k for k in known if name in k] or difflib.get_close_matches(name, known, 1, 0.4)
        suggestion = f": did you mean {nearest[0]}?" if nearest else ""
        raise TypeError(f"unexpected keyword argument {name!r}{suggestion}")
    check_tensor(completion_ids=completion_ids, advantages=advantages)
    if not isinstance(config, GRPOLossConfig):
        own, given = GRPOLossConfig, type(config)
        if given.__name__ != own.__name__:
            raise TypeError(f"config must be a {own.__name__}, got {given.__name__}")
        # Of a kernel of the Hub, for example.
        raise TypeError(
            f"config must be the {own.__name__} of {own.__module__}, got that of "
            f"{given.__module__}, another copy of the package: take loss and config from one"
        )
    optional = {
        "completion_mask": completion_mask,
        "cu_seqlens": cu_seqlens,
        "old_logps": old_logps,
        "ref_logps": ref_logps,
        "importance_sampling_ratio": importance_sampling_ratio,
        "policy_weight": policy_weight,
        "entropy_mask": entropy_mask,
    }
    check_tensor(**{name: x for name, x in optional.items() if x is not None})
    check_number(num_items_in_batch=num_items_in_batch)
    check_number(num_sequences_in_batch=num_sequences_in_batch)
    check_number(entropy_denominator=entropy_denominator)
    layout = Layout(completion_ids, cu_seqlens)
    _check_sequences(layout, num_items_in_batch, num_sequences_in_batch, config)
    if config.beta == 0:
        ref_logps = None  # not read
    elif ref_logps is None:
        raise ValueError(f"beta={config.beta} needs ref_logps, the reference's log-probs")
    check_device(device, completion_ids=completion_ids, cu_seqlens=cu_seqlens)
    check_device(device, old_logps=old_logps, ref_logps=ref_logps)
    check_device(device, importance_sampling_ratio=importance_sampling_ratio)
    check_device(device, policy_weight=policy_weight, entropy_mask=entropy_mask)

    def per_token(name: str, value: Tensor | None) -> Tensor | None:
        return None if value is None else layout.per_token(name, value.detach()).to(dtype)

    mask_N = flat_mask(layout, "completion_mask", completion_mask)
    advantages_N = layout.per_token("advantages", advantages.detach()).to(dtype)
    entropy_mask_N = per_token("entropy_mask", entropy_mask)
    factors = [
        per_token("policy_weight", policy_weight),
        None if config.loss_type == "gmpo" else entropy_mask_N,
    ]
    log_correction_B = None
    if config.loss_type != "vespo":
        factors.append(per_token("importance_sampling_ratio", importance_sampling_ratio))
    elif importance_sampling_ratio is not None:
        log_correction_B = _log_correction(layout, importance_sampling_ratio, mask_N, device, dtype)
    policy_weight_N = None
    for factor_N in factors:
        if factor_N is not None:
            policy_weight_N = factor_N if policy_weight_N is None else policy_weight_N * factor_N

    # Decided where mask and advantages live: on the CPU this needs no synchronisation later.
    everywhere = policy_weight_N is not None or (config.couples_rows and layout.packed)
    everywhere |= config.entropy_coef != 0 and entropy_mask_N is not None
    if everywhere or not (mask_N is None or advantages_N.device == mask_N.device):
        advantages_N = advantages_N.to(device, non_blocking=True)
        mask_N = None if mask_N is None else mask_N.to(device, non_blocking=True)
    if policy_weight_N is not None:
        # An advantage of 0 times an infinite ratio is 0.
        harmless_N = (advantages_N == 0) & policy_weight_N.isinf()
        policy_weight_N = policy_weight_N.masked_fill(harmless_N, 0)
    state_N = _states(layout, mask_N, advantages_N, policy_weight_N, entropy_mask_N, config)
    mask_N = None if mask_N is None else mask_N.to(device, non_blocking=True)
    counted_N = mask_N
    if counted_N is None:
        counted_N = torch.ones(layout.num_tokens, dtype=torch.bool, device=device)
    num_tokens, num_sequences = counted_N.sum(), None
    if layout.num_sequences is not None:
        num_sequences = torch.full((), layout.num_sequences, device=device)
        if config.skip_empty_sequences:
            num_sequences = (layout.sum_sequences(counted_N.long()) > 0).sum()
    row_weight_N, denominator = _aggregation(
        layout, counted_N, num_tokens, num_sequences, num_items_in_batch, num_sequences_in_batch,
        config, dtype,
    )  # fmt: skip
    entropy_weight_N = None
    if config.entropy_coef:
        bonus_N = counted_N.to(dtype)
        if entropy_mask_N is not None:
            # Not a product: what stands behind the mask may be a NaN.
            bonus_N = torch.where(counted_N, entropy_mask_N, 0)
        given = entropy_denominator is not None
        divisor = _at_least_one(entropy_denominator if given else bonus_N.sum(), device, dtype)
        entropy_weight_N = bonus_N * (config.entropy_coef * denominator / divisor)
    return TokenBatch(
        layout=layout,
        ids_N=flat(completion_ids),
        mask_N=mask_N,
        advantages_N=advantages_N.to(device, non_blocking=True),
        old_logps_N=_flat_logps(layout, "old_logps", old_logps, dtype),
        ref_logps_N=_flat_logps(layout, "ref_logps", ref_logps, dtype),
        policy_weight_N=policy_weight_N,
        entropy_weight_N=entropy_weight_N,
        row_weight_N=row_weight_N,
        ratio_mask_N=entropy_mask_N if config.loss_type == "gmpo" else None,
        log_correction_B=log_correction_B,
        denominator=denominator,
        num_tokens=num_tokens,
        num_sequences=num_sequences,
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


def _check_sequences(
    layout: Layout,
    num_items_in_batch: Number | None,
    num_sequences_in_batch: Number | None,
    config: GRPOLossConfig,
) -> None:
    """Refuse a loss that needs sequences, or their number, where only tokens are known."""
    averages = config.loss_type not in TOKEN_MEANS
    if averages and num_items_in_batch is not None and num_sequences_in_batch is None:
        raise ValueError(
            f"loss_type={config.loss_type!r} is divided by sequences, not tokens: give "
            "num_sequences_in_batch, those of the whole optimisation step"
        )
    if config.loss_type in ("dapo", "cispo", "vespo") and (
        num_sequences_in_batch is not None and num_items_in_batch is None
    ):
        raise ValueError(
            f"loss_type={config.loss_type!r} is divided by tokens, not sequences: give "
            "num_items_in_batch, those of the whole optimisation step"
        )
    if layout.num_sequences is None and (averages or config.couples_rows):
        what = f"loss_type={config.loss_type!r} averages over sequences"
        if not averages:
            what = "the ratio is one of whole sequences"
        raise ValueError(f"{what}: give cu_seqlens, or completion_ids as (B, T)")


def _states(
    layout: Layout,
    mask_N: Tensor | None,
    advantages_N: Tensor,
    policy_weight_N: Tensor | None,
    entropy_mask_N: Tensor | None,
    config: GRPOLossConfig,
) -> Tensor:
    """Return MASKED, COUNTED or ACTIVE for each token: can its gradient be other than 0?"""
    state_N = torch.full_like(advantages_N, ACTIVE, dtype=torch.int8)
    if config.beta == 0:
        factor_N = advantages_N if policy_weight_N is None else advantages_N * policy_weight_N
        active_N = factor_N != 0
        if config.entropy_coef:
            active_N |= True if entropy_mask_N is None else entropy_mask_N != 0
        if mask_N is not None:
            active_N &= mask_N
        if config.couples_rows:
            active_N = layout.spread(layout.sum_sequences(active_N.to(torch.int32)) > 0)
        state_N.masked_fill_(~active_N, COUNTED)
    if mask_N is not None:
        state_N.masked_fill_(~mask_N, MASKED)
    return state_N


def _log_correction(
    layout: Layout, ratio: Tensor, mask_N: Tensor | None, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Return the log of each sequence's sampler correction, as VESPO adds it to its log-ratio."""
    log_ratio = ratio.detach().to(dtype).log().clamp(LOG_MIN, LOG_MAX)
    if layout.is_per_sequence(ratio):
        return log_ratio.reshape(-1)
    log_ratio_N = layout.per_token("importance_sampling_ratio", log_ratio)
    if mask_N is not None:
        log_ratio_N = torch.where(mask_N.to(device), log_ratio_N, 0)
    return layout.sum_sequences(log_ratio_N)


def _aggregation(
    layout: Layout,
    counted_N: Tensor,
    num_tokens: Tensor,
    num_sequences: Tensor | None,
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
    if config.loss_type in TOKEN_MEANS:
        local = config.loss_type == "bnpo" or num_items_in_batch is None
        return None, _at_least_one(num_tokens if local else num_items_in_batch, device, dtype)
    assert layout.num_sequences is not None
    given = num_sequences_in_batch is not None
    sequences = _at_least_one(num_sequences_in_batch if given else num_sequences, device, dtype)
    if config.loss_type == "luspo":
        return None, sequences
    if config.loss_type == "dr_grpo":
        assert config.max_completion_length is not None
        return None, sequences * config.max_completion_length
    assert config.loss_type in LENGTH_WEIGHTED
    length_B = layout.sum_sequences(counted_N.long()).clamp(min=1).to(dtype)
    mean_length = _at_least_one(num_tokens, device, dtype) / max(layout.num_sequences, 1)
    return layout.spread(mean_length / length_B), sequences * mean_length


def _at_least_one(number: Number | None, device: torch.device, dtype: torch.dtype) -> Tensor:
    if isinstance(number, Tensor):
        return number.detach().reshape(()).to(device, dtype, non_blocking=True).clamp(min=1)
    assert number is not None
    return torch.full((), max(float(number), 1.0), dtype=dtype, device=device)


def _flat_logps(
    layout: Layout, name: str, value: Tensor | None, dtype: torch.dtype
) -> Tensor | None:
    return None if value is None else layout.like_tokens(name, value.detach()).to(dtype)
