"""The row step of `_row_triton.py` in torch, for the torch backend: same signatures, same results.

The derivative of the loss with respect to a log-prob is not written again here: it is autograd's,
of `policy_rows` on the chunk's log-probs.

C rows of a chunk, N tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ._backend import MIB
from ._inputs import TokenBatch
from ._reduce import RowResults, Statistics
from .config import GRPOLossConfig
from .policy import policy_rows

_SLAB_BYTES, _CPU_SLAB_BYTES = 16 * MIB, 4 * MIB


def temporary_bytes(device: torch.device) -> int:
    """Return what a row step needs beside the logits at most: four matrices like a slab."""
    return 4 * _slab_bytes(device)


def loss_rows(
    logits_CV: Tensor,
    dlogits_CV: Tensor | None,
    tokens: int | Tensor,
    batch: TokenBatch,
    rows: RowResults,
    config: GRPOLossConfig,
    scale: Tensor | None = None,
    kept: Statistics | None = None,
    dlogps_N: Tensor | None = None,
) -> None:
    """See `_row_triton.loss_rows`."""
    if kept is None:
        kept = Statistics.beside(rows.logps_N, rows.entropy_N)
    if dlogps_N is None and dlogits_CV is not None:
        dlogps_N = torch.zeros_like(rows.logps_N)
    statistics_rows(logits_CV, tokens, batch.ids_N, batch.mask_N, config, kept)
    pick = _picked(tokens, len(logits_CV))
    _objective(batch.at(pick), pick, rows, config, dlogps_N)
    if dlogits_CV is not None:
        assert dlogps_N is not None
        weight_N = batch.entropy_weight_N
        dlogits_rows(
            logits_CV, dlogits_CV, tokens, batch.ids_N, batch.mask_N, config, kept, dlogps_N,
            None if weight_N is None else -weight_N, scale,
        )  # fmt: skip


def objective_rows(
    batch: TokenBatch,
    rows: RowResults,
    config: GRPOLossConfig,
    dlogps_N: Tensor | None,
    sequences: tuple[int, int] | None = None,
) -> None:
    """See `_row_triton.objective_rows`."""
    pick = slice(None)
    if sequences is not None:
        batch, pick = batch.sequences(*sequences)
    _objective(batch, pick, rows, config, dlogps_N)


def statistics_rows(
    logits_CV: Tensor,
    tokens: int | Tensor,
    ids_N: Tensor,
    mask_N: Tensor | None,
    config: GRPOLossConfig,
    found: Statistics,
    first_column: int = 0,
    last_columns: bool = True,
) -> None:
    """See `_row_triton.statistics_rows`."""
    for rows, pick in _slabs(logits_CV, tokens):
        _statistics(logits_CV[rows], pick, ids_N, mask_N, config, found, first_column, last_columns)


def dlogits_rows(
    logits_CV: Tensor,
    dlogits_CV: Tensor,
    tokens: int | Tensor,
    ids_N: Tensor,
    mask_N: Tensor | None,
    config: GRPOLossConfig,
    found: Statistics,
    dlogps_N: Tensor,
    dentropy_N: Tensor | None,
    scale: Tensor | None = None,
    first_column: int = 0,
) -> None:
    """See `_row_triton.dlogits_rows`."""
    for rows, pick in _slabs(logits_CV, tokens):
        _dlogits(
            logits_CV[rows], dlogits_CV[rows], pick, ids_N, mask_N, config, found, dlogps_N,
            dentropy_N, scale, first_column,
        )  # fmt: skip


def scale_rows(values_CV: Tensor, scale: Tensor) -> None:
    """See `_row_triton.scale_rows`."""
    for rows, _ in _slabs(values_CV, 0):
        slab = values_CV[rows]
        slab.copy_(slab.to(torch.promote_types(slab.dtype, torch.float32)) * scale)


def _statistics(
    logits_CV: Tensor,
    pick: slice | Tensor,
    ids_N: Tensor,
    mask_N: Tensor | None,
    config: GRPOLossConfig,
    found: Statistics,
    first_column: int,
    last_columns: bool,
) -> None:
    """Do `statistics_rows` for a slab."""
    z_CV = _softmax_logits(logits_CV, config)
    here_C, ids_C1 = _target(ids_N[pick] - first_column, z_CV)
    target_C = torch.where(here_C, z_CV.gather(1, ids_C1)[:, 0], torch.nan)
    largest_C = z_CV.amax(1)
    if found.rest_N is not None and found.moment_N is not None and found.target_N is not None:
        previous_C, rest_C, moment_C = (
            found.largest_N[pick],
            found.rest_N[pick],
            found.moment_N[pick],
        )
        largest_C = torch.maximum(largest_C, previous_C)
        # While all logits are -inf there is nothing to subtract: -inf - -inf is a NaN.
        seen_C = previous_C != -torch.inf
        shift_C = torch.where(seen_C, previous_C - largest_C, 0)
        decay_C = torch.where(seen_C, shift_C.exp(), 0)
        moment_C, rest_C = decay_C * (moment_C + shift_C * rest_C), decay_C * rest_C
        target_C = torch.where(here_C, target_C, found.target_N[pick])
    else:
        rest_C = moment_C = torch.zeros_like(largest_C)
    base_C = torch.where(largest_C == -torch.inf, 0, largest_C)
    z_CV -= base_C[:, None]
    z_CV.clamp_(min=torch.finfo(z_CV.dtype).min)  # -inf columns would give 0 * -inf below
    e_CV = z_CV.exp()
    e_CV.scatter_(1, ids_C1, torch.where(here_C[:, None], 0, e_CV.gather(1, ids_C1)))
    rest_C = rest_C + e_CV.sum(1)
    moment_C = moment_C + e_CV.mul_(z_CV).sum(1)
    if found.rest_N is not None and found.moment_N is not None and found.target_N is not None:
        found.largest_N[pick], found.rest_N[pick] = largest_C, rest_C
        found.moment_N[pick], found.target_N[pick] = moment_C, target_C
    if not last_columns:
        return
    target_C = target_C - base_C
    e_target_C = target_C.exp()
    total_C = rest_C + e_target_C
    moment_C = moment_C + (e_target_C * target_C).masked_fill_(e_target_C == 0, 0)
    log_sum_C = torch.where(target_C == 0, rest_C.log1p(), total_C.log())
    results = (target_C - log_sum_C, log_sum_C - moment_C / total_C, base_C, log_sum_C)
    places = (found.logps_N, found.entropy_N, found.largest_N, found.log_sum_N)
    for place_N, result_C in zip(places, results, strict=True):
        place_N[pick] = result_C if mask_N is None else torch.where(mask_N[pick], result_C, 0)


def _dlogits(
    logits_CV: Tensor,
    dlogits_CV: Tensor,
    pick: slice | Tensor,
    ids_N: Tensor,
    mask_N: Tensor | None,
    config: GRPOLossConfig,
    found: Statistics,
    dlogps_N: Tensor,
    dentropy_N: Tensor | None,
    scale: Tensor | None,
    first_column: int,
) -> None:
    """Do `dlogits_rows` for a slab."""
    dlogps_C, logps_C = dlogps_N[pick], found.logps_N[pick]
    dentropy_C = torch.zeros_like(dlogps_C) if dentropy_N is None else dentropy_N[pick]
    if scale is not None:
        dlogps_C, dentropy_C = dlogps_C * scale, dentropy_C * scale
    nothing_C = (dlogps_C == 0) & (dentropy_C == 0)
    if mask_N is not None:
        nothing_C |= ~mask_N[pick]
    log_p_CV = _softmax_logits(logits_CV, config)
    slope_CV = _slope(logits_CV, config)
    here_C, ids_C1 = _target(ids_N[pick] - first_column, log_p_CV)
    log_p_CV -= found.largest_N[pick][:, None]
    log_p_CV -= found.log_sum_N[pick][:, None]
    d_target_C = -dlogps_C * logps_C.expm1()
    if dentropy_N is None:
        gradient_CV = log_p_CV.exp_().mul_(-dlogps_C[:, None])
    else:
        gradient_CV = log_p_CV.exp()
        entropy_C = found.entropy_N[pick]
        surprise_CV = log_p_CV.add_(entropy_C[:, None]).masked_fill_(gradient_CV == 0, 0)
        gradient_CV *= surprise_CV.mul_(dentropy_C[:, None]).add_(dlogps_C[:, None]).neg_()
        p_C = logps_C.exp()
        d_target_C = d_target_C - torch.where(p_C > 0, dentropy_C * p_C * (logps_C + entropy_C), 0)
    there_C1 = gradient_CV.gather(1, ids_C1)
    gradient_CV.scatter_(1, ids_C1, torch.where(here_C[:, None], d_target_C[:, None], there_C1))
    if isinstance(slope_CV, Tensor) or slope_CV != 1:
        gradient_CV *= slope_CV
    dlogits_CV.copy_(gradient_CV)
    if nothing_C.is_cpu:
        dlogits_CV[nothing_C] = 0
    else:  # where a list of rows would have to be waited for
        dlogits_CV.masked_fill_(nothing_C[:, None], 0)


def _objective(
    batch: TokenBatch,
    pick: slice | Tensor,
    rows: RowResults,
    config: GRPOLossConfig,
    dlogps_N: Tensor | None,
) -> None:
    """Fill `rows`, and the derivative if it is wanted, for the tokens of a batch."""
    logps_C = rows.logps_N[pick].detach().requires_grad_(dlogps_N is not None)
    with torch.enable_grad():
        found = policy_rows(logps_C, rows.entropy_N[pick], batch, config)
    if dlogps_N is not None:
        ones_C = torch.ones_like(found.loss_N)
        (dlogps_N[pick],) = torch.autograd.grad(found.loss_N, logps_C, ones_C)
    for name in ("loss_N", "policy_N", "kl_N", "report_N"):
        if getattr(rows, name) is not None:
            getattr(rows, name)[pick] = getattr(found, name).detach()


def _picked(tokens: int | Tensor, count: int) -> slice | Tensor:
    """Return the index of a chunk's tokens: a run of them from the first, or their list."""
    return slice(tokens, tokens + count) if isinstance(tokens, int) else tokens


def _slab_bytes(device: torch.device) -> int:
    """Return how many bytes of logits, in the type of the statistics, are worked on at a time.

    On a CPU so few that temporaries stay in its cache, and in memory that the process has: of a
    large block every page is new each time. On a GPU so many that launches are not what takes time.
    """
    return _CPU_SLAB_BYTES if device.type == "cpu" else _SLAB_BYTES


def _slabs(logits_CV: Tensor, tokens: int | Tensor) -> Iterator[tuple[slice, slice | Tensor]]:
    """Cut rows into slabs: their place in the chunk, and the index of their tokens.

    None is a row alone: PyTorch sums a single row in another order, by threads.
    """
    wide = torch.promote_types(logits_CV.dtype, torch.float32)
    row_bytes = logits_CV.shape[1] * wide.itemsize
    count = max(2, _slab_bytes(logits_CV.device) // row_bytes - 1)
    first, end = 0, len(logits_CV)
    while first < end:
        last = end if end - first <= count + 1 else first + count
        if isinstance(tokens, int):
            yield slice(first, last), slice(tokens + first, tokens + last)
        else:
            yield slice(first, last), tokens[first:last]
        first = last


def _softmax_logits(logits_CV: Tensor, config: GRPOLossConfig) -> Tensor:
    """Return a copy as the softmax sees it: scaled, capped, divided by the temperature."""
    z_CV = logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32), copy=True)
    if config.logit_softcap is None:
        factor = config.logit_scale / config.temperature
        return z_CV if factor == 1 else z_CV.mul_(factor)
    cap = config.logit_softcap
    return z_CV.mul_(config.logit_scale / cap).tanh_().mul_(cap / config.temperature)


def _slope(logits_CV: Tensor, config: GRPOLossConfig) -> Tensor | float:
    """Return the derivative of `_softmax_logits`."""
    slope = config.logit_scale / config.temperature
    if config.logit_softcap is None:
        return slope
    e_CV = logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32), copy=True)
    e_CV = e_CV.mul_(config.logit_scale / config.logit_softcap).abs_().mul_(-2).exp_()
    # 1 - tanh^2, from e = exp(-2|x|): the difference would be 0 where the cap is felt most.
    square_CV = (e_CV + 1).square_()
    return e_CV.mul_(4 * slope).div_(square_CV)


def _target(ids_C: Tensor, logits_CV: Tensor) -> tuple[Tensor, Tensor]:
    """Return whether each row's target is among these columns, and a column (C, 1) in any case."""
    here_C = (ids_C >= 0) & (ids_C < logits_CV.shape[1])
    return here_C, torch.where(here_C, ids_C, 0).long()[:, None]
