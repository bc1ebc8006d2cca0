"""What tests of several processes run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from small_models import save_small_model
from small_runs import STEADY

REWARDS = """
import os, time

def letter_e(completions, **columns):
    return [text.count("e") + 0.1 * len(text) for text in completions]

def fails(completions, trainer_state, **columns):
    if os.environ["RANK"] == "1" and trainer_state.global_step == 2:
        raise RuntimeError("no rewards today")
    return letter_e(completions)

def falters(completions, trainer_state, **columns):
    if trainer_state.global_step == 2:
        raise RuntimeError("no rewards today")
    return letter_e(completions)
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Return a directory with a configuration in a file; its runs last until they are ended."""
    save_small_model(tmp_path / "model")
    (tmp_path / "mine.py").write_text(REWARDS)
    rows = [{"prompt": f"Ann has {n} eggs.\n"} for n in range(2, 34)]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "model_name_or_path": str(tmp_path / "model"),
        "dataset_name": str(tmp_path / "problems.jsonl"),
        "output_dir": str(tmp_path / "run"),
        "reward_funcs": [f"{tmp_path}/mine.py:letter_e"],
        "num_generations": 4,
        "per_device_train_batch_size": 8,
        "max_completion_length": 12,
        "lr_scheduler_type": "constant",
        "max_steps": 10_000,
        "save_strategy": "no",
        "cpu_threads": 1,
        **STEADY,
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    return tmp_path
