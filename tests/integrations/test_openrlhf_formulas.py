"""What the loss for OpenRLHF computes, without OpenRLHF: a transcription, token by token.

B sequences, T positions.
"""

from __future__ import annotations

import pytest
import torch
from policy_cases import Batch, make_batch, make_far_batch
from torch import Tensor

from fastgrpo.integrations.openrlhf import PolicyLoss

LOW, HIGH, CAP = 0.7, 1.4, 2.0


def of_token(log_ratio: Tensor, advantage: float) -> tuple[Tensor, bool]:
    """Return the loss of a token, and whether its clip holds."""
    ratio = log_ratio.exp()
    loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(LOW, HIGH))
    if advantage < 0:
        loss = loss.clamp(max=-advantage * CAP)
    value = ratio.item()
    return loss, (advantage > 0 and value > HIGH) or (advantage < 0 and value < LOW)


def mean(values: list) -> float:
    return sum(values) / len(values)


def transcription(batch: Batch, kind: str) -> tuple[Tensor, float, float]:
    """Return the loss (`tokens`, `sequences` or `gspo`), the share clipped and the KL."""
    sequences, clipped, kl = [], [], []
    for i, counts in enumerate(batch.mask):
        tokens = counts.nonzero()[:, 0].tolist()
        if not tokens:
            continue
        log_ratios = batch.logps[i] - batch.old[i]
        kl += (-log_ratios[tokens]).tolist()
        found = [
            of_token(
                log_ratios[tokens].mean() if kind == "gspo" else log_ratios[t],
                batch.advantages[i, t].item(),
            )
            for t in tokens
        ]
        sequences.append([loss for loss, _ in found])
        clipped += [held for _, held in found]
    if kind == "tokens":
        loss = mean([loss for losses in sequences for loss in losses])
    else:
        loss = mean([mean(losses) for losses in sequences])
    return loss, mean(clipped), mean(kl)


def make_loss(kind: str, **options) -> PolicyLoss:
    return PolicyLoss(
        1 - LOW,
        HIGH - 1,
        CAP,
        token_level_loss=kind != "sequences",  # gspo averages over sequences whatever this says
        policy_loss_type="gspo" if kind == "gspo" else "ppo",
        **options,
    )


@pytest.mark.parametrize("kind", ["tokens", "sequences", "gspo"])
def test_values_gradients_and_metrics(kind):
    batch = make_batch()
    expected, clipped, kl = transcription(batch, kind)
    (gradient,) = torch.autograd.grad(expected, batch.logps)
    dirty = batch.with_garbage()
    loss, *metrics = make_loss(kind)(dirty.logps, dirty.old, dirty.advantages, dirty.mask)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(dirty.logps.grad, gradient, rtol=1e-12, atol=1e-15)
    assert clipped > 0.1
    assert [metrics[0].item(), metrics[1].item()] == pytest.approx([clipped, kl], rel=1e-12)
    assert metrics[2:] == [None, None]


@pytest.mark.parametrize("kind", ["tokens", "sequences", "gspo"])
def test_far_log_ratios_of_tokens_are_cut_in_value_and_gradient(kind):
    batch = make_far_batch()
    log_ratios = batch.logps - batch.old
    if kind == "gspo":
        log_ratios = log_ratios.mean(-1, keepdim=True).expand_as(log_ratios)
    else:
        log_ratios = log_ratios.clamp(-20, 20)
    ratios, advantages = log_ratios.exp(), batch.advantages
    losses = torch.maximum(-advantages * ratios, -advantages * ratios.clamp(LOW, HIGH))
    (gradient,) = torch.autograd.grad(losses.mean(), batch.logps)
    module = make_loss(kind)
    module.dual_clip = None  # or it would hide what is cut
    loss, *_ = module(batch.logps, batch.old, batch.advantages, batch.mask)
    loss.backward()
    torch.testing.assert_close(loss, losses.mean(), rtol=1e-12, atol=0)
    torch.testing.assert_close(batch.logps.grad, gradient, rtol=1e-12, atol=0)


def test_attributes_that_are_changed_later_count():
    batch, module = make_batch(), PolicyLoss()
    module.clip_eps_low, module.clip_eps_high, module.dual_clip = 1 - LOW, HIGH - 1, CAP
    module.token_level_loss = False
    found = module(batch.logps, batch.old, batch.advantages, batch.mask)
    expected, clipped, _ = transcription(batch, "sequences")
    torch.testing.assert_close(found[0], expected, rtol=1e-12, atol=0)
    assert found[1].item() == pytest.approx(clipped, rel=1e-12)
    module.dual_clip = 1.1
    with pytest.raises(ValueError, match=r"^dual_clip must be .* got 1\.1"):
        module(batch.logps, batch.old, batch.advantages, batch.mask)


def test_a_lower_bound_beyond_1_is_none():
    batch, results = make_batch(spread=3.0), []
    for low in (1.0, 1.5, 10):
        module = PolicyLoss(low)
        results.append(module(batch.logps, batch.old, batch.advantages, batch.mask)[:2])
    assert results[0] == results[1] == results[2]


def test_without_a_mask_all_tokens_count():
    batch = make_batch()
    everything = torch.ones_like(batch.mask)
    found = make_loss("sequences")(batch.logps, batch.old, batch.advantages)
    expected = make_loss("sequences")(batch.logps, batch.old, batch.advantages, everything)
    assert found[0].item() == expected[0].item() and found[1].item() == expected[1].item()


@pytest.mark.parametrize("gating", ["ratio", "binary_kl", "tv"])
@pytest.mark.parametrize("level", ["token", "seq"])
def test_a_correction_drops_what_is_outside_and_weighs_the_rest(level, gating):
    low, high = {"ratio": (0.96, 1.1), "binary_kl": (0.0, 0.01), "tv": (0.0, 0.05)}[gating]
    batch = make_batch()
    weights, outside = torch.zeros_like(batch.old), []
    for i, counts in enumerate(batch.mask):
        tokens = counts.nonzero()[:, 0].tolist()
        ours, sampled = batch.old[i], batch.sampler[i]
        p, q = sampled.exp(), ours.exp()
        judged = {
            "ratio": ours - sampled,
            "binary_kl": p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log(),
            "tv": (p - q).abs(),
        }[gating]
        if level == "seq" and tokens:
            judged = judged[tokens].mean().expand_as(judged)
        judged = judged.exp() if gating == "ratio" else judged
        kept = [t for t in tokens if low <= judged[t] <= high]
        weights[i, kept] = (ours - sampled)[kept].exp()
        units = tokens if level == "token" else tokens[:1]
        outside += [t not in kept for t in units]
    assert 0 < mean(outside) < 1

    module = make_loss(
        "tokens",
        is_correction_level=level,
        is_correction_gating=gating,
        is_correction_threshold=(low, high),
    )
    dirty = batch.with_garbage()
    loss, _, _, vllm_kl, filtered = module(
        dirty.logps, dirty.old, dirty.advantages, dirty.mask, dirty.sampler
    )
    losses = [
        weights[i, t] * of_token((batch.logps - batch.old)[i, t], batch.advantages[i, t].item())[0]
        for i, t in batch.mask.nonzero().tolist()
    ]
    expected = mean(losses)
    loss.backward()
    (gradient,) = torch.autograd.grad(expected, batch.logps)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(dirty.logps.grad, gradient, rtol=1e-12, atol=1e-15)
    assert vllm_kl.item() == pytest.approx((batch.sampler - batch.old)[batch.mask].mean().item())
    assert filtered.item() == pytest.approx(mean(outside), rel=1e-12)


def test_clip_clamps_the_ratio_to_the_sampler():
    batch = make_batch()
    ratio = (batch.old - batch.sampler).exp()
    module = make_loss(
        "tokens",
        is_correction_level="token",
        is_correction_mode="clip",
        is_correction_threshold=(0.8, 1.3),
    )
    loss, *_, filtered = module(batch.logps, batch.old, batch.advantages, batch.mask, batch.sampler)
    losses, outside = [], []
    for i, t in batch.mask.nonzero().tolist():
        each, _ = of_token((batch.logps - batch.old)[i, t], batch.advantages[i, t].item())
        losses.append(min(max(ratio[i, t].item(), 0.8), 1.3) * each)
        outside.append(not 0.8 <= ratio[i, t] <= 1.3)
    torch.testing.assert_close(loss, mean(losses), rtol=1e-12, atol=0)
    assert filtered.item() == pytest.approx(mean(outside), rel=1e-12)


def test_the_ratio_of_gspo_with_a_correction_is_to_the_sampler():
    batch = make_batch()
    found = make_loss("gspo", is_correction_level="token")(
        batch.logps, batch.old, batch.advantages, batch.mask, batch.sampler
    )
    expected = make_loss("gspo")(batch.logps, batch.sampler, batch.advantages, batch.mask)
    assert found[0].item() == expected[0].item() and found[1].item() == expected[1].item()
    kl = (batch.old - batch.logps)[batch.mask].mean().item()
    assert found[2].item() == pytest.approx(kl, rel=1e-12)
    assert found[3:] == (None, None)


@pytest.mark.parametrize("kind", ["tokens", "sequences"])
def test_denominators_of_the_step_may_be_fractions_and_zero(kind):
    batch = make_batch()
    whole = make_loss(kind)(batch.logps, batch.old, batch.advantages, batch.mask)[0]
    tokens, sequences = batch.mask.sum(), batch.mask.any(-1).sum()
    for scale in (1, 64):
        given = {
            "batch_num_tokens": tokens / scale,
            "global_batch_size": (sequences / scale).item(),
        }
        loss = make_loss(kind)(
            batch.logps, batch.old, batch.advantages, batch.mask, dp_size=3, **given
        )[0]
        torch.testing.assert_close(loss / 3 / scale, whole, rtol=1e-6, atol=0)
    nothing = torch.zeros_like(batch.mask)
    zero = {"batch_num_tokens": torch.tensor(0.0), "global_batch_size": 0.0}
    loss, *metrics = make_loss(kind)(batch.logps, batch.old, batch.advantages, nothing, **zero)
    loss.backward()
    assert loss.item() == 0 and batch.logps.grad.count_nonzero() == 0
    assert [metric.item() for metric in metrics[:2]] == [0, 0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dual_clip": 1.1}, r"^dual_clip must be .* above 1 \+ clip_eps_high = 1.2, got 1.1"),
        ({"clip_eps_low": -0.1}, "^clip_eps_low must be .* 0 or more, got -0.1"),
        ({"clip_eps_high": float("inf")}, "^clip_eps_high must be a finite number"),
        ({"policy_loss_type": "cispo"}, "policy_loss_type must be one of ppo, gspo, got 'cispo'"),
        ({"is_correction_level": "batch"}, "is_correction_level must be one of off, token, seq"),
        (
            {"is_correction_level": "seq", "is_correction_mode": "clip"},
            "is_correction_mode='clip' .* got 'seq' and 'ratio'",
        ),
        (
            {"is_correction_level": "token", "is_correction_gating": "tv"},
            r"is_correction_threshold must start with 0, got \(0.5, 5.0\)",
        ),
    ],
)
def test_options_that_do_not_fit_raise(options, words):
    with pytest.raises(ValueError, match=words):
        PolicyLoss(**options)


def test_a_correction_needs_the_samplers_log_probs():
    batch = make_batch()
    with pytest.raises(ValueError, match="is_correction_level='seq' needs rollout_log_probs"):
        PolicyLoss(is_correction_level="seq")(batch.logps, batch.old, batch.advantages, batch.mask)
