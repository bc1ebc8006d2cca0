"""A run that goes on from any of its steps is, bit by bit, the run that went through."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from small_models import save_small_model
from small_runs import assert_same_run, left_by, run_config

from fastgrpo.trainer import Trainer

# Of Hugging Face, when peft itself loads adapters.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")

REWARDS = """
import random

def draws(completions, **columns):
    import numpy as np  # only now
    return [random.random() + np.random.random() + text.count("e") for text in completions]

def draws_in_torch(completions, **columns):
    import torch
    return torch.rand(len(completions)).tolist()

def fails(completions, trainer_state, **columns):
    if trainer_state.global_step % 4 == 0:
        raise RuntimeError("not today")
    return [0.1 * len(text) for text in completions]

def overflows_at_first(completions, trainer_state, **columns):
    # 3e38 is a number in fp32, and two of them are none.
    large = 1.0 if trainer_state.global_step else 3e38
    return [large * (i % 4 > 0) for i in range(len(completions))]

def rollout(prompts, engine):
    import numpy as np
    prompt_ids = [engine.encode(prompt) for prompt in prompts]
    lengths = [random.randint(6, 9) + np.random.randint(3) for _ in prompts]
    drawn = engine.generate(prompt_ids, max_completion_length=lengths)
    return {
        "prompt_ids": prompt_ids,
        "completion_ids": [one.completion_ids for one in drawn],
        "logprobs": [one.logps for one in drawn],
    }
"""
EVERYTHING = {
    # Four steps on a generation.
    "num_iterations": 2, "steps_per_generation": 2, "dynamic_sampling": True,
    "beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.5,
    "use_adaptive_entropy": True, "entropy_target": 4.0, "max_grad_norm_ratio": 1.5,
    "lr_scheduler_type": "linear", "eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True,
    "dataset_test_split": "test", "max_eval_samples": 2, "reward_errors": "none",
}  # fmt: skip
RUNS = {
    "everything": EVERYTHING,
    "adapters": {
        "use_peft": True, "lora_r": 2, "lora_dropout": 0.3, "num_iterations": 2, "beta": 0.1,
        "warmup_steps": 2, "lr_scheduler_type": "constant_with_warmup", "rollout": True,
    },
    "processes": {"reward_timeout": 60.0, "judges": ["draws", "draws_in_torch"]},
    "offloaded": {"offload_optimizer": True},
    "8 bits": {"optim": "adamw_8bit"},
    "torchao's 8 bits": {"optim": "adamw_torch_8bit"},
    "master weights": {"dtype": "bfloat16", "bf16_updates": "master_weights"},
    "stochastic rounding": {"dtype": "bfloat16", "bf16_updates": "stochastic_rounding"},
}  # fmt: skip
"""Beside a reward function that draws random numbers, and one that fails now and then."""


@pytest.fixture
def start(tmp_path, two_splits):
    (tmp_path / "mine.py").write_text(REWARDS)
    model = save_small_model(tmp_path / "model")

    def make(run, *, resume=False, judges=("draws", "fails"), rollout=False, **values):
        values = {
            "reward_funcs": [f"{tmp_path}/mine.py:{judge}" for judge in judges],
            "rollout_fn": f"{tmp_path}/mine.py:rollout" if rollout else None,
            "reward_timeout": None, "reward_errors": "none", "max_steps": 7, "save_steps": 1,
            "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1,
            "save_strategy": "steps", "output_dir": str(run), **values,
        }  # fmt: skip
        return Trainer(run_config(tmp_path, two_splits, model, **values), resume=resume)

    return make


def assert_goes_on(start, tmp_path, values, cuts):
    """Compare a run with others that begin at some of its checkpoints, and know nothing else."""
    whole = tmp_path / "run"
    start(whole, **values).train()
    wanted = left_by(whole)
    for step in cuts:
        run = tmp_path / f"from-{step}"
        shutil.copytree(whole, run)
        (run / "summary.json").unlink()
        shutil.rmtree(run / "final")
        for path in (run / "checkpoints").iterdir():
            if int(path.name.removeprefix("step-")) > step:
                shutil.rmtree(path)
        trainer = start(run, resume=True, **values)
        assert trainer.step == step
        trainer.train()
        assert_same_run(left_by(run), wanted)
        shutil.rmtree(run)
    return wanted


@pytest.mark.slow
def test_what_goes_on_is_the_run_that_went_through(start, tmp_path):
    found, _ = assert_goes_on(start, tmp_path, EVERYTHING, [1, 4])
    counts = [line.get("rewards/fails/exceptions") for line in found["metrics"]]
    assert counts == [None, 1, 1, 1, 1, 2, 2, 2]
    assert sum("not today" in line["text"] for line in found["warnings"]) == 2  # and evaluations
    assert [line["step"] for line in found["rewards"]] == [1, 5]


@pytest.mark.slow
@pytest.mark.fault(
    "a first step that is skipped, and a checkpoint right after it",
    "the run is the one that was not saved",
)
def test_saving_before_a_step_was_taken_changes_nothing(start, tmp_path):
    values = {
        "judges": ["overflows_at_first"], "scale_rewards": "none", "max_steps": 4,
        "reward_errors": "stop",
    }  # fmt: skip
    weights = []
    for save_steps in (4, 1):
        run = tmp_path / str(save_steps)
        trainer = start(run, **values, save_steps=save_steps)
        trainer.train()
        assert trainer.learner.bad_steps.skipped == 1
        weights.append(load_file(run / "final" / "model.safetensors"))
    assert weights[0].keys() == weights[1].keys()
    for name, wanted in weights[0].items():
        assert torch.equal(weights[1][name], wanted)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:.*deterministic")  # what has no such way is said, and tried
@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit"])
def test_on_a_gpu_what_goes_on_is_the_run_that_went_through(start, tmp_path, monkeypatch, optim):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert_goes_on(start, tmp_path, {**EVERYTHING, "optim": optim}, [1, 4])
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.slow
@pytest.mark.fault(
    "a run that ends after any of its steps", "it goes on as the run that went through"
)
@pytest.mark.parametrize("run", RUNS)
def test_every_step_is_a_place_to_go_on_from(start, tmp_path, run):
    if "torchao" in run:
        pytest.importorskip("torchao")
    assert_goes_on(start, tmp_path, RUNS[run], range(1, 7))
