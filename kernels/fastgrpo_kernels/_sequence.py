"""From log-probs to losses and their derivatives, for whole sequences or token by token, in Triton.

What the row kernel does between its two sweeps, apart: for losses whose gradient needs the
log-probs of a whole sequence, and where log-probs are known before any gradient is written.

N tokens, B sequences.
"""

import triton
import triton.language as tl

from ._kernels import PER_TOKEN
from ._objective import token_loss


@triton.jit
def _log_ratio(logp, old_logps_ptr, i_token, m_token):
    if old_logps_ptr is not None:
        return logp - tl.load(old_logps_ptr + i_token, mask=m_token, other=0.0)
    return logp - logp


@triton.jit
def _counted(mask_ptr, i_token, end):
    m_token = i_token < end
    if mask_ptr is not None:
        m_token = m_token & (tl.load(mask_ptr + i_token, mask=m_token, other=0) != 0)
    return m_token


@triton.jit
def _ratio_weight(ratio_mask_ptr, i_token, m_token):
    """The weight of a token in the log-ratio of its sequence."""
    if ratio_mask_ptr is not None:
        return tl.load(ratio_mask_ptr + i_token, mask=m_token, other=0.0)
    return tl.where(m_token, 1.0, 0.0)


@triton.jit(
    do_not_specialize=["length", "first_sequence"],
    do_not_specialize_on_alignment=[*PER_TOKEN, "cu_seqlens_ptr", "log_correction_ptr"],
)
def objective_kernel(
    length,  # tokens of a sequence, or of all where there is no TERM
    first_sequence,  # program i is sequence first_sequence + i
    cu_seqlens_ptr,  # (B + 1,); None = all have the same length
    log_correction_ptr,  # (B,)
    mask_ptr,  # (N,) from here on
    advantages_ptr,
    old_logps_ptr,
    ref_logps_ptr,
    policy_weight_ptr,
    row_weight_ptr,
    entropy_weight_ptr,
    ratio_mask_ptr,
    logps_ptr,  # read
    entropy_ptr,  # read
    loss_ptr,
    policy_ptr,
    kl_ptr,
    report_ptr,
    dlogps_ptr,  # None = no gradient
    beta,
    p,
    OBJECTIVE: tl.constexpr,
    TERM: tl.constexpr,  # None = every token has its own ratio
    MEAN: tl.constexpr,
    KL: tl.constexpr,
    BIAS_CORRECTION: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    i_sequence = first_sequence + tl.program_id(0).to(tl.int64)
    o_t = tl.arange(0, BLOCK_T)
    if TERM is None:
        start = tl.program_id(0).to(tl.int64) * BLOCK_T
        end = tl.minimum(start + BLOCK_T, length)
    elif cu_seqlens_ptr is None:
        start = i_sequence * length
        end = start + length
    else:
        start = tl.load(cu_seqlens_ptr + i_sequence).to(tl.int64)
        end = tl.load(cu_seqlens_ptr + i_sequence + 1).to(tl.int64)

    count, sequence_ratio = 1.0, 0.0
    if TERM is not None:
        b_sum = tl.zeros((BLOCK_T,), tl.float32)
        b_count = tl.zeros((BLOCK_T,), tl.float32)
        for t in range(start, end, BLOCK_T):
            i_token = t + o_t
            m_token = _counted(mask_ptr, i_token, end)
            logp = tl.load(logps_ptr + i_token, mask=m_token, other=0.0)
            advantage = tl.load(advantages_ptr + i_token, mask=m_token, other=0.0)
            term, dterm = TERM(_log_ratio(logp, old_logps_ptr, i_token, m_token), advantage, p)
            weight = _ratio_weight(ratio_mask_ptr, i_token, m_token)
            b_sum += tl.where(m_token, term * weight, 0.0)
            b_count += weight
        sequence_ratio = tl.sum(b_sum, 0)
        if MEAN:
            count = tl.maximum(tl.sum(b_count, 0), 1.0)
            sequence_ratio = sequence_ratio / count
        if log_correction_ptr is not None:
            sequence_ratio += tl.load(log_correction_ptr + i_sequence)

    b_shared = tl.zeros((BLOCK_T,), tl.float32)
    for t in range(start, end, BLOCK_T):
        i_token = t + o_t
        m_token = _counted(mask_ptr, i_token, end)
        logp = tl.load(logps_ptr + i_token, mask=m_token, other=0.0)
        entropy = tl.load(entropy_ptr + i_token, mask=m_token, other=0.0)
        token_ratio = _log_ratio(logp, old_logps_ptr, i_token, m_token)
        log_ratio = token_ratio
        if TERM is not None:
            log_ratio = sequence_ratio + tl.zeros_like(token_ratio)
        dratio, dlogp = token_loss(
            log_ratio, token_ratio, logp, entropy, i_token, m_token, advantages_ptr, ref_logps_ptr,
            policy_weight_ptr, row_weight_ptr, entropy_weight_ptr, loss_ptr, policy_ptr, kl_ptr,
            report_ptr, beta, p, OBJECTIVE, KL, BIAS_CORRECTION,
        )  # fmt: skip
        if dlogps_ptr is not None:
            if TERM is None:
                dlogp += dratio
            else:
                b_shared += tl.where(m_token, dratio, 0.0)
            tl.store(dlogps_ptr + i_token, dlogp, mask=m_token)

    if dlogps_ptr is not None and TERM is not None:
        # The derivative by the sequence's log-ratio reaches every token of the sequence.
        shared = tl.sum(b_shared, 0) / count
        tl.debug_barrier()
        for t in range(start, end, BLOCK_T):
            i_token = t + o_t
            m_token = _counted(mask_ptr, i_token, end)
            logp = tl.load(logps_ptr + i_token, mask=m_token, other=0.0)
            advantage = tl.load(advantages_ptr + i_token, mask=m_token, other=0.0)
            term, dterm = TERM(_log_ratio(logp, old_logps_ptr, i_token, m_token), advantage, p)
            weight = _ratio_weight(ratio_mask_ptr, i_token, m_token)
            dlogp = tl.load(dlogps_ptr + i_token, mask=m_token, other=0.0)
            tl.store(dlogps_ptr + i_token, dlogp + shared * dterm * weight, mask=m_token)
