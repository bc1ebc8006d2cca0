"""`make demo` is configs/demo_arithmetic.yaml: that it runs, that it learns, and that it is the
rewards it learns from."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastgrpo.config import load_config
from fastgrpo.tasks.arithmetic import build_dataset
from fastgrpo.trainer import Trainer

DEMO = "configs/demo_arithmetic.yaml"
SHUFFLED = """
import random
from fastgrpo.tasks.arithmetic import exact_match

shuffle = random.Random(0).shuffle

def exact_match_of_another(completions, answer, **columns):
    rewards = exact_match(completions, answer)
    shuffle(rewards)
    return rewards
"""


def test_the_demo_fills_its_run_directory(tmp_path):
    run = tmp_path / "run"
    config = load_config(
        DEMO, [f"output_dir={run}", "warm_start_accuracy=0.01", "max_steps=3", "save_steps=1"]
    )
    summary = Trainer(config).train()
    assert {p.name for p in run.iterdir()} == {
        "config.yaml", "metrics.jsonl", "completions.jsonl", "rewards.jsonl", "warnings.jsonl",
        "summary.json", "curves.png", "checkpoints", "final",
    }  # fmt: skip
    assert set(summary["test"]) == {"greedy", "sampled"}
    assert [p.name for p in sorted((run / "checkpoints").iterdir())] == [
        "step-1",
        "step-2",
        "step-3",
    ]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-9)  # the reference is the warm start's result
    assert rows[2]["kl"] > 0  # the first step of a warm-up has a learning rate of 0
    assert all(row["entropy"] > 0 for row in rows)

    model = AutoModelForCausalLM.from_pretrained(run / "final")
    tokenizer = AutoTokenizer.from_pretrained(run / "final")
    test = build_dataset()["test"][:200]
    prompts = tokenizer(test["prompt"], return_tensors="pt", return_token_type_ids=False)
    completions = model.generate(**prompts, do_sample=False, max_new_tokens=4)[:, 6:]
    texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
    right = sum(a == b for a, b in zip(texts, test["answer"], strict=True)) / 200
    assert right == pytest.approx(summary["test"]["greedy"]["after"], abs=0.06)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_sampled_accuracy_rises_by_15_points_on_every_seed(tmp_path, seed):
    config = load_config(DEMO, [f"seed={seed}", f"output_dir={tmp_path / 'run'}"])
    test = Trainer(config).train()["test"]
    assert test["sampled"]["before"] < 0.6
    assert test["sampled"]["after"] >= test["sampled"]["before"] + 0.15
    assert test["greedy"]["after"] > test["greedy"]["before"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ["num_iterations=2", "max_steps=150"],
        ["use_peft=true", "learning_rate=2e-3", "lora_r=32"],
        ["loss_type=grpo", "importance_sampling_level=sequence", "num_iterations=2"],
        ["beta=0.0", "dynamic_sampling=true", "max_tokens_per_microbatch=1000"],
    ],
    ids=["iterations", "lora", "gspo", "dynamic"],
)
def test_variants_learn_the_task_as_well(tmp_path, options):
    config = load_config(DEMO, [f"output_dir={tmp_path / 'run'}", *options])
    trainer = Trainer(config)
    test = trainer.train()["test"]
    assert test["sampled"]["after"] >= test["sampled"]["before"] + 0.15
    assert test["greedy"]["after"] > test["greedy"]["before"]
    ids = torch.arange(10)[None] % 12
    final = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final")
    torch.testing.assert_close(final(ids).logits, trainer.policy.model(ids).logits)


@pytest.mark.slow
def test_with_rewards_of_other_completions_accuracy_does_not_rise(tmp_path):
    path = tmp_path / "shuffled.py"
    path.write_text(SHUFFLED)
    config = load_config(
        DEMO,
        [
            # The first function is what the test split is measured with; here it trains nothing.
            f"reward_funcs=[fastgrpo.tasks.arithmetic:exact_match, {path}:exact_match_of_another]",
            "reward_weights=[0, 1]",
            f"output_dir={tmp_path / 'run'}",
        ],
    )
    test = Trainer(config).train()["test"]
    assert test["sampled"]["after"] <= test["sampled"]["before"] + 0.02
