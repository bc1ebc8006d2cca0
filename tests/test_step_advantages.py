"""Process supervision: step rewards to advantages of tokens."""

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgrpo.advantages import group_advantages
from fastgrpo.step_advantages import merge_steps, step_advantages

NAN = float("nan")
LEAVE_ONE_OUT = {"baseline": "leave_one_out"}
PLAIN = {"std": "population", "advantage_eps": 0.0}


def of_tokens(steps, lengths, num_generations=None, **options) -> list[list[float]]:
    result = step_advantages(steps, lengths, num_generations or len(steps), **options)
    assert result.advantages.dtype == torch.float32
    return [part.tolist() for part in result.advantages.split(list(lengths))]


# Two completions of four and three tokens, two steps each. The rewards 1, 0, 1, 1 have the mean
# 3 / 4 and the variance 3 / 16: normalised they are 1 / sqrt(3), -sqrt(3), and 1 / sqrt(3) twice.
STEPS, LENGTHS = [[(1, 1.0), (3, 0.0)], [(0, 1.0), (2, 1.0)]], [4, 3]
HIGH, LOW = 1 / math.sqrt(3), -math.sqrt(3)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (PLAIN, [[HIGH + LOW, HIGH + LOW, LOW, LOW], [2 * HIGH, HIGH, HIGH]]),
        ({"scale_rewards": "none"}, [[-0.5, -0.5, -0.75, -0.75], [0.5, 0.25, 0.25]]),
        # The sample variance is 1 / 4: with this eps the divisor is 1.
        ({"advantage_eps": 0.5}, [[-0.5, -0.5, -0.75, -0.75], [0.5, 0.25, 0.25]]),
        # The steps of the second have the mean 1, those of the first 1 / 2.
        (LEAVE_ONE_OUT | {"scale_rewards": "none"}, [[-1, -1, -1, -1], [1, 0.5, 0.5]]),
    ],
)
def test_worked_numbers(options, expected):
    expected = [pytest.approx(tokens, abs=1e-6) for tokens in expected]
    assert of_tokens(STEPS, LENGTHS, **options) == expected
    unsorted = [steps[::-1] for steps in STEPS]
    assert of_tokens(unsorted, LENGTHS, **options) == expected


def test_statistics_are_of_steps():
    result = step_advantages(STEPS * 2, LENGTHS * 2, 2, **PLAIN)
    assert result.rewards.tolist() == [1, 2, 1, 2]
    assert result.group_mean.tolist() == [0.75, 0.75]
    assert result.group_std.tolist() == pytest.approx([math.sqrt(3) / 4] * 2)
    assert result.zero_std.tolist() == [False, False]


def test_nothing_is_to_come_behind_the_last_step():
    found = of_tokens([[(1, 2.0)], [(0, 0.0)]], [4, 3], scale_rewards="none")
    assert found == [[1, 1, 0, 0], [-1, 0, 0]]


def test_rewards_at_one_token_are_one_reward():
    one = step_advantages([[(2, 3.0)], [(1, 1.0), (0, 4.0)]], [3, 2], 2)
    two = step_advantages([[(2, 1.0), (2, 2.0)], [(1, 1.0), (0, 4.0)]], [3, 2], 2)
    assert torch.equal(one.advantages, two.advantages)
    assert torch.equal(one.group_mean, two.group_mean)
    apart = step_advantages([[(1, 1.0), (2, 2.0)], [(1, 1.0), (0, 4.0)]], [3, 2], 2)
    assert apart.group_mean.item() == 2.0 != one.group_mean.item()


@pytest.mark.parametrize("options", [{}, LEAVE_ONE_OUT, {"scale_rewards": "batch"}])
@pytest.mark.parametrize("advantage_eps", [0.0, 1e-4])
@pytest.mark.parametrize(
    "steps",
    [
        [[(0, 0.1), (1, 0.1)], [(2, 0.1)], []],  # the mean of three is another number in fp64
        [[(0, 0.1), (0, 0.2)], [(1, 0.3)], [(2, 0.15), (2, 0.15)]],  # 0.1 + 0.2 is not 0.3
        [[], [], []],
        [[(2, 1.0)], [], []],
    ],
)
def test_a_group_without_signal_is_exactly_zero(options, advantage_eps, steps):
    alive = [[(0, 1.0)], [(1, 2.0)], [(2, 3.0)]]
    result = step_advantages(steps + alive, [3] * 6, 3, advantage_eps=advantage_eps, **options)
    assert not result.advantages[:9].any()
    assert result.zero_std.tolist() == [True, False]
    assert result.advantages[9] < 0 < result.advantages[17]


def test_one_ulp_of_a_single_reward_is_a_signal():
    found = of_tokens([[(0, 1.0)], [(0, 1.0 + torch.finfo().eps)]], [1, 1], **PLAIN)
    assert found == [[-1.0], [1.0]]


def test_a_completion_that_was_not_judged_counts_in_nothing():
    with_gap = step_advantages([STEPS[0], [], STEPS[1]], [4, 2, 3], 3)
    without = step_advantages(STEPS, LENGTHS, 2)
    assert with_gap.advantages[4:6].tolist() == [0, 0]
    assert torch.equal(with_gap.advantages[[0, 1, 2, 3, 6, 7, 8]], without.advantages)
    assert math.isnan(with_gap.rewards[1].item())
    assert torch.equal(with_gap.group_mean, without.group_mean)


def test_a_completion_alone_is_compared_with_its_own_steps_or_with_nothing():
    steps, lengths = [[(0, 1.0), (1, 3.0)], []], [2, 1]
    assert of_tokens(steps, lengths, scale_rewards="none") == [[0, 1], [0]]
    alone = step_advantages(steps, lengths, 2, **LEAVE_ONE_OUT)
    assert alone.advantages.tolist() == [0, 0, 0]
    assert alone.zero_std.tolist() == [True]


def test_an_empty_completion_counts_in_its_group_and_has_no_token():
    steps = merge_steps(torch.tensor([[1.0], [0.0], [NAN]]), [1.0], {}, [0, 2, 0])
    assert steps == [[(-1, 1.0)], [(1, 0.0)], []]
    result = step_advantages(steps, [0, 2, 0], 3, scale_rewards="none")
    assert result.advantages.tolist() == [-0.5, -0.5]
    assert result.rewards.tolist()[:2] == [1, 0]
    nothing = step_advantages(
        merge_steps(torch.tensor([[1.0], [0.0]]), [1.0], {}, [0, 0]), [0, 0], 2
    )
    assert nothing.advantages.shape == (0,)


def test_outcomes_and_steps_are_merged_with_their_weights():
    rewards = torch.tensor([[1.0, 99.0, NAN], [0.5, 99.0, 2.0]])
    steps = {1: [[(0, 1.0), (3, -1.0)], []]}
    merged = merge_steps(rewards, [1.0, 0.5, 2.0], steps, [4, 3])
    assert merged == [[(3, 1.0), (0, 0.5), (3, -0.5)], [(2, 0.5), (2, 4.0)]]
    # In all 0.5 at token 0 and 0.5 at 3; 4.5 at token 2.
    found = step_advantages(merged, [4, 3], 2, scale_rewards="none")
    assert found.rewards.tolist() == [1.0, 4.5]
    low, high = 0.5 - 5.5 / 3, 4.5 - 5.5 / 3
    assert found.advantages.tolist() == pytest.approx([2 * low, low, low, low, high, high, high])


def test_steps_are_read_in_the_type_of_outcomes():
    assert 0.1 + 0.2 != 0.3
    steps = {0: [[(0, 0.1 + 0.2)], [(0, 0.3)]]}
    for dtype, silent in ((torch.float32, True), (torch.float64, False)):
        merged = merge_steps(torch.full((2, 1), NAN, dtype=dtype), [1.0], steps, [1, 1])
        assert step_advantages(merged, [1, 1], 2).zero_std.tolist() == [silent]


def test_sums_that_differ_by_rounding_alone_are_equal():
    rewards = torch.tensor([[0.1, 0.2], [0.3, 0.0], [0.15, 0.15]])
    assert rewards.double().sum(1).unique().numel() > 1
    steps = merge_steps(rewards, [1.0, 1.0], {}, [1, 1, 1])
    result = step_advantages(steps, [1, 1, 1], 3, advantage_eps=0.0)
    assert result.advantages.tolist() == [0, 0, 0]
    assert result.zero_std.tolist() == [True]


@pytest.mark.parametrize(
    ("steps", "lengths", "options", "message"),
    [
        ([[(3, 1.0)], []], [3, 3], {}, "completion 0 has a step .* token 3, .* 0 to 2"),
        ([[], [(-1, 1.0)]], [3, 3], {}, "completion 1 has a step .* token -1"),
        ([[(1.0, 1.0)], []], [3, 3], {}, r"token 1\.0"),
        ([[(0, 1.0)], []], [0, 3], {}, "completion 0 is empty, .* token 0; .* at -1"),
        (
            [[(0, 1.0)], [(2, NAN)]],
            [3, 3],
            {},
            "completion 1 .* reward nan at token 2; .* leave out",
        ),
        ([[(0, math.inf)], []], [3, 3], {}, "reward inf"),
        ([[], []], [3], {}, "2 completions; got 1 numbers"),
        ([[], []], [3, -1], {}, "the least being -1"),
        ([[], [], []], [3] * 3, {}, "3 completions, which is not a positive multiple .* 2"),
        ([[], []], [3, 3], {"baseline": "rloo"}, "baseline .* 'rloo'"),
        (
            [[], []],
            [3, 3],
            {"multi_objective_aggregation": "normalize_then_sum"},
            "'normalize_then_sum' cannot compare steps, .* use 'sum_then_normalize'",
        ),
    ],
)
def test_bad_steps_are_named(steps, lengths, options, message):
    with pytest.raises(ValueError, match=message):
        step_advantages(steps, lengths, 2, **options)


@pytest.mark.parametrize(
    ("steps", "lengths", "message"),
    [
        ({2: [[], []]}, [1, 1], "function 2, but there are 2"),
        (
            {0: [[]]},
            [1, 1],
            "function 0 has steps of 1 completions, but there are 2; .* empty list",
        ),
        ({}, [1], "got 1 numbers"),
    ],
)
def test_what_cannot_be_merged_is_named(steps, lengths, message):
    with pytest.raises(ValueError, match=message):
        merge_steps(torch.zeros(2, 2), [1.0, 1.0], steps, lengths)


def by_definition(
    steps, lengths, num_generations, *, scale_rewards, std, advantage_eps, baseline
) -> list[list[float]]:
    """The formulas, word by word, in Python; steps stand at tokens of their own."""
    deviation = statistics.stdev if std == "sample" else statistics.pstdev

    def scale_of(rewards):
        enough = len(rewards) > 1
        return (deviation(rewards) if enough else 0.0) + advantage_eps

    rewards_of = [[reward for _, reward in own] for own in steps]
    scale_of_batch = scale_of([reward for own in rewards_of for reward in own])
    tokens = []
    for i, (own, length) in enumerate(zip(steps, lengths, strict=True)):
        first = i - i % num_generations
        group = range(first, first + num_generations)
        members = [reward for j in group for reward in rewards_of[j]]
        others = [reward for j in group if j != i for reward in rewards_of[j]]
        scale = {"group": scale_of(members), "batch": scale_of_batch, "none": 1.0}[scale_rewards]
        compared_with = members if baseline == "mean" else others
        # Without others, and without a difference, there is nothing to learn.
        silent = not compared_with or len(set(members)) < 2
        base = 0.0 if silent else statistics.fmean(compared_with)
        tokens.append(
            [
                0.0 if silent else math.fsum((r - base) / scale for end, r in own if end >= t)
                for t in range(length)
            ]
        )
    return tokens


OPTIONS = st.fixed_dictionaries(
    {
        "scale_rewards": st.sampled_from(["group", "batch", "none"]),
        "std": st.sampled_from(["sample", "population"]),
        "advantage_eps": st.sampled_from([0.0, 0.5]),
        "baseline": st.sampled_from(["mean", "leave_one_out"]),
    }
)
REWARD = st.integers(-8, 8).map(lambda n: n / 4)


@st.composite
def completions(draw) -> tuple[list[int], list[list[tuple[int, float]]]]:
    """Two groups of three, some empty, some not judged, with steps at tokens of their own."""
    lengths = draw(st.lists(st.integers(0, 5), min_size=6, max_size=6))
    ends = [draw(st.sets(st.integers(min(0, n - 1), n - 1), max_size=3)) for n in lengths]
    return lengths, [[(end, draw(REWARD)) for end in own] for own in ends]


few = settings(max_examples=60, deadline=None)


def close(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, abs=2e-6)


@few
@given(completions(), OPTIONS)
def test_as_defined(drawn, options):
    lengths, steps = drawn
    found = of_tokens(steps, lengths, 3, **options)
    close(found, by_definition(steps, lengths, 3, **options))


@few
@given(completions(), OPTIONS, st.permutations(range(3)), st.integers(-50, 50))
def test_neither_the_order_nor_a_shift_matters(drawn, options, order, shift):
    lengths, steps = drawn
    expected = of_tokens(steps, lengths, 3, **options)
    order = [*order, 3, 4, 5]
    moved = [[(end, reward + shift * (i < 3)) for end, reward in steps[i]] for i in order]
    if options["scale_rewards"] == "batch":
        moved = [steps[i] for i in order]  # the std of a batch knows of the shift of a group
    found = of_tokens(moved, [lengths[i] for i in order], 3, **options)
    close(found, [expected[i] for i in order])


@few
@given(completions(), OPTIONS, st.sampled_from([0.25, 3.0]))
def test_without_eps_the_scale_matters_to_nothing_but_none(drawn, options, factor):
    lengths, steps = drawn
    options = options | {"advantage_eps": 0.0}
    scaled = [[(end, factor * reward) for end, reward in own] for own in steps]
    size = factor if options["scale_rewards"] == "none" else 1.0
    expected = of_tokens(steps, lengths, 3, **options)
    close(
        of_tokens(scaled, lengths, 3, **options),
        [[size * advantage for advantage in own] for own in expected],
    )


@few
@given(
    st.lists(st.tuples(REWARD | st.just(NAN), REWARD | st.just(NAN)), min_size=6, max_size=6),
    st.lists(st.integers(0, 5), min_size=6, max_size=6),
    OPTIONS,
)
def test_outcomes_are_steps_that_end_with_the_completion(rewards, lengths, options):
    rewards_BK, weights = torch.tensor(rewards), [1.0, -0.3]
    outcomes = group_advantages(rewards_BK, weights, 3, **options)
    steps = merge_steps(rewards_BK, weights, {}, lengths)
    result = step_advantages(steps, lengths, 3, **options)
    per_token = outcomes.advantages.repeat_interleave(torch.tensor(lengths))
    # The sums round in another order.
    torch.testing.assert_close(result.advantages, per_token, atol=1e-6, rtol=1e-6)
    for name in ("rewards", "group_mean", "group_std"):
        torch.testing.assert_close(
            getattr(result, name), getattr(outcomes, name), equal_nan=True, atol=1e-6, rtol=1e-6
        )
    assert torch.equal(result.zero_std, outcomes.zero_std)
