"""Options of rewards, advantages, evaluation and output, each as a line of a real run's YAML."""

import json
import re
from fractions import Fraction
from pathlib import Path

import pytest
import torch
import yaml
from small_models import save_small_model, small_tokenizer
from small_runs import lines, run_config, weights_of

from fastgrpo.config import ConfigError, TrainConfig, config_from, is_due
from fastgrpo.trainer import Trainer

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


@pytest.fixture
def launch(start, tmp_path):
    """Start a trainer with judges of the file above."""
    (tmp_path / "judges.py").write_text(JUDGES)

    def make(*judges, name="run", **values):
        names = [f"{tmp_path}/judges.py:{judge}" for judge in judges]
        return start(name, **{"reward_funcs": names, **values})

    return make


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


def test_evaluations_come_when_they_are_due_and_change_nothing(launch, tmp_path, word_problems):
    folder = tmp_path / "data"
    folder.mkdir()
    text = word_problems.read_text().splitlines(keepends=True)
    (folder / "train.jsonl").write_text("".join(text[:24]))
    (folder / "test.jsonl").write_text("".join(text[24:]))
    weights = []
    for name, values in (
        ("plain", {}),
        (
            "evaluated",
            {
                "eval_strategy": "steps",
                "eval_steps": 2,
                "eval_on_start": True,
                "num_generations_eval": 3,
                "per_device_eval_batch_size": 7,
                "max_eval_samples": 5,
            },
        ),
    ):
        trainer = launch(
            "first", "second", name=name, dataset_name=str(folder), max_steps=5, **values
        )
        trainer.train()
        weights.append(weights_of(trainer))
        metrics = lines(trainer.run.path / "metrics.jsonl")
        evaluated = [m["step"] for m in metrics if "eval_reward" in m]
        assert evaluated == ([0, 2, 4] if values else [])
    assert all(torch.equal(weights[0][n], x) for n, x in weights[1].items())
    for line in metrics:
        if "eval_reward" in line:
            parts = line["eval_rewards/first/mean"] + line["eval_rewards/second/mean"]
            assert line["eval_reward"] == pytest.approx(parts, abs=1e-6)
            assert 0 < line["eval_completions/mean_length"] <= 12
    assert metrics[0].keys() == {"step"} | {k for k in metrics[0] if k.startswith("eval_")}
    assert trainer.test is not None
    assert len(trainer.test.dataset) == 5
    samples = trainer.test.sample(3)
    assert len(samples) == 15
    expected = torch.stack([one.rewards_K for one in samples]).sum(1).mean().item()
    found = trainer.test.metrics()
    assert found["eval_reward"] == pytest.approx(expected, abs=1e-6)


def test_what_is_done_once_an_epoch():
    # 8 prompts a step of 20: the third and the fifth step finish an epoch.
    steps = Fraction(20, 8)
    due = [step for step in range(1, 11) if is_due("epoch", 1, step, steps)]
    assert due == [3, 5, 8, 10]
    assert [step for step in range(1, 10) if is_due("steps", 4, step, steps)] == [4, 8]
    assert not any(is_due("no", 1, step, steps) for step in range(1, 10))
    assert is_due("epoch", 1, 9, Fraction(9, 7))  # 9 / (9 / 7) is below 7 in floating point


def test_checkpoints_of_an_epoch_are_kept_up_to_their_limit(launch):
    trainer = launch("second", save_strategy="epoch", save_total_limit=2, max_steps=13)
    trainer.train()  # 8 prompts a step, 32 prompts
    kept = sorted(p.name for p in (trainer.run.path / "checkpoints").iterdir())
    assert kept == ["step-12", "step-8"]
    assert (trainer.run.path / "checkpoints" / "step-12" / "config.json").is_file()


def test_prompts_stay_in_order_and_go_through_the_template_with_its_arguments(
    launch, tmp_path, word_problems
):
    template = (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
        "{% if thinking is defined and not thinking %}[no thinking]{% endif %}"
    )
    model = save_small_model(tmp_path / "model with template")
    tokenizer = small_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(model)
    trainer = launch(
        "second",
        model_name_or_path=model,
        shuffle_dataset=False,
        system_prompt="Count.",
        chat_template_kwargs={"thinking": False},
        max_steps=1,
    )
    (batch,), _ = trainer.collect(1, {})
    rows = [json.loads(line)["prompt"] for line in word_problems.read_text().splitlines()]
    for i, start in enumerate(batch.starts):
        end = start + int(batch.mask[start:].nonzero()[0]) + 1
        text = trainer.policy.tokenizer.decode(batch.input_ids[start:end])
        assert text == f"[system]Count.[user]{rows[i // 4]}[no thinking]"


def test_reward_functions_and_a_rollout_can_be_given_as_objects(tmp_path, word_problems):
    seen = []

    def reward(completions, **columns):
        seen.append(len(completions))
        return [float(len(text)) for text in completions]

    def rollout(prompts, engine):
        drawn = engine.generate([engine.encode(prompt) for prompt in prompts])
        return {
            "prompt_ids": [one.prompt_ids for one in drawn],
            "completion_ids": [one.completion_ids for one in drawn],
            "logprobs": [one.logps.tolist() for one in drawn],
        }

    model = save_small_model(tmp_path / "model")
    results = []
    for name, given in (("engine", {}), ("function", {"rollout_fn": rollout})):
        config = run_config(
            tmp_path,
            word_problems,
            model,
            max_steps=2,
            output_dir=str(tmp_path / name),
            reward_timeout=None,  # in this process
            save_strategy="no",
        )
        trainer = Trainer(config, reward_funcs=[reward], **given)
        trainer.train()
        results.append(lines(tmp_path / name / "metrics.jsonl"))
    assert seen == [32] * 4
    for metrics in results:
        assert metrics[0]["sampling/sampling_logp_difference/max"] < 1e-4
        assert metrics[0]["rewards/reward/mean"] > 5


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"eval_steps": 5}, "eval_steps: has no effect without eval_strategy: steps"),
        ({"eval_on_start": True}, "eval_on_start: has no effect with eval_strategy: no"),
        ({"num_generations_eval": 2}, "num_generations_eval: has no effect"),
        (
            {"save_strategy": "no", "save_total_limit": 2},
            "save_total_limit: has no effect with save_strategy: no",
        ),
        ({"warmup_steps": 1.5}, "warmup_steps: must be whole, or a share below 1, got 1.5"),
        ({"min_p": 1.5}, "min_p: must be 0 or more and at most 1, got 1.5"),
        ({"reward_timeout": 0}, "reward_timeout: must be above 0, got 0"),
        ({"chat_template_kwargs": "x"}, "chat_template_kwargs: must be `key: value` pairs"),
    ],
)
def test_options_that_would_be_ignored_or_are_out_of_range_are_named(values, sentence):
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        config_from(values)


def test_the_split_that_is_trained_on_can_be_named(start, tmp_path, word_problems):
    folder = tmp_path / "data"
    folder.mkdir()
    text = word_problems.read_text().splitlines(keepends=True)
    (folder / "train.jsonl").write_text("".join(text[:24]))
    (folder / "test.jsonl").write_text("".join(text[24:]))
    trainer = start(
        dataset_name=str(folder), dataset_train_split="test", dataset_test_split="train"
    )
    assert (len(trainer.train_dataset), len(trainer.test.dataset)) == (8, 24)


def test_code_that_comes_with_a_model_is_run_only_if_it_is_trusted(start, tmp_path):
    path = save_small_model(tmp_path / "own code")
    (tmp_path / "own code" / "own.py").write_text(
        "from transformers import Qwen3ForCausalLM\nclass Own(Qwen3ForCausalLM):\n    own = True\n"
    )
    config = json.loads((tmp_path / "own code" / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "own.Own"}
    config["architectures"] = ["Own"]
    (tmp_path / "own code" / "config.json").write_text(json.dumps(config))
    trainer = start("trusted", model_name_or_path=path, trust_remote_code=True)
    assert trainer.policy.model.own
    trainer = start("not trusted", model_name_or_path=path)
    assert not hasattr(trainer.policy.model, "own")


def test_the_optimizer_gets_its_options(start):
    options = {"adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-6, "weight_decay": 0.3}
    matrices, vectors = start(learning_rate=2e-3, **options).optimizer.param_groups
    for group, decay in ((matrices, 0.3), (vectors, 0.0)):
        assert group["lr"] == 2e-3
        assert group["betas"] == (0.8, 0.95)
        assert (group["eps"], group["weight_decay"]) == (1e-6, decay)


def test_every_checkpoint_that_is_no_checkpoint_is_left_alone(launch):
    trainer = launch("second", max_steps=1)
    folder = trainer.run.path / "checkpoints"
    for name in ("step-1", "step-2", "step-10", "step-2-good", "step-3.partial"):
        (folder / name).mkdir(parents=True)
    trainer.run.remove_old_checkpoints(None)
    assert len(list(folder.iterdir())) == 5
    trainer.run.remove_old_checkpoints(2)
    assert {path.name for path in folder.iterdir()} == {
        "step-2", "step-10", "step-2-good", "step-3.partial",
    }  # fmt: skip


def test_what_was_given_as_objects_is_on_record(tmp_path, word_problems):
    def letters(completions, **columns):
        return [float(len(text)) for text in completions]

    model = save_small_model(tmp_path / "model")
    config = run_config(tmp_path, word_problems, model, max_steps=1, reward_timeout=None)
    with pytest.raises(ValueError, match="reward_funcs"):
        Trainer(config, reward_funcs=[])
    trainer = Trainer(config, reward_funcs=[letters])
    summary = trainer.train()
    assert summary["judge"] == "letters"
    found = json.loads((trainer.run.path / "objects.json").read_text())
    assert found == {"reward_funcs": ["letters"]}


def test_nothing_is_left_of_a_trainer_that_cannot_be_made(launch, tmp_path, monkeypatch):
    from fastgrpo import journal

    def broken(*_):
        raise ValueError("api key not configured")

    monkeypatch.setattr(journal, "build_trackers", broken)
    with pytest.raises(ValueError, match="api key"):
        launch("second")
    assert not (tmp_path / "run").exists()


def test_a_failure_on_held_out_prompts_is_told_as_such(launch, tmp_path, word_problems):
    folder = tmp_path / "data"
    folder.mkdir()
    text = word_problems.read_text().splitlines(keepends=True)
    (folder / "train.jsonl").write_text("".join(text[:24]))
    (folder / "test.jsonl").write_text("".join(text[24:]))
    judges = (
        "def held(prompts, completions, **columns):\n"
        "    if any(int(p.split()[2]) >= 26 for p in prompts):\n"
        "        raise RuntimeError('not these')\n"
        "    return [float(len(text)) for text in completions]\n"
    )
    (tmp_path / "held.py").write_text(judges)
    trainer = launch(
        "second",
        dataset_name=str(folder),
        dataset_test_split="test",
        reward_funcs=[f"{tmp_path}/held.py:held"],
        reward_errors="none",
        max_steps=1,
    )
    summary = trainer.train()
    assert summary["test"]["greedy"] == {"before": None, "after": None}
    assert json.loads((trainer.run.path / "summary.json").read_text()) == summary
    told = [line["text"] for line in lines(trainer.run.path / "warnings.jsonl")]
    assert sum("not these" in text for text in told) == 1
    (metrics,) = lines(trainer.run.path / "metrics.jsonl")
    assert metrics["rewards/held/mean"] > 0
    assert "rewards/held/exceptions" not in metrics  # of training there were none


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


def test_an_evaluation_without_prompts_is_refused(launch):
    with pytest.raises(ValueError, match="split 'test' does not exist"):
        launch("second", eval_strategy="steps")


def test_a_bare_no_of_yaml_is_a_strategy():
    values = yaml.safe_load("eval_strategy: no\nsave_strategy: no\n")
    config = config_from(values)
    assert (config.eval_strategy, config.save_strategy) == ("no", "no")


def test_every_option_is_named_in_a_test():
    here = Path(__file__).parent
    text = "\n".join(path.read_text(encoding="utf-8") for path in here.rglob("*.py"))
    missing = [
        key
        for key in TrainConfig().flat()
        if not re.search(rf"""(["'`(\s]){key}(["'`:=]|\s*=)""", text)
    ]
    assert not missing
