"""Our whole trainer against TRL's: given the same completions, they do the same to the weights."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from trainers import Given, Run, distance, run_ours, run_trl, trainable
from transformers import AutoModelForCausalLM

from benchmarks.trainer_cells import Task, TrainerCell, make_task, mean_id

pytestmark = pytest.mark.peers

CELL = TrainerCell(
    "demo", prompts=8, num_generations=4, completion_length=6, prompt_length=8, micro_batch=8,
    rho=0.5,
)  # fmt: skip
Tensors = dict[str, Tensor]
OPTIONS: dict[str, Any] = {
    "num_generations": 4,
    "max_completion_length": 6,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 2,
    "max_steps": 3,
    "temperature": 0.8,
    "learning_rate": 5e-3,
    "weight_decay": 0.1,
    # Far above the rounding of a gradient: at 1e-8 an element that is nothing but rounding would
    # move its weight as far as any other.
    "adam_epsilon": 1e-4,
    "gradient_checkpointing": False,
}
OURS = {"reward_funcs": ["benchmarks.trainer_cells:mean_id"], "cpu_threads": 1}
# Largest difference of an element, in root mean squares of its tensor. What rounding in fp32 does
# to the first gradient is 5e-6; clipped ratios and the optimizer pass it on to the next steps.
FIRST, LATER = 5e-5, 1e-3
LOGGED = (
    "completions/mean_terminated_length", "completions/min_terminated_length",
    "completions/max_terminated_length",
    "loss", "grad_norm", "learning_rate", "num_tokens", "reward", "reward_std",
    "frac_reward_zero_std", "rewards/mean_id/mean", "rewards/mean_id/std",
    "completions/mean_length", "completions/min_length", "completions/max_length",
    "completions/clipped_ratio",
)  # fmt: skip


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    """Half of the prompts, every other one, have the same reward for all completions."""
    made, path = make_task(CELL, "cpu"), tmp_path_factory.mktemp("model")
    made.model.save_pretrained(path)  # TRL loads its reference from where the model came from
    model = AutoModelForCausalLM.from_pretrained(path)
    return replace(made, model=model, dataset=made.dataset.select([0, 4, 1, 5, 2, 6, 3, 7]))


def both(
    task: Task,
    directory: Path,
    options: dict[str, Any],
    only_ours: dict[str, Any] | None = None,
    shortest: int = 1,
    eos: int | None = None,
) -> tuple[Run, Run]:
    options = OPTIONS | options
    ours = run_ours(task, directory, options | OURS | (only_ours or {}), given(shortest, eos))
    return ours, run_trl(task, directory, options, mean_id, given(shortest, eos))


def given(shortest: int = 1, eos: int | None = None) -> Given:
    return Given(CELL.V, shortest, CELL.completion_length, eos)


def assert_same(ours: Run, theirs: Run, *, without: tuple[str, ...] = ()) -> None:
    """Compare gradients, what the steps did to the weights, and what was logged."""
    assert len(ours.grads) == len(theirs.grads) == len(ours.logs) == len(theirs.logs) > 1
    for step, (found, wanted) in enumerate(zip(ours.grads, theirs.grads, strict=True)):
        assert distance(found, wanted) < (FIRST if step == 0 else LATER), f"gradient {step}"
    assert distance(moves(ours), moves(theirs)) < LATER
    for step, (found, wanted) in enumerate(zip(ours.logs, theirs.logs, strict=True)):
        for name in set(LOGGED) & wanted.keys() - set(without):  # of a generation TRL logs but once
            # A loss is the small difference of large sums.
            close = pytest.approx(wanted[name], rel=LATER, abs=1e-6)
            assert found[name] == close, f"{name} of step {step}"


def moves(run: Run) -> Tensors:
    """Return how far the optimizer has moved each parameter."""
    return {name: x - run.start[name] for name, x in trainable(run.model).items()}


# Zero-variance groups are dropped by us wherever that is exact, and kept by TRL.
SAME: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dapo": ({}, {}),
    "grpo": ({"loss_type": "grpo"}, {}),
    "dr_grpo": ({"loss_type": "dr_grpo", "scale_rewards": "none"}, {}),
    "bnpo": ({"loss_type": "bnpo", "entropy_coef": 0.1}, {}),  # passes of its own, bonus included
    "gspo": (
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "num_iterations": 2,
         "epsilon": 0.05, "epsilon_high": 0.1},
        {},
    ),
    "cispo": ({"loss_type": "cispo", "epsilon_high": 1.05, "num_iterations": 2}, {}),
    "reference": (
        {"beta": 0.2, "use_bias_correction_kl": True, "gradient_checkpointing": True},
        {},
    ),
    "iterations": ({"num_iterations": 3, "delta": 1.5}, {}),
    # One pass a step, and a schedule that warms up.
    "entropy": (
        {"entropy_coef": 0.1, "per_device_train_batch_size": 16, "gradient_accumulation_steps": 1,
         "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 2},
        {},
    ),
    "off-policy sequences": (
        {"off_policy_mask_threshold": 0.01, "num_iterations": 3, "learning_rate": 2e-2}, {},
    ),
    # First tokens of a group have the same entropy: later, rounding may tell them apart.
    "tokens of high entropy": (
        {"top_entropy_quantile": 0.4, "entropy_coef": 0.1, "max_steps": 2}, {},
    ),
    "adaptive entropy": (
        {"use_adaptive_entropy": True, "entropy_coef": 0.05, "entropy_coef_delta": 0.02,
         "entropy_target": 2.6, "max_steps": 4, "per_device_train_batch_size": 16,
         "gradient_accumulation_steps": 1},
        {},
    ),
    "unclipped": ({"max_grad_norm": 0.0, "lr_scheduler_type": "cosine", "warmup_steps": 0.4}, {}),
    "packed by tokens": ({}, {"max_tokens_per_microbatch": 40}),
    "padded": ({"loss_type": "grpo"}, {"padding_free": False}),
}  # fmt: skip


@pytest.mark.parametrize("name", SAME)
def test_the_weights_go_where_those_of_trl_go(task: Task, tmp_path: Path, name: str) -> None:
    options, only_ours = SAME[name]
    ours, theirs = both(task, tmp_path, options, only_ours)
    assert_same(ours, theirs)
    computed = 16 if {"entropy_coef", "beta", "top_entropy_quantile"} & options.keys() else 8
    assert ours.logged("num_computed_sequences") == [computed] * len(ours.logs)
    if "num_iterations" in options:
        clipped = "cispo_clip_ratio" if name == "cispo" else "clip_ratio/region_mean"
        assert max(ours.logged(clipped)) > 0.05


def test_truncated_completions_are_left_out_where_those_of_trl_are(
    task: Task, tmp_path: Path
) -> None:
    tokenizer = copy.deepcopy(task.tokenizer)
    tokenizer.eos_token = "5"
    for loss_type in ("dapo", "grpo"):
        options = {"mask_truncated_completions": True, "loss_type": loss_type}
        ended = replace(task, tokenizer=tokenizer)
        ours, theirs = both(ended, tmp_path / loss_type, options, shortest=2, eos=5)
        assert_same(ours, theirs)
        assert ours.logged("completions/clipped_ratio") == [0.5] * 3
        assert ours.logged("num_computed_sequences") == [4] * 3


def test_adapters_go_where_those_of_trl_go(task: Task, tmp_path: Path) -> None:
    """From the same start, at which the policy is not the reference any more."""
    peft = pytest.importorskip("peft")
    options = OPTIONS | {"beta": 0.2, "use_bias_correction_kl": True, "scale_rewards": "batch"}
    generator = torch.Generator().manual_seed(0)
    start: Tensors = {}

    def draw(model: nn.Module) -> None:
        for name, x in trainable(model).items():
            start[name] = torch.randn(x.shape, generator=generator) / 8
        load(model)

    def load(model: nn.Module) -> None:
        model.load_state_dict(start, strict=False)

    lora = {"use_peft": True, "lora_r": 4, "lora_alpha": 8}
    ours = run_ours(task, tmp_path, options | OURS | lora, given(), draw)
    adapters = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear"
    )
    theirs = run_trl(task, tmp_path, options, mean_id, given(), load, adapters)
    assert len(start) == 3 * 7 * 2 and ours.logs[0]["kl"] > 0.01  # layers, matrices, factors
    # Ours is of the groups, whatever rewards are scaled by; theirs of what they are scaled by.
    assert_same(ours, theirs, without=("frac_reward_zero_std",))
    assert ours.logs[0]["frac_reward_zero_std"] == 0.5
    assert theirs.logs[0]["frac_reward_zero_std"] == 0


def test_steps_that_share_a_generation(task: Task, tmp_path: Path) -> None:
    """With completions of one length, where both have the same denominator."""
    options = {"steps_per_generation": 4, "num_iterations": 2, "max_steps": 4}
    ours, theirs = both(task, tmp_path, options, shortest=CELL.completion_length)
    assert_same(ours, theirs)
    assert ours.logs[1]["clip_ratio/region_mean"] > 0.01  # by the step before


def test_a_step_without_signal_goes_on_by_its_momentum(task: Task, tmp_path: Path) -> None:
    """First four prompts whose rewards differ, then four whose rewards do not."""
    ordered = replace(task, dataset=task.dataset.select([0, 2, 4, 6, 1, 3, 5, 7]))
    ours, theirs = both(ordered, tmp_path, {"max_steps": 2})
    assert_same(ours, theirs)
    assert ours.logged("num_computed_sequences") == [16, 0]
    assert ours.logged("grad_norm")[1] == theirs.logged("grad_norm")[1] == 0
    one, _ = both(ordered, tmp_path / "one", {"max_steps": 1, "lr_scheduler_type": "constant"})
    assert distance(moves(ours), moves(one)) > 0.1


def test_what_is_dropped_is_missing_in_the_entropy_only(task: Task, tmp_path: Path) -> None:
    one_pass = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1}
    kept, theirs = both(task, tmp_path, one_pass, {"filter_zero_advantages": False})
    assert_same(kept, theirs)
    assert kept.logged("entropy") == pytest.approx(theirs.logged("entropy"), rel=1e-5)
    dropped, _ = both(task, tmp_path / "dropped", one_pass)
    assert distance(dropped.grads[0], kept.grads[0]) < FIRST
    assert dropped.logged("entropy")[0] != pytest.approx(kept.logged("entropy")[0], rel=1e-5)


# Where TRL differs from FORMULAS on purpose.


def test_trl_divides_the_steps_of_a_generation_by_their_mean_number_of_tokens(
    task: Task, tmp_path: Path
) -> None:
    """FORMULAS: by that of the step itself, so that it does not matter what else was sampled."""
    options = {"steps_per_generation": 4, "max_steps": 2, "max_grad_norm": 1e9}
    ours, theirs = both(task, tmp_path, options, shortest=2)
    ids = [task.tokenizer(prompt)["input_ids"] for prompt in task.dataset["prompt"]]
    lengths = [sum(map(len, given(2).completions(each, 4))) for each in ids]
    factor = sum(lengths[:4]) / (sum(lengths) / 2)
    assert abs(factor - 1) > 0.01
    scaled = {name: factor * grad for name, grad in ours.grads[0].items()}
    assert distance(scaled, theirs.grads[0]) < FIRST


def test_the_entropy_bonus_of_trl_is_the_mean_over_passes_of_their_means(
    task: Task, tmp_path: Path
) -> None:
    """FORMULAS: over the tokens of the step, however it is cut into passes; but for bnpo."""

    def first(name: str, **options: Any) -> Tensors:
        options = OPTIONS | OURS | {"max_steps": 1, "max_grad_norm": 1e9} | options
        return run_ours(task, tmp_path / name, options, given()).grads[0]

    options = OPTIONS | {"max_steps": 1, "max_grad_norm": 1e9, "entropy_coef": 0.5}
    theirs = run_trl(task, tmp_path, options, mean_id, given()).grads[0]
    policy = first("policy")
    with_bonus = first("bnpo bonus", loss_type="bnpo", entropy_coef=0.5)
    without = first("bnpo", loss_type="bnpo")
    wanted = {name: policy[name] + with_bonus[name] - without[name] for name in policy}
    assert distance(wanted, theirs) < FIRST
    assert distance(first("bonus", entropy_coef=0.5), theirs) > 100 * FIRST
