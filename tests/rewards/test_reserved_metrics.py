"""Every metric that the trainer writes has a name that reward functions cannot log."""

import json
from typing import get_args

import pytest

from fastgrpo.rewards.contract import is_reserved
from fastgrpo_kernels._reduce import metric_names
from fastgrpo_kernels.config import LossType


@pytest.mark.parametrize("loss_type", get_args(LossType))
@pytest.mark.parametrize("num_sequences", [None, 2])
def test_metrics_of_the_loss(loss_type, num_sequences):
    names = metric_names(
        loss_type, with_kl=True, with_entropy_bonus=True, num_sequences=num_sequences
    )
    assert [name for name in names if not is_reserved(name)] == []


def test_metrics_of_a_run(start, word_problems, tmp_path):
    rows, folder = word_problems.read_text().splitlines(keepends=True), tmp_path / "data"
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(rows[:30]))
    (folder / "test.jsonl").write_text("".join(rows[30:]))
    trainer = start(
        dynamic_sampling=True,
        entropy_coef=0.01,
        beta=0.1,
        eval_strategy="steps",
        eval_steps=1,
        max_steps=1,
        dataset_name=str(folder),
        dataset_test_split="test",
    )
    trainer.train()
    written = (trainer.run.path / "metrics.jsonl").read_text().splitlines()
    names = {name for line in written for name in json.loads(line)}
    assert {"step", "reward", "kl", "eval_reward", "dynamic_sampling/rounds"} <= names
    assert [name for name in names if not is_reserved(name)] == []


def test_metrics_of_several_processes():
    assert is_reserved("parallel/imbalance")


def test_other_names_are_free():
    for name in ("letters", "steps", "my/reward", "reward/mean", "evaluated", "accuracy_reward"):
        assert not is_reserved(name)
