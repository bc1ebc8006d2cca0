"""The row step of the Triton backend: launches the kernels of `_kernels.py` and `_sequence.py`.

B sequences, C rows of a chunk, N tokens, V vocabulary.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
from torch import Tensor

from ._inputs import TokenBatch
from ._kernels import dlogits_kernel, loss_kernel, scale_kernel, statistics_kernel
from ._objective import KL, OBJECTIVES, SEQUENCE_TERMS, gspo_term, parameters
from ._reduce import RowResults, Statistics
from ._sequence import objective_kernel
from .config import GRPOLossConfig


def temporary_bytes(device: torch.device) -> int:
    """Return what a row step needs beside the logits: the kernels have it in registers."""
    return 0


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
    """Fill `rows` for the tokens of a chunk and, if asked, write d loss / d logits.

    For losses of which a token's gradient depends on its own log-prob only.

    Args:
        logits_CV: a chunk of logits, unit stride along V.
        dlogits_CV: takes the gradient of the undivided loss; may be `logits_CV`. None: no gradient.
        tokens: the first token of the chunk, or the (C,) indices of its tokens.
        batch: what is known of the tokens.
        rows: the results, written at the chunk's tokens.
        config: the mathematics.
        scale: 0-d; multiplies the gradient.
        kept: takes what `dlogits_rows` needs, for a gradient that is written later.
        dlogps_N: takes the derivative by the log-probs, likewise.
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
            old_logps_ptr=batch.old_logps_N,
            logps_ptr=rows.logps_N,
            entropy_ptr=rows.entropy_N,
            largest_ptr=None if kept is None else kept.largest_N,
            log_sum_ptr=None if kept is None else kept.log_sum_N,
            dlogps_ptr=dlogps_N,
            **_objective(batch, rows, config),
            **_logit_options(config),
            **launch_options(logits_CV.shape[1]),
        )


def objective_rows(
    batch: TokenBatch,
    rows: RowResults,
    config: GRPOLossConfig,
    dlogps_N: Tensor | None,
    sequences: tuple[int, int] | None = None,
) -> None:
    """Fill `rows` from its log-probs and entropies and, if asked, write d loss / d log-prob.

    Args:
        batch: what is known of the tokens.
        rows: the results; its log-probs and entropies are read.
        config: the mathematics.
        dlogps_N: takes the derivative, 0 where masked. None: not wanted.
        sequences: from which to before which; None: all.
    """
    layout = batch.layout
    block = 1024
    if config.couples_rows:
        assert layout.num_sequences is not None
        first, last = (0, layout.num_sequences) if sequences is None else sequences
        programs, length = last - first, 0 if layout.cu_seqlens is not None else layout.shape[1]
        term = SEQUENCE_TERMS.get(config.loss_type, gspo_term)
    else:
        assert sequences is None, "only sequences whose rows are coupled are taken apart"
        first, length, term = 0, layout.num_tokens, None
        programs = triton.cdiv(length, block)
    if not programs:
        return
    structure: dict[str, Any] = {
        "TERM": term,
        "MEAN": config.loss_type != "vespo",
        "BLOCK_T": block,
        "num_warps": _most_warps(),
    }
    if not torch.version.hip:
        # What 1,024 threads can have; left alone, ptxas takes fewer, and spills.
        structure["maxnreg"] = 64
    with _device_of(batch.ids_N):
        objective_kernel[(programs,)](
            length=length,
            first_sequence=first,
            cu_seqlens_ptr=layout.cu_seqlens if term is not None else None,
            log_correction_ptr=batch.log_correction_B,
            old_logps_ptr=batch.old_logps_N,
            ratio_mask_ptr=batch.ratio_mask_N,
            logps_ptr=rows.logps_N,
            entropy_ptr=rows.entropy_N,
            dlogps_ptr=dlogps_N,
            **structure,
            **_objective(batch, rows, config),
        )


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
    """Write what `found` holds of the tokens of a chunk.

    Args:
        logits_CV: a chunk of logits, or some of its columns if `found` is made for parts.
        tokens: the first token of the chunk, or the (C,) indices of its tokens.
        ids_N: the tokens.
        mask_N: those that count; of the others nothing is written.
        config: temperature, scale and softcap.
        found: takes the results.
        first_column: where in the vocabulary the columns begin.
        last_columns: no more columns follow: log-probs and entropies can be known.
    """
    first_token, tokens_C = _first_and_list(tokens)
    with _device_of(logits_CV):
        statistics_kernel[(logits_CV.shape[0],)](
            logits_ptr=logits_CV,
            stride=logits_CV.stride(0),
            V=logits_CV.shape[1],
            first_token=first_token,
            tokens_ptr=tokens_C,
            first_column=first_column,
            ids_ptr=ids_N,
            mask_ptr=_as_bytes(mask_N),
            logps_ptr=found.logps_N if last_columns else None,
            entropy_ptr=found.entropy_N if last_columns else None,
            log_sum_ptr=found.log_sum_N if last_columns else None,
            largest_ptr=found.largest_N,
            rest_ptr=found.rest_N,
            moment_ptr=found.moment_N,
            target_ptr=found.target_N,
            **_logit_options(config),
            **launch_options(logits_CV.shape[1]),
        )


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
    """Write the gradient of a chunk of logits, given that of log-probs and entropies.

    Args:
        logits_CV: a chunk of logits, or some of its columns.
        dlogits_CV: takes the gradient, 0 where masked; may be `logits_CV`.
        tokens: the first token of the chunk, or the (C,) indices of its tokens.
        ids_N: the tokens.
        mask_N: those that count.
        config: temperature, scale and softcap.
        found: the statistics of the same logits.
        dlogps_N: gradient of the log-probs.
        dentropy_N: gradient of the entropies; None: 0.
        scale: 0-d; multiplies the gradient.
        first_column: where in the vocabulary the columns begin.
    """
    first_token, tokens_C = _first_and_list(tokens)
    with _device_of(logits_CV):
        dlogits_kernel[(logits_CV.shape[0],)](
            logits_ptr=logits_CV,
            dlogits_ptr=dlogits_CV,
            stride=logits_CV.stride(0),
            dstride=dlogits_CV.stride(0),
            V=logits_CV.shape[1],
            first_token=first_token,
            tokens_ptr=tokens_C,
            first_column=first_column,
            scale_ptr=scale,
            ids_ptr=ids_N,
            mask_ptr=_as_bytes(mask_N),
            logps_ptr=found.logps_N,
            entropy_ptr=found.entropy_N,
            largest_ptr=found.largest_N,
            log_sum_ptr=found.log_sum_N,
            dlogps_ptr=dlogps_N,
            dentropy_ptr=dentropy_N,
            **_logit_options(config),
            **launch_options(logits_CV.shape[1]),
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
    return {"BLOCK_V": block, "num_warps": max(1, min(_most_warps(), block // 256))}


def _most_warps() -> int:
    """Return the warps of 1,024 threads, the most of a program; one of AMD's has 64 of them."""
    return 16 if torch.version.hip else 32


def _objective(batch: TokenBatch, rows: RowResults, config: GRPOLossConfig) -> dict[str, Any]:
    """Return what the loss of a token is computed with, and where it goes."""
    corrects = config.use_bias_correction_kl and batch.ref_logps_N is not None
    return {
        "mask_ptr": _as_bytes(batch.mask_N),
        "advantages_ptr": batch.advantages_N,
        "ref_logps_ptr": batch.ref_logps_N,
        "policy_weight_ptr": batch.policy_weight_N,
        "row_weight_ptr": batch.row_weight_N,
        "entropy_weight_ptr": batch.entropy_weight_N,
        "loss_ptr": rows.loss_N,
        "policy_ptr": rows.policy_N,
        "kl_ptr": rows.kl_N,
        "report_ptr": rows.report_N,
        "beta": float(config.beta),
        "p": parameters(config),
        "OBJECTIVE": OBJECTIVES[config.loss_type],
        "KL": KL[config.kl_estimator],
        "BIAS_CORRECTION": config.importance_sampling_level if corrects else None,
    }


def _logit_options(config: GRPOLossConfig) -> dict[str, float | None]:
    softcap = config.logit_softcap
    return {
        "logit_scale": float(config.logit_scale),
        "softcap": None if softcap is None else float(softcap),
        "inv_temperature": 1 / config.temperature,
    }


def _as_bytes(mask_N: Tensor | None) -> Tensor | None:
    return None if mask_N is None else mask_N.view(torch.int8)


def _first_and_list(tokens: int | Tensor) -> tuple[int, Tensor | None]:
    return (0, tokens) if isinstance(tokens, Tensor) else (tokens, None)


def _device_of(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
