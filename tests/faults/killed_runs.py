"""Runs that are killed and go on, each in a child of this process, which has imported everything.

`killed_runs.py FOLDER random`: at random times, over and over; `killed_runs.py FOLDER aimed`:
before every call that changes a directory or waits for the disk, and in the midst of lines. The
last line that is printed is a count of the kills. Each run ends as one that was never killed.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from small_models import save_small_model
from small_runs import assert_same_run, left_by, lines, run_config

from fastgrpo import run_directory
from fastgrpo.manifest import damage
from fastgrpo.run_checkpoints import RunCheckpoints
from fastgrpo.trainer import Trainer

KILLS, PER_RUN = 25, 5
STRIDE = 3  # calls; where they are in a save differs from step to step
STEPS = 6
REWARD = """
def letter_e(completions, **columns):
    return [text.count("e") + 0.1 * len(text) for text in completions]
"""
CALLS = ("fsync", "replace", "rename", "mkdir", "unlink", "rmdir")


def config_of(folder: Path, name: str, **values: Any) -> Any:
    return run_config(
        folder,
        folder / "data",
        str(folder / "model"),
        **{
            "max_steps": STEPS, "save_steps": 1, "save_total_limit": 2, "num_iterations": 2,
            "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1,
            "reward_timeout": None, "output_dir": str(folder / name), "max_completion_length": 6,
            "eval_strategy": "steps", "eval_steps": 2, "dataset_test_split": "test",
            "max_eval_samples": 2, "metric_for_best_model": "reward", **values,
        },
    )  # fmt: skip


def child(work: Callable[[], object]) -> int:
    """Do something in a child, which ends without tidying up, and return its process."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return pid


def ended(pid: int) -> bool:
    """Wait for a child, and say whether it ended by itself.

    Raises:
        AssertionError: neither so nor by SIGKILL.
    """
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, -signal.SIGKILL), status
    return status == 0


def train(config: Any) -> None:
    Trainer(config, resume=True).train()


def finish(config: Any) -> None:
    """Go on to the end, in a child."""
    assert ended(child(lambda: train(config)))


def check(run: Path, wanted: Any) -> None:
    """Hold what a run has left to one that was never killed; there is nothing beside it."""
    assert_same_run(left_by(run), wanted)
    assert [line["step"] for line in lines(run / "metrics.jsonl")] == list(range(1, STEPS + 1))
    # One more than are kept, if it was killed between the last save and what it deletes.
    assert RunCheckpoints(run).steps()[-2:] == [STEPS - 1, STEPS]
    for path in (run / "best", run / "final", *(run / "checkpoints").iterdir()):
        assert damage(path) is None, path
    hidden = list(run.rglob(".*"))
    assert not hidden, hidden


def check_newest(run: Path) -> None:
    """Hold what a kill has left to a checkpoint that is whole, if a step was ever saved."""
    folder = run / "checkpoints"
    steps = RunCheckpoints(run).steps()
    for step in steps:
        assert damage(folder / f"step-{step}") is None
    if steps:
        kept = (run / "metrics.jsonl").read_text().rpartition("\n")[0].splitlines()
        found = [json.loads(line)["step"] for line in kept]
        assert found[: steps[-1]] == list(range(1, steps[-1] + 1))


def at_random(folder: Path, wanted: Any, seconds: float) -> int:
    """Kill runs at random times, several times each, and return how often."""
    rng = random.Random(0)
    kills = run = 0
    while kills < KILLS:
        run += 1
        config = config_of(folder, f"run-{run}")
        for _ in range(PER_RUN):
            pid = child(lambda config=config: train(config))
            time.sleep(rng.uniform(0, seconds))
            os.kill(pid, signal.SIGKILL)
            killed = not ended(pid)
            kills += killed
            if not killed:
                break
            if Path(config.output_dir).exists():
                check_newest(Path(config.output_dir))
        finish(config)
        check(Path(config.output_dir), wanted)
    return kills


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def aim(config: Any, calls: int) -> None:
    """Go on, and be killed after so many calls."""
    left = calls

    def counting(function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                die()
            return function(*arguments, **options)

        return called

    for name in CALLS:
        setattr(os, name, counting(getattr(os, name)))
    train(config)


def at_calls(folder: Path, wanted: Any) -> int:
    """Kill a run before its first call, go on and kill it some calls later, and so forth.

    So it is killed at every stage of a save, and as it goes on; return how often.
    """
    config = config_of(folder, "aimed")
    kills = 0
    while not ended(child(partial(aim, config, STRIDE * kills))):
        kills += 1
        check_newest(Path(config.output_dir))
    check(Path(config.output_dir), wanted)
    return kills


def tear(config: Any, name: str) -> None:
    """Go on, and be killed in the midst of the second line of metrics, or of the next of a file."""
    append, lines_left = run_directory.append_lines, int(name == "metrics")

    def torn(path: str | Path, some: Any) -> None:
        nonlocal lines_left
        if Path(path).stem != name or lines_left:
            lines_left -= Path(path).stem == name
            return append(path, some)
        with Path(path).open("a") as file:
            file.write('{"step": 5, "rewa')
        die()

    run_directory.append_lines = torn
    train(config)


def in_lines(folder: Path, wanted: Any) -> int:
    """Kill a run in the midst of lines; return how often."""
    config = config_of(folder, "torn")
    names = ("metrics", "completions", "rewards")
    for name in names:
        assert not ended(child(lambda name=name: tear(config, name)))
        assert not (Path(config.output_dir) / f"{name}.jsonl").read_text().endswith("\n")
    finish(config)
    check(Path(config.output_dir), wanted)
    return len(names)


def main(folder: Path, how: str) -> None:
    (folder / "my_rewards.py").write_text(REWARD)
    (folder / "data").mkdir()
    for split, numbers in (("train", range(2, 26)), ("test", range(26, 34))):
        rows = [json.dumps({"prompt": f"Ann has {n} eggs.\n"}) for n in numbers]
        (folder / "data" / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
    assert ended(child(lambda: save_small_model(folder / "model")))
    assert len(os.listdir("/proc/self/task")) == 1  # no thread that a child would lack
    finish(config_of(folder, "whole"))
    wanted = left_by(folder / "whole")
    start = time.monotonic()
    finish(config_of(folder, "again"))
    seconds = time.monotonic() - start
    check(folder / "again", wanted)
    print(f"{seconds:.1f} s a run", flush=True)
    if how == "random":
        kills = at_random(folder, wanted, seconds)
    else:
        kills = in_lines(folder, wanted) + at_calls(folder, wanted)
    print(kills, flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    main(Path(sys.argv[1]), sys.argv[2])
