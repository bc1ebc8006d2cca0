"""What reward functions are given, what they may return, and what is made of it."""

import asyncio
import datetime
import math
import re
from decimal import Decimal
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastgrpo.rewards import Judges, RewardError, accuracy, decode_completions

HERE, APART = None, 60.0  # reward_timeout
both = pytest.mark.parametrize("reward_timeout", [HERE, APART], ids=["here", "apart"])


class FakeTokenizer:
    def decode(self, ids, skip_special_tokens):
        assert skip_special_tokens
        return "".join(map(chr, ids))


def test_completions_take_the_form_of_their_prompts():
    prompts = ["Hi", [{"role": "user", "content": "Hi"}]]
    assert decode_completions(prompts, [[65], [66]], FakeTokenizer()) == [
        "A",
        [{"role": "assistant", "content": "B"}],
    ]


@both
def test_functions_are_called_by_keyword_with_all_that_trl_gives(judge, reward_timeout):
    def everything(*args, **kwargs):
        assert args == ()
        assert kwargs.pop("trainer_state").global_step == 7
        assert callable(kwargs.pop("log_metric")) and callable(kwargs.pop("log_extra"))
        assert kwargs == {
            "prompts": ["p", "p"],
            "completions": ["a", "bcd"],
            "completion_ids": [[1, 4], [2, 3, 4]],
            "answer": ["x", "y"],
        }
        return [1, None]

    def those_it_names(completions, answer):
        return [len(c) + ord(a) for c, a in zip(completions, answer, strict=True)]

    def also_with_defaults(answer, trainer_state=None, scale=2.0):
        return [trainer_state.max_steps * scale for _ in answer]

    _, score = judge(
        everything,
        those_it_names,
        also_with_defaults,
        columns={"answer": ["x", "y"]},
        trainer_state=SimpleNamespace(global_step=7, max_steps=9),
        reward_timeout=reward_timeout,
    )
    rewards_BK = score().rewards_BK
    assert rewards_BK.dtype == torch.float32
    assert rewards_BK.shape == (2, 3)
    assert rewards_BK[:, 1:].tolist() == [[121.0, 18.0], [124.0, 18.0]]
    assert rewards_BK[0, 0] == 1.0
    assert math.isnan(rewards_BK[1, 0])


@both
def test_columns_of_any_type_arrive(judge, reward_timeout):
    columns = {
        "day": [datetime.date(2024, 2, 29), datetime.date(1, 1, 1)],
        "time": [datetime.datetime(2024, 2, 29, 1, tzinfo=datetime.UTC)] * 2,
        "price": [Decimal("0.10"), None],
        "tests": [{"in": [1, 2], "bytes": b"\x00\n"}, {}],
        "array": [np.arange(3), np.zeros(0)],
    }

    def reads(day, time, price, tests, array, **columns):
        assert time[0].tzinfo is not None and str(price[0]) == "0.10" and price[1] is None
        assert tests == [{"in": [1, 2], "bytes": b"\x00\n"}, {}]
        return [d.year + a.sum() for d, a in zip(day, array, strict=True)]

    _, score = judge(reads, columns=columns, reward_timeout=reward_timeout)
    assert score().rewards_BK.tolist() == [[2027], [1]]


def test_arguments_that_cannot_leave_are_named(judge):
    stuck = (x for x in "ab")
    _, score = judge(lambda **c: [0, 0], columns={"stuck": [stuck, stuck]})
    with pytest.raises(RewardError, match=r"cannot be sent .*generator.*reward_timeout: null"):
        score()


@pytest.mark.parametrize(
    ("kind", "reward_timeout"),
    [("plain", HERE), ("numpy", HERE), ("array", HERE), ("torch", HERE), ("tensor", HERE),
     ("numpy", APART), pytest.param("tensor", APART, marks=pytest.mark.slow)],
)  # fmt: skip
def test_every_kind_of_number_is_accepted(judge, kind, reward_timeout):
    def numbers(**columns):
        if kind == "plain":
            return [True, False]
        if kind in ("numpy", "array"):
            return (np.float32(1), np.bool_(False)) if kind == "numpy" else np.array([1.0, 0.0])
        import torch

        return [torch.tensor(1), np.array(0.0)] if kind == "torch" else torch.tensor([1, 0])

    _, score = judge(numbers, reward_timeout=reward_timeout)
    assert score().rewards_BK.tolist() == [[1.0], [0.0]]


@pytest.mark.fault(
    "a reward is a text, NaN, infinite, larger than fp32 holds, an array or no number",
    "the run stops and names the completion; with reward_errors: none the batch counts as invalid",
)
@pytest.mark.parametrize(
    "value",
    ["1", b"1", math.nan, math.inf, 1e300, 10**400, [1.0], np.array([1.0]), torch.ones(1), 1j, {}],
)
def test_a_value_that_is_no_finite_number_is_named(judge, value):
    def judge_badly(**columns):
        return [0.0, value]

    message = r"'judge_badly' returned .* for completion 1; return a fin"
    _, score = judge(judge_badly, reward_timeout=None)
    with pytest.raises(RewardError, match=message):
        score()
    _, score = judge(judge_badly, "tag_count", reward_timeout=None, reward_errors="none")
    scores = score()
    assert re.search(message, scores.problems[0])
    assert scores.rewards_BK.isnan().tolist() == [[True, False]] * 2
    assert scores.metrics == {"rewards/judge_badly/invalid": 1}
    assert score().metrics == {"rewards/judge_badly/invalid": 2}
    assert score().problems == []


@both
@pytest.mark.fault(
    "rewards are too few, too many, none at all, a number, a mapping, or steps beyond the end",
    "the run stops and says what came; with reward_errors: none the batch counts as invalid",
)
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0], "'short' returned 1 values for 2 completions; return a list with one"),
        ([1.0] * 3, "'short' returned 3 values for 2 completions"),
        (None, "'short' returned None for 2 completions"),
        (1.0, r"'short' returned 1\.0 for 2 completions"),
        ([0, [(3, 1.0)]], r"the step \(3, 1\.0\) for completion 1, which has 3 tokens"),
        ([0, [(-1, 1.0)]], r"the step \(-1, 1\.0\) for completion 1"),
        ([0, [(0, math.nan)]], r"the step \(0, nan\) for completion 1.*finite reward"),
        ([0, [(0, 1.0, 2.0)]], "the step"),
        ([0, [(0.5, 1.0)]], "the step"),
        ([0, [()]], "the step"),
        ({0: 1.0, 1: 2.0}, r"'short' returned \{0: 1\.0, 1: 2\.0\} for 2 completions"),
        ({0.0, 1.0}, r"'short' returned \{0\.0, 1\.0\} for 2 completions"),
        (b"ab", "'short' returned b'ab' for 2 completions"),
        ("ab", "'short' returned 'ab' for 2 completions"),
    ],
)
def test_what_are_no_rewards_stops_the_run_or_counts(judge, values, message, reward_timeout):
    def short(**columns):
        return values

    judges, score = judge(short, reward_timeout=reward_timeout)
    with pytest.raises(RewardError, match=message):
        score()
    judges.failures.errors = "none"
    scores = score()
    assert scores.metrics == {"rewards/short/invalid": 1}
    assert re.search(message, scores.problems[0])


@both
def test_rewards_of_steps(judge, reward_timeout):
    def steps(completions, **columns):
        return [[(0, 0.5), (1, -0.25)], np.float64(2)]

    def gaps(completions, **columns):
        return [None, [[np.int64(2), np.float16(3)]]]

    def whole(completions, **columns):
        return [1, 2]

    def nothing(completions, **columns):
        return [[], [(1, 1.0)]]

    _, score = judge(steps, gaps, whole, nothing, reward_timeout=reward_timeout)
    scores = score()
    assert scores.steps == {
        0: [[(0, 0.5), (1, -0.25)], [(2, 2.0)]],
        1: [[], [(2, 3.0)]],
        3: [[], [(1, 1.0)]],
    }
    nan = math.nan
    expected = torch.tensor([[0.25, nan, 1, nan], [2, 3, 2, 1]])
    torch.testing.assert_close(scores.rewards_BK, expected, rtol=0, atol=0, equal_nan=True)


@both
def test_what_functions_log(judge, reward_timeout):
    def first(completions, log_metric, log_extra, **columns):
        log_metric("words", 3)
        log_metric("words", np.float32(5))
        log_extra("read", ["a", "b"])
        log_extra("same", [1, 2])
        return [0, 0]

    async def second(completions, log_metric, log_extra, **columns):
        log_metric("words", 10.0)
        log_extra("read", ["c"])
        await asyncio.sleep(0)
        log_extra("read", ("d",))
        log_extra("same", [1, 2])
        return [0, 0]

    _, score = judge(first, second, reward_timeout=reward_timeout)
    scores = score()
    assert scores.metrics == {"words": 6.0}
    assert scores.extra == {"read": ["a", "b"], "same": [1, 2], "second/read": ["c", "d"]}
    assert scores.problems == []
    assert score().metrics == {"words": 6.0}


@both
@pytest.mark.parametrize("metric", ["step", "reward", "num_tokens", "eval_reward", "time/reward"])
def test_metrics_of_the_trainer_are_refused(judge, metric, reward_timeout):
    def logs(log_metric, completions):
        log_metric("stepwise", 1.0)
        log_metric(metric, 1000.0)
        return [0, 0]

    _, score = judge(logs, reward_timeout=reward_timeout, reward_errors="none")
    with pytest.raises(
        RewardError, match=f"'logs' logged the metric '{metric}'.*log it as 'logs/{metric}'"
    ):
        score()


def test_failures_of_evaluations_are_counted_and_told_apart(judge):
    def fails(**columns):
        raise KeyError("a")

    _, score = judge(fails, reward_timeout=None, reward_errors="none")
    for evaluation in (True, False):
        for times in (1, 2):
            scores = score(evaluation=evaluation)
            assert scores.metrics == {"rewards/fails/exceptions": times}
            assert len(scores.problems) == (times == 1)


@both
def test_closed_judges_score_again(judge, reward_timeout):
    async def f(completions, **columns):
        await asyncio.sleep(0)
        return [len(c) for c in completions]

    def g(completions, **columns):
        return [2 * len(c) for c in completions]

    judges, score = judge(f, g, "format", reward_timeout=reward_timeout)
    for _ in range(2):
        assert score().rewards_BK.tolist() == [[1, 2, 0], [3, 6, 0]]
        judges.close()


def test_a_process_is_sent_what_its_function_takes_alone(judge):
    stuck = [(x for x in "ab")] * 2  # could not be sent

    def f(completions, trainer_state=None):
        return [[(0, trainer_state.global_step)], len(completions)]

    def g(answer, log_extra):
        log_extra("read", answer)
        return [None, ord(answer[1])]

    columns = {"answer": ["x", "y"], "stuck": stuck}
    _, score = judge(f, g, columns=columns, trainer_state=SimpleNamespace(global_step=5))
    scores = score()
    assert scores.rewards_BK[:, 0].tolist() == [5, 2] and scores.rewards_BK[1, 1] == 121
    assert scores.steps == {0: [[(0, 5.0)], [(2, 2.0)]]}
    assert scores.extra == {"read": ["x", "y"]}


@both
def test_extra_columns_have_a_value_for_each_completion(judge, reward_timeout):
    def logs(log_extra, **columns):
        log_extra("read", ["a"])
        return [0, 0]

    _, score = judge(logs, reward_timeout=reward_timeout)
    with pytest.raises(RewardError, match="'logs' logged 1 values of 'read' for 2 completions"):
        score()


@both
def test_async_functions_run_at_once_in_a_loop_that_stays(judge, reward_timeout, tmp_path):
    loops = []
    here, there = tmp_path / "here", tmp_path / "there"

    async def meet(mine, other):
        mine.touch()
        for _ in range(3000):
            if other.exists():
                return
            await asyncio.sleep(0.01)
        raise TimeoutError("the other has not begun")

    async def first(**columns):
        await meet(here, there)
        loops.append(asyncio.get_running_loop())
        return [len(loops), float(all(loop is loops[0] for loop in loops))]

    class Second:
        async def __call__(self, **columns):
            await meet(there, here)
            return [1, 2]

    judges, score = judge(first, Second(), reward_timeout=reward_timeout)
    assert judges.names == ["first", "Second"]
    assert score().rewards_BK.tolist() == [[1, 1], [1, 2]]
    assert score().rewards_BK.tolist() == [[2, 1], [1, 2]]


def test_async_functions_where_a_loop_runs_already_as_in_a_notebook(judge):
    async def slow(**columns):
        await asyncio.sleep(0)
        return [1, 2]

    def starts_its_own(**columns):
        return asyncio.run(slow())

    _, score = judge(slow, reward_timeout=None)

    async def cell():
        return score()

    assert asyncio.run(cell()).rewards_BK.tolist() == [[1], [2]]
    _, score = judge(starts_its_own, reward_timeout=None)
    assert score().rewards_BK.tolist() == [[1], [2]]


def test_random_numbers_of_a_function_depend_on_the_seed_and_the_completions_alone(judge):
    def draws(**columns):
        import random

        return [random.random(), np.random.rand()]

    def values(score, **arguments):
        return tuple(score(**arguments).rewards_BK[:, 0].tolist())

    _, score = judge(draws, seed=1)
    first = values(score)
    assert first[1] != values(score, completion_ids=[[1], [2]])[1]
    assert values(score) == first  # a resumed run has not made the calls in between
    _, other = judge(draws, seed=2)
    assert set(first).isdisjoint(values(other))


@both
def test_columns_are_checked_before_anything_is_sampled(judge, reward_timeout):
    def f(completions, gold, level=0):
        return []

    judges, _ = judge(f, "accuracy", reward_timeout=reward_timeout)
    judges.check_columns(["prompt", "answer", "gold"])
    with pytest.raises(ValueError, match="'f' needs 'gold', and the dataset has prompt, answer"):
        judges.check_columns(["prompt", "answer"])
    with pytest.raises(ValueError, match="'solution' or 'answer'; the dataset has gold"):
        judges.check_columns(["prompt", "gold"])
    for name in ("completions", "trainer_state", "log_extra"):
        with pytest.raises(RewardError, match=f"{name!r} is an argument's name; rename"):
            judges.check_columns(["prompt", "answer", "gold", name])


def test_arguments_that_do_not_fit_are_named(judge):
    _, score = judge("tag_count")
    with pytest.raises(RewardError, match="answer has 1 entries for 2 completions"):
        score(columns={"answer": ["x"]})
    with pytest.raises(RewardError, match="completion_ids has 1 entries for 2 completions"):
        score(completion_ids=[[1]])
    with pytest.raises(RewardError, match="'completions' is an argument's name; rename"):
        score(columns={"completions": ["x", "y"]})


def test_built_in_functions_are_called_here():
    with Judges([accuracy, "format", "fastgrpo.tasks.arithmetic:exact_match"]) as judges:
        assert sorted(judges.functions) == [0, 1, 2]
        scores = judges.score(
            prompts=["2+2="], completions=["4"], completion_ids=[[1]], columns={"answer": ["4"]}
        )
    assert scores.rewards_BK.tolist() == [[1, 0, 1]]
