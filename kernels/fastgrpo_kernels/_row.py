"""One row of logits to its statistics, its loss and its gradient, in Triton.

A program reads its row twice: once for the statistics, once to write the gradient over it (the
second read is meant to hit the cache: see `kernels/README.md`). Statistics are fp32 whatever the
type of the logits. The denominator of the loss and the upstream gradient stay out of the gradient
that is written: in fp16 they would push it below the smallest number.

C rows of a chunk, N tokens, V vocabulary. `_row_triton.py` launches these kernels.
"""

import triton
import triton.language as tl

from ._objective import clip_objective, kl_k3

# Where a slice of a longer tensor may start anywhere: alignment would compile one more variant.
_PER_TOKEN = [
    "tokens_ptr", "scale_ptr", "ids_ptr", "mask_ptr", "advantages_ptr", "old_logps_ptr",
    "ref_logps_ptr", "policy_weight_ptr", "row_weight_ptr", "logps_ptr", "entropy_ptr", "loss_ptr",
    "policy_ptr", "kl_ptr", "clip_ptr", "dlogps_ptr", "dentropy_ptr",
]  # fmt: skip


@triton.jit
def _log1p(x):
    """log(1 + x) for x >= 0, right to rounding also where 1 + x loses most of x."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def _statistics(p_row, i_target, V, inv_temperature, BLOCK_V: tl.constexpr):
    """Read a row once: largest logit, sums over the columns, log-prob and entropy.

    `rest` is the sum of exp(z - largest) over all columns but the target's. Kept apart it gives
    1 - p(target) = rest / total to full precision, where `1 - p` would have rounded to 0.
    """
    o_v = tl.arange(0, BLOCK_V)
    largest = float("-inf")
    b_rest = tl.zeros((BLOCK_V,), tl.float32)
    b_moment = tl.zeros((BLOCK_V,), tl.float32)  # sum of exp(z - largest) * (z - largest)
    for v in range(0, V, BLOCK_V):
        m_v = v + o_v < V
        z = tl.load(p_row + v + o_v, mask=m_v, other=float("-inf")).to(tl.float32)
        z = z * inv_temperature
        previous = largest
        largest = tl.maximum(largest, tl.max(z, 0))
        # While all logits are -inf there is nothing to subtract: -inf - -inf is a NaN.
        base = tl.where(largest == float("-inf"), 0.0, largest)
        shift = tl.where(previous == float("-inf"), 0.0, previous - base)
        decay = tl.where(previous == float("-inf"), 0.0, tl.exp(shift))
        e = tl.where(v + o_v == i_target, 0.0, tl.exp(z - base))
        b_moment = decay * (b_moment + shift * b_rest) + tl.where(e > 0, e * (z - base), 0.0)
        b_rest = decay * b_rest + e
    base = tl.where(largest == float("-inf"), 0.0, largest)
    # An id outside the vocabulary must show, as a NaN, and must not read outside the row.
    in_row = (i_target >= 0) & (i_target < V)
    z_target = tl.load(p_row + i_target, mask=in_row, other=float("nan")).to(tl.float32)
    z_target = z_target * inv_temperature
    e_target = tl.exp(z_target - base)
    rest = tl.sum(b_rest, 0)
    total = rest + e_target
    moment = tl.sum(b_moment, 0) + tl.where(e_target > 0, e_target * (z_target - base), 0.0)
    log_total = tl.where(z_target == base, _log1p(rest), tl.log(total))
    logp = z_target - base - log_total
    entropy = log_total - moment / total
    return base, rest, total, log_total, logp, entropy


@triton.jit
def _write_dlogits(
    p_row,
    p_drow,
    i_target,
    V,
    inv_temperature,
    base,
    rest,
    total,
    log_total,
    entropy,
    dlogp,
    dentropy,
    BLOCK_V: tl.constexpr,
):
    """Write dlogp * (1[target] - p) - dentropy * p * (log p + entropy), times 1 / temperature."""
    o_v = tl.arange(0, BLOCK_V)
    d_target = dlogp * (rest / total)
    inv_total = 1.0 / total
    for v in range(0, V, BLOCK_V):
        m_v = v + o_v < V
        z = tl.load(p_row + v + o_v, mask=m_v, other=float("-inf")).to(tl.float32)
        z = z * inv_temperature - base
        p = tl.exp(z) * inv_total
        d = tl.where(v + o_v == i_target, d_target, -dlogp * p)
        if dentropy is not None:
            d -= dentropy * tl.where(p > 0, p * (z - log_total + entropy), 0.0)
        d = d * inv_temperature
        tl.store(p_drow + v + o_v, d.to(p_drow.dtype.element_ty), mask=m_v)


@triton.jit
def _write_zeros(p_drow, V, BLOCK_V: tl.constexpr):
    o_v = tl.arange(0, BLOCK_V)
    zeros = tl.zeros((BLOCK_V,), p_drow.dtype.element_ty)
    for v in range(0, V, BLOCK_V):
        tl.store(p_drow + v + o_v, zeros, mask=v + o_v < V)


@triton.jit
def _token_of_row(tokens_ptr, first_token, i_row):
    if tokens_ptr is not None:
        return tl.load(tokens_ptr + i_row).to(tl.int64)
    return first_token + i_row


@triton.jit(do_not_specialize=["first_token"], do_not_specialize_on_alignment=_PER_TOKEN)
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
    logps_ptr,
    entropy_ptr,
    loss_ptr,
    policy_ptr,
    kl_ptr,
    clip_ptr,
    inv_temperature,
    epsilon_low,
    epsilon_high,
    delta,
    beta,
    BLOCK_V: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    i_token = _token_of_row(tokens_ptr, first_token, i_row)
    p_row = logits_ptr + i_row * stride
    if mask_ptr is not None:
        if tl.load(mask_ptr + i_token) == 0:
            if dlogits_ptr is not None:
                _write_zeros(dlogits_ptr + i_row * dstride, V, BLOCK_V)
            return
    i_target = tl.load(ids_ptr + i_token)
    base, rest, total, log_total, logp, entropy = _statistics(
        p_row, i_target, V, inv_temperature, BLOCK_V
    )

    old_logp = logp
    if old_logps_ptr is not None:
        old_logp = tl.load(old_logps_ptr + i_token)
    advantage = tl.load(advantages_ptr + i_token)
    policy, dpolicy, clip = clip_objective(
        logp - old_logp, advantage, epsilon_low, epsilon_high, delta
    )
    if policy_weight_ptr is not None:
        policy_weight = tl.load(policy_weight_ptr + i_token)
        policy *= policy_weight
        dpolicy *= policy_weight
    loss, dlogp = policy, dpolicy
    if ref_logps_ptr is not None:
        kl, dkl = kl_k3(tl.load(ref_logps_ptr + i_token), logp)
        loss += beta * kl
        dlogp += beta * dkl
        tl.store(kl_ptr + i_token, kl)
    if row_weight_ptr is not None:
        row_weight = tl.load(row_weight_ptr + i_token)
        loss *= row_weight
        dlogp *= row_weight
    tl.store(logps_ptr + i_token, logp)
    tl.store(entropy_ptr + i_token, entropy)
    tl.store(loss_ptr + i_token, loss)
    tl.store(policy_ptr + i_token, policy)
    tl.store(clip_ptr + i_token, clip)

    if dlogits_ptr is not None:
        p_drow = dlogits_ptr + i_row * dstride
        if scale_ptr is not None:
            dlogp *= tl.load(scale_ptr)
        # A row that contributes nothing is not read again (a NaN is not equal to 0).
        if dlogp == 0:
            _write_zeros(p_drow, V, BLOCK_V)
        else:
            _write_dlogits(
                p_row, p_drow, i_target, V, inv_temperature, base, rest, total, log_total, entropy,
                dlogp, None, BLOCK_V,
            )  # fmt: skip


@triton.jit(do_not_specialize=["first_token"], do_not_specialize_on_alignment=_PER_TOKEN)
def logps_kernel(
    logits_ptr,  # (C, V)
    dlogits_ptr,  # (C, V), may be logits_ptr; None = forward
    stride,
    dstride,
    V,
    first_token,
    tokens_ptr,
    ids_ptr,  # (N,) from here on
    mask_ptr,
    logps_ptr,  # written when forward
    entropy_ptr,
    dlogps_ptr,  # read when backward
    dentropy_ptr,  # None = the entropy was not used
    inv_temperature,
    BLOCK_V: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    i_token = _token_of_row(tokens_ptr, first_token, i_row)
    p_row = logits_ptr + i_row * stride
    if mask_ptr is not None:
        if tl.load(mask_ptr + i_token) == 0:
            if dlogits_ptr is not None:
                _write_zeros(dlogits_ptr + i_row * dstride, V, BLOCK_V)
            return
    i_target = tl.load(ids_ptr + i_token)
    base, rest, total, log_total, logp, entropy = _statistics(
        p_row, i_target, V, inv_temperature, BLOCK_V
    )
    if dlogits_ptr is None:
        tl.store(logps_ptr + i_token, logp)
        tl.store(entropy_ptr + i_token, entropy)
    else:
        dentropy = None
        if dentropy_ptr is not None:
            dentropy = tl.load(dentropy_ptr + i_token)
        _write_dlogits(
            p_row, dlogits_ptr + i_row * dstride, i_target, V, inv_temperature, base, rest, total,
            log_total, entropy, tl.load(dlogps_ptr + i_token), dentropy, BLOCK_V,
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
