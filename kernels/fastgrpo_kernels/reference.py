"""The specification: log-probs and losses from logits and hidden states in plain PyTorch.

Every function here has the meaning of its fused twin and its arguments but those that say how to
compute (`backend`, `chunk_rows`, ...). It holds the logits in full, takes its gradient from
autograd and computes in the inputs' type, up to float64. It is the oracle of the tests and the
baseline of the benchmarks. The loss itself, from log-probs on, is `policy_loss`, which the fused
functions share.

B sequences, T positions, N tokens (B * T, or packed), H hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from ._checks import check_ids
from ._inputs import flat_mask
from ._layout import Layout
from ._sharding import gathered
from .config import GRPOLossConfig, GRPOLossOutput, LossArguments
from .policy import policy_loss


def selective_logps(
    logits: Tensor,  # (B, T, V) or (N, V)
    ids: Tensor,  # (B, T) or (N,) int64
    *,
    mask: Tensor | None = None,  # like ids
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Return log-prob of each id and entropy of each distribution, like `ids`, 0 where masked."""
    layout = Layout(ids)
    mask_N = flat_mask(layout, "mask", mask)
    check_ids(ids.reshape(-1), mask_N, logits.shape[-1])
    logits_NV = logits.reshape(-1, logits.shape[-1])
    ids_N = ids.reshape(-1)
    if mask_N is not None:
        logits_NV = logits_NV.masked_fill(~mask_N[:, None], 0)
        ids_N = ids_N.masked_fill(~mask_N, 0)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    logits_NV = logits_NV.to(dtype) * logit_scale
    if logit_softcap is not None:
        logits_NV = logit_softcap * torch.tanh(logits_NV / logit_softcap)
    all_logps_NV = (logits_NV / temperature).log_softmax(-1)
    logps_N = all_logps_NV.gather(-1, ids_N.long()[:, None])[:, 0]
    # A column of probability 0 contributes 0, in value and in gradient.
    possible_NV = all_logps_NV.detach() != -torch.inf
    finite_NV = torch.where(possible_NV, all_logps_NV, 0)
    entropy_N = -torch.where(possible_NV, finite_NV.exp() * finite_NV, 0).sum(-1)
    if mask_N is not None:
        logps_N = torch.where(mask_N, logps_N, 0)
        entropy_N = torch.where(mask_N, entropy_N, 0)
    return logps_N.view(ids.shape), entropy_N.view(ids.shape)


def linear_logps(
    hidden: Tensor,  # (B, T, H) or (N, H)
    weight: Tensor,  # (V, H)
    ids: Tensor,  # (B, T) or (N,) int64
    *,
    bias: Tensor | None = None,  # (V,)
    mask: Tensor | None = None,  # like ids
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Return `selective_logps` of the logits `hidden @ weight.T + bias`."""
    return selective_logps(
        _logits(hidden, weight, ids, bias, mask),
        ids,
        mask=mask,
        temperature=temperature,
        logit_scale=logit_scale,
        logit_softcap=logit_softcap,
    )


def grpo_loss(
    logits: Tensor,  # (B, T, V) or (N, V)
    completion_ids: Tensor,  # (B, T) or (N,) int64
    advantages: Tensor,  # (B,) one a sequence, or (B, T) / (N,) one a token
    *,
    config: GRPOLossConfig = GRPOLossConfig(),
    **arguments: Unpack[LossArguments],
) -> GRPOLossOutput:
    """Return the loss and its metrics, differentiable to `logits`; see `LossArguments`."""
    logps, entropy = selective_logps(
        logits.reshape(*completion_ids.shape, logits.shape[-1]),
        completion_ids,
        mask=arguments.get("completion_mask"),
        temperature=config.temperature,
        logit_scale=config.logit_scale,
        logit_softcap=config.logit_softcap,
    )
    return policy_loss(logps, advantages, entropy=entropy, config=config, **arguments)


def linear_grpo_loss(
    hidden: Tensor,  # (B, T, H) or (N, H)
    weight: Tensor,  # (V, H)
    completion_ids: Tensor,  # (B, T) or (N,) int64
    advantages: Tensor,  # (B,) one a sequence, or (B, T) / (N,) one a token
    *,
    bias: Tensor | None = None,  # (V,)
    config: GRPOLossConfig = GRPOLossConfig(),
    **arguments: Unpack[LossArguments],
) -> GRPOLossOutput:
    """Return `grpo_loss` of the logits `hidden @ weight.T + bias`."""
    mask = arguments.get("completion_mask")
    logits = _logits(hidden, weight, completion_ids, bias, mask)
    return grpo_loss(logits, completion_ids, advantages, config=config, **arguments)


def _logits(
    hidden: Tensor, weight: Tensor, ids: Tensor, bias: Tensor | None, mask: Tensor | None
) -> Tensor:
    weight, bias = gathered(weight), gathered(bias)
    hidden = hidden.reshape(*ids.shape, hidden.shape[-1])
    if mask is not None:
        # 0 times a NaN is a NaN: what stands behind the mask must not reach the weight's gradient.
        hidden = hidden.masked_fill(mask.view(ids.shape)[..., None] == 0, 0)
    return F.linear(hidden, weight, bias)
