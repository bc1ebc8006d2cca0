"""Advantages: the worked numbers of FORMULAS, exact zeros, gaps, invariances."""

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgrpo.advantages import group_advantages

NAN = float("nan")
LEAVE_ONE_OUT = {"baseline": "leave_one_out"}
GDPO = {"multi_objective_aggregation": "normalize_then_sum"}


def column(*rewards: float) -> torch.Tensor:
    return torch.tensor(rewards, dtype=torch.float32)[:, None]


def advantages(rewards: list[float], num_generations: int | None = None, **options) -> list[float]:
    result = group_advantages(
        column(*rewards), [1.0], num_generations or len(rewards), **options
    ).advantages
    assert result.dtype == torch.float32
    return result.tolist()


@pytest.mark.parametrize(
    ("rewards", "options", "expected"),
    [
        ([1, 1, 0, 0], {"std": "population", "advantage_eps": 0.0}, [1, 1, -1, -1]),
        ([1, 1, 0, 0], {"std": "population"}, [0.9998, 0.9998, -0.9998, -0.9998]),
        ([1, 1, 0, 0], {}, [0.5 / (0.57735027 + 1e-4)] * 2 + [-0.5 / (0.57735027 + 1e-4)] * 2),
        ([0.9, 0.7, 0.8, 0.4], {"scale_rewards": "none"}, [0.2, 0.0, 0.1, -0.3]),
        ([0, 0, 0.1, 0], {"scale_rewards": "none"}, [-0.025, -0.025, 0.075, -0.025]),
        ([1, 0, 1, 0], {"scale_rewards": "none"}, [0.5, -0.5, 0.5, -0.5]),
        # Leave one out: 1 - (0 + 0 + 0) / 3 and 0 - (1 + 0 + 0) / 3; their std is 0.5.
        ([1, 0, 0, 0], LEAVE_ONE_OUT | {"scale_rewards": "none"}, [1] + [-1 / 3] * 3),
        ([1, 0, 0, 0], LEAVE_ONE_OUT | {"advantage_eps": 0.0}, [2] + [-2 / 3] * 3),
        ([1, NAN, 0, 0], LEAVE_ONE_OUT | {"scale_rewards": "none"}, [1, 0, -0.5, -0.5]),
        ([5, NAN, NAN, NAN], LEAVE_ONE_OUT | {"scale_rewards": "none"}, [0, 0, 0, 0]),
    ],
)
def test_worked_numbers(rewards, options, expected):
    assert advantages(rewards, **options) == pytest.approx(expected, abs=1e-6)


def test_four_of_eight_correct():
    result = group_advantages(column(1, 1, 1, 1, 0, 0, 0, 0), [1.0], 8)
    assert result.group_std.item() == pytest.approx(0.5345, abs=5e-5)
    assert result.advantages.tolist() == pytest.approx([0.935] * 4 + [-0.935] * 4, abs=5e-4)


def test_the_mean_that_one_seed_prints_wrongly():
    assert group_advantages(column(1, 0, 1, 0), [1.0], 4).group_mean.item() == 0.5


def test_statistics_of_each_group():
    result = group_advantages(column(1, 0, 4, 8), [1.0], 2, std="population", advantage_eps=0.0)
    assert result.rewards.tolist() == [1, 0, 4, 8]
    assert result.group_mean.tolist() == [0.5, 6.0]
    assert result.group_std.tolist() == [0.5, 2.0]
    assert result.zero_std.tolist() == [False, False]
    assert result.advantages.tolist() == [1, -1, -1, 1]


@pytest.mark.parametrize("std", ["sample", "population"])
def test_batch_scale_uses_the_std_of_the_whole_batch(std):
    rewards = [1.0, 0.0, 4.0, 8.0]
    scale = torch.tensor(rewards).std(correction=1 if std == "sample" else 0).item() + 1e-4
    expected = [0.5 / scale, -0.5 / scale, -2 / scale, 2 / scale]
    assert advantages(rewards, 2, scale_rewards="batch", std=std) == pytest.approx(expected)


@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
@pytest.mark.parametrize("scale_rewards", ["group", "batch", "none"])
@pytest.mark.parametrize("advantage_eps", [0.0, 1e-4])
@pytest.mark.parametrize("value", [0.1, 0.7, -1 / 3, 1e6 + 0.1, 0.0])
def test_equal_rewards_give_exactly_zero(baseline, scale_rewards, advantage_eps, value):
    rewards = torch.full((6, 1), value, dtype=torch.float64)
    rewards[3:] = torch.tensor([[1.0], [2.0], [3.0]])
    result = group_advantages(
        rewards,
        [0.3],
        3,
        scale_rewards=scale_rewards,
        advantage_eps=advantage_eps,
        baseline=baseline,
    )
    assert result.advantages[:3].tolist() == [0.0, 0.0, 0.0]
    assert result.group_std[0].item() == 0.0
    assert result.zero_std.tolist() == [True, False]
    assert result.advantages[3].item() < 0 < result.advantages[5].item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_totals_that_differ_by_rounding_alone_are_equal(dtype):
    rewards = torch.tensor([[0.1, 0.2], [0.3, 0.0], [0.15, 0.15]], dtype=dtype)
    assert rewards.double().sum(1).unique().numel() > 1
    result = group_advantages(rewards, [1.0, 1.0], 3, advantage_eps=0.0)
    assert result.zero_std.tolist() == [True]
    assert result.advantages.tolist() == [0.0, 0.0, 0.0]


def test_one_ulp_of_a_single_reward_is_a_signal():
    low = torch.tensor(1.0)
    rewards = torch.stack([low, torch.nextafter(low, torch.tensor(2.0))])[:, None]
    result = group_advantages(rewards, [1.0], 2, std="population", advantage_eps=0.0)
    assert result.zero_std.tolist() == [False]
    assert result.advantages.tolist() == [-1.0, 1.0]


def test_weights_and_rewards_left_out():
    rewards = torch.tensor([[1.0, 4.0], [NAN, 2.0], [3.0, NAN], [NAN, NAN]])
    result = group_advantages(rewards, [2.0, 0.5], 4, scale_rewards="none")
    assert result.rewards.tolist()[:3] == [4.0, 1.0, 6.0]
    assert math.isnan(result.rewards[3].item())
    mean = 11 / 3
    assert result.group_mean.item() == pytest.approx(mean)
    assert result.advantages.tolist() == pytest.approx([4 - mean, 1 - mean, 6 - mean, 0.0])


@pytest.mark.parametrize("scale_rewards", ["group", "batch", "none"])
def test_unjudged_completions_count_in_no_statistic(scale_rewards):
    with_gap = advantages([1, NAN, 0, 3], scale_rewards=scale_rewards)
    without = advantages([1, 0, 3], scale_rewards=scale_rewards)
    assert with_gap == [without[0], 0.0, *without[1:]]


@pytest.mark.parametrize("scale_rewards", ["group", "batch", "none"])
def test_groups_with_one_or_no_judged_completion(scale_rewards):
    result = group_advantages(
        column(5, NAN, NAN, NAN, 0, 1), [1.0], 2, scale_rewards=scale_rewards, advantage_eps=0.0
    )
    assert result.advantages[:4].tolist() == [0.0] * 4
    assert result.advantages[4].item() == -result.advantages[5].item() < 0
    assert result.group_mean[0].item() == 5.0
    assert math.isnan(result.group_mean[1].item())
    assert result.group_std[:2].tolist() == [0.0, 0.0]
    assert result.zero_std.tolist() == [True, True, False]


def test_a_batch_nobody_judged_is_all_zero():
    assert advantages([NAN] * 4, 2, scale_rewards="batch", advantage_eps=0.0) == [0.0] * 4


@pytest.mark.parametrize(
    ("shape", "weights", "num_generations", "options", "message"),
    [
        ((4,), [1.0], 2, {}, r"\(4,\)"),
        ((4, 1), [1.0, 2.0], 2, {}, r"tensor\(\[1., 2.\]"),
        ((4, 1), [NAN], 2, {}, "nan"),
        ((4, 1), [1.0], 1, {}, "at least 2, got 1"),
        ((4, 1), [1.0], 3, {}, "4 completions, which is not a positive multiple .* 3"),
        ((0, 1), [1.0], 2, {}, "0 completions"),
        ((4, 1), [1.0], 2, {"scale_rewards": "groups"}, "'groups'"),
        ((4, 1), [1.0], 2, {"std": "biased"}, "'biased'"),
        ((4, 1), [1.0], 2, {"advantage_eps": -1.0}, "advantage_eps .* -1.0"),
        ((4, 1), [1.0], 2, {"baseline": "rloo"}, "baseline .* 'rloo'"),
        ((4, 1), [1.0], 2, {"multi_objective_aggregation": "gdpo"}, "aggregation .* 'gdpo'"),
        ((4, 1), [1.0], 2, GDPO | LEAVE_ONE_OUT, "baseline = 'leave_one_out' .* at 'mean'"),
        ((4, 1), [1.0], 2, GDPO | {"scale_rewards": "none"}, "scale_rewards = 'none' .* 'group'"),
    ],
)
def test_bad_arguments_are_named(shape, weights, num_generations, options, message):
    with pytest.raises(ValueError, match=message):
        group_advantages(torch.zeros(shape), weights, num_generations, **options)


def test_integer_and_infinite_rewards_are_refused():
    with pytest.raises(ValueError, match="int64"):
        group_advantages(torch.zeros(4, 1, dtype=torch.int64), [1.0], 2)
    with pytest.raises(ValueError, match="infinite"):
        group_advantages(column(0, float("inf")), [1.0], 2)


GROUPS = st.lists(
    st.lists(st.integers(-8, 8).map(lambda n: n / 4) | st.just(NAN), min_size=4, max_size=4),
    min_size=1,
    max_size=3,
).map(lambda groups: torch.tensor(groups, dtype=torch.float64))
OPTIONS = st.fixed_dictionaries(
    {
        "scale_rewards": st.sampled_from(["group", "batch", "none"]),
        "std": st.sampled_from(["sample", "population"]),
        "baseline": st.sampled_from(["mean", "leave_one_out"]),
    }
)
few = settings(max_examples=40, deadline=None)


def of_groups(rewards_PG: torch.Tensor, **options) -> torch.Tensor:
    result = group_advantages(rewards_PG.reshape(-1, 1), [1.0], 4, **options)
    return result.advantages.view(-1, 4)


@few
@given(GROUPS, OPTIONS)
def test_the_advantages_of_a_group_sum_to_zero(rewards_PG, options):
    torch.testing.assert_close(
        of_groups(rewards_PG, **options).sum(1), torch.zeros(len(rewards_PG)), atol=2e-6, rtol=0
    )


@few
@given(GROUPS, st.integers(-100, 100))
def test_a_constant_added_to_one_group_changes_nothing(rewards_PG, shift):
    shifted_PG = rewards_PG.clone()
    shifted_PG[0] += shift
    torch.testing.assert_close(of_groups(shifted_PG), of_groups(rewards_PG), atol=1e-6, rtol=1e-6)


@few
@given(GROUPS, OPTIONS, st.permutations(range(4)))
def test_permuting_a_group_permutes_its_advantages(rewards_PG, options, order):
    torch.testing.assert_close(
        of_groups(rewards_PG[:, list(order)], **options),
        of_groups(rewards_PG, **options)[:, list(order)],
    )


@few
@given(GROUPS, st.sampled_from([0.25, 3.0]))
def test_without_eps_the_scale_of_the_rewards_does_not_matter(rewards_PG, factor):
    torch.testing.assert_close(
        of_groups(rewards_PG * factor, advantage_eps=0.0), of_groups(rewards_PG, advantage_eps=0.0)
    )


@few
@given(GROUPS, st.sampled_from(["group", "batch", "none"]))
def test_leaving_one_out_is_to_compare_with_the_mean_of_the_others(rewards_PG, scale_rewards):
    options = {"scale_rewards": scale_rewards, "advantage_eps": 0.5}
    found = of_groups(rewards_PG, **options, **LEAVE_ONE_OUT)
    everything = [x for x in rewards_PG.flatten().tolist() if x == x]
    for rewards, row in zip(rewards_PG.tolist(), found.tolist(), strict=True):
        judged = [x for x in rewards if x == x]
        members = everything if scale_rewards == "batch" else judged
        std = statistics.stdev(members) if len(members) > 1 else 0.0
        scale = 1.0 if scale_rewards == "none" else std + 0.5
        for i, (reward, advantage) in enumerate(zip(rewards, row, strict=True)):
            others = [x for j, x in enumerate(rewards) if x == x and j != i]
            known = reward == reward and others
            expected = (reward - statistics.fmean(others)) / scale if known else 0.0
            assert advantage == pytest.approx(expected, abs=1e-6)
