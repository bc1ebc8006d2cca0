"""Weights for data that was not sampled by the policy itself, and for its most open tokens.

B sequences, T positions, N tokens (B * T, or packed).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ._inputs import flat_mask
from ._layout import Layout, check_device
from .config import MAX_EXPONENT


def importance_weights(
    logps: Tensor,  # (B, T) or (N,): log-probs of the trainer's model at sampling time
    sampling_logps: Tensor,  # like logps: log-probs the sampler reported; NaN = not known
    *,
    completion_mask: Tensor | None = None,  # like logps
    cu_seqlens: Tensor | None = None,  # (B + 1,), packed layout
    mode: Literal[
        "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"
    ] = "token_truncate",
    clip_min: float = 0.0,
    clip_max: float = 3.0,
) -> Tensor:
    """Return exp(logps - sampling_logps), bounded: corrects for a sampler that is not the policy.

    `truncate` clamps to [clip_min, clip_max] (TIS, fengyao.notion.site/off-policy-rl); `mask` sets
    what is outside to 0 (IcePop/MIS). `sequence` uses one ratio, that of all counted tokens of the
    sequence together.

    Returns:
        fp32, detached: an `importance_sampling_ratio`. Like `logps`; by sequence (B, 1), as TRL, or
        (B,) where they are packed.

    Raises:
        ValueError: an unknown mode, bounds out of order or shapes that do not fit.
    """
    modes = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
    if mode not in modes:
        raise ValueError(f"mode must be one of {', '.join(modes)}, got {mode!r}")
    if not 0 <= clip_min < clip_max:
        raise ValueError(f"0 <= clip_min < clip_max must hold, got {clip_min} and {clip_max}")
    by_sequence = mode.startswith("sequence")
    difference_N, layout = _sampler_difference(
        logps, sampling_logps, completion_mask, cu_seqlens, by_sequence
    )
    if by_sequence:
        difference_N = layout.sum_sequences(difference_N)
    ratio_N = difference_N.clamp(max=MAX_EXPONENT).exp()
    if mode.endswith("truncate"):
        ratio_N = ratio_N.clamp(clip_min, clip_max)
    else:
        ratio_N = torch.where((ratio_N >= clip_min) & (ratio_N <= clip_max), ratio_N, 0)
    if by_sequence:
        return ratio_N if layout.packed else ratio_N[:, None]
    return ratio_N.view(logps.shape)


def off_policy_mask(
    logps: Tensor,  # (B, T) or (N,)
    sampling_logps: Tensor,  # like logps
    advantages: Tensor,  # (B,)
    *,
    threshold: float,
    completion_mask: Tensor | None = None,  # like logps
    cu_seqlens: Tensor | None = None,  # (B + 1,), packed layout
) -> Tensor:
    """Return 0 for sequences to drop, 1 for the rest (DeepSeek-V3.2, off-policy sequence masking).

    A sequence is dropped when its advantage is negative and the mean over its counted tokens of
    `sampling_logps - logps` is above `threshold` (in nats).

    Returns:
        (B,) fp32: a `policy_weight`.

    Raises:
        ValueError: shapes that do not fit.
    """
    difference_N, layout = _sampler_difference(
        logps, sampling_logps, completion_mask, cu_seqlens, by_sequence=True
    )
    if tuple(advantages.shape) != (layout.num_sequences,):
        raise ValueError(
            f"advantages must be one per sequence ({layout.num_sequences},), "
            f"got {tuple(advantages.shape)}"
        )
    mask_N = flat_mask(layout, "completion_mask", completion_mask)
    counted_N = torch.ones_like(difference_N) if mask_N is None else mask_N.to(torch.float32)
    length_B = layout.sum_sequences(counted_N).clamp(min=1)
    drift_B = -layout.sum_sequences(difference_N) / length_B
    return 1 - ((advantages < 0) & (drift_B > threshold)).to(torch.float32)


def top_entropy_mask(
    entropy: Tensor,  # (B, T) or (N,)
    *,
    quantile: float,
    completion_mask: Tensor | None = None,  # like entropy
) -> Tensor:
    """Return 1 for the share `quantile` of counted tokens with the highest entropy, else 0.

    Keeps tokens at or above the (1 - quantile) quantile of this call (arXiv 2506.01939).

    Returns:
        fp32, like `entropy`: an `entropy_mask`.

    Raises:
        ValueError: `quantile` outside (0, 1] or shapes that do not fit.
    """
    if not 0 < quantile <= 1:
        raise ValueError(f"quantile must be in (0, 1], got {quantile}")
    layout = Layout(entropy)
    mask_N = flat_mask(layout, "completion_mask", completion_mask)
    entropy_N = entropy.detach().reshape(-1).float()
    if mask_N is None:
        mask_N = torch.ones_like(entropy_N, dtype=torch.bool)
    if not mask_N.any():
        return torch.zeros_like(entropy, dtype=torch.float32)
    threshold = entropy_N[mask_N].nanquantile(1 - quantile)  # NaN: not computed
    return ((entropy_N >= threshold) & mask_N).to(torch.float32).view(entropy.shape)


def _sampler_difference(
    logps: Tensor,
    sampling_logps: Tensor,
    completion_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    by_sequence: bool,
) -> tuple[Tensor, Layout]:
    """Return logps - sampling_logps (N,) in fp32, 0 where masked or not known, and the layout."""
    check_device(
        logps.device,
        sampling_logps=sampling_logps,
        completion_mask=completion_mask,
        cu_seqlens=cu_seqlens,
    )
    layout = Layout(logps, cu_seqlens)
    if by_sequence and layout.num_sequences is None:
        raise ValueError("one weight per sequence needs cu_seqlens, or logps as (B, T)")
    sampling_N = layout.like_tokens("sampling_logps", sampling_logps.detach()).float()
    difference_N = logps.detach().reshape(-1).float() - sampling_N
    known_N = ~sampling_N.isnan()
    mask_N = flat_mask(layout, "completion_mask", completion_mask)
    if mask_N is not None:
        known_N &= mask_N
    return torch.where(known_N, difference_N, 0), layout
