"""FORMULAS.md written out again, token by token in fp64: what `reference` is held to.

Padded (B, T) only, numbers in lists, autograd for the gradient. B sequences, T positions.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from fastgrpo_kernels import GRPOLossConfig

Grid = list[list[Any]]  # (B, T); 0.0 where masked

FLOOR, CEILING = math.log(1e-8), 20.0


def log_probs(
    logits: Tensor, ids: Tensor, mask: Tensor | None, config: GRPOLossConfig
) -> tuple[Grid, Grid]:
    """Log-prob and entropy of each counted token."""
    B, T = ids.shape
    logps: Grid = [[0.0] * T for _ in range(B)]
    entropies: Grid = [[0.0] * T for _ in range(B)]
    for i in range(B):
        for t in counted(mask, i, T):
            z = logits[i, t] * config.logit_scale
            if config.logit_softcap is not None:
                z = config.logit_softcap * (z / config.logit_softcap).tanh()
            z = z / config.temperature
            p = z.exp() / z.exp().sum()
            logps[i][t] = p[ids[i, t]].log()
            entropies[i][t] = -(p * p.log()).sum()
    return logps, entropies


def transcription(
    logps: Grid,
    entropies: Grid,
    advantages: Tensor,
    *,
    config: GRPOLossConfig,
    completion_mask: Tensor | None = None,
    old_logps: Tensor | None = None,
    ref_logps: Tensor | None = None,
    importance_sampling_ratio: Tensor | None = None,
    policy_weight: Tensor | None = None,
    entropy_mask: Tensor | None = None,
    num_items_in_batch: float | None = None,
    num_sequences_in_batch: float | None = None,
    entropy_denominator: float | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Loss and metrics."""
    B, T = len(logps), len(logps[0])
    name = config.loss_type
    of_sequence = config.importance_sampling_level == "sequence"

    def at(value: Tensor | None, i: int, t: int) -> float:
        if value is None:
            return 1.0
        row = value[i]
        return float(row[t] if row.dim() == 1 and len(row) == T else row.reshape(()))

    sums = dict.fromkeys(("policy_loss", "kl", "entropy"), 0.0)
    bonus, bonus_weight = 0.0, 0.0
    totals: list[Any] = []
    reports: list[list[Any]] = []  # of each counted token: how it was clipped, or its phi
    for i in range(B):
        tokens = counted(completion_mask, i, T)
        d = {
            t: logps[i][t] - (logps[i][t].detach() if old_logps is None else float(old_logps[i, t]))
            for t in tokens
        }
        mean = sum(d.values()) / max(len(tokens), 1)
        total: Any = 0.0
        reports.append([])
        for t in tokens:
            lp, A = logps[i][t], at(advantages, i, t)
            r = exp(mean if of_sequence else d[t])
            report = 0.0
            if name in ("grpo", "bnpo", "dr_grpo", "dapo", "luspo"):
                low, high = 1 - config.epsilon_low, 1 + config.epsilon_high
                capped = r if config.delta is None or r <= config.delta else config.delta
                bounded = low if r < low else high if r > high else r
                objective = capped * A if capped * A <= bounded * A else bounded * A
                policy, report = -objective, side(r, low, high, A)
            elif name == "cispo":
                low, high = 0.0, config.epsilon_high
                if config.cispo_bounds == "verl":
                    low, high = 1 - config.epsilon_low, 1 + config.epsilon_high
                policy = -min(max(r.item(), low), high) * A * lp
                report = side(r, low, high, A)
            elif name == "sapo":
                tau = config.sapo_temperature_pos if A > 0 else config.sapo_temperature_neg
                policy = -A * 4 / tau / (1 + (-tau * (r - 1)).exp())
            elif name == "vespo":
                log_w = sum(min(max(d[s].item(), -20.0), 20.0) for s in tokens)
                ratio = importance_sampling_ratio
                if ratio is not None:
                    per_token = ratio.dim() == 2 and ratio.shape[1] == T
                    terms = [log_ratio(at(ratio, i, s)) for s in (tokens if per_token else [t])]
                    log_w += sum(terms)
                log_w = min(max(log_w, FLOOR), CEILING)
                k, rate = config.vespo_k_neg, config.vespo_lambda_neg
                if A >= 0:
                    k, rate = config.vespo_k_pos, config.vespo_lambda_pos
                report = math.exp(rate + k * log_w - rate * math.exp(log_w))
                policy = -report * A * lp
            else:
                assert name == "gmpo"
                c = config.gmpo_clip
                kept = [s for s in tokens if at(entropy_mask, i, s) != 0]
                signs = {s: at(advantages, i, s) > 0 for s in kept}
                held = [min(d[s], c) if signs[s] else max(d[s], -c) for s in kept]
                policy = -exp(sum(held) / max(len(kept), 1)) * A
                report = side(d[t], -c, c, A)
            policy = policy * at(policy_weight, i, t)
            if name != "gmpo":
                policy = policy * at(entropy_mask, i, t)
            if name != "vespo":
                policy = policy * at(importance_sampling_ratio, i, t)
            sums["policy_loss"] += number(policy)
            sums["entropy"] += number(entropies[i][t])
            reports[-1].append(report)
            total = total + policy
            if config.beta:
                assert ref_logps is not None
                x = float(ref_logps[i, t]) - lp
                kl = {"k1": -x, "k2": x * x / 2, "k3": exp(x) - x - 1}[config.kl_estimator]
                if config.use_bias_correction_kl:
                    kl = kl * (r if of_sequence else exp(d[t]))
                sums["kl"] += kl.item()
                total = total + config.beta * kl
            if config.entropy_coef:
                bonus = bonus + entropies[i][t] * at(entropy_mask, i, t)
                bonus_weight += at(entropy_mask, i, t)
        totals.append(total)
    lengths = [len(x) for x in reports]
    N = max(sum(lengths), 1)
    sequences = sum(n > 0 for n in lengths) if config.skip_empty_sequences else B
    step = sequences if num_sequences_in_batch is None else num_sequences_in_batch
    if name in ("grpo", "sapo", "gmpo"):
        loss = sum(s / max(n, 1) for s, n in zip(totals, lengths, strict=True)) / step
    elif name == "luspo":
        loss = sum(totals) / step
    elif name == "dr_grpo":
        assert config.max_completion_length is not None
        loss = sum(totals) / (step * config.max_completion_length)
    elif name == "bnpo":
        loss = sum(totals) / N
    else:
        loss = sum(totals) / (N if num_items_in_batch is None else num_items_in_batch)
    if config.entropy_coef:
        given = entropy_denominator is not None
        loss = loss - config.entropy_coef * bonus / (entropy_denominator if given else bonus_weight)

    metrics = {k: v / N for k, v in sums.items() if k != "kl" or config.beta}
    metrics |= {"num_tokens": sum(lengths), "num_sequences": sequences}
    if config.entropy_coef:
        metrics["entropy_coef"] = config.entropy_coef
    metrics |= report_metrics(reports, name, of_sequence, config.skip_empty_sequences)
    return loss, metrics


def report_metrics(
    reports: list[list[Any]], name: str, of_sequence: bool, skip_empty: bool
) -> dict[str, float]:
    """Clip fractions of tokens, or of sequences, an empty one among them as not clipped."""
    if name == "sapo":
        return {}
    if name == "vespo":
        phis = [sum(x) / len(x) if x else 1.0 for x in reports if x or not skip_empty]
        return {"vespo/phi_seq_mean": sum(phis) / max(len(phis), 1)}

    def fractions(sign: int) -> list[float]:
        return [sum(s == sign for s in x) / len(x) if x else 0.0 for x in reports]

    def mean(sign: int) -> float:
        if of_sequence:
            return sum(fractions(sign)) / max(sum(bool(x) or not skip_empty for x in reports), 1)
        return sum(s == sign for x in reports for s in x) / max(sum(map(len, reports)), 1)

    low, high = mean(-1), mean(1)
    if name == "cispo":
        return {"cispo_clip_ratio": low + high}
    some = [bool(x) or of_sequence for x in reports]
    lowest = [f for f, x in zip(fractions(-1), some, strict=True) if x]
    return {
        "clip_ratio/low_mean": low,
        "clip_ratio/high_mean": high,
        "clip_ratio/region_mean": low + high,
        "clip_ratio/low_min": min(lowest, default=0.0),
        "clip_ratio/high_max": max(fractions(1), default=0.0),
    }


def counted(mask: Tensor | None, i: int, T: int) -> list[int]:
    return [t for t in range(T) if mask is None or mask[i, t]]


def exp(x: Any) -> Any:
    """exp, from an exponent of 60 on constant in value and derivative."""
    if not isinstance(x, Tensor):
        return math.exp(min(x, 60.0))
    return x.exp() if x <= 60 else math.exp(60) * (1 + x - x.detach())


def number(x: Any) -> float:
    return x.item() if isinstance(x, Tensor) else x


def side(value: Any, low: float, high: float, A: float) -> int:
    return -1 if value < low and A < 0 else 1 if value > high and A > 0 else 0


def log_ratio(ratio: float) -> float:
    return min(max(math.log(ratio) if ratio > 0 else -math.inf, FLOOR), CEILING)
