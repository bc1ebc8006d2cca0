"""A run of many steps takes no more memory, files, threads or processes than one of a few."""

import json
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import yaml
from small_models import small_tokenizer
from small_runs import lines
from transformers import AutoModelForCausalLM, Qwen3Config

STEPS, WARM, EVERY = 2000, 600, 20
"""Steps of the run, before what it holds is looked at, and between two looks."""
BYTES_A_STEP = 1000
"""Measured are 80, of what the console draws; the metrics of a step were 3,300 when kept."""
PATIENCE = 500
"""Seconds."""


class Follower:
    """Reads what is added to a file while it is written, as `tail -f` does."""

    def __init__(self, path):
        self.path, self.place, self.rest, self.lines = path, 0, b"", []

    def read(self):
        """Take the lines that have come; what has no end yet is left for the next time."""
        if self.path.exists():
            with self.path.open("rb") as file:
                file.seek(self.place)
                added = file.read()
            self.place += len(added)
            *whole, self.rest = (self.rest + added).split(b"\n")
            self.lines += map(json.loads, whole)


def held(process):
    """Return what a process and those that it has started hold now."""
    children = process.children(recursive=True)
    return {
        "memory": process.memory_info().rss,
        "memory of others": sum(child.memory_info().rss for child in children),
        "files": process.num_fds(),
        "threads": process.num_threads(),
        "processes": len(children),
    }


def save_tiny_model(path):
    tokenizer = small_tokenizer()
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        max_position_embeddings=128,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture
def config(tmp_path, two_splits):
    path = tmp_path / "long.yaml"
    values = {
        "model_name_or_path": save_tiny_model(tmp_path / "model"),
        "dataset_name": two_splits,
        "reward_funcs": [f"{tmp_path}/my_rewards.py:letter_e"],
        "output_dir": str(tmp_path / "run"),
        "num_generations": 2,
        "per_device_train_batch_size": 4,
        "max_completion_length": 3,
        "learning_rate": 1e-4,
        "max_steps": STEPS,
        "eval_strategy": "steps",
        "eval_steps": 200,
        "max_eval_samples": 2,
        "save_steps": 100,
        "save_total_limit": 2,
        "cpu_threads": 1,
    }
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="counts what processes hold")
@pytest.mark.fault("2,000 steps", "no growth of memory, files, threads or processes")
@pytest.mark.fault("a reader that follows the files of a run", "it reads every line, and no other")
def test_a_long_run_holds_no_more_than_a_short_one(config, tmp_path):
    run, found, end = tmp_path / "run", [], time.monotonic() + PATIENCE
    followers = [Follower(run / f"{name}.jsonl") for name in ("metrics", "completions", "rewards")]
    command = [sys.executable, "-m", "fastgrpo", "train", str(config)]
    with (tmp_path / "told.txt").open("w") as told:
        process = subprocess.Popen(command, stdout=told, stderr=subprocess.STDOUT)
    try:
        while process.poll() is None and time.monotonic() < end:
            for follower in followers:
                follower.read()
            step = len(followers[0].lines)
            if step // EVERY > len(found):
                found.append({"step": step, **held(psutil.Process(process.pid))})
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, (tmp_path / "told.txt").read_text()[-2000:]
    late = [line for line in found if line["step"] > WARM]
    assert len(late) > 40
    steps = [line["step"] for line in late]
    for name in ("memory", "memory of others"):
        assert np.polyfit(steps, [line[name] for line in late], 1)[0] < BYTES_A_STEP, late
    # Files are open and threads alive for moments; what is never given back raises the least.
    for name in ("files", "threads", "processes"):
        counts = [line[name] for line in late]
        assert min(counts[-20:]) <= min(counts[:20]), counts
    assert found[-1]["processes"] == 1  # of the reward function
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"step-1900", "step-2000"}
    for follower in followers:
        follower.read()
        assert not follower.rest
        assert follower.lines == lines(follower.path)
    assert [line["step"] for line in followers[0].lines] == list(range(1, STEPS + 1))
    logged = [1, *range(10, STEPS + 1, 10)]
    assert [line["step"] for line in followers[1].lines] == [x for x in logged for _ in range(4)]
    assert [line["step"] for line in followers[2].lines] == list(range(1, STEPS + 1))
