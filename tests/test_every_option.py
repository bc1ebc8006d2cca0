"""Options of data, evaluation and output, each as a line of a real run's YAML; none untested."""

import json
import re
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch
import yaml
from small_models import save_small_model, small_tokenizer
from small_runs import lines, run_config, weights_of

from fastgrpo.config import ConfigError, TrainConfig, config_from, is_due, load_config
from fastgrpo.evaluate import Evaluator
from fastgrpo.manifest import seal
from fastgrpo.trainer import Trainer


def test_evaluations_come_when_they_are_due_and_change_nothing(launch, two_splits):
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
            "first", "second", name=name, dataset_name=two_splits, max_steps=5, **values
        )
        trainer.train()
        weights.append(weights_of(trainer))
        metrics = lines(trainer.run.path / "metrics.jsonl")
        evaluated = [m["step"] for m in metrics if "eval_reward" in m]
        assert evaluated == ([0, 2, 4, 5] if values else [])  # the last step too
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


def test_what_an_evaluation_samples_does_not_depend_on_how_much_at_once(launch, two_splits):
    trainer = launch("first", dataset_name=two_splits, eval_strategy="steps")
    found = []
    for completions in (None, 1, 7, 9, 24):
        config = replace(trainer.config, per_device_eval_batch_size=completions)
        test = Evaluator(config, trainer.sampler, trainer.test.dataset)
        trainer.collect(1, {})  # training draws from streams of its own
        found.append([one.drawn.completion_ids for one in test.sample(3)])
        assert test.num_batches(3) == {None: 1, 1: 8, 7: 4, 9: 3, 24: 1}[completions]
    assert len({str(ids) for ids in found[0]}) == 24
    assert all(ids == found[0] for ids in found)
    config = replace(trainer.config, seed=43)
    other = Evaluator(config, trainer.sampler, trainer.test.dataset).sample(3)
    assert [one.drawn.completion_ids for one in other] != found[0]


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
    trainer.train()  # 8 prompts a step, 32 prompts; an epoch ends where the run does
    kept = sorted(p.name for p in (trainer.run.path / "checkpoints").iterdir())
    assert kept == ["step-12", "step-13"]
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
        ({"eval_steps": 5}, "eval_steps: has no effect with eval_strategy: no, got 5; write"),
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


def test_the_split_that_is_trained_on_can_be_named(start, two_splits):
    trainer = start(dataset_name=two_splits, dataset_train_split="test", dataset_test_split="train")
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
    matrices, vectors = start(learning_rate=2e-3, **options).learner.optimizer.param_groups
    for group, decay in ((matrices, 0.3), (vectors, 0.0)):
        assert group["lr"] == 2e-3
        assert group["betas"] == (0.8, 0.95)
        assert (group["eps"], group["weight_decay"]) == (1e-6, decay)


def test_every_checkpoint_that_is_no_checkpoint_is_left_alone(launch):
    trainer = launch("second", max_steps=1)
    folder = trainer.run.path / "checkpoints"
    for name in ("step-1", "step-2", "step-10", "step-2-good", "step-3.partial"):
        (folder / name).mkdir(parents=True)
        seal(folder / name)
    assert trainer.run.checkpoints.remove_old(None) == []
    assert len(list(folder.iterdir())) == 5
    assert trainer.run.checkpoints.remove_old(2) == []
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
    recorded = yaml.safe_load((trainer.run.path / "config.yaml").read_text())
    assert recorded["reward_funcs"] == ["<object letters>"]
    with pytest.raises(ValueError, match="<object letters>"):
        Trainer(load_config(trainer.run.path / "config.yaml", [f"output_dir={tmp_path / 'again'}"]))
    one = run_config(tmp_path, word_problems, model, output_dir=str(tmp_path / "one"))
    assert Trainer(one, reward_funcs=letters).judges.names == ["letters"]


def test_a_punishment_of_length_may_be_named_to_the_trainer_alone(tmp_path, word_problems):
    model, name = save_small_model(tmp_path / "model"), "soft_overlong_punishment"
    options = {"soft_punish_cache": 4, "reward_funcs": ["accuracy"], "reward_timeout": None}
    config = run_config(tmp_path, word_problems, model, max_steps=1, **options)
    with pytest.raises(ValueError, match="soft_punish_cache: nothing reads it"):
        Trainer(config)
    trainer = Trainer(config, reward_funcs=[name])
    trainer.train()
    for line in lines(trainer.run.path / "completions.jsonl"):
        assert line["rewards"] == {name: -max(0, line["num_tokens"] - 8) / 4}
    recorded = trainer.run.path / "config.yaml"
    for names, cache in (([name], 4), (["accuracy"], None)):
        assert load_config(recorded, [f"reward_funcs={names}"]).soft_punish_cache == cache


def test_nothing_is_left_of_a_trainer_that_cannot_be_made(launch, tmp_path, monkeypatch):
    from fastgrpo import journal

    def broken(*_):
        raise ValueError("api key not configured")

    monkeypatch.setattr(journal, "build_trackers", broken)
    with pytest.raises(ValueError, match="api key"):
        launch("second")
    assert not (tmp_path / "run").exists()


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
