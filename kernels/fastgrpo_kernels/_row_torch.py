"""The row step of `_row_triton.py` in torch, for the torch backend: same signatures, same results.

The derivative of the loss with respect to a log-prob is not written again here: it is autograd's,
of `policy_rows` on the chunk's log-probs.

C rows of a chunk, N tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ._inputs import TokenBatch
from ._reduce import RowResults
from .config import GRPOLossConfig
from .policy import policy_rows

TEMPORARY_BYTES = 16
"""Bytes per logit that a row step needs beside the logits: four fp32 values."""


class _Statistics(NamedTuple):
    ids_C: Tensor  # 0 where the row is masked
    e_CV: Tensor  # exp(z - largest), 0 in the target's column
    shifted_CV: Tensor  # z - largest
    rest_C: Tensor  # sum of e
    total_C: Tensor  # rest + exp(z_target - largest)
    log_total_C: Tensor
    logps_C: Tensor
    entropy_C: Tensor


def loss_rows(
    logits_CV: Tensor,
    dlogits_CV: Tensor | None,
    tokens: int | Tensor,
    batch: TokenBatch,
    rows: RowResults,
    config: GRPOLossConfig,
    scale: Tensor | None = None,
) -> None:
    """See `_row_triton.loss_rows`."""
    pick = _picked(tokens, len(logits_CV))
    chunk = replace(
        batch,
        **{name: None if x is None else x[pick] for name, x in _vectors(batch).items()},
    )
    row = _statistics(logits_CV, chunk.ids_N, chunk.mask_N, config.temperature)
    with torch.enable_grad():
        logps_C = row.logps_C.requires_grad_(dlogits_CV is not None)
        found = policy_rows(logps_C, row.entropy_C, chunk, config)
    # Outside: autograd must not record what is written over the logits.
    if dlogits_CV is not None:
        ones_C = torch.ones_like(found.loss_N)
        (dlogps_C,) = torch.autograd.grad(found.loss_N, logps_C, ones_C)
        if scale is not None:
            dlogps_C = dlogps_C * scale
        _write_dlogits(row, dlogits_CV, dlogps_C, None, chunk.mask_N, config.temperature)
    for name in ("logps_N", "entropy_N", "loss_N", "policy_N", "kl_N", "clip_N"):
        if getattr(rows, name) is not None:
            getattr(rows, name)[pick] = getattr(found, name).detach()


def logps_rows(
    logits_CV: Tensor,
    tokens: int | Tensor,
    ids_N: Tensor,
    mask_N: Tensor | None,
    temperature: float,
    logps_N: Tensor,
    entropy_N: Tensor,
) -> None:
    """See `_row_triton.logps_rows`."""
    pick = _picked(tokens, len(logits_CV))
    mask_C = None if mask_N is None else mask_N[pick]
    row = _statistics(logits_CV, ids_N[pick], mask_C, temperature)
    logps_N[pick] = row.logps_C if mask_C is None else torch.where(mask_C, row.logps_C, 0)
    entropy_N[pick] = row.entropy_C if mask_C is None else torch.where(mask_C, row.entropy_C, 0)


def dlogits_rows(
    logits_CV: Tensor,
    dlogits_CV: Tensor,
    tokens: int | Tensor,
    ids_N: Tensor,
    mask_N: Tensor | None,
    temperature: float,
    dlogps_N: Tensor,
    dentropy_N: Tensor | None,
) -> None:
    """See `_row_triton.dlogits_rows`."""
    pick = _picked(tokens, len(logits_CV))
    mask_C = None if mask_N is None else mask_N[pick]
    row = _statistics(logits_CV, ids_N[pick], mask_C, temperature)
    dentropy_C = None if dentropy_N is None else dentropy_N[pick]
    _write_dlogits(row, dlogits_CV, dlogps_N[pick], dentropy_C, mask_C, temperature)


def scale_rows(values_CV: Tensor, scale: Tensor) -> None:
    """See `_row_triton.scale_rows`."""
    values_CV.copy_(values_CV.to(torch.promote_types(values_CV.dtype, torch.float32)) * scale)


def _picked(tokens: int | Tensor, count: int) -> slice | Tensor:
    """Return the index of a chunk's tokens: a run of them from the first, or their list."""
    return slice(tokens, tokens + count) if isinstance(tokens, int) else tokens


def _vectors(batch: TokenBatch) -> dict[str, Tensor | None]:
    return {name: value for name, value in vars(batch).items() if name.endswith("_N")}


def _statistics(
    logits_CV: Tensor, ids_C: Tensor, mask_C: Tensor | None, temperature: float
) -> _Statistics:
    dtype = torch.promote_types(logits_CV.dtype, torch.float32)
    shifted_CV = logits_CV.to(dtype, copy=True).mul_(1 / temperature)
    largest_C1 = shifted_CV.amax(-1, keepdim=True)
    shifted_CV -= largest_C1.masked_fill_(largest_C1 == -torch.inf, 0)
    ids_C = (ids_C if mask_C is None else ids_C.masked_fill(~mask_C, 0)).long()
    target_C1 = shifted_CV.gather(1, ids_C[:, None])
    e_CV = shifted_CV.exp().scatter_(1, ids_C[:, None], 0)
    rest_C = e_CV.sum(1)
    e_target_C1 = target_C1.exp()
    total_C = rest_C + e_target_C1[:, 0]
    log_total_C = torch.where(target_C1[:, 0] == 0, rest_C.log1p(), total_C.log())
    moment_C = _moment(e_CV, shifted_CV) + _moment(e_target_C1, target_C1)
    return _Statistics(
        ids_C=ids_C,
        e_CV=e_CV,
        shifted_CV=shifted_CV,
        rest_C=rest_C,
        total_C=total_C,
        log_total_C=log_total_C,
        logps_C=target_C1[:, 0] - log_total_C,
        entropy_C=log_total_C - moment_C / total_C,
    )


def _moment(e_CV: Tensor, shifted_CV: Tensor) -> Tensor:
    # -inf columns have e = 0 and would give 0 * -inf.
    return (e_CV * shifted_CV).masked_fill_(e_CV == 0, 0).sum(1)


def _write_dlogits(
    row: _Statistics,
    dlogits_CV: Tensor,
    dlogps_C: Tensor,
    dentropy_C: Tensor | None,
    mask_C: Tensor | None,
    temperature: float,
) -> None:
    """Write dlogp * (1[target] - p) - dentropy * p * (log p + entropy), times 1 / temperature.

    Where masked 0, whatever the logits are.
    """
    ids_C1 = row.ids_C[:, None]
    p_CV = None
    if dentropy_C is not None:
        p_CV = row.e_CV.scatter(1, ids_C1, row.shifted_CV.gather(1, ids_C1).exp())
        p_CV /= row.total_C[:, None]
    # The statistics are not needed again: their memory is the gradient's.
    gradient_CV = row.e_CV.mul_((-dlogps_C / row.total_C)[:, None])
    gradient_CV.scatter_(1, ids_C1, (dlogps_C * (row.rest_C / row.total_C))[:, None])
    if p_CV is not None and dentropy_C is not None:
        surprise_CV = row.shifted_CV.add_((row.entropy_C - row.log_total_C)[:, None])
        surprise_CV.masked_fill_(p_CV == 0, 0)
        gradient_CV -= p_CV.mul_(surprise_CV).mul_(dentropy_C[:, None])
    dlogits_CV.copy_(gradient_CV.mul_(1 / temperature))
    if mask_C is not None:
        dlogits_CV.masked_fill_(~mask_C[:, None], 0)
