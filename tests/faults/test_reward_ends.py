"""How the processes of reward functions end: at a signal, killed, or not even then."""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from fastgrpo.rewards import accuracy, answers, process

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

ENDING = """
import os, signal, subprocess, time

def sleeps(completions, **columns):
    time.sleep(600 if completions[0] == "a" else 0)
    return [1, 2]

def ends_of_a_signal_without_a_name(**columns):
    os.kill(os.getpid(), signal.SIGRTMIN + 6)

def leaves_children(**columns):
    subprocess.Popen(["sleep", "600"])
    subprocess.Popen(["sleep", "600"], start_new_session=True)
    os._exit(0)

def gets_a_schedulers_signal():
    os.kill(os.getpid(), signal.SIGUSR1)

def is_signalled_and_then_hangs(completions, **columns):
    if completions[0] == "a":
        time.sleep(600)
    for _ in range(300):
        gets_a_schedulers_signal()
    return [1, 2]
"""


@linux
@pytest.mark.fault(
    "the process of a reward function does not end even when it is killed, as on a dead disk",
    "it counts as a timeout, and the next batch has another process",
)
def test_what_cannot_be_killed_is_left_behind(write, judge, monkeypatch):
    monkeypatch.setattr(process, "_KILL_TIMEOUT_S", 0.1)
    judges, score = judge(write(ENDING) + "sleeps", reward_timeout=0.5, reward_errors="none")
    (one,) = judges._processes.values()
    popen, kill = one._popen, os.kill
    # No disk can be made to hang here: the signal is lost instead, and that of the lifeline too.
    lifeline = os.dup(one._lifeline)
    monkeypatch.setattr(os, "killpg", lambda pid, number: None)
    monkeypatch.setattr(os, "kill", lambda pid, number: number != 9 and kill(pid, number))
    start = time.perf_counter()
    assert score().metrics == {"rewards/sleeps/timeouts": 1}
    assert time.perf_counter() - start < 10
    assert popen.poll() is None
    talk = one._talk
    monkeypatch.undo()
    os.close(lifeline)
    popen.kill()
    popen.wait()
    talk.join()
    scores = score(completions=["b", "c"])
    assert scores.rewards_BK.tolist() == [[1], [2]]


@linux
@pytest.mark.fault(
    "the run is process 1 of a container, and reward functions leave children behind",
    "they are ended and waited for: no zombies",
)
def test_process_1_waits_for_what_it_is_left_with(write, judge):
    name = "leaves_children"
    _, score = judge(write(ENDING) + name, reward_errors="none")
    before = children()
    set_child_subreaper = 36
    prctl = ctypes.CDLL(None).prctl
    assert prctl(set_child_subreaper, 1, 0, 0, 0) == 0  # gets orphans as process 1 does
    try:
        assert score().metrics == {f"rewards/{name}/exceptions": 1}
    finally:
        prctl(set_child_subreaper, 0, 0, 0, 0)
    assert children() <= before


def children() -> set[str]:
    """Return the children of this process, those included that nobody has waited for."""
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


@linux
@pytest.mark.fault(
    "a scheduler's signal to all processes as that of a reward function is only beginning",
    "it does nothing to it",
)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_process_that_begins_is_not_ended(write, judge, monkeypatch, number):
    judges, score = judge(write(ENDING) + "sleeps", reward_timeout=60)
    judges.close()
    popen = subprocess.Popen

    def signalled(*arguments, **options):
        begun = popen(*arguments, **options)
        os.kill(begun.pid, number)
        return begun

    monkeypatch.setattr(subprocess, "Popen", signalled)
    assert score(completions=["b", "c"]).rewards_BK.tolist() == [[1], [2]]


@linux
@pytest.mark.fault(
    "a reward function ends of a signal that has no name", "counted, and told by its number"
)
def test_signals_without_a_name(write, judge):
    _, score = judge(write(ENDING) + "ends_of_a_signal_without_a_name", reward_errors="none")
    (problem,) = score().problems
    assert f"ended its process by signal {signal.SIGRTMIN + 6} over" in problem


@linux
@pytest.mark.slow
@pytest.mark.fault(
    "a reward function gets SIGUSR1 300 times, and hangs in a later batch",
    "it goes on, and what is told is where it hangs",
)
def test_a_stack_is_of_the_timeout(write, judge):
    name = "is_signalled_and_then_hangs"
    _, score = judge(write(ENDING) + name, reward_timeout=1, reward_errors="none")
    assert score(completions=["b", "c"]).rewards_BK.tolist() == [[1], [2]]
    (problem,) = score().problems
    assert f"in {name}: time.sleep(600);" in problem


def judged(gold: str, completion: str) -> float | None:
    return accuracy(completions=[completion], answer=[gold])[0]


def reader() -> int:
    """Return the id of the process that reads answers."""
    assert judged("-7/3", "-14/6") == 1.0
    answers._checker._ask.cache_clear()
    if answers._checker._process is None:
        assert judged("-7/3", "-14/6") == 1.0
    assert answers._checker._process is not None
    return answers._checker._process.pid


@linux
@pytest.mark.slow
@pytest.mark.fault(
    "the process that reads answers is killed as it does, as when memory runs out",
    "another reads them, and a right answer is right",
)
def test_a_right_answer_is_right_whatever_happens_to_its_reader():
    pid = reader()
    os.kill(pid, signal.SIGSTOP)
    timer = threading.Timer(0.2, os.kill, (pid, signal.SIGKILL))
    timer.start()
    assert judged("1/2", "2/4") == 1.0
    assert answers._checker._process is not None and answers._checker._process.pid != pid
    timer.join()


@linux
@pytest.mark.slow
@pytest.mark.fault(
    "the process that reads answers is stopped, for good",
    "it is ended 5 s after its time, and another reads them",
)
def test_a_reader_that_is_stopped(monkeypatch):
    pid = reader()
    monkeypatch.setattr(answers, "_GRACE_S", 0.1)
    monkeypatch.setattr(answers, "CHECK_TIMEOUT_S", 0.3)
    os.kill(pid, signal.SIGSTOP)
    assert judged("1/2", "2/4") == 1.0


@linux
@pytest.mark.slow
@pytest.mark.fault(
    "the process that reads answers is killed again and again",
    "told and counted as an exception of `accuracy`, and not remembered of the answer",
)
def test_a_reader_that_is_killed_again_and_again(judge, monkeypatch):
    os.kill(reader(), signal.SIGKILL)
    start = answers._checker._start

    def killed():
        process = start()
        process.kill()
        return process

    monkeypatch.setattr(answers._checker, "_start", killed)
    _, score = judge("accuracy", columns={"answer": ["1/2", "x"]}, reward_errors="none")
    scores = score(completions=["2/4", "x"])
    assert scores.metrics == {"rewards/accuracy/exceptions": 1}
    assert "was ended twice by signal SIGKILL, as when memory runs out" in scores.problems[0]
    monkeypatch.undo()
    assert score(completions=["2/4", "x"]).rewards_BK.tolist() == [[1], [1]]


@linux
@pytest.mark.slow
@pytest.mark.fault(
    "signals for all processes as the one that reads answers is only starting, which takes longer "
    "than `reward_timeout`",
    "they do nothing to it; the batch counts as a timeout, and the next is judged",
)
def test_a_reader_that_begins_is_not_ended(judge, monkeypatch):
    os.kill(reader(), signal.SIGKILL)
    popen = subprocess.Popen

    def signalled(*arguments, **options):
        begun = popen(*arguments, **options)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.kill(begun.pid, number)
        return begun

    monkeypatch.setattr(subprocess, "Popen", signalled)
    columns = {"answer": ["1/2", "x"]}
    _, score = judge("accuracy", columns=columns, reward_timeout=0.05, reward_errors="none")
    assert score(completions=["2/4", "x"]).metrics == {"rewards/accuracy/timeouts": 1}
    _, score = judge("accuracy", columns=columns)
    assert score(completions=["2/4", "x"]).rewards_BK.tolist() == [[1], [1]]
