"""Liger's fused linear GRPO loss and its Triton loss, option by option, and where they differ."""

from __future__ import annotations

from dataclasses import replace
from inspect import signature
from typing import Any

import pytest
import torch
from peers_liger import (
    DEVICE,
    AsIf,
    Case,
    assert_agree,
    assert_close,
    assert_same_gradients,
    clip_metric,
    fused,
    logps_of,
    make_case,
    ours,
    ours_from_logits,
    theirs,
    theirs_in_triton,
    triton_loss,
)

from fastgrpo_kernels import GRPOLossConfig

pytestmark = pytest.mark.peers

TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")
LOSSES = [(t, "token") for t in TYPES if t != "luspo"] + [
    (t, "sequence") for t in TYPES if t not in ("cispo", "sapo", "vespo", "luspo")
]

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "on_policy": {"off_policy": False},
    "no_bias": {"with_bias": False},
    "temperature": {"temperature": 0.7},
    "delta": {"delta": 1.35},
    "kl": {"beta": 0.3},
    "kl_corrected": {"beta": 0.3, "use_bias_correction_kl": True},
    "kl_corrected_delta": {"beta": 0.3, "use_bias_correction_kl": True, "delta": 1.35},
    "kl_on_policy": {"beta": 0.3, "off_policy": False},
    "ratio": {"arguments": "token"},
    "ratio_of_sequence": {"arguments": "sequence", "beta": 0.3},
    "step": {"arguments": "step"},
}


def case_of(loss_type: str, level: str, *, arguments: str | None = None, **options: Any) -> Case:
    if loss_type == "dr_grpo":
        options["max_completion_length"] = 9
    if loss_type in ("cispo", "sapo", "vespo"):
        options.pop("delta", None)  # theirs refuses it or does not read it
    if loss_type == "cispo":
        options["epsilon_high"] = 1.3
    case = make_case(loss_type=loss_type, importance_sampling_level=level, **options)
    if arguments == "step" and loss_type in ("dapo", "cispo", "vespo"):
        case.arguments["num_items_in_batch"] = 50
    if arguments in ("token", "sequence"):
        g = torch.Generator().manual_seed(5)
        counted = case.mask if arguments == "token" else case.mask.amax(1, keepdim=True)
        ratio = 2 * torch.rand(counted.shape, generator=g).to(DEVICE)
        case.arguments["importance_sampling_ratio"] = torch.where(counted.bool(), ratio, 1)
    return case


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize(("loss_type", "level"), LOSSES)
def test_fused_linear_loss_is_that_of_liger(loss_type: str, level: str, option: str) -> None:
    case = case_of(loss_type, level, **OPTIONS[option])
    assert_agree(case, ours(case), theirs(case))


# Its kernels run in the interpreter, slowly: every loss once, dapo with every option.
IN_TRITON = [
    *((*loss, "kl_corrected") for loss in LOSSES),
    *(("dapo", "token", option) for option in OPTIONS if option != "kl_corrected"),
    *(("grpo", "sequence", option) for option in ("plain", "delta", "ratio")),
]


@pytest.mark.parametrize(("loss_type", "level", "option"), IN_TRITON)
def test_loss_of_logits_is_that_of_the_triton_kernels_of_liger(
    loss_type: str, level: str, option: str
) -> None:
    case = case_of(loss_type, level, **OPTIONS[option])
    assert_agree(case, ours_from_logits(case), theirs_in_triton(case))


@pytest.mark.parametrize(("loss_type", "level"), [("dapo", "token"), ("grpo", "sequence")])
def test_our_triton_kernels_agree_with_both(loss_type: str, level: str) -> None:
    case = case_of(loss_type, level, **OPTIONS["kl_corrected_delta"])
    assert_agree(case, ours(case, "triton"), theirs(case))
    assert_agree(case, ours_from_logits(case, "triton"), theirs_in_triton(case))


def test_defaults_of_liger_are_not_ours() -> None:
    mine = GRPOLossConfig()
    its = signature(fused.LigerFusedLinearGRPOLoss).parameters
    assert (its["beta"].default, mine.beta) == (0.04, 0.0)
    same = ("epsilon_low", "epsilon_high", "loss_type", "importance_sampling_level", "delta")
    same += ("temperature", "use_bias_correction_kl", "sapo_temperature_pos", "vespo_k_pos")
    same += ("sapo_temperature_neg", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg")
    for name in same:
        assert its[name].default == getattr(mine, name), name
    its = signature(triton_loss.triton_grpo_loss).parameters
    assert (its["temperature"].default, mine.temperature) == (0.9, 1.0)
    assert (its["eps_high"].default, mine.epsilon_high) == (0.4, 0.2)


@pytest.mark.parametrize("run", [theirs, theirs_in_triton])
def test_the_clip_fraction_of_liger_counts_tokens_and_ours_sequences(run: Any) -> None:
    case = case_of("grpo", "sequence")
    mine, its = (ours if run is theirs else ours_from_logits)(case), run(case)
    clipped = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0, 0.0]).to(DEVICE)  # by the drift of make_case
    assert_close(clip_metric(case, mine), clipped.mean())
    length = case.mask.sum(1)
    assert_close(its.metrics["clip"], (clipped * length).sum() / length.sum())


def test_luspo_agrees_where_every_token_counts_and_of_sequences_in_the_linear_loss() -> None:
    for level, masked in (("token", False), ("sequence", False), ("sequence", True)):
        case = case_of("luspo", level, masked=masked)
        assert_agree(case, ours(case), theirs(case))
    case = case_of("luspo", "sequence", masked=False)
    assert_agree(case, ours_from_logits(case), theirs_in_triton(case))


def test_luspo_of_tokens_in_liger_adds_masked_ones_and_divides_by_the_padded_length() -> None:
    case = case_of("luspo", "token")
    share = case.mask.sum(1) / case.mask.shape[1]
    by_hand = replace(case, mask=torch.ones_like(case.mask), arguments={"policy_weight": share})
    assert_same_gradients(ours(by_hand), theirs(case))
    assert (ours(case).loss - theirs(case).loss).abs() > 0.01


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_luspo_in_the_triton_kernels_of_liger_divides_by_the_padded_length(level: str) -> None:
    """The loss only at token level: its backward there reads `dloss`, (B, 1), as if it were (B, T),

    beyond its end.
    """
    case = case_of("luspo", level)
    share = case.mask.sum(1) / case.mask.shape[1]
    by_hand = replace(case, arguments={"policy_weight": share})
    mine, its = ours_from_logits(by_hand), theirs_in_triton(case, backward=level == "sequence")
    if level == "sequence":
        assert_same_gradients(mine, its)
    assert_close(mine.loss, its.loss)
    assert (ours_from_logits(case).loss - its.loss).abs() > 0.01


@pytest.mark.parametrize("run", [theirs, theirs_in_triton])
def test_vespo_of_liger_sums_the_sampler_correction_of_masked_tokens_too(run: Any) -> None:
    case = case_of("vespo", "token")
    ratio = torch.rand(case.mask.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE) + 0.5
    case.arguments["importance_sampling_ratio"] = ratio
    mine = ours if run is theirs else ours_from_logits
    over_all_tokens = {"importance_sampling_ratio": ratio.log().sum(1, keepdim=True).exp()}
    assert_same_gradients(mine(replace(case, arguments=over_all_tokens)), run(case))
    assert (mine(case).loss - run(case).loss).abs() > 0.01


@pytest.mark.parametrize("loss_type", ["cispo", "sapo", "vespo"])
def test_liger_refuses_ratios_of_sequences_where_ours_refuses_vespo_only(loss_type: str) -> None:
    case = case_of(loss_type, "token")
    for run in (theirs, theirs_in_triton):
        with pytest.raises(ValueError, match="importance"):
            run(AsIf(case, importance_sampling_level="sequence"))
    if loss_type == "vespo":
        with pytest.raises(ValueError, match="is not defined for loss_type='vespo'"):
            case_of(loss_type, "sequence").options()
    else:
        assert ours(case_of(loss_type, "sequence")).loss.isfinite()  # held to TRL's elsewhere


def test_dr_grpo_in_the_triton_kernels_of_liger_takes_the_padded_length_if_none_is_given() -> None:
    case = case_of("dr_grpo", "token")
    padded = replace(case, config={**case.config, "max_completion_length": case.ids.shape[1]})
    its = theirs_in_triton(AsIf(case, max_completion_length=None))
    assert_same_gradients(ours_from_logits(padded), its)
    with pytest.raises(ValueError, match="max_completion_length: set it"):
        GRPOLossConfig(loss_type="dr_grpo")


def test_what_stands_behind_the_mask_reaches_the_linear_loss_of_liger_only() -> None:
    case = case_of("dapo", "token", **OPTIONS["kl"])
    dirty = replace(case, hidden=case.hidden.masked_fill(case.mask[..., None] == 0, torch.nan))
    assert theirs(dirty).loss.isnan()
    assert_same_gradients(ours(dirty), theirs(case))
    assert_same_gradients(ours_from_logits(dirty), theirs_in_triton(dirty))


def test_ratios_beyond_exp_of_60_stop_growing_here_only() -> None:
    case = case_of("grpo", "token", masked=False)
    case.advantages = -case.advantages.abs()
    logps = logps_of(case)
    far, at_60 = replace(case, old=logps - 100), replace(case, old=logps - 60)
    assert theirs(far).loss.isinf()
    mine, its = ours(far), theirs(at_60)
    # exp at 60 magnifies the rounding of its argument 60-fold.
    assert_close(mine.loss, its.loss, "loss", 60 * 1e-6)
    for name, gradient in its.gradients.items():
        assert_close(mine.gradients[name], gradient, name, 60 * 1e-6)
