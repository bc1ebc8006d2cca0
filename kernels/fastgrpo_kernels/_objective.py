"""One token's loss and its derivatives, in Triton: a small function per loss family.

Each is the twin of the function of the same name in `policy.py`. It is given the log-ratio of the
token, or of its sequence, and returns the loss, its derivative with respect to that log-ratio, its
derivative with respect to the token's log-prob beyond that, and what the family reports.
Comparisons are written so that a NaN stays a NaN: `tl.minimum` and `tl.maximum` would drop it.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from . import config as _config

MAX_EXPONENT = tl.constexpr(_config.MAX_EXPONENT)
LOG_MIN = tl.constexpr(_config.LOG_MIN)
LOG_MAX = tl.constexpr(_config.LOG_MAX)


class Parameters(NamedTuple):
    """What a family's function is given at run time: another value compiles nothing anew."""

    low: float = 0.0
    high: float = 0.0
    delta: float = 0.0
    positive: float = 0.0  # for tokens with a positive advantage
    negative: float = 0.0
    k_positive: float = 0.0
    k_negative: float = 0.0


@triton.jit
def _at_most(x, bound):
    return tl.where(x > bound, bound, x)


@triton.jit
def _at_least(x, bound):
    return tl.where(x < bound, bound, x)


@triton.jit
def bounded_exp(x):
    """exp, which stops growing before it overflows, in its derivative as well."""
    return tl.exp(_at_most(x, MAX_EXPONENT))


@triton.jit
def _clipped(value, low, high, advantage):
    """-1 where the lower bound holds a token back, +1 where the upper one does, else 0."""
    below = (value < low) & (advantage < 0)
    above = (value > high) & (advantage > 0)
    return tl.where(above, 1.0, tl.where(below, -1.0, 0.0))


@triton.jit
def clip_objective(log_ratio, token_log_ratio, logp, advantage, p):
    """-min(min(r, delta) A, clip(r, low, high) A): constant where the clipped side is smaller."""
    ratio = bounded_exp(log_ratio)
    unclipped = _at_most(ratio, p.delta) * advantage
    clipped = _at_least(_at_most(ratio, p.high), p.low) * advantage
    constant = (unclipped > clipped) | (ratio > p.delta)
    loss = -tl.where(unclipped > clipped, clipped, unclipped)
    derivative = tl.where(constant, 0.0, -ratio * advantage)
    return loss, derivative, 0.0, _clipped(ratio, p.low, p.high, advantage)


@triton.jit
def cispo_objective(log_ratio, token_log_ratio, logp, advantage, p):
    """-(bounded r) A lp, the ratio a constant."""
    ratio = bounded_exp(log_ratio)
    slope = -_at_least(_at_most(ratio, p.high), p.low) * advantage
    return slope * logp, 0.0, slope, _clipped(ratio, p.low, p.high, advantage)


@triton.jit
def sapo_objective(log_ratio, token_log_ratio, logp, advantage, p):
    """-A sigmoid(tau (r - 1)) 4 / tau; the sigmoid's derivative is s (1 - s)."""
    ratio = bounded_exp(log_ratio)
    tau = tl.where(advantage > 0, p.positive, p.negative)
    e = tl.exp(-tau * tl.abs(ratio - 1.0))
    gate = tl.where(ratio >= 1.0, 1.0, e) / (1.0 + e)
    derivative = -advantage * 4.0 * ratio * (e / ((1.0 + e) * (1.0 + e)))
    loss = -advantage * gate * 4.0 / tau
    return loss, derivative, 0.0, 0.0


@triton.jit
def vespo_objective(log_ratio, token_log_ratio, logp, advantage, p):
    """-phi A lp, phi = exp(k log w - lambda (w - 1)) a constant, w bounded."""
    log_w = _at_least(_at_most(log_ratio, LOG_MAX), LOG_MIN)
    k = tl.where(advantage >= 0, p.k_positive, p.k_negative)
    rate = tl.where(advantage >= 0, p.positive, p.negative)
    phi = tl.exp(k * log_w - rate * expm1(log_w))
    slope = -phi * advantage
    return slope * logp, 0.0, slope, phi


@triton.jit
def gmpo_objective(log_ratio, token_log_ratio, logp, advantage, p):
    """-exp(mean of the clipped log-ratios) A; reports which tokens were clipped."""
    loss = -bounded_exp(log_ratio) * advantage
    return loss, loss, 0.0, _clipped(token_log_ratio, p.low, p.high, advantage)


@triton.jit
def gspo_term(log_ratio, advantage, p):
    """What a token adds to the log-ratio of its sequence, and the derivative; reports nothing."""
    return log_ratio, 1.0


@triton.jit
def vespo_term(log_ratio, advantage, p):
    """The log-ratio within bounds, a constant."""
    return _at_least(_at_most(log_ratio, LOG_MAX), -LOG_MAX), 0.0


@triton.jit
def gmpo_term(log_ratio, advantage, p):
    """The log-ratio, clipped on the side that would raise the objective."""
    held = tl.where(advantage > 0, log_ratio > p.high, log_ratio < p.low)
    bound = tl.where(advantage > 0, p.high, p.low)
    return tl.where(held, bound, log_ratio), tl.where(held, 0.0, 1.0)


@triton.jit
def kl_k1(ref_logp, logp):
    """-x and its derivative with respect to logp, with x = ref_logp - logp."""
    return logp - ref_logp, 1.0


@triton.jit
def kl_k2(ref_logp, logp):
    """x^2 / 2 and its derivative -x."""
    x = ref_logp - logp
    return 0.5 * x * x, -x


@triton.jit
def kl_k3(ref_logp, logp):
    """exp(x) - x - 1 and its derivative 1 - exp(x).

    Near 0 the difference is summed as a series: the terms of exp(x) - x - 1 cancel there.
    """
    x = ref_logp - logp
    direct = bounded_exp(x) - 1.0 - x
    kl = tl.where(tl.abs(x) < 0.5, _exp_minus_line(x), direct)
    return kl, -(kl + x)


@triton.jit
def _exp_minus_line(x):
    """exp(x) - 1 - x for |x| < 0.5, by its series."""
    tail = 1.0 + x / 7 * (1.0 + x / 8 * (1.0 + x / 9))
    return 0.5 * x * x * (1.0 + x / 3 * (1.0 + x / 4 * (1.0 + x / 5 * (1.0 + x / 6 * tail))))


@triton.jit
def expm1(x):
    """exp(x) - 1, right to rounding near 0 too."""
    return tl.where(tl.abs(x) < 0.5, x + _exp_minus_line(x), tl.exp(x) - 1.0)


@triton.jit
def token_loss(
    log_ratio,  # of the token, or of its sequence
    token_log_ratio,
    logp,
    entropy,
    i_token,
    m_token,  # tokens that are there
    advantages_ptr,  # (N,) from here on
    ref_logps_ptr,
    policy_weight_ptr,
    row_weight_ptr,
    entropy_weight_ptr,
    loss_ptr,
    policy_ptr,
    kl_ptr,
    report_ptr,
    beta,
    p,
    OBJECTIVE: tl.constexpr,
    KL: tl.constexpr,
    BIAS_CORRECTION: tl.constexpr,  # None, or whose ratio multiplies the KL: "token", "sequence"
):
    """Store what a token contributes; return the derivatives of its loss.

    With respect to `log_ratio`, and to `logp` beyond that.
    """
    advantage = tl.load(advantages_ptr + i_token, mask=m_token, other=0.0)
    policy, dratio, dlogp, report = OBJECTIVE(log_ratio, token_log_ratio, logp, advantage, p)
    if policy_weight_ptr is not None:
        policy_weight = tl.load(policy_weight_ptr + i_token, mask=m_token, other=0.0)
        policy *= policy_weight
        dratio *= policy_weight
        dlogp *= policy_weight
    loss = policy
    if ref_logps_ptr is not None:
        kl, dkl = KL(tl.load(ref_logps_ptr + i_token, mask=m_token, other=0.0), logp)
        if BIAS_CORRECTION == "token":
            ratio = bounded_exp(token_log_ratio)
            kl *= ratio
            dkl = dkl * ratio + kl
        elif BIAS_CORRECTION == "sequence":
            ratio = bounded_exp(log_ratio)
            kl *= ratio
            dkl *= ratio
            dratio += beta * kl
        loss += beta * kl
        dlogp += beta * dkl
        tl.store(kl_ptr + i_token, kl, mask=m_token)
    if row_weight_ptr is not None:
        row_weight = tl.load(row_weight_ptr + i_token, mask=m_token, other=0.0)
        loss *= row_weight
        dratio *= row_weight
        dlogp *= row_weight
    if entropy_weight_ptr is not None:
        loss -= tl.load(entropy_weight_ptr + i_token, mask=m_token, other=0.0) * entropy
    tl.store(loss_ptr + i_token, loss, mask=m_token)
    tl.store(policy_ptr + i_token, policy, mask=m_token)
    tl.store(report_ptr + i_token, report, mask=m_token)
    return dratio, dlogp


OBJECTIVES = {
    "grpo": clip_objective,
    "bnpo": clip_objective,
    "dr_grpo": clip_objective,
    "dapo": clip_objective,
    "luspo": clip_objective,
    "cispo": cispo_objective,
    "sapo": sapo_objective,
    "vespo": vespo_objective,
    "gmpo": gmpo_objective,
}
SEQUENCE_TERMS = {"vespo": vespo_term, "gmpo": gmpo_term}  # the others: gspo_term
KL = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}


def parameters(config: _config.GRPOLossConfig) -> Parameters:
    """Return what the family of `config.loss_type` computes with."""
    low, high = 1 - float(config.epsilon_low), 1 + float(config.epsilon_high)
    if config.loss_type == "sapo":
        return Parameters(
            positive=float(config.sapo_temperature_pos), negative=float(config.sapo_temperature_neg)
        )
    if config.loss_type == "vespo":
        return Parameters(
            positive=float(config.vespo_lambda_pos),
            negative=float(config.vespo_lambda_neg),
            k_positive=float(config.vespo_k_pos),
            k_negative=float(config.vespo_k_neg),
        )
    if config.loss_type == "gmpo":
        return Parameters(low=-float(config.gmpo_clip), high=float(config.gmpo_clip))
    if config.loss_type == "cispo" and config.cispo_bounds == "trl":
        return Parameters(low=0.0, high=float(config.epsilon_high))
    delta = float("inf") if config.delta is None else float(config.delta)
    return Parameters(low=low, high=high, delta=delta)
