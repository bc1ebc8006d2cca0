"""What the losses for verl compute, without verl: a transcription of its formulas, token by token.

B sequences, T positions.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import math
import sys
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from policy_cases import MODES, Batch, make_batch, make_far_batch
from torch import Tensor

from fastgrpo.integrations.verl import LOSSES

CASES = [
    *((name, mode) for name in ("fastgrpo", "fastgrpo_gspo", "fastgrpo_cispo") for mode in MODES),
    ("fastgrpo_sapo", "seq-mean-token-mean"),
]


@dataclass
class Actor:
    """The fields of verl's ActorConfig that its policy losses read."""

    clip_ratio: float = 0.2
    clip_ratio_low: float | None = 0.3
    clip_ratio_high: float | None = 0.4
    clip_ratio_c: float = 2.0
    tau_pos: float = 1.0
    tau_neg: float = 1.3
    global_batch_info: dict[str, Any] = field(default_factory=dict)


def of_token(name: str, log_ratio: Tensor, logp: Tensor, advantage: float, actor: Actor) -> Tensor:
    ratio = log_ratio.exp()
    low, high = 1 - actor.clip_ratio_low, 1 + actor.clip_ratio_high
    if name == "fastgrpo_cispo":
        return -ratio.clamp(low, high).detach() * advantage * logp
    if name == "fastgrpo_sapo":
        tau = actor.tau_pos if advantage > 0 else actor.tau_neg
        return -advantage * torch.sigmoid(tau * (ratio - 1)) * 4 / tau
    loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(low, high))
    if name == "fastgrpo" and advantage < 0:
        loss = loss.clamp(max=-advantage * actor.clip_ratio_c)
    return loss


def transcription(
    name: str, mode: str, batch: Batch, actor: Actor
) -> tuple[Tensor, dict[str, float]]:
    """Return loss and metrics of a whole optimisation step."""
    low, high = 1 - actor.clip_ratio_low, 1 + actor.clip_ratio_high
    sequences, clipped, capped, kl = [], [], [], []
    for i, counts in enumerate(batch.mask):
        tokens = counts.nonzero()[:, 0].tolist()
        log_ratios = batch.logps[i] - batch.old[i]
        losses = []
        for t in tokens:
            advantage, logp = batch.advantages[i, t].item(), batch.logps[i, t]
            if name == "fastgrpo_gspo":
                kl.append(-log_ratios[t].item())
                log_ratio = log_ratios[tokens].mean().detach() + (logp - logp.detach())
                log_ratio = log_ratio.clamp(max=10)
            else:
                log_ratio = log_ratios[t].clamp(-20, 20)
                kl.append(-log_ratio.item())
            losses.append(
                of_token(name, log_ratio, logp, advantage, actor) * batch.weights[i, t].item()
            )
            ratio = log_ratio.exp().item()
            held = (ratio > high and advantage > 0) or (ratio < low and advantage < 0)
            if name == "fastgrpo_cispo":
                held = not low <= ratio <= high
            clipped.append(held and name != "fastgrpo_sapo")
            capped.append(name == "fastgrpo" and ratio > actor.clip_ratio_c and advantage < 0)
        if losses:
            sequences.append(torch.stack(losses))
    count = len(kl)
    means = {
        "actor/pg_clipfrac": sum(clipped) / count,
        "actor/ppo_kl": sum(kl) / count,
        "actor/pg_clipfrac_lower": sum(capped) / count,
    }
    tokens = torch.cat(sequences).sum()
    scale = actor.global_batch_info.get("loss_scale_factor") or batch.mask.shape[1]
    loss = {
        "token-mean": tokens / count,
        "token-sum": tokens,
        "seq-mean-token-mean": sum(x.mean() for x in sequences) / len(sequences),
        "seq-mean-token-sum": tokens / len(sequences),
        "seq-mean-token-sum-norm": tokens / len(sequences) / scale,
    }[mode]
    return loss, means


def call(name: str, mode: str, batch: Batch, actor: Any, **options: Any) -> Any:
    options.setdefault("rollout_is_weights", batch.weights)
    return LOSSES[name](
        batch.old, batch.logps, batch.advantages, batch.mask, mode, actor, **options
    )


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_values_gradients_and_metrics(name, mode):
    batch = make_batch()
    expected, means = transcription(name, mode, batch, Actor())
    (gradient,) = torch.autograd.grad(expected, batch.logps)
    # Clip and cap hold somewhere, or the case says nothing of them.
    assert means["actor/pg_clipfrac"] > 0.1 or name == "fastgrpo_sapo"
    assert means["actor/pg_clipfrac_lower"] > 0.05 or name != "fastgrpo"

    dirty = batch.with_garbage()
    loss, metrics = call(name, mode, dirty, Actor())
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(dirty.logps.grad, gradient, rtol=1e-12, atol=1e-15)
    assert metrics == pytest.approx(means, rel=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_far_log_ratios_are_cut_in_value_and_gradient_as_verl_cuts_them(name):
    # Neither cap nor bounds hide what is cut.
    actor, mode = Actor(clip_ratio_low=10, clip_ratio_c=1e12), "seq-mean-token-mean"
    batch = make_far_batch()
    expected, means = transcription(name, mode, batch, actor)
    (gradient,) = torch.autograd.grad(expected, batch.logps)
    loss, metrics = call(name, mode, batch, actor)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(batch.logps.grad, gradient, rtol=1e-12, atol=0)
    assert metrics == pytest.approx(means, rel=1e-12)
    if name == "fastgrpo_gspo":  # exactly 10 is not cut
        assert (gradient != 0).any(-1).tolist() == [True, False, True, True, True]

    names = [
        *("old_log_prob", "log_prob", "advantages", "response_mask"),
        *("loss_agg_mode", "config", "rollout_is_weights"),
    ]
    assert set(LOSSES) == {"fastgrpo", "fastgrpo_gspo", "fastgrpo_cispo", "fastgrpo_sapo"}
    for loss in LOSSES.values():
        assert list(inspect.signature(loss).parameters) == names


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_shares_of_micro_batches_and_ranks_sum_to_the_step(name, mode):
    batch = make_batch()
    actor = Actor(global_batch_info={"loss_scale_factor": 40} if mode.endswith("norm") else {})
    whole, _ = transcription(name, mode, batch, actor)
    (gradient,) = torch.autograd.grad(whole, batch.logps)
    actor.global_batch_info |= {
        "dp_size": 2,
        "batch_num_tokens": int(batch.mask.sum()),
        "global_batch_size": int(batch.mask.any(-1).sum()),
    }
    parts = [batch.rows(pick) for pick in (slice(0, 2), slice(2, 3), slice(3, 5))]
    losses = [call(name, mode, part, actor)[0] for part in parts]
    for loss in losses:
        loss.backward()
    # Data-parallel training averages the gradients of 2 ranks.
    torch.testing.assert_close(sum(losses) / 2, whole, rtol=1e-12, atol=0)
    found = torch.cat([part.logps.grad for part in parts]) / 2
    torch.testing.assert_close(found, gradient, rtol=1e-12, atol=1e-15)


def test_the_first_step_of_an_optimisation_changes_no_ratio():
    batch = make_batch(spread=0.0)
    loss, metrics = call("fastgrpo", "token-mean", batch, Actor(), rollout_is_weights=None)
    loss.backward()
    tokens = batch.mask.sum()
    assert set(metrics.values()) == {0.0}
    expected = torch.where(batch.mask, -batch.advantages / tokens, 0)
    torch.testing.assert_close(batch.logps.grad, expected, rtol=1e-12, atol=0)


def test_the_loss_may_be_changed_in_place_as_verl_does():
    batch = make_batch()
    loss, _ = call("fastgrpo", "token-mean", batch, Actor())
    loss -= 0.5 * torch.where(batch.mask, batch.logps, 0).sum()
    loss.backward()
    plain, _ = transcription("fastgrpo", "token-mean", batch, Actor())
    (gradient,) = torch.autograd.grad(plain, batch.logps)
    torch.testing.assert_close(batch.logps.grad, gradient - 0.5 * batch.mask, rtol=1e-12, atol=0)


def test_nothing_that_counts_is_a_loss_of_0():
    batch = make_batch()
    nothing = LOSSES["fastgrpo"](
        batch.old, batch.logps, batch.advantages, torch.zeros_like(batch.mask), config=Actor()
    )
    nothing[0].backward()
    assert nothing[0].item() == 0 and set(nothing[1].values()) == {0.0}
    assert batch.logps.grad.count_nonzero() == 0


def test_an_old_clip_ratio_and_no_lower_bound_are_read_as_verl_reads_them():
    batch = make_batch()
    loss, _ = call("fastgrpo", "token-mean", batch, Actor(0.25, None, None))
    expected, _ = call("fastgrpo", "token-mean", batch, Actor(0.9, 0.25, 0.25))
    assert loss.item() == expected.item()
    unbounded, metrics = call("fastgrpo_cispo", "token-mean", batch, Actor(clip_ratio_low=10))
    expected, means = transcription("fastgrpo_cispo", "token-mean", batch, Actor(clip_ratio_low=10))
    assert unbounded.item() == pytest.approx(expected.item(), rel=1e-12)
    assert metrics == pytest.approx(means, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "mode", "actor", "words"),
    [
        ("fastgrpo", "token-mean", None, "ActorConfig"),
        ("fastgrpo", "tokens", Actor(), "loss_agg_mode must be one of token-mean"),
        ("fastgrpo_sapo", "tokens", Actor(), "loss_agg_mode must be one of token-mean"),
        (
            "fastgrpo_sapo",
            "token-mean",
            Actor(),
            "'token-mean': set actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean",
        ),
        ("fastgrpo_sapo", "seq-mean-token-mean", Actor(tau_pos=0), "^tau_pos must be above 0"),
        ("fastgrpo_sapo", "seq-mean-token-mean", Actor(tau_neg=-1), "^tau_neg must .* got -1"),
        (
            "fastgrpo",
            "token-mean",
            Actor(clip_ratio_c=1.3),
            r"^clip_ratio_c must be .* above 1 \+ clip_ratio_high = 1.4, got 1.3",
        ),
        ("fastgrpo", "token-mean", Actor(clip_ratio_low=-0.1), "^clip_ratio_low must .* got -0.1"),
        ("fastgrpo_cispo", "token-mean", Actor(clip_ratio_high=-1), "^clip_ratio_high must be"),
        ("fastgrpo_gspo", "token-mean", Actor(-0.1, None), "^clip_ratio must be .* got -0.1"),
        ("fastgrpo", "token-mean", Actor(global_batch_info={"dp_size": 2}), "batch_num_tokens of"),
        (
            "fastgrpo",
            "seq-mean-token-sum",
            Actor(global_batch_info={"dp_size": 2, "batch_num_tokens": 9}),
            "global_batch_size of the whole step",
        ),
        (
            "fastgrpo",
            "token-mean",
            Actor(global_batch_info={"loss_scale_factor": 100}),
            "loss_scale_factor=100 belongs to seq-mean-token-sum-norm",
        ),
        (
            "fastgrpo",
            "seq-mean-token-sum-norm",
            Actor(global_batch_info={"loss_scale_factor": 0}),
            "loss_scale_factor must be above 0, got 0",
        ),
    ],
)
def test_what_is_not_ours_raises_and_is_named(name, mode, actor, words):
    with pytest.raises(ValueError, match=words):
        call(name, mode, make_batch(), actor)


def test_verls_cap_of_negative_advantages_is_our_delta():
    # max(min(r, d), clip(r)) = min(max(r, clip(r)), d) wherever d is above every clipped ratio.
    ratios = torch.linspace(-3, 3, 121, dtype=torch.float64).exp()
    low, high, cap = 0.7, 1.4, 2.0
    for ratio in ratios.tolist():
        clipped = min(max(ratio, low), high)
        assert max(min(ratio, cap), clipped) == min(max(ratio, clipped), cap)
        assert min(min(ratio, cap), clipped) == min(ratio, clipped)
    batch = make_batch(spread=3.0)
    loss, metrics = call("fastgrpo", "token-sum", batch, Actor(clip_ratio_c=math.e))
    expected, means = transcription("fastgrpo", "token-sum", batch, Actor(clip_ratio_c=math.e))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert metrics == pytest.approx(means, rel=1e-12)


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_log_probs_of_16_bits_cost_their_own_rounding_only(name, mode):
    batch = make_batch()
    half = dataclasses.replace(
        batch, old=batch.old.bfloat16(), logps=batch.logps.bfloat16()
    ).with_graph()
    full = dataclasses.replace(half, old=half.old.float(), logps=half.logps.float()).with_graph()
    losses = [call(name, mode, each, Actor())[0] for each in (half, full)]
    assert losses[0].dtype == torch.float32 and losses[0].item() == losses[1].item()


def test_a_folder_of_that_name_is_not_verl(tmp_path, monkeypatch):
    """Import again beside an empty folder `verl`, as one of results may be called."""
    (tmp_path / "verl").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "fastgrpo.integrations.verl")
    again = importlib.import_module("fastgrpo.integrations.verl")
    assert again.LOSSES.keys() == LOSSES.keys() and again.LOSSES is not LOSSES
