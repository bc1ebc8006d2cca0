"""Functions in processes of their own: whatever they do, the run goes on and nothing is left."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from fastgrpo.rewards import Judges, RewardError

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

HOSTILE = """
import os, signal, subprocess, sys, time
from pathlib import Path

def sleeps(completions, **columns):
    if completions[0] == "a":
        time.sleep(600)
    return [5, 6]

def ignores_signals(**columns):
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    while True:
        pass

def a_power_in_c(**columns):
    return 9 ** 9 ** 9

def leaves(completions, **columns):
    if completions[0] == "a":
        os._exit(3)
    return [5, 6]

def faults(**columns):
    import ctypes
    ctypes.string_at(0)

def has_children(completions, **columns):
    if completions[0] == "a":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        grandchild = os.fork() or time.sleep(600)
        Path("children").write_text(f"{child.pid} {grandchild} {os.getpid()}")
        time.sleep(600)
    return [5, 6]

def raises(completions, answers={}, **columns):
    def look_up(completion):
        return answers[completion]
    return [look_up(c) for c in completions]

def quits(**columns):
    sys.exit("enough")

def chatters(completions, **columns):
    print("x" * 100_000)
    os.system("echo from a child; cat")
    os.write(1, b"\\x00" * 100_000)
    sys.__stdout__.write("y" * 100_000)
    return [len(sys.stdin.read()), 1]

def forks(completions, **columns):
    if os.fork() == 0:
        return None  # and goes on as if it were the process that was asked
    return [5, 6]

def meets(here, there):
    Path(here).touch()
    while not Path(there).exists():
        time.sleep(0.01)
    return [1, 1]

def one(here, there):
    return meets(here[0], there[0])

def another(here, there):
    return meets(there[0], here[0])
"""


def gone(pid: int, seconds: float = 5.0) -> bool:
    """Wait for the end of a process; one that nobody has waited for is at its end too."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.01)
    return False


def pid_of(judges: Judges) -> int:
    (process,) = judges._processes.values()
    assert process._popen is not None
    return process._popen.pid


@pytest.mark.parametrize(
    ("name", "where"),
    [("sleeps", r"mine\.py:\d+ in sleeps: time\.sleep\(600\)"),
     ("ignores_signals", r"mine\.py:\d+ in ignores_signals: "),
     ("a_power_in_c", r"mine\.py:\d+ in a_power_in_c: return 9 \*\* 9 \*\* 9")],
)  # fmt: skip
def test_what_hangs_is_ended_and_told_where_it_was(write, judge, name, where):
    mine = write(HOSTILE)
    _, score = judge(mine + name, "tag_count", reward_timeout=0.3)
    start = time.perf_counter()
    with pytest.raises(
        RewardError,
        match=f"{name!r} took longer than reward_timeout: 0.3 s over 2 completions, at .*{where}"
        ".*; raise reward_timeout, or set reward_errors: none to do without",
    ):
        score()
    assert 0.3 < time.perf_counter() - start < 30  # of the 600 that one sleeps


def test_timeouts_and_exceptions_count_and_the_next_call_starts_another(write, judge):
    mine = write(HOSTILE)
    _, score = judge(
        mine + "sleeps", mine + "leaves", "tag_count", reward_timeout=1, reward_errors="none"
    )
    good = {"completions": ["b", "c"]}
    assert score(**good).metrics == {}
    for times in (1, 2):
        scores = score()
        assert scores.rewards_BK.isnan().tolist() == [[True, True, False]] * 2
        assert scores.metrics == {
            "rewards/sleeps/timeouts": times,
            "rewards/leaves/exceptions": times,
        }
        assert len(scores.problems) == (2 if times == 1 else 0)  # said once
    scores = score(**good)
    assert scores.rewards_BK.tolist() == [[5, 5, 0], [6, 6, 0]]
    assert scores.metrics == {"rewards/sleeps/timeouts": 2, "rewards/leaves/exceptions": 2}


@pytest.mark.parametrize("reward_timeout", [None, 60.0], ids=["here", "apart"])
def test_exceptions_are_told_with_the_line_of_the_user(write, judge, reward_timeout):
    mine = write(HOSTILE)
    names = [mine + "raises", mine + "quits"]
    _, score = judge(*names, reward_timeout=reward_timeout, reward_errors="none")
    scores = score()
    assert scores.rewards_BK.isnan().all()
    assert scores.metrics == {"rewards/raises/exceptions": 1, "rewards/quits/exceptions": 1}
    first, second = scores.problems
    assert "reward function 'raises' raised KeyError: 'a' over 2 completions, at " in first
    assert "mine.py:38 in look_up: return answers[completion]; none of them has" in first
    assert "'quits' raised SystemExit: enough" in second
    _, score = judge(*names, reward_timeout=reward_timeout)
    with pytest.raises(RewardError, match=r"'raises' .*; mend it, or set reward_err") as caught:
        score()
    assert "in look_up" in caught.value.__notes__[0]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "how"),
    [("leaves", "ended its process with status 3"),
     ("faults", "ended its process by signal SIGSEGV")],
)  # fmt: skip
def test_a_process_that_ends_by_itself(write, judge, name, how):
    _, score = judge(write(HOSTILE) + name)
    with pytest.raises(RewardError, match=f"{name!r} {how} over 2 completions; mend it"):
        score()


@linux
def test_a_process_killed_from_outside_while_idle(write, judge):
    judges, score = judge(write(HOSTILE) + "leaves", reward_errors="none")
    os.kill(pid_of(judges), signal.SIGKILL)
    scores = score(completions=["b", "c"])
    assert "by signal SIGKILL, as when memory runs out" in scores.problems[0]
    assert score(completions=["b", "c"]).rewards_BK.tolist() == [[5], [6]]


def test_what_a_function_prints_reads_and_forks_does_no_harm(write, judge, capfd):
    mine = write(HOSTILE)
    _, score = judge(mine + "chatters", mine + "forks")
    for _ in range(2):
        assert score().rewards_BK.tolist() == [[0, 5], [1, 6]]
    out, err = capfd.readouterr()
    assert out == ""
    assert "from a child" in err and "x" * 100_000 in err and "y" * 100_000 in err


@linux
def test_children_of_a_function_end_with_it(write, judge, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    judges, score = judge(write(HOSTILE) + "has_children", reward_timeout=1.5, reward_errors="none")
    worker = pid_of(judges)
    assert score().metrics == {"rewards/has_children/timeouts": 1}
    children = [int(pid) for pid in (tmp_path / "children").read_text().split()]
    assert worker in children and len(children) == 3
    assert all(gone(pid) for pid in children)


def test_functions_run_at_once(write, judge, tmp_path):
    mine = write(HOSTILE)
    columns = {name: [str(tmp_path / name)] * 2 for name in ("here", "there")}
    _, score = judge(mine + "one", mine + "another", columns=columns, reward_timeout=60)
    assert score().rewards_BK.tolist() == [[1, 1], [1, 1]]


def test_a_large_batch_goes_through_the_pipes(write, judge):
    mine = write("def length(completions, log_extra, **columns):\n"
                 "    log_extra('read', completions)\n"
                 "    return [len(c) for c in completions]\n")  # fmt: skip
    completions = [chr(97 + i % 26) * (40_000 + i) for i in range(256)]
    _, score = judge(mine + "length")
    arguments = {"prompts": ["p"] * 256, "completion_ids": [[1]] * 256}
    scores = score(completions=completions, **arguments)
    assert scores.rewards_BK[:, 0].tolist() == [40_000 + i for i in range(256)]
    assert scores.extra == {"read": completions}


@linux
def test_nothing_is_left_when_the_run_is_killed(write, tmp_path):
    """Within code in C, with children, and while the function is idle."""
    mine = write(HOSTILE)
    program = f"""
from fastgrpo.rewards import Judges
idle = Judges([{mine + "leaves"!r}])
busy = Judges([{mine + "a_power_in_c"!r}, {mine + "has_children"!r}])
for process in [*idle._processes.values(), *busy._processes.values()]:
    print(process._popen.pid, flush=True)
a = ["a"]
busy.score(prompts=a, completions=a, completion_ids=[[1]], columns={{}})
"""
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
    ) as run:
        assert run.stdout is not None
        pids = {int(run.stdout.readline()) for _ in range(3)}
        children = tmp_path / "children"
        while not (children.exists() and children.read_text()):
            time.sleep(0.02)
        pids |= {int(pid) for pid in children.read_text().split()}
        assert len(pids) == 5
        assert not any(gone(pid, 0.01) for pid in pids)
        run.kill()
    assert all(gone(pid) for pid in pids)


@linux
def test_ctrl_c_during_a_call_ends_it_and_leaves_nothing(write, judge):
    judges, score = judge(write(HOSTILE) + "sleeps")
    pid = pid_of(judges)
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    start = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        score()
    assert time.perf_counter() - start < 30
    timer.join()
    assert gone(pid)
    judges.close()


@linux
def test_closing_lets_a_function_clean_up(write, judge, tmp_path):
    mine = write("import atexit\nfrom pathlib import Path\n"
                 f"atexit.register(Path({str(tmp_path / 'cleaned')!r}).touch)\n"
                 "def f(**columns):\n    return [1, 2]\n")  # fmt: skip
    judges, _ = judge(mine + "f")
    pid = pid_of(judges)
    judges.close()
    judges.close()
    assert (tmp_path / "cleaned").exists()
    assert not Path(f"/proc/{pid}").exists()  # waited for


@linux
def test_judges_that_cannot_be_made_leave_no_process(write, monkeypatch):
    def children() -> set[str]:
        return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())

    mine, before = write(HOSTILE), children()
    with pytest.raises(ValueError, match="has no function 'missing'"):
        Judges([mine + "sleeps", mine + "missing", mine + "leaves"])
    assert children() <= before


def test_a_function_that_does_not_load_in_time(write, monkeypatch):
    monkeypatch.setattr("fastgrpo.rewards.judges.START_TIMEOUT_S", 0.5)
    name = write("import time\ntime.sleep(600)\n") + "f"
    with pytest.raises(
        ValueError, match=r"mine\.py:f' was not loaded in 0.5 s, at .*:2 in <module"
    ):
        Judges([name])
    name = write("import os\nos._exit(4)\n") + "f"
    with pytest.raises(ValueError, match="ended its process with status 4 while it was loaded"):
        Judges([name])


def test_a_process_that_finds_no_function_any_more_counts(write, judge):
    mine = write(HOSTILE)
    _, score = judge(mine + "leaves", reward_errors="none")
    assert score().metrics == {"rewards/leaves/exceptions": 1}
    write("")
    scores = score()
    assert scores.metrics == {"rewards/leaves/exceptions": 2}
    assert "could not be started again: function" in scores.problems[0]
