"""What one process of several fails of ends them all, soon, with a sentence; and what restarts."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from launch import end, popen, torchrun
from safetensors.torch import load_file
from small_runs import lines

from fastgrpo.bad_steps import read_bad_step
from fastgrpo.replay import replay

SECONDS = 60
"""From a fault to the end of the last process."""
FAULTS = Path(__file__).with_name("faults.py")


@dataclass(frozen=True)
class Ended:
    """What came of two processes."""

    status: int
    err: str
    seconds: float
    """Since the fault, or since they were started if there was none."""

    def __post_init__(self) -> None:
        assert self.status != 0, self.err
        assert self.seconds < SECONDS
        # Torchrun's own, and none of ours.
        assert self.err.count("Traceback (most recent call last)") == 1, self.err

    @property
    def said(self) -> list[str]:
        """What we have said in the end: before torchrun's summary, which repeats it."""
        return re.findall("^fastgrpo: (?!loading)(.*)$", self.err, re.MULTILINE)


def launch(place: Path, fault: str, *overrides: str, options: tuple[Any, ...] = ()) -> Any:
    """Run two processes, of which rank 1 has a fault; none is left of what they have started."""
    start = time.time()
    mark = f"test_failures_{os.getpid()}_{start}"
    arguments = [*options, FAULTS, fault, place, "train", place / "config.yaml", *overrides]
    done = torchrun(2, *arguments, env={"FASTGRPO_TEST": mark}, cwd=place)
    ended = time.time()
    if (place / "fault").exists():
        start = float((place / "fault").read_text())
    assert_none_left(mark)
    return done, ended - start


def fail(place: Path, fault: str, *overrides: str) -> Ended:
    done, seconds = launch(place, fault, *overrides)
    return Ended(done.returncode, done.stderr, seconds)


def assert_none_left(mark: str, patience: float = 10) -> None:
    """Reward functions in processes of their own end with what has started them, very soon."""
    if sys.platform != "linux":
        return
    late = time.monotonic() + patience
    while left := [p for p in Path("/proc").glob("[0-9]*") if mark in environment(p)]:
        assert time.monotonic() < late, left
        time.sleep(0.1)


def environment(process: Path) -> str:
    try:
        return (process / "environ").read_text(errors="replace")
    except OSError:  # it has ended, or is another user's
        return ""


def assert_steps(run: Path, count: int) -> None:
    """There are so many whole lines, each of its step."""
    text = (run / "metrics.jsonl").read_text()
    assert text.endswith("\n")
    assert [json.loads(line)["step"] for line in text.splitlines()] == list(range(1, count + 1))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ("memory", "rank 1: CUDA out of memory. Tried to allocate 2.00 GiB"),
        # The norm is that of all, so that any of them may be the first to say so.
        ("gradient", "rank [01]: step 3: the loss is .* and the norm of the gradient is nan; .*"),
        ("reward", "rank 1: reward function 'fails' raised RuntimeError: no rewards today over 8"),
    ],
)
def test_what_fails_on_one_rank_is_told_once_and_ends_all(place, fault, sentence):
    overrides = {
        "reward": [f"reward_funcs=[{place}/mine.py:fails]"],
        "gradient": ["max_bad_steps=0"],
    }.get(fault, [])
    ended = fail(place, "none" if fault == "reward" else fault, *overrides)
    (said,) = ended.said
    assert re.match(sentence, said)
    summary = ended.err.partition("Root Cause")[2]
    assert said in summary  # of torchrun, whose summary is the last thing to be seen
    assert f"run directory: {place}/run\n" in ended.err
    assert_steps(place / "run", 2)


@pytest.mark.slow
@pytest.mark.fault(
    "a layer gives infinity on one of two processes",
    "both skip the step and go on; the module and the process are named; one replays it",
)
def test_a_step_that_goes_wrong_on_one_rank_is_skipped_by_all(place):
    done, _ = launch(place, "overflow", "max_steps=5")
    assert done.returncode == 0, done.stderr
    metrics = lines(place / "run" / "metrics.jsonl")
    assert [m["skipped_steps"] for m in metrics] == [0, 0, 1, 1, 1]
    assert [m["grad_norm"] is None for m in metrics] == [False, False, True, False, False]
    folder = place / "run" / "bad_steps" / "step-3"
    bad = read_bad_step(folder)
    assert bad.finding is not None
    assert (bad.finding.module, bad.finding.phase) == ("model.layers.1.mlp.down_proj", "forward")
    assert bad.finding.rank == 1
    found = replay(folder)  # without the fault, which was in memory
    assert not found.came_again and found.grad_norm > 0


@pytest.mark.slow
def test_a_slip_of_ours_is_one_traceback(place):
    done, seconds = launch(place, "slip")
    assert done.returncode != 0 and seconds < SECONDS
    assert done.stderr.count("fastgrpo: rank 1: Traceback (most recent call last)") == 1
    assert done.stderr.count('KeyError: "nobody\'s input"\nrun directory:') == 1


@pytest.mark.slow
def test_what_is_wrong_for_all_is_told_once(place):
    ended = fail(place, "none", "loss_type=dpao")
    (said,) = ended.said
    assert re.match("rank [01]: .*config.yaml:", said)
    assert ended.err.partition("Root Cause")[0].count("'dpao'") == 2  # there, and in the summary
    assert not (place / "run").exists()


@pytest.mark.slow
def test_what_cannot_be_loaded_on_one_rank_ends_all(place):
    """As when a file is missing on one of two machines."""
    ended = fail(place, "missing model")
    (said,) = ended.said
    assert re.match("rank 1: model_name_or_path: .*nowhere", said)
    assert not (place / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["killed as it trains", "killed as it samples"])
def test_a_killed_rank_ends_the_others(place, fault):
    ended = fail(place, fault)
    (said,) = ended.said
    assert said.startswith("rank 0: ")
    assert "another process" in said
    assert "Signal 9 (SIGKILL) received by PID" in ended.err.partition("Root Cause")[2]
    assert "gloo" not in ended.err
    assert_steps(place / "run", 2)


@pytest.mark.slow
@pytest.mark.fault(
    "several processes, and Ctrl-C or SIGTERM for torchrun or SIGUSR1 for one of them",
    "all stop after the same step, which is saved once, and say so once",
)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_stops_all_after_one_step(place, number):
    mark = f"test_failures_{os.getpid()}_{time.time()}"
    process = popen(
        2, "-m", "fastgrpo", "train", place / "config.yaml", env={"FASTGRPO_TEST": mark}
    )
    try:
        wait_for(place / "run" / "metrics.jsonl", process)
        start = time.time()
        if number == signal.SIGUSR1:
            os.kill(rank_1(mark), number)
        else:
            process.send_signal(number)
        _, err = process.communicate(timeout=SECONDS)
    finally:
        end(process)
    ended = Ended(process.returncode, err, time.time() - start)
    (said,) = ended.said
    steps = len(lines(place / "run" / "metrics.jsonl"))
    assert said == (
        f"stopped by {number.name} after step {steps}, saved in {place}/run/checkpoints/step-"
        f"{steps}; start it again with output_dir={place}/run and --resume auto to go on"
    )
    assert_none_left(mark)
    assert_steps(place / "run", steps)
    if number != signal.SIGTERM:  # one of them shows that there is something to go on from
        return
    arguments = ["-m", "fastgrpo", "train", place / "config.yaml", "--resume", "auto"]
    process = popen(2, *arguments, env={"FASTGRPO_TEST": mark})
    try:
        wait_for_steps(place / "run", steps + 1, process)
    finally:
        end(process)
        process.communicate()


def rank_1(mark: str) -> int:
    """Return the process of rank 1, and none of a reward function."""
    for process in Path("/proc").glob("[0-9]*"):
        variables = environment(process).split("\0")
        command = (process / "cmdline").read_text() if f"FASTGRPO_TEST={mark}" in variables else ""
        if "RANK=1" in variables and "\0train\0" in command:
            return int(process.name)
    raise AssertionError("there is none")


def wait_for_steps(run: Path, count: int, process: Any, patience: float = 240) -> None:
    late = time.monotonic() + patience
    while len(lines(run / "metrics.jsonl")) < count:
        assert process.poll() is None and time.monotonic() < late
        time.sleep(0.1)


def wait_for(path: Path, process: Any, patience: float = 240) -> None:
    late = time.monotonic() + patience
    while not path.exists():
        assert process.poll() is None and time.monotonic() < late
        time.sleep(0.1)


RESTARTED = ("max_steps=5", "save_strategy=steps", "save_steps=2", "beta=0.1")


@pytest.mark.slow
def test_torchrun_restarts_a_run_from_its_last_checkpoint(place):
    """Or from the beginning, if it has none; and what is restarted ends as what was not."""

    def weights(run: str) -> dict[str, torch.Tensor]:
        return load_file(place / run / "final" / "model.safetensors")

    def metrics(run: str) -> list[dict[str, Any]]:
        return [
            {
                name: value
                for name, value in line.items()
                if not re.search("time|memory|_per_", name)
            }
            for line in lines(place / run / "metrics.jsonl")
        ]

    done, _ = launch(place, "none", *RESTARTED, f"output_dir={place}/whole")
    assert done.returncode == 0, done.stderr
    assert len(metrics("whole")) == 5
    for fault, said in (
        ("killed as it trains", f"resumed after step 2: {place}/run-1/checkpoints/step-2"),
        ("killed at once", ""),
    ):
        run = "run-1" if said else "run-2"
        done, _ = launch(
            place, fault, *RESTARTED, f"output_dir={place}/{run}", options=("--max-restarts", 1)
        )
        assert done.returncode == 0, done.stderr
        assert (place / "fault").exists()
        assert "SIGKILL" in done.stderr or "exitcode: -9" in done.stderr
        assert done.stdout.count("resumed after") == bool(said)
        assert said in done.stdout
        assert metrics(run) == metrics("whole")
        found, wanted = weights(run), weights("whole")
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            assert torch.equal(found[name], value), name
        (place / "fault").unlink()


@pytest.mark.slow
def test_a_restart_does_not_go_on_with_the_run_of_another_job(place):
    """Which a first attempt has refused, since its directory was not empty."""
    (place / "run").mkdir()
    config = yaml.safe_load((place / "config.yaml").read_text())
    (place / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    (place / "run" / "metrics.jsonl").write_text('{"step": 1}\n')
    done, _ = launch(place, "none", options=("--max-restarts", 1))
    assert done.returncode != 0
    said = re.findall(
        r"^fastgrpo: rank \d: output_dir: .* not an empty directory", done.stderr, re.M
    )
    assert len(said) == 2, done.stderr  # one of each attempt
    assert (place / "run" / "metrics.jsonl").read_text() == '{"step": 1}\n'


@pytest.mark.slow
def test_processes_must_bring_the_same_model(tmp_path):
    """As they do in `step_cases`, whose models go through the same door."""
    script = Path(__file__).with_name("two_models.py")
    done = torchrun(2, script, 1e-3, tmp_path / "run")
    assert done.returncode != 0
    told = "the processes have brought different models: call torch.manual_seed before you make"
    assert told in done.stderr
