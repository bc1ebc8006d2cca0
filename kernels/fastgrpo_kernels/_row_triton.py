"""The row step of the Triton backend: launches the kernels of `_row.py`.

C rows of a chunk, N tokens, V vocabulary.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
from torch import Tensor

from ._inputs import TokenBatch
from ._reduce import RowResults
from ._row import logps_kernel, loss_kernel, scale_kernel
from .config import GRPOLossConfig

TEMPORARY_BYTES = 0
"""Bytes per logit that a row step needs beside the logits."""


def loss_rows(
    logits_CV: Tensor,
    dlogits_CV: Tensor | None,
    tokens: int | Tensor,
    batch: TokenBatch,
    rows: RowResults,
    config: GRPOLossConfig,
    scale: Tensor | None = None,
) -> None:
    """Fill `rows` for the tokens of a chunk and, if asked, write d loss / d logits.

    Args:
        logits_CV: a chunk of logits, unit stride along V.
        dlogits_CV: takes the gradient of the undivided loss; may be `logits_CV`. None: no gradient.
        tokens: the first token of the chunk, or the (C,) indices of its tokens.
        batch: what is known of the tokens.
        rows: the results, written at the chunk's tokens.
        config: the mathematics.
        scale: 0-d; multiplies the gradient.
    """
    first_token, tokens_C = _first_and_list(tokens)
    with _device_of(logits_CV):
        loss_kernel[(logits_CV.shape[0],)](
            logits_ptr=logits_CV,
            dlogits_ptr=dlogits_CV,
            stride=logits_CV.stride(0),
            dstride=0 if dlogits_CV is None else dlogits_CV.stride(0),
            V=logits_CV.shape[1],
            first_token=first_token,
            tokens_ptr=tokens_C,
            scale_ptr=scale,
            ids_ptr=batch.ids_N,
            mask_ptr=None if batch.mask_N is None else batch.mask_N.view(torch.int8),
            advantages_ptr=batch.advantages_N,
            old_logps_ptr=batch.old_logps_N,
            ref_logps_ptr=batch.ref_logps_N,
            policy_weight_ptr=batch.policy_weight_N,
            row_weight_ptr=batch.row_weight_N,
            logps_ptr=rows.logps_N,
            entropy_ptr=rows.entropy_N,
            loss_ptr=rows.loss_N,
            policy_ptr=rows.policy_N,
            kl_ptr=rows.kl_N,
            clip_ptr=rows.clip_N,
            inv_temperature=1 / config.temperature,
            epsilon_low=float(config.epsilon_low),
            epsilon_high=float(config.epsilon_high),
            delta=float("inf") if config.delta is None else float(config.delta),
            beta=float(config.beta),
            **launch_options(logits_CV.shape[1]),
        )


def logps_rows(
    logits_CV: Tensor,
    tokens: int | Tensor,
    ids_N: Tensor,
    mask_N: Tensor | None,
    temperature: float,
    logps_N: Tensor,
    entropy_N: Tensor,
) -> None:
    """Write log-prob and entropy of the tokens of a chunk."""
    _launch_logps(
        logits_CV, None, tokens, ids_N, mask_N, temperature, logps_N, entropy_N, None, None
    )


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
    """Write the gradient of a chunk of logits, given that of log-probs and entropies."""
    _launch_logps(
        logits_CV, dlogits_CV, tokens, ids_N, mask_N, temperature, None, None, dlogps_N, dentropy_N
    )


def scale_rows(values_CV: Tensor, scale: Tensor) -> None:
    """Multiply in place by a 0-d tensor; touches nothing if that is 1."""
    with _device_of(values_CV):
        scale_kernel[(values_CV.shape[0],)](
            values_ptr=values_CV,
            stride=values_CV.stride(0),
            V=values_CV.shape[1],
            scale_ptr=scale,
            **launch_options(values_CV.shape[1]),
        )


def launch_options(vocabulary: int) -> dict[str, Any]:
    """Return block size and warps for a vocabulary; fixed, since tuning would move the rounding."""
    block = min(8192, triton.next_power_of_2(vocabulary))
    # A program may have 1,024 threads; a warp of AMD's has 64 of them.
    most_warps = 16 if torch.version.hip else 32
    return {"BLOCK_V": block, "num_warps": max(1, min(most_warps, block // 256))}


def _launch_logps(
    logits_CV, dlogits_CV, tokens, ids_N, mask_N, temperature, logps_N, entropy_N, dlogps_N,
    dentropy_N,
) -> None:  # fmt: skip
    first_token, tokens_C = _first_and_list(tokens)
    with _device_of(logits_CV):
        logps_kernel[(logits_CV.shape[0],)](
            logits_ptr=logits_CV,
            dlogits_ptr=dlogits_CV,
            stride=logits_CV.stride(0),
            dstride=0 if dlogits_CV is None else dlogits_CV.stride(0),
            V=logits_CV.shape[1],
            first_token=first_token,
            tokens_ptr=tokens_C,
            ids_ptr=ids_N,
            mask_ptr=None if mask_N is None else mask_N.view(torch.int8),
            logps_ptr=logps_N,
            entropy_ptr=entropy_N,
            dlogps_ptr=dlogps_N,
            dentropy_ptr=dentropy_N,
            inv_temperature=1 / temperature,
            **launch_options(logits_CV.shape[1]),
        )


def _first_and_list(tokens: int | Tensor) -> tuple[int, Tensor | None]:
    return (0, tokens) if isinstance(tokens, Tensor) else (tokens, None)


def _device_of(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
