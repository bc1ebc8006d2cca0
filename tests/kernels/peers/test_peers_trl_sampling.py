"""TRL's corrections for off-policy data, and its VESPO weights, against our helpers."""

from __future__ import annotations

import warnings
from inspect import signature
from typing import Any

import pytest
import torch
from peers_trl import assert_close, make_inputs, make_trainer, trl
from torch import Tensor

from fastgrpo_kernels import (
    GRPOLossConfig,
    importance_weights,
    off_policy_mask,
    policy_loss,
    top_entropy_mask,
)

pytestmark = pytest.mark.peers

MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
LENGTHS = (5, 2, 6, 1)


def generated_by_trl(
    mode: str, sampler: Tensor, old: Tensor, tools: bool, **options: Any
) -> dict[str, Any]:
    """Run TRL's `_generate_and_score_completions` with the generation itself replaced."""
    trainer = make_trainer("dapo", use_vllm=True, vllm_importance_sampling_mode=mode, **options)
    ids = [[5] * n for n in LENGTHS]
    reported = [
        [None if x.isnan() else x.item() for x in sampler[i, :n]] for i, n in enumerate(LENGTHS)
    ]
    tool_mask = [[int(t != 1) for t in range(n)] for n in LENGTHS] if tools else None
    prompts = ["1+1"] * len(ids)
    trainer._generate = lambda _: (
        [[3, 4]] * len(ids), ids, tool_mask, prompts, reported, {}, None, None,
    )  # fmt: skip

    def logps(*arguments: Any, **_: Any) -> tuple[Tensor, None, None]:
        padded = old.new_zeros(len(ids), arguments[3])
        padded[:, : old.shape[1]] = old
        return padded, None, None

    trainer._get_per_token_logps_and_entropies = logps
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers
        return trainer._generate_and_score_completions([{"prompt": prompt} for prompt in prompts])


@pytest.mark.parametrize("bounds", [(0.0, 3.0), (0.6, 1.5)])
@pytest.mark.parametrize("tools", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_importance_weights_are_those_of_trl(
    mode: Any, tools: bool, bounds: tuple[float, float]
) -> None:
    g = torch.Generator().manual_seed(5)  # tokens and sequences below, inside and above the bounds
    old = -torch.rand(4, 6, generator=g)
    sampler = old + 0.4 * torch.randn(4, 6, generator=g)
    sampler[0, 2] = torch.nan  # the sampler could not say
    low, high = bounds
    found = generated_by_trl(
        mode,
        sampler,
        old,
        tools,
        vllm_importance_sampling_clip_max=high,
        vllm_importance_sampling_clip_min=low or None,
    )
    its, width = found["importance_sampling_ratio"], found["completion_mask"].shape[1]
    mask = found["completion_mask"] * found.get("tool_mask", 1)
    padding = (0, width - 6)
    mine = importance_weights(
        torch.nn.functional.pad(old, padding),
        found["sampling_per_token_logps"],
        completion_mask=mask,
        mode=mode,
        clip_min=low,
        clip_max=high,
    )
    assert its.shape == mine.shape == ((4, 1) if mode.startswith("sequence") else mask.shape)
    inside = ((its > low) & (its < high)).any()
    assert inside and its.max() <= high and (low == 0 or (its == low * mode.endswith("e")).any())
    assert_close(mine, its, tolerance=2e-7)


def test_our_default_is_truncation_by_token_and_that_of_trl_masking_by_sequence() -> None:
    its, mine = trl.GRPOConfig.__dataclass_fields__, signature(importance_weights).parameters
    assert its["vllm_importance_sampling_mode"].default == "sequence_mask"
    assert mine["mode"].default == "token_truncate"
    assert its["vllm_importance_sampling_clip_max"].default == mine["clip_max"].default == 3.0


@pytest.mark.parametrize("threshold", [-0.2, 0.0, 0.1, 0.5])
def test_off_policy_mask_is_that_of_trl(threshold: float) -> None:
    inputs = make_inputs()
    assert inputs.old is not None
    sampler = inputs.old.clone()
    sampler[0, 0] = torch.nan
    its = trl.GRPOTrainer.get_off_policy_mask(
        inputs.advantages[:, None], inputs.logps, sampler, inputs.mask, threshold
    )
    mine = off_policy_mask(
        inputs.logps, sampler, inputs.advantages, threshold=threshold, completion_mask=inputs.mask
    )
    assert 0 < its.sum() < 6
    assert torch.equal(mine[:, None], its.float())


@pytest.mark.parametrize("quantile", [0.01, 0.2, 0.5, 0.99, 1.0])
def test_top_entropy_mask_is_that_of_trl(quantile: float) -> None:
    trainer, inputs = make_trainer("dapo"), make_inputs()
    its = trainer.get_high_entropy_mask(inputs.entropy, inputs.mask, 1 - quantile)
    mine = top_entropy_mask(inputs.entropy, quantile=quantile, completion_mask=inputs.mask)
    assert torch.equal(mine, its.float())
    assert 0 < its.sum() <= inputs.mask.sum()
    none = torch.zeros_like(inputs.mask)
    assert not trainer.get_high_entropy_mask(inputs.entropy, none, 0.5).any()
    assert not top_entropy_mask(inputs.entropy, quantile=0.5, completion_mask=none).any()


def test_one_entropy_of_nan_empties_the_mask_of_trl_and_leaves_ours_to_the_others() -> None:
    trainer, inputs = make_trainer("dapo"), make_inputs()
    entropy, known = inputs.entropy.clone(), inputs.mask.clone()
    entropy[0, 0], known[0, 0] = torch.nan, 0
    assert not trainer.get_high_entropy_mask(entropy, inputs.mask, 0.5).any()
    mine = top_entropy_mask(entropy, quantile=0.5, completion_mask=inputs.mask)
    its = trainer.get_high_entropy_mask(inputs.entropy, known, 0.5)
    assert torch.equal(mine, its.float())


@pytest.mark.parametrize("shape", [None, "token", "sequence"])
@pytest.mark.parametrize("far", [0.0, 3.0, 30.0, (30.0, -19.0)], ids=str)
def test_vespo_weights_are_the_gamma_weights_of_trl(
    shape: str | None, far: float | tuple[float, float]
) -> None:
    """Also where the sum of the log-ratios, or that of one token alone, is beyond its bounds."""
    inputs = make_inputs(empty=False)
    assert inputs.old is not None
    inputs.mask[:, 1] = 1
    direction = torch.tensor([1, -1, 1, -1, 1, -1], dtype=torch.float64)[:, None]
    if isinstance(far, tuple):
        inputs.old[:, :2] -= direction * torch.tensor(far)
    else:
        inputs.old -= direction * far
    ratio = None
    if shape is not None:
        width = 1 if shape == "sequence" else 7
        ratio = torch.rand(6, width, generator=torch.Generator().manual_seed(3)).double() + 0.5
        ratio[0] = 1e-12
        ratio = ratio if width == 1 else torch.where(inputs.mask.bool(), ratio, 1)
    options = {"k_pos": 1.5, "lambda_pos": 2.5, "k_neg": 3.5, "lambda_neg": 1.25}
    its = trl.GRPOTrainer.get_gamma_weights(
        inputs.advantages[:, None], inputs.logps - inputs.old, inputs.mask, ratio, **options
    )
    logps = inputs.logps.clone().requires_grad_()
    out = policy_loss(
        logps,
        inputs.advantages,
        config=GRPOLossConfig(
            loss_type="vespo",
            vespo_k_pos=options["k_pos"],
            vespo_lambda_pos=options["lambda_pos"],
            vespo_k_neg=options["k_neg"],
            vespo_lambda_neg=options["lambda_neg"],
        ),
        completion_mask=inputs.mask,
        old_logps=inputs.old,
        importance_sampling_ratio=ratio,
        num_items_in_batch=1,
    )
    out.loss.backward()
    assert logps.grad is not None
    mine = (-logps.grad / inputs.advantages[:, None])[:, :1]  # the first token always counts
    assert_close(mine, its)
    assert_close(out.metrics["vespo/phi_seq_mean"], its.mean())


def test_trl_refuses_vespo_with_a_ratio_of_sequences_which_ours_adds_once() -> None:
    with pytest.raises(ValueError, match="VESPO loss requires"):
        make_trainer("vespo", start_vllm=True, vllm_importance_sampling_mode="sequence_mask")
    inputs = make_inputs(empty=False)
    assert inputs.old is not None
    weights = importance_weights(
        inputs.old, inputs.old - 0.1, completion_mask=inputs.mask, mode="sequence_truncate"
    )
    arguments: dict[str, Any] = {"completion_mask": inputs.mask, "old_logps": inputs.old}
    config = GRPOLossConfig(loss_type="vespo")
    once = policy_loss(
        inputs.logps, inputs.advantages, importance_sampling_ratio=weights, config=config,
        **arguments,
    )  # fmt: skip
    # Once for the sequence is the same as a share of it for each of its tokens.
    shares = weights ** (1 / inputs.mask.sum(1, keepdim=True))
    shared = policy_loss(
        inputs.logps, inputs.advantages, importance_sampling_ratio=shares.expand_as(inputs.mask),
        config=config, **arguments,
    )  # fmt: skip
    assert_close(once.loss, shared.loss, tolerance=1e-6)
    without = policy_loss(inputs.logps, inputs.advantages, config=config, **arguments)
    assert (once.loss - without.loss).abs() > 0.01
