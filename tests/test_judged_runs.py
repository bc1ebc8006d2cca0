"""Options of rewards and advantages, each as a line of a real run's YAML."""

import json

import pytest
import torch
from small_models import small_tokenizer
from small_runs import lines


def groups(values, size=4):
    return torch.tensor(values, dtype=torch.float64).view(-1, size)


def rewards_of(trainer):
    """Return for each generation (rewards by function, advantages), as rewards.jsonl has them."""
    rows = lines(trainer.run.path / "rewards.jsonl")
    return [(row["rewards"], row["advantages"]) for row in rows]


def spread(values_PG):
    return values_PG - values_PG.mean(1, keepdim=True), values_PG.std(1, keepdim=True)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"scale_rewards": "batch"},
        {"scale_rewards": "none"},
        {"scale_rewards": "none", "advantage_baseline": "leave_one_out"},
        {"advantage_std": "population", "advantage_eps": 0.5},
        {"multi_objective_aggregation": "normalize_then_sum"},
    ],
    ids=str,
)
def test_advantages_of_a_run_are_those_of_the_formulas(launch, values):
    trainer = launch("first", "second", reward_weights=[1.0, 2.0], max_steps=1, **values)
    trainer.train()
    ((rewards, advantages),) = rewards_of(trainer)
    first, second = groups(rewards["first"]), groups(rewards["second"])
    total = first + 2 * second
    centred, std = spread(total)
    eps = 1e-4
    if "multi_objective_aggregation" in values:
        parts = [spread(part) for part in (first, second)]
        scores = sum(w * c / (s + eps) for w, (c, s) in zip((1, 2), parts, strict=True))
        expected = (scores - scores.mean()) / (scores.std() + eps)
    elif values.get("scale_rewards") == "batch":
        expected = centred / (total.std() + eps)
    elif values.get("scale_rewards") == "none":
        expected = centred * (4 / 3 if "advantage_baseline" in values else 1)
    elif "advantage_std" in values:
        expected = centred / (total.std(1, correction=0, keepdim=True) + 0.5)
    else:
        expected = centred / (std + eps)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(groups(advantages), expected, atol=2e-6, rtol=1e-5)


def test_step_rewards_reach_the_tokens_before_them(launch):
    trainer = launch("steps", max_steps=1)
    (batch,), metrics = trainer.collect(1, {})
    (logged,) = [found for found, _ in rewards_of(trainer)]
    ids = [
        part[mask.roll(1)].tolist()
        for part, mask in zip(
            batch.input_ids.split(batch.lengths), batch.mask.split(batch.lengths), strict=True
        )
    ]
    advantages = [
        part[mask]
        for part, mask in zip(
            batch.advantages.split(batch.lengths), batch.mask.split(batch.lengths), strict=True
        )
    ]
    expected_metrics = []
    for group in range(0, 32, 4):
        steps = [[] if len(x) < 2 else [float(x[0] % 3), 1.0] for x in ids[group : group + 4]]
        together = torch.tensor([value for each in steps for value in each], dtype=torch.float64)
        mean, std = together.mean(), together.std() + 1e-4
        for own, tokens, found in zip(
            steps, ids[group : group + 4], advantages[group : group + 4], strict=True
        ):
            expected = torch.zeros(len(tokens), dtype=torch.float64)
            if own:
                half = len(tokens) // 2
                scaled = (torch.tensor(own, dtype=torch.float64) - mean) / std
                expected[:half] = scaled.sum()
                expected[half:] = scaled[1]
            torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-5)
            expected_metrics.append(sum(own) if own else None)
    assert logged["steps"] == pytest.approx(expected_metrics)
    judged = [value for value in expected_metrics if value is not None]
    assert metrics["reward"] == pytest.approx(sum(judged) / len(judged), abs=1e-5)
    assert abs(trainer.optimise(batch, {})["loss"]) < 10


def test_what_judges_log_is_in_the_metrics_and_beside_the_completions(launch):
    trainer = launch("first", max_steps=2, logging_steps=1)
    trainer.train()
    metrics = lines(trainer.run.path / "metrics.jsonl")
    completions = lines(trainer.run.path / "completions.jsonl")
    assert [m["progress"] for m in metrics] == [0, 0.5]  # of steps taken before
    assert all(5 < m["letters"] <= 12 for m in metrics)
    assert len(completions) == 8
    for line in completions:
        assert line["extra"] == {"length": len(line["completion"])}
        assert line["rewards"] == {"first": float("e" in line["completion"])}
        assert line["num_tokens"] <= 12
        assert line["finished"] == (line["num_tokens"] < 12) or line["finished"]


@pytest.mark.parametrize(("judge", "kind"), [("fails", "exceptions"), ("sleeps", "timeouts")])
def test_a_judge_that_fails_is_counted_and_the_run_goes_on(launch, judge, kind):
    trainer = launch("second", judge, reward_errors="none", reward_timeout=0.5, max_steps=3)
    trainer.train()
    metrics = lines(trainer.run.path / "metrics.jsonl")
    assert [m.get(f"rewards/{judge}/{kind}") for m in metrics] == [None, 1, 1]
    assert [m[f"rewards/{judge}/mean"] for m in metrics] == [1, None, 1]
    assert all(m["rewards/second/mean"] > 0 for m in metrics)
    warnings = [line for line in lines(trainer.run.path / "warnings.jsonl") if line["step"] == 2]
    assert any(judge in line["text"] for line in warnings)


@pytest.mark.parametrize(
    ("judge", "sentence"),
    [("fails", "no rewards today"), ("sleeps", "took longer than reward_timeout")],
)
def test_a_judge_that_fails_stops_the_run_unless_told_otherwise(launch, judge, sentence):
    trainer = launch(judge, reward_timeout=0.5, max_steps=3)
    with pytest.raises(ValueError, match=sentence):
        trainer.train()
    assert len(lines(trainer.run.path / "metrics.jsonl")) == 1


def test_a_reward_model_and_a_punishment_of_length_judge_a_run(start, tmp_path):
    from transformers import AutoModelForSequenceClassification, Qwen3Config

    tokenizer = small_tokenizer()
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, num_labels=1,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    model.save_pretrained(tmp_path / "judge")
    tokenizer.save_pretrained(tmp_path / "judge")
    trainer = start(
        reward_funcs=[str(tmp_path / "judge"), "soft_overlong_punishment"],
        soft_punish_cache=8,
        max_steps=1,
        logging_steps=1,
    )
    trainer.train()
    for line in lines(trainer.run.path / "completions.jsonl"):
        ids = tokenizer(line["prompt"] + line["completion"])["input_ids"]
        score = model(torch.tensor([ids])).logits[0, 0].item()
        assert line["rewards"]["judge"] == pytest.approx(score, abs=1e-5)
        over = max(0, line["num_tokens"] - 4) / 8
        assert line["rewards"]["soft_overlong_punishment"] == pytest.approx(-over)


@pytest.mark.parametrize("scale", ["batch", "normalize_then_sum"])
def test_what_is_logged_of_advantages_is_what_is_trained_on(launch, scale):
    """Also where dynamic sampling has left groups out."""
    values = {"scale_rewards": "batch"}
    if scale != "batch":
        values = {"multi_objective_aggregation": scale}
    trainer = launch("first", dynamic_sampling=True, max_resample_rounds=2, max_steps=1, **values)
    (batch,), metrics = trainer.collect(1, {})
    ((rewards, advantages),) = rewards_of(trainer)
    assert len(advantages) == 4 * metrics["dynamic_sampling/num_prompts"] > 32
    means = batch.sequence_advantages.tolist()
    kept = [value for value in advantages if value != 0]
    assert kept == pytest.approx([value for value in means if value != 0], abs=1e-6)
    silent = (groups(rewards["first"]).std(1) == 0).double().mean().item()
    assert metrics["frac_reward_zero_std"] == pytest.approx(silent)


def test_a_failure_on_held_out_prompts_is_told_as_such(launch, tmp_path, two_splits):
    judges = (
        "def held(prompts, completions, **columns):\n"
        "    if any(int(p.split()[2]) >= 26 for p in prompts):\n"
        "        raise RuntimeError('not these')\n"
        "    return [float(len(text)) for text in completions]\n"
    )
    (tmp_path / "held.py").write_text(judges)
    trainer = launch(
        "second",
        dataset_name=two_splits,
        dataset_test_split="test",
        reward_funcs=[f"{tmp_path}/held.py:held"],
        reward_errors="none",
        max_steps=1,
    )
    summary = trainer.train()
    assert summary["test"]["greedy"] == {"before": None, "after": None}
    assert json.loads((trainer.run.path / "summary.json").read_text()) == summary
    told = lines(trainer.run.path / "warnings.jsonl")
    assert [line["step"] for line in told if "not these" in line["text"]] == [0]
    (metrics,) = lines(trainer.run.path / "metrics.jsonl")
    assert metrics["rewards/held/mean"] > 0
    assert "rewards/held/exceptions" not in metrics  # of training there were none
