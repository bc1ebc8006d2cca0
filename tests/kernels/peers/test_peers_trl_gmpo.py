"""TRL's experimental GMPOTrainer: what agrees, and what it leaves out that ours does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from peers_trl import (
    assert_agree,
    assert_close,
    assert_same_gradients,
    make_inputs,
    make_trainer,
    ours,
    theirs,
)

pytestmark = pytest.mark.peers


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"epsilon": 0.1},
        {"beta": 0.3},
        {"top_entropy_quantile": 0.5},
        {"accumulation": 3},
        {"accumulation": 3, "training": False},
        {"beta": 0.3, "top_entropy_quantile": 0.5, "accumulation": 2, "epsilon": 0.2},
    ],
    ids=str,
)
@pytest.mark.parametrize("on_policy", [False, True])
@pytest.mark.parametrize("tools", [False, True])
def test_loss_gradients_and_metrics_are_those_of_trl(
    options: dict[str, Any], on_policy: bool, tools: bool
) -> None:
    trainer, inputs = make_trainer("gmpo", **options), make_inputs(empty=False)
    if on_policy:
        inputs = replace(inputs, old=None)
    if tools:
        tool_mask = torch.ones_like(inputs.mask)
        tool_mask[:, 2:4] = 0
        inputs = replace(inputs, tool_mask=tool_mask)
    assert_agree(ours(trainer, inputs), theirs(trainer, inputs))


def test_a_sequence_whose_tokens_all_have_low_entropy_keeps_a_ratio_of_1() -> None:
    trainer, inputs = make_trainer("gmpo", top_entropy_quantile=0.5), make_inputs(empty=False)
    entropy = inputs.entropy.clone()
    entropy[1] = 0.0
    inputs = replace(inputs, entropy=entropy)
    assert_agree(ours(trainer, inputs), theirs(trainer, inputs))


def test_in_trl_a_sequence_without_a_counted_token_adds_its_advantage_to_the_loss() -> None:
    trainer, inputs = make_trainer("gmpo", beta=0.3), make_inputs()
    mine, its = ours(trainer, inputs), theirs(trainer, inputs)
    by_hand = mine.loss - inputs.advantages[-1] / len(inputs.mask)
    assert_agree(replace(mine, loss=by_hand), its)


def test_trl_ignores_ratio_and_off_policy_mask_and_ours_multiplies_by_them() -> None:
    trainer = make_trainer("gmpo", use_vllm=True, off_policy_mask_threshold=0.1)
    plain, inputs = make_trainer("gmpo"), make_inputs(empty=False)
    ratio = torch.tensor([[0.5], [2.0], [1.0], [0.0], [1.5], [0.7]], dtype=torch.float64)
    inputs = replace(inputs, ratio=ratio)
    its = theirs(trainer, inputs)
    assert_same_gradients(ours(plain, inputs), its)
    mine = ours(trainer, inputs)
    assert (mine.dlogps - its.dlogps).abs().max() > 0.01
    dropped = (mine.dlogps == 0).all(1)
    assert dropped.tolist() == [
        True,
        False,
        False,
        True,
        False,
        False,
    ]  # A < 0 and far off; ratio 0
    assert_close(mine.dlogps, torch.where(dropped[:, None], 0, its.dlogps * ratio))


def test_trl_ignores_bias_correction_and_entropy_bonus() -> None:
    options: dict[str, Any] = {"beta": 0.3, "use_bias_correction_kl": True, "entropy_coef": 0.2}
    trainer, inputs = make_trainer("gmpo", **options), make_inputs(empty=False)
    its = theirs(trainer, inputs)
    assert_agree(ours(trainer, inputs), its)  # translated without the two
    assert_same_gradients(ours(trainer, inputs), theirs(make_trainer("gmpo", beta=0.3), inputs))
    corrected = ours(trainer, inputs, use_bias_correction_kl=True)
    assert (corrected.loss - its.loss).abs() > 1e-3
    bonus = ours(trainer, inputs, entropy_coef=0.2)
    mean_entropy = (inputs.entropy * inputs.mask).sum() / inputs.mask.sum()
    assert_close(bonus.loss, its.loss - 0.2 * mean_entropy)


def test_bounds_that_differ_are_our_one_bound_by_the_sign_of_the_advantage() -> None:
    trainer, inputs = make_trainer("gmpo", epsilon=0.15, epsilon_high=0.5), make_inputs(empty=False)
    its = theirs(trainer, inputs)
    positive = (inputs.advantages > 0)[:, None]
    high, low = (ours(trainer, inputs, gmpo_clip=clip) for clip in (0.5, 0.15))
    assert_close(its.dlogps, torch.where(positive, high.dlogps, low.dlogps))
    assert_close(
        its.metrics["clip_ratio/high_mean"], high.metrics["clip_ratio/high_mean"], "", 1e-7
    )
    assert_close(its.metrics["clip_ratio/low_mean"], low.metrics["clip_ratio/low_mean"], "", 1e-7)
