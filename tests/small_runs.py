"""Runs on local files, short enough for a test."""

import json
import re

import torch
from safetensors.torch import load_file

from fastgrpo.config import config_from

# What a model of random weights can learn in seconds: to write more of one letter.
REWARD = """
def letter_e(completions, answer, **columns):
    assert len(answer) == len(completions)
    return [text.count("e") / max(len(text), 1) for text in completions]

def judges_nothing(completions, **columns):
    return [None] * len(completions)
"""


def run_config(tmp_path, dataset, model, **values):
    return config_from(
        {
            "model_name_or_path": model,
            "dataset_name": str(dataset),
            "output_dir": str(tmp_path / "run"),
            "reward_funcs": [f"{tmp_path}/my_rewards.py:letter_e"],
            "num_generations": 4,
            "per_device_train_batch_size": 16,
            "gradient_accumulation_steps": 2,
            "max_completion_length": 12,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "max_steps": 12,
            "logging_steps": 1,
            "cpu_threads": 1,
            **({} if "save_strategy" in values else {"save_steps": 5}),
            **values,
        }
    )


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def left_by(run):
    """Return the lines that a run leaves, without what depends on how long it took, and its end."""
    found = {}
    for name in ("metrics", "completions", "rewards", "warnings"):
        path = run / f"{name}.jsonl"
        found[name] = [
            {key: value for key, value in line.items() if not re.search("time|memory|_per_", key)}
            for line in (lines(path) if path.exists() else [])
        ]
    (weights,) = (run / "final").glob("*.safetensors")
    return found, load_file(weights)


def assert_same_run(found, wanted):
    """Compare what `left_by` has returned of two runs, bit by bit."""
    assert found[0] == wanted[0]
    assert found[1].keys() == wanted[1].keys()
    for name, value in wanted[1].items():
        assert torch.equal(found[1][name], value), name


HALF_SILENT = """
def half_silent(prompts, completions, **columns):
    # Of prompts with an even number of eggs every completion is as good as the others.
    return [
        0.5 if int(prompt.split()[2]) % 2 == 0 else text.count("e") + 0.1 * len(text)
        for prompt, text in zip(prompts, completions)
    ]

def silent(completions, **columns):
    return [1.0] * len(completions)
"""


def weights_of(trainer):
    return {name: p.detach().clone() for name, p in trainer.policy.model.named_parameters()}


def assert_same_weights(found, expected, atol=2e-5):
    """Compare after a few steps at a learning rate of 1e-2, of which AdamW makes 1e-2 each."""
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], atol=atol, rtol=0)


def rows_seen(trainer):
    """Count the tokens the body runs on with gradients, and without."""
    seen = {True: 0, False: 0}

    def count(module, args, kwargs):
        if kwargs.get("past_key_values") is None:  # sampling has a cache
            seen[torch.is_grad_enabled()] += kwargs["input_ids"].numel()

    trainer.policy.model.get_decoder().register_forward_pre_hook(count, with_kwargs=True)
    return seen


# SGD would show differences as they are; AdamW turns rounding of tiny gradients into whole steps,
# so these runs have an epsilon above rounding.
STEADY = {"adam_epsilon": 1e-3, "learning_rate": 1e-2}


JUDGES = """
import asyncio

def first(completions, log_metric=None, log_extra=None, trainer_state=None, **columns):
    log_metric("letters", sum(map(len, completions)) / len(completions))
    log_extra("length", [len(text) for text in completions])
    log_metric("progress", trainer_state.global_step / trainer_state.max_steps)
    return [float("e" in text) for text in completions]

async def second(completions, **columns):
    await asyncio.sleep(0)
    return [len(text) / 12 for text in completions]

def steps(completion_ids, **columns):
    # The first half of a completion is a step, and the rest another.
    return [
        [(len(ids) // 2 - 1, float(ids[0] % 3)), (len(ids) - 1, 1.0)] if len(ids) > 1 else []
        for ids in completion_ids
    ]

def fails(completions, trainer_state, **columns):
    if trainer_state.global_step == 1:
        raise RuntimeError("no rewards today")
    return [1.0] * len(completions)

def sleeps(completions, trainer_state, **columns):
    import time
    time.sleep(60 if trainer_state.global_step == 1 else 0)
    return [1.0] * len(completions)
"""
