"""How the processes of reward functions end: at a signal, killed, or not even then."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastgrpo.rewards import process

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
    # No disk can be made to hang here: the signal is lost instead.
    monkeypatch.setattr(os, "killpg", lambda pid, number: None)
    monkeypatch.setattr(os, "kill", lambda pid, number: number != 9 and kill(pid, number))
    start = time.perf_counter()
    assert score().metrics == {"rewards/sleeps/timeouts": 1}
    assert time.perf_counter() - start < 10
    assert popen.poll() is None
    talk = one._talk
    monkeypatch.undo()
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
