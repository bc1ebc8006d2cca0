"""GDPO: every reward function is scaled in its group, their sum over the batch."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgrpo.advantages import group_advantages

NAN = float("nan")
GDPO = {"multi_objective_aggregation": "normalize_then_sum"}

# GDPO: two groups of two, for each of which the one who is better is so by a std of 1. The first
# is better for both functions (a score of 2), the second for one (1); plain GRPO makes no
# difference between them. The variance of the scores 2, -2, 1, -1 is 10 / 4.
BOTH_OR_ONE = torch.tensor([[1.0, 8], [0, 4], [1, 4], [0, 4]])


def test_gdpo_keeps_apart_what_a_common_scale_makes_equal():
    options = {"std": "population", "advantage_eps": 0.0}
    result = group_advantages(BOTH_OR_ONE, [1.0, 1.0], 2, **options, **GDPO)
    expected = [x / math.sqrt(2.5) for x in (2, -2, 1, -1)]
    assert result.advantages.tolist() == pytest.approx(expected, rel=1e-6)
    grpo = group_advantages(BOTH_OR_ONE, [1.0, 1.0], 2, **options)
    assert grpo.advantages.tolist() == [1, -1, 1, -1]
    for name in ("rewards", "group_mean", "group_std", "zero_std"):
        assert torch.equal(getattr(result, name), getattr(grpo, name))


def test_gdpo_weighs_scores_and_adds_eps_to_both_stds():
    result = group_advantages(
        BOTH_OR_ONE, [1.0, 0.5], 2, std="population", advantage_eps=0.25, **GDPO
    )
    first, second = 0.5 / 0.75, 2 / 2.25  # their scores
    scores = [first + second / 2, first]
    scale = math.sqrt((scores[0] ** 2 + scores[1] ** 2) / 2) + 0.25
    expected = [sign * score / scale for score in scores for sign in (1, -1)]
    assert result.advantages.tolist() == pytest.approx(expected, rel=1e-6)


def test_gdpo_with_gaps():
    """What one function leaves out counts 0; a completion none judges counts in no statistic."""
    rewards = torch.tensor([[1.0, 7.0], [0.0, NAN], [NAN, NAN], [NAN, 0.0], [2.0, 2.0], [2.0, 4.0]])
    result = group_advantages(rewards, [1.0, 3.0], 3, std="population", advantage_eps=0.0, **GDPO)
    # The second function gives the second group 0, 2 and 4, the variance of which is 8 / 3.
    scores = [1.0, -1.0, None, *(3 * x / math.sqrt(8 / 3) for x in (-2, 0, 2))]
    std = math.sqrt(sum(x * x for x in scores if x is not None) / 5)
    expected = [0.0 if x is None else x / std for x in scores]
    assert result.advantages.tolist() == pytest.approx(expected, rel=1e-6)
    assert math.isnan(result.rewards[2].item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("advantage_eps", "opposed"),
    [
        (1e-4, [[0.1, 0.4], [0.1, 0.4], [0.4, 0.1]]),
        (0.0, [[0.1, 5.0], [0.1, 5.0], [0.4, 2.0]]),  # another std, which eps would weigh
    ],
)
def test_gdpo_without_signal_is_exactly_zero(dtype, advantage_eps, opposed):
    """A group that is equal for both functions, and one in which they outweigh each other."""
    options = {"advantage_eps": advantage_eps, **GDPO}
    silent = torch.tensor([[0.1, 0.7]] * 3 + opposed, dtype=dtype)
    result = group_advantages(silent, [1.0, 1.0], 3, **options)
    assert not result.advantages.any()
    assert result.zero_std.tolist() == [True, True]

    alive = torch.tensor([[0.1, 1.0], [0.1, 2.0], [0.1, 3.0]], dtype=dtype)
    result = group_advantages(torch.cat([silent, alive]), [1.0, 1.0], 3, **options)
    assert not result.advantages[:6].any()
    assert result.zero_std.tolist() == [True, True, False]
    # Scores of nearly 1, 0 and -1, and six times 0; their sample std is 1 / 2.
    assert result.advantages[6:].tolist() == pytest.approx([-2, 0, 2], abs=1e-3)


def test_one_function_that_judged_one_completion_says_nothing():
    rewards = torch.tensor([[1.0, NAN], [2.0, 100.0], [3.0, NAN]])
    found = group_advantages(rewards, [1.0, 1.0], 3, **GDPO)
    alone = group_advantages(rewards[:, :1], [1.0], 3, **GDPO)
    assert torch.equal(found.advantages, alone.advantages)
    assert found.advantages[2].item() == pytest.approx(1, abs=1e-3)


def test_gdpo_sees_a_small_reward_beside_a_large_one():
    """2 ** -30 of fp32 would be rounding if the two were added."""
    large = torch.tensor([2.0**24] * 2 + [0.0] * 2)
    small = torch.tensor([0.0, 1, 1, 0]) * 2.0**-30
    rewards = torch.stack([large, small], dim=1)
    options = {"advantage_eps": 0.0, "std": "population"}
    result = group_advantages(rewards, [1.0, 1.0], 4, **options, **GDPO)
    # Scores (1, -1), (1, 1), (-1, 1), (-1, -1), whose sums have the variance 2.
    expected = [0, math.sqrt(2), 0, -math.sqrt(2)]
    assert result.advantages.tolist() == pytest.approx(expected, rel=1e-6)


REWARD = st.integers(-8, 8).map(lambda n: n / 4) | st.just(NAN)
COMPLETIONS = st.lists(st.tuples(REWARD, REWARD), min_size=4, max_size=4)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(COMPLETIONS, min_size=1, max_size=3),
    st.permutations(range(4)),
    st.sampled_from([0.25, 3.0]),
)
def test_gdpo_whitens_and_knows_no_shift_scale_or_order(groups, order, factor):
    def advantages(rewards_PGK):
        return group_advantages(
            rewards_PGK.reshape(-1, 2), [1.0, 0.5], 4, advantage_eps=0.0, **GDPO
        )

    rewards_PGK = torch.tensor(groups, dtype=torch.float64)
    result = advantages(rewards_PGK)
    judged = result.advantages[~result.rewards.isnan()]
    assert not judged.numel() or judged.mean().item() == pytest.approx(0, abs=1e-6)
    if not result.zero_std.all():
        assert judged.std().item() == pytest.approx(1, rel=1e-6)
    changed_PGK = rewards_PGK * torch.tensor([factor, 1.0]) - torch.tensor([7.0, 0.0])
    changed = advantages(changed_PGK[:, list(order)])
    torch.testing.assert_close(
        changed.advantages.view(-1, 4),
        result.advantages.view(-1, 4)[:, list(order)],
        atol=1e-6,
        rtol=1e-6,
    )
    assert torch.equal(changed.zero_std, result.zero_std)
