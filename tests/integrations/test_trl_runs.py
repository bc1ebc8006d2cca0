"""Whole runs of `FastGRPOTrainer` beside those of TRL's own, and what a step of each costs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM
from trl_pairs import Pair, assert_same, make_trainer, saved_model, trl

from benchmarks.measure import FlopCounter, LiveBytes
from fastgrpo.integrations.trl import FastGRPOTrainer

pytestmark = pytest.mark.peers


def sevens(completions: list[str], **_: Any) -> list[float]:
    return [text.count("7") + 0.1 * len(set(text)) for text in completions]


def train(trainer_class: Any, directory: Path, **options: Any) -> Any:
    """Let a trainer sample and learn on CPU."""
    model = saved_model(directory)
    with torch.random.fork_rng():
        trainer = make_trainer(trainer_class, model, directory, reward=sevens, **RUN | options)
        trainer.train()
    return trainer


RUN = {
    "max_steps": 6, "learning_rate": 1e-2, "save_strategy": "no", "max_completion_length": 8,
    "adam_epsilon": 1e-4, "per_device_train_batch_size": 8, "num_generations": 4,
    "logging_steps": 1,
}  # fmt: skip
RUNS: dict[str, dict[str, Any]] = {
    "dapo": {},
    "several iterations, reference": {
        "num_iterations": 2, "steps_per_generation": 2, "beta": 0.1, "loss_type": "grpo",
    },
    "accumulation, adaptive entropy, truncated ones masked, evaluation": {
        "gradient_accumulation_steps": 2, "use_adaptive_entropy": True, "entropy_target": 3.0,
        "mask_truncated_completions": True, "eval_strategy": "steps", "eval_steps": 3,
        "num_generations_eval": 2, "max_completion_length": 40,
    },
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS)
def test_runs_from_the_same_seed_are_the_same(tmp_path: Path, options: dict[str, Any]) -> None:
    """They sample for themselves: one token of difference and the rewards would differ."""
    theirs = train(trl.GRPOTrainer, tmp_path / "theirs", **options)
    ours = train(FastGRPOTrainer, tmp_path / "ours", **options)
    assert len(theirs.state.log_history) == len(ours.state.log_history) > 6
    for wanted, found in zip(theirs.state.log_history, ours.state.log_history, strict=True):
        assert found.keys() == wanted.keys()
        for name in wanted:
            if re.search("time|runtime|per_second", name):
                continue
            exact = re.search("reward|num_tokens|completions|epoch|step$", name)
            if exact or wanted[name] is None:
                assert found[name] == wanted[name], name
            else:
                assert found[name] == pytest.approx(wanted[name], rel=2e-3, abs=2e-5), name
    rewards = [line["reward"] for line in ours.state.log_history if "reward" in line]
    assert rewards[-1] > rewards[0]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_two_processes(tmp_path: Path, way: str) -> None:
    """DDP: both trainers learn the same. FSDP2: gradients are those of whole models."""
    here, root = Path(__file__).parent, Path(__file__).parents[2]
    script = [str(here / "trl_ranks.py"), way, str(tmp_path)]
    found = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node=2",
            *script,
        ],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, (root, root / "kernels", here.parent, here))),
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert found.stdout.count("same") == 2, found.stderr[-3000:]


# What it costs


def test_fewer_flops_and_fewer_bytes_than_trl(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a vocabulary as much larger than the hidden size as that of a language model."""
    import trl.trainer.utils as utils

    if hasattr(utils, "_use_triton"):  # on a GPU TRL's head leaves out the prompt, so here too
        monkeypatch.setattr(utils, "_use_triton", lambda device: True)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=8192, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=1, head_dim=32, tie_word_embeddings=False,
        )
    )  # fmt: skip
    pair = Pair.make(tmp_path, model)
    g = torch.Generator().manual_seed(0)
    inputs: dict[str, Any] = {
        name: torch.randint(2, 8000, (8, length), generator=g)
        for name, length in (("prompt_ids", 16), ("completion_ids", 64))
    }
    inputs |= {
        "prompt_mask": torch.ones_like(inputs["prompt_ids"]),
        "completion_mask": torch.ones_like(inputs["completion_ids"]),
        "advantages": torch.randn(8, generator=g),
        "num_items_in_batch": torch.tensor(8 * 64),
    }
    assert_same(pair, inputs)

    def cost(trainer: Any) -> tuple[int, int]:
        def step() -> None:
            trainer._compute_loss(trainer.model, inputs).backward()

        trainer.model.zero_grad()
        with FlopCounter() as flops:
            step()
        with LiveBytes() as live:  # with the gradients of the model in place
            step()
        return flops.get_total_flops(), live.peak

    def body() -> int:
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        with FlopCounter() as flops:
            pair.ours.model.model(ids, attention_mask=torch.ones_like(ids))[0].sum().backward()
        return flops.get_total_flops()

    (their_flops, their_bytes), (our_flops, our_bytes) = cost(pair.theirs), cost(pair.ours)
    head = 8 * 64 * 64 * 8192
    assert their_flops - body() == 8 * head
    assert our_flops - body() == 6 * head
    assert our_bytes < their_bytes / 4
