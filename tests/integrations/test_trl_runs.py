"""Whole runs of `FastGRPOTrainer` beside those of TRL's own, and what a step of each costs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from small_models import small_tokenizer
from transformers import Qwen3Config, Qwen3ForCausalLM
from trl_pairs import Pair, assert_same, make_trainer, saved_model, trl

from benchmarks.measure import FlopCounter, LiveBytes
from fastgrpo import linear_grpo_loss
from fastgrpo.integrations.trl import FastGRPOTrainer
from fastgrpo_kernels import _products, _row_triton

pytestmark = [
    pytest.mark.peers,
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),  # TRL's own
]


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
def test_the_lines_in_the_readme_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = Path("README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    (lines,) = [block for block in blocks if "FastGRPOTrainer(" in block]
    without_gpu = 'GRPOConfig("runs/trl", use_cpu=True, bf16=False, report_to=[], '
    lines = lines.replace('GRPOConfig("runs/trl", ', without_gpu)
    monkeypatch.chdir(tmp_path)
    model = saved_model(tmp_path)
    small_tokenizer().save_pretrained(tmp_path / "model")
    dataset = datasets.Dataset.from_dict({"prompt": ["1+1", "2+3"]})
    names = {"model": model, "reward_funcs": sevens, "dataset": dataset}
    with torch.random.fork_rng():
        exec(lines, names)
    rewards = [line["reward"] for line in names["trainer"].state.log_history if "reward" in line]
    assert type(names["trainer"]) is FastGRPOTrainer and len(rewards) > 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's
def test_compiled_models_beside_a_reference(tmp_path: Path) -> None:
    options = {"beta": 0.1, "max_steps": 2}
    compiler = {"torch_compile": True, "torch_compile_backend": "eager"}
    runs = [train(FastGRPOTrainer, tmp_path, **options, **how) for how in ({}, compiler)]
    wanted, found = ([line["grad_norm"] for line in r.state.log_history[:2]] for r in runs)
    assert found == pytest.approx(wanted, rel=1e-4)


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


class NoWork:
    """Stands in for a kernel that takes no memory; costs do not depend on what it writes."""

    def __getitem__(self, grid: object) -> NoWork:
        return self

    def __call__(self, *_: object, **__: object) -> None:
        pass


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("how", ["bf16", "autocast", "fp32"])
def test_fewer_flops_and_fewer_bytes_than_trl(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, frozen: bool, how: str
) -> None:
    """As on a GPU: TRL leaves out the prompt, and neither side's row kernels take memory.

    Everything is as much smaller as the vocabulary, the tiles too: of 128 by 2,048 logits.
    """
    import trl.kernels.chunked_logprob as theirs
    import trl.trainer.utils as utils

    import fastgrpo.integrations.trl as ours

    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=9000, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=1, head_dim=32, tie_word_embeddings=False,
        )
    )  # fmt: skip
    model.lm_head.weight.requires_grad_(not frozen)
    model = model.bfloat16() if how == "bf16" else model
    pair = Pair.make(tmp_path, model, bf16=how == "autocast")
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
    if how == "fp32":
        assert_same(pair, inputs)

    if hasattr(utils, "_use_triton"):
        monkeypatch.setattr(utils, "_use_triton", lambda device: True)
    monkeypatch.setattr(utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", 2048)
    monkeypatch.setattr(theirs, "TOKEN_CHUNK_SIZE", 128)
    monkeypatch.setattr(ours, "_TILE", 128 * 2048)
    # A CPU has no 16-bit products with fp32 results, and converts slices of so many bytes.
    monkeypatch.setattr(_products, "MIB", 1024)
    for name in ("_forward_tile", "_backward_tile", "_forward_kernel", "_backward_kernel"):
        if hasattr(theirs, name):  # 1.15 has kernels alone
            monkeypatch.setattr(theirs, name, NoWork())
    for name in ("loss_kernel", "objective_kernel", "statistics_kernel", "dlogits_kernel"):
        monkeypatch.setattr(_row_triton, name, NoWork())
    monkeypatch.setattr(ours, "linear_grpo_loss", partial(linear_grpo_loss, backend="triton"))

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
    head = 8 * 64 * 64 * 9000
    assert their_flops - body() == (6 if frozen else 8) * head
    assert our_flops - body() == (4 if frozen else 6) * head
    # TRL's gradients of fp32 hidden states and heads need no copy either: equal, but for a few
    # numbers a token.
    assert our_bytes < (their_bytes + 32 * 8 * 64 if how == "fp32" else 0.9 * their_bytes)
