"""Rewards: the rule of `accuracy`, hostile completions, finding functions, and the contract."""

import asyncio
import importlib
import math
import os
import signal
import sys
import threading
import time

import numpy as np
import pytest
import torch

from fastgrpo import answers
from fastgrpo import rewards as module
from fastgrpo.rewards import (
    Reward,
    accuracy,
    decode_completions,
    load_reward_funcs,
    load_rewards,
    score,
    tag_count,
)


def judge(gold, completion) -> float | None:
    return accuracy(prompts=["?"], completions=[completion], completion_ids=[[1]], answer=[gold])[0]


@pytest.mark.parametrize(
    ("gold", "completion"),
    [
        ("72", "72"),
        ("She sold 48/2 = <<48/2=24>>24.\n#### 72", " 72\n"),
        ("#### 1,000", "<think>99</think> <answer>1000</answer>"),
        ("1000", "1,000"),
        ("18", "$18"),
        ("18", r"\$18.00"),
        ("72", "72.0"),
        ("100000", "1e5"),
        ("1/2", ".5"),
        (r"\frac{1}{2}", "0.5"),
        ("1/3", r"$\frac{2}{6}$"),
        ("x=5", "5"),
        ("5", "<answer>x = 5</answer>"),
        ("2**10", "1024"),
        ("2x+1", "$1+2x$"),
        ("50%", "0.5"),
        ("72", "so the answer is 72."),
        ("72", r"first \boxed{3}, then \boxed{72} or so, 4"),
        (r"We get $x=3$, so \boxed{\frac{3}{4}}.", "0.75"),
        ("A", "<answer> A </answer>"),
        ("A", r"the choice is $\boxed{A}$"),
        ("Paris", r"\boxed{\text{Paris}}"),
        ("Apollo 11", "<answer>Apollo 11</answer>"),
        ("72", "<answer>3</answer> no: <answer>72</answer>"),
        ("72", "word " * 9999 + "so it is 72."),
        ("72", [{"role": "assistant", "content": "<answer>72</answer>"}]),
        (72, "72"),
        (0.5, "1/2"),
    ],
)
def test_right_answers(gold, completion):
    assert judge(gold, completion) == 1.0


@pytest.mark.parametrize(
    ("gold", "completion"),
    [
        ("72", "73"),
        ("1000", "1,00"),
        ("3.1415926", "3.14159265"),
        ("1/3", "0.3333"),
        ("x=5", "y=5"),
        ("72", "<answer>70, 71, 72</answer>"),
        ("72", "72 <answer>3</answer>"),
        ("(1,2)", "[1,2]"),
        ("A", "B"),
        ("A", "Not A"),
        ("Paris", "$Spari$"),
        ("Paris", "paris"),
        ("Apollo 11", "12 - 1 = 11"),
        ("5 miles", "5"),
        ("on", "$no$"),
        ("", ""),
        ("72", []),
        ("72", [{"role": "assistant", "content": None}]),
    ],
)
def test_wrong_answers(gold, completion):
    assert judge(gold, completion) == 0.0


def test_solution_goes_before_answer_and_a_missing_gold_is_not_judged():
    assert accuracy(completions=["1", "1"], solution=["1", None], answer=["2", "2"]) == [1.0, None]


def test_accuracy_names_the_columns_it_has():
    with pytest.raises(ValueError, match="'solution' or 'answer'; the dataset has level, question"):
        accuracy(prompts=[], completions=[], completion_ids=[], question=[], level=[])


@pytest.mark.parametrize(
    "completion",
    [
        "",
        "🙂",
        "\ud800",
        "\x00\n\r",
        r"\boxed{",
        r"\boxed{" * 999,
        "{" * 9999,
        "$" + "(" * 9999 + "$",
        r"\(" * 30000 + r"\)" * 30000,
        "<answer>" * 9999,
        "9^9^9^9",
        "1" * 20000,
        r"\boxed{" + "{" * 9999 + "}" * 9999 + "}",
        "$$$",
    ],
)
def test_hostile_text_is_wrong_in_time(completion):
    start = time.perf_counter()
    assert judge("-7/3", completion) == 0.0
    assert time.perf_counter() - start < 4


def test_a_bomb_ends_at_the_timeout_and_the_next_pair_is_judged(monkeypatch):
    monkeypatch.setattr(answers, "CHECK_TIMEOUT_S", 0.5)
    answers._checker.close()
    bomb = r"\boxed{9^{9^9}}"  # an integer power in C: no signal would interrupt it
    start = time.perf_counter()
    assert judge("-7/5", bomb) == 0.0
    assert time.perf_counter() - start < 6
    assert answers._checker._process is None
    assert judge("-7/5", "-1.4") == 1.0
    start = time.perf_counter()
    assert judge("-7/5", bomb) == 0.0  # a group repeats its answers: remembered
    assert time.perf_counter() - start < 0.1
    answers._checker.close()


def test_a_checker_that_was_killed_is_started_again():
    assert judge("3/7", "6/14") == 1.0
    assert answers._checker._process is not None
    os.kill(answers._checker._process.pid, signal.SIGTERM)
    answers._checker._process.wait()
    assert judge("3/7", "9/21") == 1.0


def test_off_the_main_thread_and_from_several():
    results = {}

    def check(i: int) -> None:
        results[i] = judge(f"{i}/101", f"{2 * i}/202" if i % 2 else f"{i}/102")

    threads = [threading.Thread(target=check, args=(i,)) for i in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {i: float(i % 2) for i in range(1, 9)}


def test_a_checker_that_cannot_start_says_so(monkeypatch):
    answers._checker.close()
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.raises(RuntimeError, match="import math_verify"):
        judge("5/7", "10/14")


@pytest.mark.parametrize(
    ("completion", "formatted", "tags"),
    [
        ("<think>a</think><answer>b</answer>", 1.0, 1.0),
        (" <think>a\nb</think>\n\n<answer>c</answer>\n", 1.0, 1.0),
        ("<think></think><answer></answer>", 1.0, 1.0),
        ("so <think>a</think><answer>b</answer>", 0.0, 1.0),
        ("<think>a</think> so <answer>b</answer>", 0.0, 1.0),
        ("<think>a</think><answer>b</answer>.", 0.0, 1.0),
        ("<answer>b</answer><think>a</think>", 0.0, 1.0),
        ("<think>a<think>b</think><answer>c</answer>", 0.0, 0.75),
        ("<think>a</think><answer>b</answer><answer>c</answer>", 0.0, 0.5),
        ("<think>a</think>", 0.0, 0.5),
        ("<answer>", 0.0, 0.25),
        ("", 0.0, 0.0),
    ],
)
def test_format_and_tag_count(completion, formatted, tags):
    messages = [{"role": "assistant", "content": completion}]
    assert module.format([completion, messages], prompts=["?"] * 2) == [formatted, formatted]
    assert tag_count([completion, messages], prompts=["?"] * 2) == [tags, tags]


def test_the_three_forms_of_a_name_and_a_function(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass\n"
        "@dataclass\nclass Point:\n    x: 'int'\n"
        "def length(completions, **columns):\n    return [Point(len(c)).x for c in completions]\n"
    )
    found = load_reward_funcs(
        ["accuracy", "mine.py:length", "fastgrpo.rewards:tag_count", tag_count]
    )
    assert found[0] is accuracy
    assert found[1](completions=["abc"]) == [3]
    assert found[2] is tag_count is found[3]


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        (
            "acuracy",
            ValueError,
            "'acuracy', did you mean 'accuracy'.*module:function.*path.py:func",
        ),
        ("tags", ValueError, "did you mean 'tag_count'"),
        (":accuracy", ValueError, "unknown reward function ':accuracy'"),
        ("no_such_module_:f", ModuleNotFoundError, "no module 'no_such_module_'"),
        ("fastgrpo.no_such:f", ModuleNotFoundError, "no module 'fastgrpo.no_such'"),
        ("no_such.py:f", FileNotFoundError, "no file 'no_such.py'"),
        ("fastgrpo.rewards:f", ValueError, "'fastgrpo.rewards' has no function 'f'"),
        ("fastgrpo.rewards:BUILT_IN", ValueError, "has no function 'BUILT_IN'"),
    ],
)
def test_names_that_lead_nowhere(name, error, message):
    with pytest.raises(error, match=message):
        load_reward_funcs([name])


def test_a_module_that_misses_an_import_says_which(tmp_path, monkeypatch):
    (tmp_path / "needs_more.py").write_text("import no_such_dependency_\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    with pytest.raises(ModuleNotFoundError, match=r"^No module named 'no_such_dependency_'"):
        load_reward_funcs(["needs_more:f"])


def test_async_functions_are_refused_by_name():
    async def slow(**columns):
        await asyncio.sleep(0)

    with pytest.raises(NotImplementedError, match="'slow' is async"):
        load_rewards([slow])


def test_load_rewards_pairs_names_functions_and_weights():
    assert load_rewards(["accuracy", "format"]) == [
        Reward("accuracy", accuracy, 1.0),
        Reward("format", module.format, 1.0),
    ]
    assert [r.weight for r in load_rewards(["accuracy", "format"], [2, 0.5])] == [2.0, 0.5]
    with pytest.raises(ValueError, match="1 entries for 2 reward_funcs"):
        load_rewards(["accuracy", "format"], [1.0])
    with pytest.raises(ValueError, match="accuracy, accuracy"):
        load_rewards(["accuracy", "accuracy"])


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


def score_two(*functions, columns=None, **arguments):
    return score(
        [Reward(f.__name__, f) for f in functions],
        **{
            "prompts": ["p", "p"],
            "completions": ["a", "bcd"],
            "completion_ids": [[1], [2, 3]],
            "columns": columns or {},
            **arguments,
        },
    )


def test_score_calls_by_keyword_with_the_columns_and_keeps_none_as_nan():
    seen = {}

    def first(*args, **kwargs):
        assert args == ()
        seen.update(kwargs)
        return [1, None]

    def second(completions, completion_ids, **columns):
        return [len(c) / len(ids) for c, ids in zip(completions, completion_ids, strict=True)]

    rewards_BK = score_two(first, second, columns={"answer": ["x", "y"]})
    assert seen == {
        "prompts": ["p", "p"],
        "completions": ["a", "bcd"],
        "completion_ids": [[1], [2, 3]],
        "answer": ["x", "y"],
    }
    assert rewards_BK.dtype == torch.float32
    assert rewards_BK.shape == (2, 2)
    assert rewards_BK[0].tolist() == [1.0, 1.0]
    assert math.isnan(rewards_BK[1, 0].item())
    assert rewards_BK[1, 1].item() == 1.5


@pytest.mark.parametrize(
    "values",
    [
        [True, False],
        (np.float32(1), np.bool_(False)),
        [torch.tensor(1), np.array(0.0)],
        np.array([1.0, 0.0]),
        torch.tensor([1, 0]),
    ],
)
def test_every_kind_of_number_is_accepted(values):
    def f(**columns):
        return values

    assert score_two(f).tolist() == [[1.0], [0.0]]


@pytest.mark.parametrize(
    "value",
    ["1", b"1", math.nan, math.inf, 1e300, 10**400, [1.0], np.array([1.0]), torch.ones(1), 1j, {}],
)
def test_a_value_that_is_no_finite_number_is_named(value):
    def judge_badly(**columns):
        return [0.0, value]

    with pytest.raises(
        ValueError, match=r"'judge_badly' returned .* for completion 1; return a fin"
    ):
        score_two(judge_badly)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0], "'short' returned 1 values for 2 completions"),
        ([1.0] * 3, "'short' returned 3 values for 2 completions"),
        (None, "'short' returned None for 2 completions"),
        (1.0, r"'short' returned 1\.0 for 2 completions"),
    ],
)
def test_a_wrong_number_of_values_is_named(values, message):
    def short(**columns):
        return values

    with pytest.raises(ValueError, match=message):
        score_two(short)


def test_what_a_function_raises_goes_through_with_its_name():
    def broken(**columns):
        raise KeyError("gold")

    with pytest.raises(KeyError, match="gold") as caught:
        score_two(broken)
    assert caught.value.__notes__ == ["raised by the reward function 'broken'"]


def test_arguments_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="answer has 1 entries for 2 completions"):
        score_two(tag_count, columns={"answer": ["x"]})
    with pytest.raises(ValueError, match="completion_ids has 1 entries for 2 completions"):
        score_two(tag_count, completion_ids=[[1]])
    with pytest.raises(ValueError, match="'completions' is an argument's name; rename"):
        score_two(tag_count, columns={"completions": ["x", "y"]})
