"""The built-in `accuracy`: its rule, hostile completions, and the process that reads them."""

import os
import signal
import sys
import threading

import pytest

from fastgrpo.rewards import RewardError, accuracy, answers


def reward_of(gold, completion) -> float | None:
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
    assert reward_of(gold, completion) == 1.0


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
    assert reward_of(gold, completion) == 0.0


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
    assert reward_of("-7/3", "-14/6") == 1.0
    process = answers._checker._process
    assert reward_of("-7/3", completion) == 0.0
    assert answers._checker._process is process  # it was not ended


def test_a_bomb_ends_at_the_timeout_and_is_tried_once(monkeypatch):
    monkeypatch.setattr(answers, "CHECK_TIMEOUT_S", 1.0)
    answers._checker._ask.cache_clear()
    started, start = [], answers._checker._start
    monkeypatch.setattr(answers._checker, "_start", lambda: started.append(1) or start())
    answers._checker.close()
    bomb = r"\boxed{9^{9^9}}"  # an integer power in C: no signal would interrupt it
    assert reward_of("4/7", bomb) == 0.0
    assert answers._checker._process is None
    assert len(started) == 1
    assert [reward_of(f"{i}/7", bomb) for i in range(1, 9)] == [0.0] * 8
    assert [reward_of(bomb, f"{i}/7") for i in range(1, 9)] == [0.0] * 8
    assert reward_of("4/7", "8/14") == 1.0  # what was compared with it is none the worse
    assert len(started) == 2


def test_a_batch_of_bombs_ends_at_reward_timeout(judge, monkeypatch):
    answers._checker._ask.cache_clear()
    bombs = {f"{i}^{{9^{{9^9}}}}": "1/7" for i in range(11, 15)}
    prose = {"so it is 3/21": "1/7", "5/36": "5/35"}
    batch = {
        "completions": list(bombs | prose),
        "columns": {"answer": list((bombs | prose).values())},
    }
    _, score = judge("accuracy", "format", reward_timeout=0.4, reward_errors="none")
    ids = {"prompts": ["?"] * 6, "completion_ids": [[1]] * 6}
    scores = score(**batch, **ids)
    assert scores.metrics == {"rewards/accuracy/timeouts": 1}
    assert scores.rewards_BK.isnan().tolist() == [[True, False]] * 6
    assert "'accuracy' took longer than reward_timeout: 0.4 s over 6 comp" in scores.problems[0]
    _, score = judge("accuracy", reward_timeout=0.4)
    with pytest.raises(
        RewardError, match=r"'accuracy' took longer .*; raise reward_timeout, or set"
    ):
        score(**batch, **ids)
    # A text whose time was cut short is not held for hopeless.
    _, score = judge(
        "accuracy", reward_timeout=60
    )  # the checker is started again, which takes time
    columns = {"answer": ["1/7", "5/35"]}
    scores = score(completions=["3/21", "5/36"], columns=columns)
    assert scores.rewards_BK.tolist() == [[1], [0]]


def test_a_checker_that_was_killed_is_started_again():
    assert reward_of("3/7", "6/14") == 1.0
    assert answers._checker._process is not None
    os.kill(answers._checker._process.pid, signal.SIGKILL)
    answers._checker._process.wait()
    assert reward_of("3/7", "9/21") == 1.0


def test_off_the_main_thread_and_from_several():
    results = {}

    def check(i: int) -> None:
        results[i] = reward_of(f"{i}/101", f"{2 * i}/202" if i % 2 else f"{i}/102")

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
        reward_of("5/7", "10/14")
