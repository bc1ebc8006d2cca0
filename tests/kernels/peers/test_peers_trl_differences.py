"""Where TRL means something else: with the difference applied by hand, the numbers are the same."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from peers_trl import (
    TYPES,
    arguments_of,
    assert_agree,
    assert_close,
    assert_same_gradients,
    config_of,
    make_inputs,
    make_trainer,
    ours,
    theirs,
    trl,
)
from torch import Tensor

from fastgrpo_kernels import GRPOLossConfig, off_policy_mask, policy_loss

pytestmark = pytest.mark.peers

PER_SEQUENCE = ("grpo", "sapo", "dr_grpo", "luspo")


def test_defaults_are_those_of_trl_but_for_the_bias_correction_and_the_width_of_gmpo() -> None:
    trainer, mine = make_trainer("dapo", sapo_temperature_neg=1.05), GRPOLossConfig()
    its = trainer.args
    fields = {f.name: f.default for f in trl.GRPOConfig.__dataclass_fields__.values()}
    assert fields["loss_type"] == mine.loss_type == "dapo"
    assert config_of(trainer, use_bias_correction_kl=False, max_completion_length=None) == mine
    assert its.use_bias_correction_kl is True and mine.use_bias_correction_kl is False
    assert its.temperature == mine.temperature == 1.0
    assert make_trainer("gmpo").epsilon_high == mine.gmpo_clip == 0.4


def test_vespo_of_trl_sums_the_sampler_correction_of_masked_tokens_too() -> None:
    trainer = make_trainer("vespo", use_vllm=True)
    inputs = make_inputs(empty=False)
    ratio = torch.rand(inputs.mask.shape, generator=torch.Generator().manual_seed(1)).double() + 0.5
    inputs = replace(inputs, ratio=ratio)
    its = theirs(trainer, inputs)
    over_all_tokens = replace(inputs, ratio=ratio.log().sum(1, keepdim=True).exp())
    assert_agree(ours(trainer, over_all_tokens), its)
    counted = torch.where(inputs.mask.bool(), ratio, 1)
    assert_agree(ours(trainer, inputs), theirs(trainer, replace(inputs, ratio=counted)))
    assert (ours(trainer, inputs).loss - its.loss).abs() > 1e-3


def test_only_trl_takes_a_delta_inside_the_clip_range_where_it_hides_the_upper_clips() -> None:
    inside, outside = make_trainer("dapo", delta=1.1), make_trainer("dapo", delta=1.3)
    inputs = make_inputs()
    assert theirs(inside, inputs).metrics["clip_ratio/high_mean"] == 0
    its = theirs(outside, inputs).metrics
    assert its["clip_ratio/high_mean"] > 0.1
    assert its == theirs(make_trainer("dapo"), inputs).metrics  # though delta caps ratios
    with pytest.raises(ValueError, match=r"delta must be .* above 1 \+ epsilon_high = 1.2"):
        config_of(inside)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "bnpo"])
def test_policy_loss_of_trl_is_the_loss_and_ours_the_mean_over_tokens_of_the_policy_term(
    loss_type: str,
) -> None:
    trainer = make_trainer(loss_type, beta=0.3, entropy_coef=0.2, accumulation=2)
    inputs = make_inputs()
    mine, its = ours(trainer, inputs), theirs(trainer, inputs)
    # Theirs: the whole loss without the bonus; not yet divided by the accumulation, save for dapo.
    whole = ours(trainer, inputs, entropy_coef=0.0).loss * (1 if loss_type == "dapo" else 2)
    assert_close(its.metrics["policy_loss"], whole)
    policy_term = policy_loss(
        inputs.logps,
        inputs.advantages,
        config=GRPOLossConfig(loss_type="bnpo"),
        completion_mask=inputs.mask,
        old_logps=inputs.old,
    )
    assert_close(mine.metrics["policy_loss"], policy_term.loss)
    assert mine.metrics["policy_loss"] != pytest.approx(its.metrics["policy_loss"], abs=1e-3)


def test_bnpo_of_trl_divides_by_the_accumulation_steps_and_ours_leaves_that_to_the_caller() -> None:
    trainer, inputs = make_trainer("bnpo", accumulation=4), make_inputs()
    out = policy_loss(
        inputs.logps, inputs.advantages, config=config_of(trainer), **arguments_of(trainer, inputs)
    )
    assert_close(out.loss / 4, theirs(trainer, inputs).loss)


@pytest.mark.parametrize("loss_type", [t for t in TYPES if t != "bnpo"])
def test_micro_batches_of_trl_add_up_to_one_call_of_ours(loss_type: str) -> None:
    trainer, inputs = make_trainer(loss_type, accumulation=3), make_inputs()
    inputs = replace(inputs, num_items=int(inputs.mask.sum()))
    parts = [theirs(trainer, inputs.rows(i, i + 2)) for i in (0, 2, 4)]
    whole = make_trainer(loss_type)
    mine = ours(whole, inputs)
    assert_close(mine.loss, sum(part.loss for part in parts))
    assert_close(mine.dlogps, torch.cat([part.dlogps for part in parts]))


@pytest.mark.parametrize(("loss_type", "level"), [("grpo", "token"), ("cispo", "token")])
def test_advantages_of_tokens_agree_at_token_level(loss_type: str, level: str) -> None:
    trainer = make_trainer(loss_type, level=level, beta=0.2)
    inputs = make_inputs(per_token=True)
    assert_agree(ours(trainer, inputs), theirs(trainer, inputs))


@pytest.mark.parametrize(
    ("loss_type", "level", "names"),
    [
        ("grpo", "sequence", ("clip_ratio/low_mean", "clip_ratio/high_mean")),
        ("cispo", "sequence", ("cispo_clip_ratio",)),
        ("vespo", "token", ("vespo/phi_seq_mean",)),
    ],
)
def test_advantages_of_tokens_make_trl_count_tokens_and_ours_sequences(
    loss_type: str, level: str, names: tuple[str, ...]
) -> None:
    trainer = make_trainer(loss_type, level=level, beta=0.2)
    inputs = make_inputs(per_token=True, empty=False)
    mine, its = ours(trainer, inputs), theirs(trainer, inputs)
    assert_same_gradients(mine, its)
    # Sequence by sequence, where the two kinds of mean are one.
    singles = [ours(trainer, inputs.rows(i, i + 1)) for i in range(6)]
    lengths = inputs.mask.sum(1).double()
    for name in names:
        values = torch.tensor([single.metrics[name] for single in singles], dtype=torch.float64)
        assert_close(mine.metrics[name], values.mean(), name, 1e-6)
        assert_close(its.metrics[name], (values * lengths).sum() / lengths.sum(), name, 1e-6)
        assert mine.metrics[name] != pytest.approx(its.metrics[name], abs=1e-4)


def test_only_trl_masks_off_policy_tokens_one_by_one() -> None:
    inputs = make_inputs(per_token=True)
    assert inputs.old is not None
    its = trl.GRPOTrainer.get_off_policy_mask(
        inputs.advantages, inputs.logps, inputs.old, inputs.mask, 0.1
    )
    assert its.shape == inputs.mask.shape and 0 < its.sum() < its.numel()
    with pytest.raises(ValueError, match="advantages must be one per sequence"):
        off_policy_mask(inputs.logps, inputs.old, inputs.advantages, threshold=0.1)


def test_trl_takes_completions_of_one_token_for_values_of_sequences_in_its_metrics() -> None:
    trainer, inputs = make_trainer("dapo", beta=0.3), make_inputs(length=1)
    mine, its = ours(trainer, inputs), theirs(trainer, inputs)
    assert_same_gradients(mine, its)
    everything = ours(trainer, replace(inputs, mask=torch.ones_like(inputs.mask)))
    for name in ("entropy", "kl", "clip_ratio/low_mean", "clip_ratio/high_mean"):
        assert_close(its.metrics[name], everything.metrics[name], name, 1e-6)  # masked ones too
    assert mine.metrics["entropy"] != pytest.approx(its.metrics["entropy"], abs=1e-3)


def test_a_call_without_a_counted_token_has_extremes_of_nan_in_trl_and_of_0_here() -> None:
    trainer, inputs = make_trainer("grpo"), make_inputs()
    inputs = replace(inputs, mask=torch.zeros_like(inputs.mask))
    mine, its = ours(trainer, inputs), theirs(trainer, inputs)
    assert_same_gradients(mine, its)
    extremes = ("clip_ratio/low_min", "clip_ratio/high_max")
    for name, value in its.metrics.items():
        assert mine.metrics[name] == 0
        assert value != value if name in extremes else value == 0


@pytest.mark.parametrize("loss_type", TYPES)
def test_what_stands_behind_the_mask_reaches_the_loss_of_trl_only(loss_type: str) -> None:
    trainer, inputs = make_trainer(loss_type, beta=0.3), make_inputs()
    masked = inputs.mask == 0
    assert inputs.old is not None
    dirty = replace(
        inputs,
        logps=inputs.logps.masked_fill(masked, torch.nan),
        old=inputs.old.masked_fill(masked, -torch.inf),
    )
    assert theirs(trainer, dirty).loss.isnan()
    mine, its = ours(trainer, dirty), theirs(trainer, inputs)
    assert_close(mine.loss, its.loss)
    assert_close(mine.dlogps, its.dlogps)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("far", ["old", "ref"])
def test_exponents_beyond_60_stop_growing_here_only(far: str, level: str) -> None:
    trainer = make_trainer(
        "grpo", level=level, beta=0.3 * (far == "ref"), use_bias_correction_kl=False
    )
    inputs = make_inputs()
    inputs = replace(inputs, advantages=-inputs.advantages.abs(), old=inputs.logps)
    sign = -1 if far == "old" else 1
    at_100 = replace(inputs, **{far: inputs.logps + sign * 100})
    at_60 = replace(inputs, **{far: inputs.logps + sign * 60})
    mine, its, by_hand = ours(trainer, at_100), theirs(trainer, at_100), theirs(trainer, at_60)
    assert its.loss > 1e40
    assert_close(mine.loss / by_hand.loss, 1.0)
    size = by_hand.dlogps.abs().max()
    assert_close(mine.dlogps / size, by_hand.dlogps / size)


def test_k3_of_trl_drowns_in_rounding_where_the_policies_are_close() -> None:
    trainer = make_trainer("bnpo", beta=0.3, use_bias_correction_kl=False)
    inputs = make_inputs()
    inputs = replace(inputs, old=None, ref=inputs.logps + 1e-4)
    in_fp32 = {
        n: x.float() for n, x in vars(inputs).items() if isinstance(x, Tensor) and n != "mask"
    }
    single = replace(inputs, **in_fp32)
    x = (single.ref - single.logps).double()  # exact: the log-probs of fp32 are neighbours
    exact = ((x.expm1() - x) * inputs.mask).sum() / inputs.mask.sum()
    mine, its = ours(trainer, single).metrics["kl"], theirs(trainer, single).metrics["kl"]
    assert abs(mine / exact - 1) < 1e-3
    assert abs(its / exact - 1) > 0.5
