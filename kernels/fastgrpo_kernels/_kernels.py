"""The Triton kernels; `_row_triton.py` launches them.

The loss kernel reads its row twice: once for the statistics, once to write the gradient over it
(the second read is meant to hit the cache: see `kernels/README.md`). Where a gradient needs more
than its own row, statistics and gradient are two kernels, with `_sequence.py` between them. The
denominator of the loss and the upstream gradient stay out of the gradient that is written over
logits: in fp16 they would push it below the smallest number.

C rows of a chunk, N tokens, V vocabulary.
"""

import triton
import triton.language as tl

from ._objective import token_loss
from ._row import log_prob, sweep, target_logit, write_dlogits, write_zeros

# Where a slice of a longer tensor may start anywhere: alignment would compile one more variant.
PER_TOKEN = [
    "tokens_ptr", "scale_ptr", "ids_ptr", "mask_ptr", "advantages_ptr", "old_logps_ptr",
    "ref_logps_ptr", "policy_weight_ptr", "row_weight_ptr", "entropy_weight_ptr", "ratio_mask_ptr",
    "logps_ptr", "entropy_ptr", "log_sum_ptr", "loss_ptr", "policy_ptr", "kl_ptr", "report_ptr",
    "dlogps_ptr", "dentropy_ptr", "largest_ptr", "rest_ptr", "moment_ptr", "target_ptr",
]  # fmt: skip


@triton.jit
def _token_of_row(tokens_ptr, first_token, i_row):
    if tokens_ptr is not None:
        return tl.load(tokens_ptr + i_row).to(tl.int64)
    return first_token + i_row


@triton.jit
def _is_masked(mask_ptr, i_token):
    if mask_ptr is not None:
        return tl.load(mask_ptr + i_token) == 0
    return False


@triton.jit(do_not_specialize=["first_token"], do_not_specialize_on_alignment=PER_TOKEN)
def loss_kernel(
    logits_ptr,  # (C, V)
    dlogits_ptr,  # (C, V), may be logits_ptr; None = no gradient
    stride,
    dstride,
    V,
    first_token,  # row i belongs to token first_token + i ...
    tokens_ptr,  # ... or to tokens_ptr[i]
    scale_ptr,  # 0-d: multiplies the gradient; None = 1
    ids_ptr,  # (N,) from here on
    mask_ptr,
    advantages_ptr,
    old_logps_ptr,
    ref_logps_ptr,
    policy_weight_ptr,
    row_weight_ptr,
    entropy_weight_ptr,
    logps_ptr,
    entropy_ptr,
    largest_ptr,  # None = not kept
    log_sum_ptr,  # None = not kept
    loss_ptr,
    policy_ptr,
    kl_ptr,
    report_ptr,
    dlogps_ptr,  # None = not kept
    logit_scale,
    softcap,
    inv_temperature,
    beta,
    p,
    OBJECTIVE: tl.constexpr,
    KL: tl.constexpr,
    BIAS_CORRECTION: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    i_token = _token_of_row(tokens_ptr, first_token, i_row)
    p_row = logits_ptr + i_row * stride
    if _is_masked(mask_ptr, i_token):
        if dlogits_ptr is not None:
            write_zeros(dlogits_ptr + i_row * dstride, V, BLOCK_V)
        return
    i_target = tl.load(ids_ptr + i_token)
    # Read before the sweep: its reductions wait for all warps, so that none of them can write the
    # gradient over the target's logit while another has yet to read it.
    z_target = target_logit(p_row, i_target, V, logit_scale, softcap, inv_temperature)
    largest, rest, moment = sweep(
        p_row, i_target, V, logit_scale, softcap, inv_temperature, float("-inf"), 0.0, 0.0, BLOCK_V
    )
    logp, entropy, base, log_sum = log_prob(largest, rest, moment, z_target)

    log_ratio = logp - logp
    if old_logps_ptr is not None:
        log_ratio = logp - tl.load(old_logps_ptr + i_token)
    dratio, dlogp = token_loss(
        log_ratio, log_ratio, logp, entropy, i_token, i_token >= 0, advantages_ptr, ref_logps_ptr,
        policy_weight_ptr, row_weight_ptr, entropy_weight_ptr, loss_ptr, policy_ptr, kl_ptr,
        report_ptr, beta, p, OBJECTIVE, KL, BIAS_CORRECTION,
    )  # fmt: skip
    dlogp += dratio
    tl.store(logps_ptr + i_token, logp)
    tl.store(entropy_ptr + i_token, entropy)
    if log_sum_ptr is not None:
        tl.store(largest_ptr + i_token, base)
        tl.store(log_sum_ptr + i_token, log_sum)
    if dlogps_ptr is not None:
        tl.store(dlogps_ptr + i_token, dlogp)

    if dlogits_ptr is not None:
        factor = 1.0
        if scale_ptr is not None:
            factor = tl.load(scale_ptr)
            dlogp *= factor
        dentropy = None
        if entropy_weight_ptr is not None:
            dentropy = -factor * tl.load(entropy_weight_ptr + i_token)
        write_dlogits(
            p_row, dlogits_ptr + i_row * dstride, i_target, V, logit_scale, softcap,
            inv_temperature, logp, entropy, base, log_sum, dlogp, dentropy, BLOCK_V,
        )  # fmt: skip


@triton.jit(
    do_not_specialize=["first_token", "first_column"],
    do_not_specialize_on_alignment=PER_TOKEN,
)
def statistics_kernel(
    logits_ptr,  # (C, V): rows, or the columns first_column to first_column + V of them
    stride,
    V,
    first_token,
    tokens_ptr,
    first_column,
    ids_ptr,  # (N,) from here on
    mask_ptr,
    logps_ptr,  # written when no further columns come
    entropy_ptr,
    log_sum_ptr,
    largest_ptr,
    rest_ptr,  # what the columns before gave and the next will need; None = these are all
    moment_ptr,
    target_ptr,
    logit_scale,
    softcap,
    inv_temperature,
    BLOCK_V: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    i_token = _token_of_row(tokens_ptr, first_token, i_row)
    p_row = logits_ptr + i_row * stride
    if _is_masked(mask_ptr, i_token):
        return
    i_target = tl.load(ids_ptr + i_token) - first_column
    largest, rest, moment = float("-inf"), 0.0, 0.0
    if rest_ptr is not None:
        largest = tl.load(largest_ptr + i_token)
        rest = tl.load(rest_ptr + i_token)
        moment = tl.load(moment_ptr + i_token)
    largest, rest, moment = sweep(
        p_row, i_target, V, logit_scale, softcap, inv_temperature, largest, rest, moment, BLOCK_V
    )
    z_target = target_logit(p_row, i_target, V, logit_scale, softcap, inv_temperature)
    if rest_ptr is not None:
        if not ((i_target >= 0) & (i_target < V)):
            z_target = tl.load(target_ptr + i_token)
        tl.store(largest_ptr + i_token, largest)
        tl.store(rest_ptr + i_token, rest)
        tl.store(moment_ptr + i_token, moment)
        tl.store(target_ptr + i_token, z_target)
    if logps_ptr is not None:
        logp, entropy, base, log_sum = log_prob(largest, rest, moment, z_target)
        tl.store(logps_ptr + i_token, logp)
        tl.store(entropy_ptr + i_token, entropy)
        tl.store(largest_ptr + i_token, base)
        tl.store(log_sum_ptr + i_token, log_sum)


@triton.jit(
    do_not_specialize=["first_token", "first_column"],
    do_not_specialize_on_alignment=PER_TOKEN,
)
def dlogits_kernel(
    logits_ptr,  # (C, V): rows, or the columns first_column to first_column + V of them
    dlogits_ptr,  # (C, V), may be logits_ptr
    stride,
    dstride,
    V,
    first_token,
    tokens_ptr,
    first_column,
    scale_ptr,  # 0-d: multiplies the gradient; None = 1
    ids_ptr,  # (N,) from here on
    mask_ptr,
    logps_ptr,
    entropy_ptr,
    largest_ptr,
    log_sum_ptr,
    dlogps_ptr,
    dentropy_ptr,  # None = 0
    logit_scale,
    softcap,
    inv_temperature,
    BLOCK_V: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    i_token = _token_of_row(tokens_ptr, first_token, i_row)
    p_row = logits_ptr + i_row * stride
    p_drow = dlogits_ptr + i_row * dstride
    if _is_masked(mask_ptr, i_token):
        write_zeros(p_drow, V, BLOCK_V)
        return
    dlogp = tl.load(dlogps_ptr + i_token)
    dentropy = None
    if dentropy_ptr is not None:
        dentropy = tl.load(dentropy_ptr + i_token)
    if scale_ptr is not None:
        factor = tl.load(scale_ptr)
        dlogp *= factor
        if dentropy_ptr is not None:
            dentropy *= factor
    write_dlogits(
        p_row, p_drow, tl.load(ids_ptr + i_token) - first_column, V, logit_scale, softcap,
        inv_temperature, tl.load(logps_ptr + i_token), tl.load(entropy_ptr + i_token),
        tl.load(largest_ptr + i_token), tl.load(log_sum_ptr + i_token), dlogp, dentropy, BLOCK_V,
    )  # fmt: skip


@triton.jit(do_not_specialize_on_alignment=["scale_ptr"])
def scale_kernel(values_ptr, stride, V, scale_ptr, BLOCK_V: tl.constexpr):
    scale = tl.load(scale_ptr).to(tl.float32)
    if scale != 1.0:
        p_row = values_ptr + tl.program_id(0).to(tl.int64) * stride
        o_v = tl.arange(0, BLOCK_V)
        for v in range(0, V, BLOCK_V):
            m_v = v + o_v < V
            b_row = tl.load(p_row + v + o_v, mask=m_v).to(tl.float32)
            tl.store(p_row + v + o_v, (b_row * scale).to(p_row.dtype.element_ty), mask=m_v)
