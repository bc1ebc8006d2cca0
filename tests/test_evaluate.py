"""Estimates against enumeration and simulation.

P prompts, n samples of each, k of them drawn; R repetitions of an experiment.
"""

import math
from collections import Counter
from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgrpo.evaluation import (
    estimate,
    group_answers,
    interval,
    majority_at_k,
    pass_at_k,
)
from fastgrpo.evaluation import votes as votes_module
from fastgrpo.evaluation.measures import Verdict, count_votes, measure
from fastgrpo.evaluation.votes import is_unmarked_prose
from fastgrpo.rewards.answers import answer_of, is_right


@pytest.mark.parametrize("num_samples", range(1, 8))
def test_pass_at_k_is_the_share_of_draws_with_a_right_sample(num_samples):
    for right in range(num_samples + 1):
        samples = [i < right for i in range(num_samples)]
        for k in range(1, num_samples + 1):
            draws = list(combinations(samples, k))
            expected = sum(map(any, draws)) / len(draws)
            assert pass_at_k(num_samples, right, k) == pytest.approx(expected, abs=1e-15)


def test_pass_at_k_of_many_samples_is_that_of_the_paper_s_product():
    for right, k in ((1, 100), (40, 10), (199, 2), (0, 200)):
        wrong = 200 - right
        product = math.prod(1 - Fraction(k, i) for i in range(wrong + 1, 201))
        assert pass_at_k(200, right, k) == pytest.approx(float(1 - product), abs=1e-15)


def majority_by_enumeration(votes, k):
    samples = [
        (answer, i < right) for answer, (count, right) in enumerate(votes) for i in range(count)
    ]
    total = Fraction(0)
    draws = list(combinations(samples, k))
    for draw in draws:
        given_by = Counter(answer for answer, _ in draw)
        winners = [a for a, count in given_by.items() if count == max(given_by.values())]
        for winner in winners:
            verdicts = [right for answer, right in draw if answer == winner]
            total += Fraction(sum(verdicts), len(verdicts) * len(winners))
    return float(total / len(draws))


@given(
    st.lists(
        st.integers(1, 4).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))),
        min_size=1,
        max_size=5,
    ).filter(lambda votes: sum(count for count, _ in votes) <= 9)
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_a_majority_is_right_as_often_as_over_all_draws_and_ties(votes):
    for k in range(1, sum(count for count, _ in votes) + 1):
        expected = majority_by_enumeration(votes, k)
        assert majority_at_k(votes, k) == pytest.approx(expected, abs=1e-12)


def test_majorities_worked_by_hand():
    # Three say 7, which is right, two say 8, one says 9.
    votes = [(3, 3), (2, 0), (1, 0)]
    assert majority_at_k(votes, 6) == 1.0
    assert majority_at_k(votes, 1) == pytest.approx(pass_at_k(6, 3, 1)) == 0.5
    # Of two, either both say 7 (3 draws of 15), or one does and half the ties are won (9 of 15).
    assert majority_at_k(votes, 2) == pytest.approx(3 / 15 + 9 / 15 / 2)
    assert majority_at_k([(2, 2), (2, 0)], 4) == 0.5
    assert majority_at_k([(5, 0)], 3) == 0.0
    # Two say the same and the judge, who looks at more than the answer, likes one of them.
    assert majority_at_k([(2, 1), (1, 0)], 3) == 0.5


def test_a_majority_of_many_samples_can_be_had():
    """Of 64 samples there are 2e18 ways to draw 32: never done if they were gone through."""
    votes = [(8, 8), (7, 0), (6, 0), (5, 0), (4, 0), (4, 0), (3, 0), (3, 0), (2, 0), (2, 0)]
    assert 0.4 < majority_at_k(votes + [(1, 0)] * 20, 32) < 0.5
    assert majority_at_k([(1, 1)] + [(1, 0)] * 63, 32) == pytest.approx(1 / 64)


@pytest.mark.parametrize("k", [0, -1, 5])
def test_a_k_that_does_not_fit_is_refused(k):
    with pytest.raises(ValueError, match=f"k must be between 1 and the 4 samples, got {k}"):
        pass_at_k(4, 2, k)
    with pytest.raises(ValueError, match=f"k must be between 1 and the 4 samples, got {k}"):
        majority_at_k([(4, 2)], k)
    with pytest.raises(ValueError, match="num_right must be between 0 and 4, got 5"):
        pass_at_k(4, 5, 1)
    with pytest.raises(ValueError, match="3 of 2 samples of an answer cannot be right"):
        majority_at_k([(2, 3)], 1)


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    # Newcombe, Statistics in Medicine 17 (1998) 857, table I, method 3.
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_with_one_sample_a_prompt_the_interval_is_wilson_s(right, count, low, high):
    found = interval([1.0] * right + [0.0] * (count - right))
    assert found == pytest.approx((low, high), abs=5e-5)


def test_no_interval_is_a_point_and_each_holds_its_value():
    for shares in ([0.0], [1.0], [0.5], [0.0] * 9, [1.0] * 500, [0.25] * 40, [0.1, 0.7]):
        found = estimate(shares)
        assert 0 <= found.low <= found.value <= found.high <= 1
        assert found.high - found.low > 0.005
        mirrored = estimate([1 - share for share in shares])
        assert (1 - mirrored.high, 1 - mirrored.low) == pytest.approx((found.low, found.high))
    assert estimate([0.0] * 100).low == 0.0
    assert estimate([1.0] * 100).high == 1.0
    with pytest.raises(ValueError, match="at least one"):
        interval([])
    with pytest.raises(ValueError, match="between 0 and 1"):
        interval([0.5, 1.5])


def test_prompts_that_agree_make_a_narrow_interval_and_mixed_ones_a_wide_one():
    alike, mixed = [0.5] * 100, [0.0, 1.0] * 50
    assert interval(mixed) == pytest.approx((0.4038, 0.5962), abs=5e-5)  # Wilson's, 50 of 100
    low, high = interval(alike)
    # 50 * 102 effective observations: the two that are added, of 102, have all the variance.
    assert high - low == pytest.approx(2 * 1.959964 * math.sqrt(0.25 / (5100 + 1.959964**2)))


POPULATIONS = {
    "all alike": lambda rng, size: np.full(size, 0.5),
    "hard": lambda rng, size: rng.beta(0.3, 3, size),
    "easy or hard": lambda rng, size: rng.beta(0.5, 0.5, size),
    "few easy": lambda rng, size: np.where(rng.random(size) < 0.05, 1.0, 0.003),
}


@pytest.mark.parametrize("population", POPULATIONS)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (8, 1), (8, 4)])
def test_intervals_hold_the_truth_as_often_as_they_say(population, n, k):
    rng = np.random.default_rng(0)
    draw, repetitions, prompts = POPULATIONS[population], 400, 100
    truth = float(np.mean(1 - (1 - draw(rng, 10**6)) ** k))
    right_RP = rng.binomial(n, draw(rng, (repetitions, prompts)))
    shares = [pass_at_k(n, right, k) for right in range(n + 1)]
    held = 0
    for right_P in right_RP.tolist():
        low, high = interval([shares[right] for right in right_P])
        held += low <= truth <= high
    # 400 repetitions at 95% are within 0.032 of it, three standard errors.
    assert held / repetitions >= 0.95 - 0.032


def test_the_usual_interval_of_a_mean_would_not_do():
    """Shares of one easy prompt in a hundred: most often none is drawn, or too few."""
    rng = np.random.default_rng(0)
    easy_RP = rng.random((2000, 50)) < 0.02
    shares_RP = np.where(easy_RP, 1.0, 0.0)
    error_R = 1.96 * shares_RP.std(1, ddof=1) / math.sqrt(50)
    usual = float(np.mean(np.abs(shares_RP.mean(1) - 0.02) <= error_R))
    ours = np.mean([low <= 0.02 <= high for low, high in map(interval, shares_RP.tolist())])
    assert usual < 0.7
    assert ours > 0.9


@pytest.mark.parametrize(
    ("completion", "answer", "prose"),
    [
        ("640", "640", False),
        (" 12 apples\n", "12 apples", True),
        ("<think>1 or 2</think><answer> 2 </answer>", "2", False),
        ("so \\boxed{\\text{B}} it is", "B", False),
        ("$\\frac{1}{2}$", "\\frac{1}{2}", False),
        ("", "", False),
    ],
)
def test_answers_are_read_as_accuracy_reads_them(completion, answer, prose):
    assert answer_of(completion) == answer
    assert is_unmarked_prose(completion) == prose


def test_answers_are_the_same_by_the_rule_of_accuracy():
    answers = ["7", "7.0", "\\frac{1}{2}", "B", "0.5", "", "1,000", "$1000", "b", "", "x=7", "8"]
    assert group_answers(answers) == [0, 0, 2, 3, 2, 5, 6, 6, 8, 5, 0, 11]
    # What only ends in the same number is not the same text.
    assert group_answers(["Ann has 7", "Bob has 7", "7", "Ann has 7"]) == [0, 1, 2, 0]
    # Two golds of GSM8K's form, each of which is right by the other, and two that are not.
    assert group_answers(["Ann has #### 7", "So #### 7", "Ann has #### cat", "cat"]) == [0, 0, 2, 3]


def test_only_formulas_are_compared_and_one_of_each_group(monkeypatch):
    compared = []

    def spy(gold, completion):
        compared.append((gold, completion))
        return is_right(gold, completion)

    monkeypatch.setattr(votes_module, "is_right", spy)
    prose = [f"Ann has {word} left" for word in ("many", "some", "few", "none", "two", "ten")]
    assert group_answers([*prose, "7", *prose]) == [*range(7), *range(6)]
    assert compared == []
    numbers = ["7", "7.0", "+7", "7.00", "8"]
    assert group_answers([*numbers, *prose, *numbers]) == [
        0,
        0,
        0,
        0,
        4,
        *range(5, 11),
        0,
        0,
        0,
        0,
        4,
    ]
    same = [(a, b) for n in numbers[1:4] for a, b in (("7", n), (n, "7"))]
    assert compared == [*same, ("7", "8")]


def test_votes_are_counted_by_answer_where_there_is_a_vote():
    verdicts = [Verdict("7", True), Verdict("8", False), Verdict("7.0", True), Verdict("9", None)]
    assert count_votes(verdicts) == [(2, 2), (1, 0)]
    assert count_votes(verdicts, by_answer=False) == [(3, 2)]
    assert count_votes([Verdict("9", None)]) == []
    found = measure([count_votes(verdicts), []], [1, 3])
    assert {name: (e.value, e.num_prompts) for name, e in found.items()} == {
        "pass@1": (pytest.approx(2 / 3), 1), "pass@3": (1.0, 1), "maj@3": (1.0, 1),
    }  # fmt: skip
    ungrouped = measure([count_votes(verdicts, by_answer=False), []], [1])
    assert ungrouped == {"pass@1": found["pass@1"]}
