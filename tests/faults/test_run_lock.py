"""A run directory has one process at a time, and the dead keep nothing."""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from small_runs import lines

from fastgrpo.run_directory import RunDirectory
from fastgrpo.run_lock import RunLock, check_unused
from fastgrpo.trainer import Trainer

QUICK = {
    "reward": "silent", "reward_timeout": None, "max_steps": 1, "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
}  # fmt: skip
HOLD = """
import os, subprocess, sys, time
from pathlib import Path
from fastgrpo.run_lock import RunLock

lock = RunLock(Path(sys.argv[1]))
if os.fork() == 0:
    sys.exit()  # tidies up, which must not give the lock back
os.wait()
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(child.pid, flush=True)
time.sleep(60)
"""


@pytest.fixture(scope="module")
def holder(tmp_path_factory):
    """Start a process that has the lock of a directory, and a child; yield all three.

    Another child of it has ended.
    """
    folder = tmp_path_factory.mktemp("held")
    (folder / "hold it.py").write_text(HOLD)
    run = folder / "run"
    run.mkdir()
    arguments = [sys.executable, str(folder / "hold it.py"), str(run)]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    yield run, process, child
    process.kill()
    process.wait()
    os.kill(child, signal.SIGKILL)
    process.stdout.close()


@pytest.mark.fault(
    "a run directory in use by another process", "it is refused, and the process is named"
)
def test_a_directory_in_use_is_refused(holder, start, tmp_path):
    run, process, _ = holder
    owner = json.loads((run / ".running.json").read_text())
    command = shlex.join(["hold it.py", str(run)])
    assert owner == {
        "pid": process.pid, "host": socket.gethostname(), "since": owner["since"],
        "command": command,
    }  # fmt: skip
    sentence = (
        f"output_dir: {run} is in use by process {process.pid} on {owner['host']}, since "
        f"{owner['since']}: {command}; wait until it has ended, end it, or choose another "
        "output_dir"
    )
    config = start(**QUICK).config
    before = sorted(run.iterdir())
    for resume in (False, True):
        with pytest.raises(ValueError) as error:
            Trainer(replace(config, output_dir=str(run)), resume=resume)
        assert str(error.value) == sentence
    with pytest.raises(ValueError) as error:
        RunLock(run)
    assert str(error.value) == sentence
    assert sorted(run.iterdir()) == before


@pytest.mark.fault(
    "a process killed that had a run directory, while one that it has started lives on",
    "the next takes the directory over, and says so once",
)
def test_the_lock_of_a_dead_process_is_taken_over(holder, start, capsys):
    run, process, child = holder
    process.kill()
    process.wait()
    os.kill(child, 0)  # lives
    trainer = start(**QUICK, output_dir=str(run))
    told = f"taken over from process {process.pid} on {socket.gethostname()}, since"
    assert " ".join(capsys.readouterr().out.split()).count(told) == 1
    trainer.train()
    assert not {".lock", ".running.json"} & {path.name for path in run.iterdir()}
    lock = RunLock(run)
    assert lock.left_by is None
    lock.release()


def test_a_trainer_has_its_directory_until_it_is_done(start, tmp_path):
    trainer = start(**QUICK)
    with pytest.raises(ValueError, match=f"is in use by process {os.getpid()} on"):
        start(**QUICK)
    assert (tmp_path / "run" / "config.yaml").exists()
    trainer.train()
    check_unused(tmp_path / "run")


@pytest.mark.fault(
    "a run is started twice at the same time in the same new directory",
    "the second is refused, and what the first has written stays",
)
def test_the_second_of_two_leaves_what_the_first_has_written(start):
    """Both have found it free before they loaded their models."""
    first = start(**QUICK)
    before = {path.name: path.read_bytes() for path in first.run.path.iterdir()}
    with pytest.raises(ValueError, match=f"is in use by process {os.getpid()} on"):
        RunDirectory(first.config, "train")
    assert {path.name: path.read_bytes() for path in first.run.path.iterdir()} == before
    assert "config.yaml" in before


def test_a_trainer_that_fails_gives_its_directory_back(start, tmp_path):
    trainer = start(**QUICK)
    trainer.learner.optimise = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    check_unused(tmp_path / "run")
    assert not (tmp_path / "run" / ".running.json").exists()


@pytest.mark.fault(
    "a process killed as it begins a run, before anything is written",
    "what it leaves is in nobody's way",
)
def test_what_is_left_of_a_beginning_is_no_run(start, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    for name in (".lock", ".running.json", ".config.yaml.partial"):
        (run / name).write_text("")
    assert start(**QUICK).train()["steps"] == 1


@pytest.mark.slow
@pytest.mark.fault(
    "kill -9 of a run in the midst of a step, whose reward function is running",
    "the same command with --resume auto takes the directory over and ends the run",
)
def test_a_killed_run_is_taken_over(start, tmp_path):
    (tmp_path / "slow.py").write_text(
        "import time\n"
        "from pathlib import Path\n"
        "def slow(completions, **columns):\n"
        "    flag = Path(__file__).with_name('waiting')\n"
        "    if not flag.exists():\n"
        "        flag.write_text('')\n"
        "        time.sleep(60)\n"
        "    return [1.0] * len(completions)\n"
    )
    config = yaml.safe_load((start("other").run.path / "config.yaml").read_text())
    config |= {"reward_funcs": [f"{tmp_path}/slow.py:slow"], "output_dir": str(tmp_path / "run")}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "fastgrpo", "train", str(tmp_path / "config.yaml")]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        late = time.monotonic() + 120
        while not (tmp_path / "waiting").exists():
            assert first.poll() is None and time.monotonic() < late
            time.sleep(0.05)
    finally:
        first.kill()
        first.wait()
    second = subprocess.run(
        [*command, "--resume", "auto"], capture_output=True, text=True, timeout=200
    )
    assert second.returncode == 0, second.stderr
    said = " ".join(second.stdout.split())
    assert said.count(f"taken over from process {first.pid} on") == 1
    assert f"train {tmp_path}/config.yaml, which has died" in said
    assert len(lines(tmp_path / "run" / "metrics.jsonl")) == 3
    assert not list(Path(tmp_path / "run").glob(".*"))
