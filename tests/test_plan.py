"""The planner against what real steps allocate, and what it prints."""

import dataclasses
import gc
import json
import os
import socket
import subprocess
import sys
import time

import pytest
import torch
from datasets import Dataset
from small_models import save_small_model, small_tokenizer
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
)

from benchmarks.measure import CpuAllocations
from fastgrpo.assets import Assets
from fastgrpo.batch import make_batch
from fastgrpo.cli import main
from fastgrpo.config_file import config_from
from fastgrpo.memory import Device, Planner, largest_values, switches
from fastgrpo.memory.passes import Footprint, LossKind, Pass
from fastgrpo.memory.plan import GIB
from fastgrpo.trainer import Trainer

PROMPT, COMPLETION, BATCH = 24, 104, 8
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "vocab_size": 100,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
ARCHITECTURES = {
    "qwen3": Qwen3Config(**SIZES, tie_word_embeddings=True),
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=False),
    "gemma3": Gemma3TextConfig(
        **SIZES, sliding_window=64, layer_types=["sliding_attention"] * 4 + ["full_attention"]
    ),
}
CPU = Device("the CPU", 64 * GIB, on_gpu=False)


def run_config(**values):
    return config_from(
        {
            "model_name_or_path": "given",
            "dataset_name": "given",
            "reward_funcs": ["accuracy"],
            "num_generations": 4,
            "max_completion_length": COMPLETION,
            "per_device_train_batch_size": BATCH,
            "max_steps": 4,
            "save_steps": 0,
            "cpu_threads": 1,
            **values,
        }
    )


def make_trainer(tmp_path, architecture, **values):
    config = run_config(output_dir=str(tmp_path / "run"), **values)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(architecture, dtype=getattr(torch, config.dtype))
    rows = [{"prompt": "a" * PROMPT, "answer": "1"}] * 4
    assets = Assets(model=model, tokenizer=small_tokenizer(), train_dataset=Dataset.from_list(rows))
    return Trainer(config, assets)


def allocated(action):
    """Return the bytes at the peak beyond those there were."""
    gc.collect()
    allocations = CpuAllocations()
    action()
    return allocations.stop()


def train_step(trainer):
    """Return an optimisation step on completions that are as long as they can be."""
    count = trainer.config.completions_per_step
    batch = make_batch(
        [[5] * PROMPT] * count,
        [[7] * COMPLETION] * count,
        [torch.zeros(COMPLETION)] * count,
        torch.ones(count),
    )
    if trainer.reference is not None:
        batch.ref_logps = torch.zeros_like(batch.sampling_logps)
    return lambda: trainer.optimise(batch, {})


def beyond(plan, phase, *parts):
    """Return what a phase takes beside some parts."""
    return sum(size for part, size in plan.phases[phase].items() if part not in parts)


TRAINING = {
    "qwen3": ("qwen3", {}),
    "qwen3 bf16 autocast": ("qwen3", {"bf16": True}),
    "qwen3 kept activations": ("qwen3", {"gradient_checkpointing": False}),
    "qwen3 bf16 kept": ("qwen3", {"gradient_checkpointing": False, "bf16": True}),
    "qwen3 two passes": ("qwen3", {"gradient_accumulation_steps": 2}),
    "qwen3 budget": ("qwen3", {"max_tokens_per_microbatch": 640}),
    "qwen3 padded": ("qwen3", {"padding_free": False, "gradient_checkpointing": False}),
    "llama kept": ("llama", {"gradient_checkpointing": False}),
    "llama 8-bit": ("llama", {"optim": "adamw_8bit"}),
    "llama master weights": ("llama", {"dtype": "bfloat16", "bf16_updates": "master_weights"}),
    "llama bf16 kept": (
        "llama",
        {
            "dtype": "bfloat16",
            "bf16_updates": "stochastic_rounding",
            "gradient_checkpointing": False,
        },
    ),
    "gemma3": ("gemma3", {"gradient_checkpointing": False}),
    "lora": ("qwen3", {"use_peft": True}),
    "lora kept": ("qwen3", {"use_peft": True, "gradient_checkpointing": False, "bf16": True}),
    "lora on bf16": ("llama", {"use_peft": True, "dtype": "bfloat16"}),
    "reference": ("llama", {"beta": 0.1}),
}


@pytest.mark.parametrize("case", TRAINING)
def test_training_takes_what_was_planned(tmp_path, case):
    family, values = TRAINING[case]
    architecture = ARCHITECTURES[family]
    trainer = make_trainer(tmp_path, architecture, **values)
    step = train_step(trainer)
    step()  # makes the optimizer's states
    measured = allocated(step)
    plan = Planner(architecture, CPU, PROMPT).plan(trainer.config)
    training = beyond(plan, "training", "weights", "optimizer", "reference")
    stepping = beyond(plan, "optimizer step", "weights", "reference")
    stepping -= plan.phases["training"]["optimizer"]
    planned = max(training, stepping)
    print(
        f"\n{case}: planned {planned / measured:.3f} of what was measured, {measured / 1e6:.1f} MB"
    )
    assert planned == pytest.approx(measured, rel=0.15)
    parameters = list(trainer.policy.model.parameters())
    assert plan.num_parameters == sum(p.numel() for p in parameters)
    assert plan.num_trainable == sum(p.numel() for p in parameters if p.requires_grad)


@pytest.mark.parametrize(
    ("family", "values"),
    [
        ("qwen3", {}),
        ("llama", {"bf16": True}),
        ("gemma3", {"top_p": 0.9, "max_generation_batch_size": 4}),
        ("qwen3", {"use_peft": True}),
    ],
)
def test_sampling_takes_what_was_planned(tmp_path, family, values):
    architecture = ARCHITECTURES[family]
    trainer = make_trainer(tmp_path, architecture, gradient_accumulation_steps=4, **values)
    prompts = [[5] * PROMPT] * trainer.config.prompts_per_step
    sampling = trainer.collector.sampling

    def sample():
        with trainer.policy.sampling():
            trainer.rollout.generate(prompts, trainer.config.num_generations, sampling)

    measured = allocated(sample)
    plan = Planner(architecture, CPU, PROMPT).plan(trainer.config)
    planned = beyond(plan, "sampling", "weights", "optimizer", "reference")
    print(
        f"\nsampling {family} {values}: planned {planned / measured:.3f} of {measured / 1e6:.1f} MB"
    )
    assert planned == pytest.approx(measured, rel=0.15)
    assert plan.rows_decoded == values.get("max_generation_batch_size", 32)


@pytest.mark.parametrize("values", [{"bf16": True}, {"use_peft": True}])
def test_log_probs_take_what_was_planned(tmp_path, values):
    architecture = ARCHITECTURES["llama"]
    trainer = make_trainer(tmp_path, architecture, beta=0.1, **values)
    count = trainer.config.completions_per_step
    batch = make_batch(
        [[5] * PROMPT] * count,
        [[7] * COMPLETION] * count,
        [torch.zeros(COMPLETION)] * count,
        torch.ones(count),
    )
    measured = allocated(lambda: trainer.add_logps(batch))
    plan = Planner(architecture, CPU, PROMPT).plan(trainer.config)
    planned = beyond(plan, "log-probs", "weights", "optimizer", "reference")
    print(f"\nlog-probs {values}: planned {planned / measured:.3f} of {measured / 1e6:.1f} MB")
    assert planned == pytest.approx(measured, rel=0.15)
