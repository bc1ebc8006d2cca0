"""One row of logits to its statistics, and to its gradient, in Triton.

Statistics are fp32 whatever the type of the logits. V vocabulary.
"""

import triton
import triton.language as tl

from ._objective import expm1


@triton.jit
def _log1p(x):
    """log(1 + x) for x >= 0, right to rounding also where 1 + x loses most of x."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def _softcap(x, cap):
    """Cap * tanh(x / cap) and its derivative 1 - tanh^2; a series where the quotient cancels."""
    y = x / cap
    e = tl.exp(-2.0 * tl.abs(y))
    large = tl.where(y < 0, e - 1.0, 1.0 - e) / (1.0 + e)
    y2 = y * y
    series = 17.0 / 315.0 - y2 * (62.0 / 2835.0)
    small = y * (1.0 - y2 * (1.0 / 3.0 - y2 * (2.0 / 15.0 - y2 * series)))
    return cap * tl.where(y2 < 0.04, small, large), 4.0 * e / ((1.0 + e) * (1.0 + e))


@triton.jit
def logit(p_logit, m_v, scale, softcap):
    """Read logits as the softmax sees them, up to the temperature; -inf where there are none."""
    z = tl.load(p_logit, mask=m_v, other=float("-inf")).to(tl.float32) * scale
    if softcap is not None:
        z, _ = _softcap(z, softcap)  # pyright: ignore[reportGeneralTypeIssues]
        z = tl.where(m_v, z, float("-inf"))
    return z


@triton.jit
def sweep(
    p_row,
    i_target,
    V,
    scale,
    softcap,
    inv_temperature,
    largest,
    rest,
    moment,
    BLOCK_V: tl.constexpr,
):
    """Go once over a row, or a further part of it.

    `largest` is the largest logit so far; `rest` the sum of exp(z - largest) over all columns but
    the target's, and `moment` that of exp(z - largest) * (z - largest).
    """
    o_v = tl.arange(0, BLOCK_V)
    largest = tl.full((), largest, tl.float32)
    b_rest = tl.where(o_v == 0, rest, 0.0)
    b_moment = tl.where(o_v == 0, moment, 0.0)
    for v in range(0, V, BLOCK_V):
        m_v = v + o_v < V
        z = logit(p_row + v + o_v, m_v, scale, softcap) * inv_temperature
        previous = largest
        largest = tl.maximum(largest, tl.max(z, 0))
        # While all logits are -inf there is nothing to subtract: -inf - -inf is a NaN.
        base = tl.where(largest == float("-inf"), 0.0, largest)
        shift = tl.where(previous == float("-inf"), 0.0, previous - base)
        decay = tl.where(previous == float("-inf"), 0.0, tl.exp(shift))
        e = tl.where(v + o_v == i_target, 0.0, tl.exp(z - base))
        b_moment = decay * (b_moment + shift * b_rest) + tl.where(e > 0, e * (z - base), 0.0)
        b_rest = decay * b_rest + e
    return largest, tl.sum(b_rest, 0), tl.sum(b_moment, 0)


@triton.jit
def target_logit(p_row, i_target, V, scale, softcap, inv_temperature):
    # An id outside the vocabulary must show, as a NaN, and must not read outside the row.
    in_row = (i_target >= 0) & (i_target < V)
    z = tl.load(p_row + i_target, mask=in_row, other=float("nan")).to(tl.float32) * scale
    if softcap is not None:
        z, _ = _softcap(z, softcap)  # pyright: ignore[reportGeneralTypeIssues]
    return z * inv_temperature


@triton.jit
def log_prob(largest, rest, moment, z_target):
    """Log-prob, entropy, and log of the sum of exp(z - base), from sums without the target.

    Kept apart, `rest` gives the log-prob of a confident token to full precision, and with it
    1 - p(target) = -expm1(logp), where `1 - p` would have rounded to 0.
    """
    base = tl.where(largest == float("-inf"), 0.0, largest)
    e_target = tl.exp(z_target - base)
    total = rest + e_target
    moment += tl.where(e_target > 0, e_target * (z_target - base), 0.0)
    log_sum = tl.where(z_target == base, _log1p(rest), tl.log(total))
    return z_target - base - log_sum, log_sum - moment / total, base, log_sum


@triton.jit
def write_zeros(p_drow, V, BLOCK_V: tl.constexpr):
    o_v = tl.arange(0, BLOCK_V)
    zeros = tl.zeros((BLOCK_V,), p_drow.dtype.element_ty)
    for v in range(0, V, BLOCK_V):
        tl.store(p_drow + v + o_v, zeros, mask=v + o_v < V)


@triton.jit
def write_dlogits(
    p_row,
    p_drow,
    i_target,
    V,
    scale,
    softcap,
    inv_temperature,
    logp,
    entropy,
    base,
    log_sum,
    dlogp,
    dentropy,
    BLOCK_V: tl.constexpr,
):
    """Write dlogp * (1[target] - p) - dentropy * p * (log p + entropy), times d z / d logit."""
    # A row that contributes nothing is not read again (a NaN is not equal to 0).
    nothing = dlogp == 0
    if dentropy is not None:
        nothing = nothing & (dentropy == 0)
    if nothing:
        write_zeros(p_drow, V, BLOCK_V)
        return
    o_v = tl.arange(0, BLOCK_V)
    d_target = -dlogp * expm1(logp)
    for v in range(0, V, BLOCK_V):
        m_v = v + o_v < V
        x = tl.load(p_row + v + o_v, mask=m_v, other=float("-inf")).to(tl.float32) * scale
        slope = scale * inv_temperature
        if softcap is not None:
            x, dcap = _softcap(x, softcap)
            slope = slope * dcap
        log_p = x * inv_temperature - base - log_sum
        p = tl.exp(log_p)
        d = tl.where(v + o_v == i_target, d_target, -dlogp * p)
        if dentropy is not None:
            d -= dentropy * tl.where(p > 0, p * (log_p + entropy), 0.0)
        tl.store(p_drow + v + o_v, (d * slope).to(p_drow.dtype.element_ty), mask=m_v)
