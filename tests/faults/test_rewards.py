"""Reward functions that fail in every way they can: for real, in processes of their own."""

import json
import os
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from small_runs import lines

from fastgrpo.rewards import RewardError

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

FAULTY = """
import asyncio, os, signal, subprocess, sys, time
from pathlib import Path

class Unspeakable(Exception):
    def __str__(self):
        raise RuntimeError("no text")
    def __reduce__(self):
        raise RuntimeError("no pickle")
    __repr__ = __str__

class Value:
    def __len__(self):
        raise RuntimeError("no length")

class Growing(list):
    def __len__(self):
        return 2

def raises_the_unspeakable(**columns):
    raise Unspeakable

def gives_the_unspeakable(**columns):
    return [Unspeakable(), 1]

def gives_no_length(**columns):
    return Value()

def gives_more_than_it_says(**columns):
    return Growing([1, 2, 3])

def gives_much(**columns):
    return ["x" * 20_000_000, 1]

def complains_much(**columns):
    raise ValueError("x" * 20_000_000)

def interrupts(**columns):
    raise KeyboardInterrupt

async def cancels(**columns):
    raise asyncio.CancelledError

async def waits(**columns):
    await asyncio.Event().wait()

def stops(**columns):
    os.kill(os.getpid(), signal.SIGSTOP)

def kills(**columns):
    os.kill(os.getpid(), signal.SIGKILL)

def closes_what_it_prints_to(**columns):
    for stream in (sys.stdin, sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
        stream.close()
    for descriptor in range(3):
        os.close(descriptor)
    return [1, 2]

def closes_everything(**columns):
    os.closerange(0, 100)
    return [1, 2]

def writes_everywhere(**columns):
    for descriptor in range(3, 30):
        try:
            os.write(descriptor, b"\\xff" * 64)
        except OSError:
            pass
    return [1, 2]

def talks(**columns):
    for _ in range(25):
        sys.stdout.write("o" * 1_000_000)
        sys.stderr.write("e" * 1_000_000)
        os.write(1, b"1" * 1_000_000)
        os.write(2, b"2" * 1_000_000)
    return [1, 2]

def takes_memory(**columns):
    return [bytes(1 << 60), 1]

def shows_how_soon_it_is_ended(log_extra, **columns):
    log_extra("score", [Path("/proc/self/oom_score_adj").read_text().strip()] * 2)
    return [1, 2]

def hides_a_child(completions, place, **columns):
    child = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True
    )
    Path(place[0]).write_text(str(child.pid))
    time.sleep(600 if completions[0] == "a" else 0)
    return [1, 2]

def changes_what_it_is_given(prompts, completions, completion_ids, here, **columns):
    for found in (prompts, completions, here):
        found[0][0]["content"] = "changed"
        found.clear()
    completion_ids[0].clear()
    return [1, 2]

def nan_now_and_then(completions, trainer_state, **columns):
    return [float("nan") if trainer_state.global_step == 1 else 1.0] * len(completions)

def dies_now_and_then(completions, trainer_state, **columns):
    if trainer_state.global_step == 1:
        os._exit(1)
    return [1.0] * len(completions)
"""


@pytest.mark.fault(
    "a reward function raises what cannot be shown or pickled, returns what cannot be read or "
    "said in a line, ends its process, is stopped or never returns",
    "counted by kind and told in a line, and the next batch is judged as if nothing had been",
)
@pytest.mark.parametrize(
    ("name", "kind", "said"),
    [
        ("raises_the_unspeakable", "exceptions", "raised fastgrpo_rewards_mine.Unspeakable: <exce"),
        ("gives_the_unspeakable", "invalid", "returned <Unspeakable instance at"),
        ("gives_no_length", "invalid", "returned what cannot be read (RuntimeError: no length)"),
        ("gives_more_than_it_says", "invalid", "returned 2 values for 2 completions"),
        ("gives_much", "invalid", "returned 'xxxxxxxx"),
        ("complains_much", "exceptions", "raised ValueError: xxxxxxxxx"),
        ("interrupts", "exceptions", "ended its process by signal SIGINT over 2"),
        ("cancels", "exceptions", "raised asyncio.exceptions.CancelledError over 2"),
        ("waits", "timeouts", "took longer than reward_timeout: 0.3 s over 2"),
        ("stops", "timeouts", "took longer than reward_timeout: 0.3 s over 2"),
        ("kills", "exceptions", "ended its process by signal SIGKILL, as when memory runs out"),
        ("closes_everything", "exceptions", "ended its process with status 1"),
        ("takes_memory", "exceptions", "raised MemoryError"),
    ],
)
def test_it_is_told_in_a_line_and_counted(write, judge, name, kind, said):
    timeout = 0.3 if kind == "timeouts" else 60
    _, score = judge(
        write(FAULTY) + name, "tag_count", reward_timeout=timeout, reward_errors="none"
    )
    scores = score()
    (problem,) = scores.problems
    assert problem.startswith(f"reward function {name!r} {said}")
    assert problem.endswith("; none of them has a reward of it (reward_errors: none)")
    assert len(problem) < 1500 and "\n" not in problem
    assert scores.metrics == {f"rewards/{name}/{kind}": 1}
    assert scores.rewards_BK.isnan().tolist() == [[True, False]] * 2


@pytest.mark.fault(
    "a reward function closes what it reads from and prints to, or prints 100 MB in every way",
    "its rewards arrive; what it prints goes to the run's standard error",
)
def test_what_it_does_to_its_streams_does_not_matter(write, judge, capfd):
    mine = write(FAULTY)
    _, score = judge(mine + "closes_what_it_prints_to", mine + "talks", reward_timeout=60)
    assert score().rewards_BK.tolist() == [[1, 1], [2, 2]]
    out, err = capfd.readouterr()
    assert out == ""
    assert [err.count(letter) >= 25_000_000 for letter in "oe12"] == [True] * 4


@pytest.mark.fault(
    "a reward function writes into the pipe through which its rewards go",
    "counted as invalid, and its process is started anew",
)
def test_what_is_no_answer_is_not_read(write, judge):
    _, score = judge(write(FAULTY) + "writes_everywhere", reward_timeout=60, reward_errors="none")
    scores = score()
    assert scores.metrics == {"rewards/writes_everywhere/invalid": 1}
    assert (
        "wrote into the pipe that its rewards go through (ValueError('a frame of 18,446"
        in (scores.problems[0])
    )
    assert score().metrics == {"rewards/writes_everywhere/invalid": 2}


@linux
@pytest.mark.fault(
    "a reward function starts a process in a session of its own, with its environment, and "
    "takes too long, or returns",
    "the process ends with the function's: at the timeout, or at the end of the run",
)
def test_no_child_is_left_in_another_session(write, judge, tmp_path):
    place = tmp_path / "child"
    judges, score = judge(
        write(FAULTY) + "hides_a_child",
        columns={"place": [str(place)] * 2},
        reward_timeout=1,
        reward_errors="none",
    )
    assert score(completions=["b", "c"]).rewards_BK.tolist() == [[1], [2]]
    first = int(place.read_text())
    assert alive(first)  # it may be of use to the next call
    assert score().metrics == {"rewards/hides_a_child/timeouts": 1}
    second = int(place.read_text())
    assert not alive(first) and not alive(second)
    assert score(completions=["b", "c"]).rewards_BK.tolist() == [[1], [2]]
    judges.close()
    assert not alive(int(place.read_text()))


def alive(pid: int) -> bool:
    time.sleep(0.05)
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "XZ"
    except FileNotFoundError:
        return False


@linux
@pytest.mark.fault(
    "memory runs out while a reward function has its part in it",
    "the system ends the function's process before the run",
)
def test_the_process_of_a_function_is_the_first_to_go(write, judge):
    mine = write(FAULTY)
    _, score = judge(mine + "shows_how_soon_it_is_ended")
    assert score().extra == {"score": ["1000"] * 2}  # the most there is, of -1000 to 1000
    assert int(Path("/proc/self/oom_score_adj").read_text()) < 1000


@pytest.mark.fault(
    "a reward function changes the completions, ids, prompts and columns that it is given",
    "other functions and the run have what was sampled",
)
@pytest.mark.parametrize("reward_timeout", [None, 60.0], ids=["here", "apart"])
def test_what_is_given_is_a_copy(write, judge, reward_timeout):
    mine, name = write(FAULTY), "changes_what_it_is_given"
    seen = write_second(mine)
    message = [[{"role": "user", "content": "p"}] for _ in range(2)]
    given = {
        "prompts": message,
        "completions": [[{"role": "assistant", "content": "a"}] for _ in range(2)],
        "completion_ids": [[1, 4], [2, 3, 4]],
        "columns": {"here": [[{"content": "h"}], [{"content": "h"}]]},
    }
    before = json.dumps(given)
    _, score = judge(mine + name, seen, reward_timeout=reward_timeout)
    scores = score(**given)
    assert json.dumps(given) == before
    expected = {k: given[k] for k in ("prompts", "completions", "completion_ids")}
    assert json.loads(scores.extra["seen"][0]) == expected | given["columns"]


def write_second(mine: str) -> str:
    path = Path(mine[:-1]).with_name("other.py")
    path.write_text(
        "import json\n"
        "def sees(log_extra, trainer_state, log_metric, **given):\n"
        "    log_extra('seen', [json.dumps(given)] * 2)\n"
        "    return [1, 1]\n"
    )
    return f"{path}:sees"


@pytest.mark.fault(
    "the classifier that judges gives NaN",
    "the run stops and names the completion; with reward_errors: none the batch counts as invalid",
)
def test_a_reward_model_that_gives_nan(judge):
    from small_models import small_tokenizer
    from transformers import AutoModelForSequenceClassification, Qwen3Config

    from fastgrpo.rewards import RewardModel

    tokenizer = small_tokenizer()
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 4}
    config = Qwen3Config(
        vocab_size=len(tokenizer), intermediate_size=8, num_key_value_heads=2, num_labels=1, **sizes
    )
    model = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        model.score.weight.fill_(float("nan"))
    judging = RewardModel(model, tokenizer, device="cpu")
    _, score = judge(judging)
    with pytest.raises(RewardError, match=r"returned nan for completion 0; return a finite numbe"):
        score()
    _, score = judge(judging, reward_errors="none")
    (problem,) = score().problems
    assert "returned nan for completion 0" in problem


@pytest.mark.slow
@pytest.mark.fault(
    "in the middle of a run a reward function dies, or gives NaN",
    "the run stops with what it has written, or goes on without those rewards and counts them",
)
@pytest.mark.parametrize(
    ("name", "kind"), [("nan_now_and_then", "invalid"), ("dies_now_and_then", "exceptions")]
)
def test_a_run_goes_on_or_stops_as_told(start, write, name, kind):
    faulty = write(FAULTY) + name
    trainer = start("on", reward_funcs=[faulty, "tag_count"], reward_errors="none")
    trainer.train()
    metrics = lines(trainer.run.path / "metrics.jsonl")
    assert [m.get(f"rewards/{name}/{kind}") for m in metrics] == [None, 1, 1]
    assert [m[f"rewards/{name}/mean"] for m in metrics] == [1, None, 1]
    told = [x for x in lines(trainer.run.path / "warnings.jsonl") if name in x["text"]]
    assert [x["step"] for x in told] == [2]
    trainer = start("stopped", reward_funcs=[faulty, "tag_count"])
    with pytest.raises(RewardError, match=rf"'{name}' .*; (mend it, )?or set reward_errors: none"):
        trainer.train()
    assert len(lines(trainer.run.path / "metrics.jsonl")) == 1


def descendants() -> set[int]:
    """Return every process below this one, those included that nobody has waited for."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
    found, more = set[int](), {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in more} - found:
        found |= more
    return found


ENDLESS = """
import os, subprocess, sys, time

def in_python(**columns):
    while True:
        pass

def in_c(**columns):
    return 9 ** 9 ** 9

def asleep(**columns):
    time.sleep(600)

def with_children(**columns):
    os.fork() or time.sleep(600)
    subprocess.Popen(["sleep", "600"], start_new_session=True).wait()
"""


@linux
@pytest.mark.slow
@pytest.mark.fault(
    "1,000 timeouts of functions that hang in Python, in C and asleep, with children",
    "all are counted; no process, zombie, thread or file handle is left",
)
def test_a_thousand_timeouts_leave_nothing(write, judge):
    mine = write(ENDLESS)
    names = ["in_python", "in_c", "asleep", "with_children"]
    judges, score = judge(*(mine + n for n in names), reward_timeout=0.02, reward_errors="none")
    before = descendants() - {p._popen.pid for p in judges._processes.values() if p._popen}
    score()
    handles, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    for _ in range(249):
        scores = score()
    assert scores.metrics == {f"rewards/{name}/timeouts": 250 for name in names}
    assert len(os.listdir("/proc/self/fd")) == handles
    assert threading.active_count() == threads
    assert descendants() <= before
    marks = [p._mark.encode() for p in judges._processes.values()]
    for place in Path("/proc").glob("[0-9]*/environ"):
        try:
            environment = place.read_bytes()
        except OSError:
            continue
        assert not any(mark in environment for mark in marks), place
