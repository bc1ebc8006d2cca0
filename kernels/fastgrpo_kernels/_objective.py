"""One token's loss and its derivative with respect to its log-prob, in Triton.

Each function is the twin of the function of the same name in `policy.py`. Comparisons are written
so that a NaN stays a NaN: `tl.minimum` and `tl.maximum` would drop it.
"""

import triton
import triton.language as tl

MAX_EXPONENT = tl.constexpr(60.0)


@triton.jit
def clip_objective(log_ratio, advantage, epsilon_low, epsilon_high, delta):
    """Return the loss, its derivative, and -1 / +1 / 0 for clipped below / above / not at all.

    loss = -min(min(r, delta) A, clip(r, 1 - epsilon_low, 1 + epsilon_high) A); its derivative is
    -r A where the unclipped branch is the smaller (or equal) one and r <= delta, else 0.
    """
    low = 1.0 - epsilon_low
    high = 1.0 + epsilon_high
    ratio = tl.exp(tl.where(log_ratio > MAX_EXPONENT, MAX_EXPONENT, log_ratio))
    unclipped = tl.where(ratio > delta, delta, ratio) * advantage
    clipped = tl.where(ratio < low, low, tl.where(ratio > high, high, ratio)) * advantage
    constant = (unclipped > clipped) | (ratio > delta)
    loss = -tl.where(unclipped > clipped, clipped, unclipped)
    dlogp = tl.where(constant, 0.0, -ratio * advantage)
    below = (ratio < low) & (advantage < 0)
    above = (ratio > high) & (advantage > 0)
    return loss, dlogp, above.to(tl.int8) - below.to(tl.int8)


@triton.jit
def kl_k3(ref_logp, logp):
    """Return exp(x) - x - 1 and its derivative 1 - exp(x), with x = ref_logp - logp.

    Near 0 the difference is summed as a series: the terms of exp(x) - x - 1 cancel there.
    """
    x = ref_logp - logp
    tail = 1.0 + x / 7 * (1.0 + x / 8 * (1.0 + x / 9))
    series = 0.5 * x * x * (1.0 + x / 3 * (1.0 + x / 4 * (1.0 + x / 5 * (1.0 + x / 6 * tail))))
    direct = tl.exp(tl.where(x > MAX_EXPONENT, MAX_EXPONENT, x)) - 1.0 - x
    kl = tl.where(tl.abs(x) < 0.5, series, direct)
    return kl, -(kl + x)
