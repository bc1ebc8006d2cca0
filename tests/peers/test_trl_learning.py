"""Our whole trainer against TRL's: each samples for itself, and they learn equally well."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import datasets
import pytest
from small_models import small_model, small_tokenizer
from trainers import run_ours, run_trl

from benchmarks.trainer_cells import Task

pytestmark = [pytest.mark.peers, pytest.mark.slow]

SEEDS = (0, 1, 2)
LAST = 8  # steps whose mean reward is what a run has reached
STUDENT = 4.604  # what |t| of 2 * 3 - 2 degrees of freedom exceeds once in a hundred times
OPTIONS: dict[str, Any] = {
    "num_generations": 4,
    "max_completion_length": 12,
    "per_device_train_batch_size": 128,
    "gradient_accumulation_steps": 1,
    "learning_rate": 5e-3,
    "lr_scheduler_type": "constant",
    "max_steps": 24,
    "gradient_checkpointing": False,
}


def letter_e(completions: list[str], **columns: Any) -> list[float]:
    """Reward what a model of random weights can learn in seconds: to write more of one letter."""
    return [text.count("e") / max(len(text), 1) for text in completions]


def test_both_learn_equally_well_over_three_seeds(tmp_path: Path) -> None:
    """The means over the seeds differ by no more than chance, by Student's test for two samples.

    With m and s the mean and the standard deviation over n seeds of what the runs have reached,
    |m1 - m2| < STUDENT * sqrt((s1^2 + s2^2) / n). Were s large that would say little, so that it
    must be below a tenth of the mean.
    """
    prompts = datasets.Dataset.from_dict({"prompt": [f"Ann has {n} eggs." for n in range(32)]})
    reached: dict[str, list[float]] = {"ours": [], "theirs": []}
    for seed in SEEDS:
        task = Task(small_model(), small_tokenizer(), prompts)
        options = OPTIONS | {"seed": seed}
        only_ours = {"reward_funcs": [f"{__file__}:letter_e"], "cpu_threads": 1}
        directory = tmp_path / str(seed)
        runs = {
            "ours": run_ours(task, directory, options | only_ours),
            "theirs": run_trl(task, directory, options, letter_e),
        }
        for name, run in runs.items():
            rewards = run.logged("reward")
            assert rewards[0] < 0.05 and len(rewards) == OPTIONS["max_steps"]
            reached[name].append(statistics.mean(rewards[-LAST:]))
    ours, theirs = reached["ours"], reached["theirs"]
    noise = math.hypot(statistics.stdev(ours), statistics.stdev(theirs)) / math.sqrt(len(SEEDS))
    difference = abs(statistics.mean(ours) - statistics.mean(theirs))
    assert difference < STUDENT * noise, reached
    for found in (ours, theirs):
        assert min(found) > 0.2
        assert statistics.stdev(found) < 0.1 * statistics.mean(found), reached
