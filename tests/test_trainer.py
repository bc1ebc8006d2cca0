import json
import math

import pytest
import torch
from small_models import save_small_model
from small_runs import lines, run_config
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastgrpo.assets import Assets, load_assets
from fastgrpo.config import config_from
from fastgrpo.evaluate import Evaluator
from fastgrpo.rollout import SamplingParams
from fastgrpo.rollout.static import StaticCacheRollout
from fastgrpo.trainer import Trainer


@pytest.mark.parametrize(
    ("family", "tie", "loss_type"), [("llama", False, "dapo"), ("qwen2", True, "grpo")]
)
def test_a_real_run_on_local_files_learns_and_its_checkpoint_scores_the_same(
    tmp_path, word_problems, family, tie, loss_type
):
    model = save_small_model(tmp_path / "model", family, tie)
    config = run_config(
        tmp_path,
        word_problems,
        model,
        loss_type=loss_type,
        dataset_test_split="train",
        max_steps=24,
        save_steps=10,
    )
    trainer = Trainer(config)
    summary = trainer.train()
    run = tmp_path / "run"

    metrics = lines(run / "metrics.jsonl")
    assert [m["step"] for m in metrics] == list(range(1, 25))
    assert metrics[0]["reward"] < 0.1
    assert sum(m["reward"] for m in metrics[-3:]) / 3 > 0.3
    for m in metrics:
        assert m["reward"] == pytest.approx(m["rewards/letter_e/mean"], abs=1e-6)
        if m["num_computed_sequences"]:  # else no group had a signal
            assert m["clip_ratio/region_mean"] == 0  # on-policy
            assert m["sampling/sampling_logp_difference/max"] < 1e-4
        assert m["num_sequences"] == 32
        assert math.isfinite(m["grad_norm"])
    assert metrics[-1]["num_tokens"] > metrics[0]["num_tokens"] > 32 * 12

    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-10", "step-20"]
    sampled = summary["test"]["sampled"]
    assert sampled["after"] > sampled["before"] + 0.2
    assert json.loads((run / "summary.json").read_text()) == summary
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")

    reloaded = AutoModelForCausalLM.from_pretrained(run / "final")
    tokenizer = AutoTokenizer.from_pretrained(run / "final")
    again = Trainer(
        run_config(tmp_path, word_problems, model, output_dir=str(tmp_path / "again")),
        Assets(model=reloaded, tokenizer=tokenizer, train_dataset=trainer.train_dataset),
    )
    measured = Evaluator(again.config, again.sampler, trainer.test.dataset)
    for how, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        score = measured.accuracy(temperature)
        assert score == pytest.approx(summary["test"][how]["after"], abs=1e-6)


def test_completions_are_logged_with_rewards_and_advantages(tmp_path, word_problems):
    model = save_small_model(tmp_path / "model")
    config = run_config(
        tmp_path,
        word_problems,
        model,
        max_steps=2,
        reward_funcs=[f"{tmp_path}/my_rewards.py:{f}" for f in ("letter_e", "judges_nothing")],
    )
    Trainer(config).train()
    completions = lines(tmp_path / "run" / "completions.jsonl")
    assert [c["step"] for c in completions] == [1] * 4 + [2] * 4
    group = completions[:4]
    assert len({c["prompt"] for c in group}) == 1
    rewards = [c["rewards"]["letter_e"] for c in group]
    shares = [c["completion"].count("e") / len(c["completion"]) for c in group]
    assert rewards == pytest.approx(shares, abs=1e-7)
    assert all(c["rewards"]["judges_nothing"] is None for c in group)
    values = torch.tensor(rewards, dtype=torch.float64)
    expected = (values - values.mean()) / (values.std() + 1e-4)
    assert [c["advantage"] for c in group] == pytest.approx(expected.tolist(), abs=1e-5)


def test_the_same_seed_gives_the_same_run(tmp_path, word_problems):
    model = save_small_model(tmp_path / "model")
    results = []
    for name in ("a", "b"):
        config = run_config(
            tmp_path, word_problems, model, max_steps=3, output_dir=str(tmp_path / name)
        )
        trainer = Trainer(config)
        trainer.train()
        results.append([p.detach().clone() for p in trainer.policy.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_reference_is_where_the_run_began_and_the_kl_grows_from_0(tmp_path, word_problems):
    model = save_small_model(tmp_path / "model")
    trainer = Trainer(run_config(tmp_path, word_problems, model, beta=0.01, max_steps=4))
    trainer.train()
    kl = [m["kl"] for m in lines(tmp_path / "run" / "metrics.jsonl")]
    assert kl[0] == pytest.approx(0, abs=1e-9)
    assert kl[0] < kl[1] < kl[3]
    start = AutoModelForCausalLM.from_pretrained(model).state_dict()
    for name, value in trainer.learner.reference.frozen.model.state_dict().items():
        assert torch.equal(value, start[name])


def test_iterations_reuse_a_batch_and_measure_how_far_the_policy_moved(tmp_path, word_problems):
    model = save_small_model(tmp_path / "model")
    Trainer(run_config(tmp_path, word_problems, model, num_iterations=2, max_steps=4)).train()
    metrics = lines(tmp_path / "run" / "metrics.jsonl")
    assert metrics[0]["reward"] == metrics[1]["reward"] != metrics[2]["reward"]
    assert metrics[0]["sampling/sampling_logp_difference/max"] < 1e-4
    assert metrics[1]["sampling/sampling_logp_difference/max"] > 1e-2
    assert metrics[0]["clip_ratio/region_mean"] == 0 < metrics[1]["clip_ratio/region_mean"]


def test_steps_follow_from_epochs(tmp_path, word_problems):
    model = save_small_model(tmp_path / "model")
    config = run_config(tmp_path, word_problems, model, max_steps=-1, num_train_epochs=1.5)
    assert Trainer(config).num_steps == 6  # 32 prompts, 8 a step


def test_the_last_step_ends_its_epoch_as_in_transformers(tmp_path, word_problems, two_splits):
    """Its `on_epoch_end` comes also where max_steps cuts an epoch, and steps end with a look."""
    model = save_small_model(tmp_path / "model")
    for strategy, evaluated, saved in (
        ("epoch", [3, 5], ["step-3", "step-5"]),
        ("steps", [2, 4, 5], ["step-4"]),  # `final` is step 5
    ):
        values = {} if strategy == "epoch" else {"eval_steps": 2, "save_steps": 4}
        trainer = Trainer(
            run_config(
                tmp_path,
                two_splits,
                model,
                max_steps=5,  # 24 prompts, 8 a step
                output_dir=str(tmp_path / strategy),
                eval_strategy=strategy,
                save_strategy=strategy,
                num_generations_eval=1,
                **values,
            )
        )
        trainer.train()
        metrics = lines(trainer.run.path / "metrics.jsonl")
        assert [m["step"] for m in metrics if "eval_reward" in m] == evaluated
        folders = (trainer.run.path / "checkpoints").iterdir()
        assert sorted(path.name for path in folders) == saved


def test_a_run_that_ends_before_it_wrote_anything_leaves_nothing(
    tmp_path, word_problems, monkeypatch
):
    model = save_small_model(tmp_path / "model")
    trainer = Trainer(run_config(tmp_path, word_problems, model))
    assert (trainer.run.path / "config.yaml").is_file()

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer.sampler.rollout, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert not trainer.run.path.exists()
    trainer = Trainer(run_config(tmp_path, word_problems, model))  # its place is free
    (trainer.run.path / "notes.txt").write_text("mine")
    monkeypatch.setattr(trainer.sampler.rollout, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert (trainer.run.path / "notes.txt").read_text() == "mine"


def test_a_graded_reward_is_a_number_and_no_percent(tmp_path, word_problems, capsys):
    model = save_small_model(tmp_path / "model")
    values = {"max_steps": 1, "dataset_test_split": "train"}
    trainer = Trainer(run_config(tmp_path, word_problems, model, **values))
    trainer.train()  # shares of letters
    (greedy,) = [line for line in capsys.readouterr().out.splitlines() if "greedy" in line]
    assert "%" not in greedy
    assert trainer.run.graded


def test_chat_prompts_go_through_the_template_and_come_back_as_messages(tmp_path):
    path = tmp_path / "chat.jsonl"
    message = {"role": "user", "content": "two plus two?"}
    path.write_text(json.dumps({"prompt": [message], "answer": "4"}) + "\n")
    (tmp_path / "my_rewards.py").write_text(
        "def answered(prompts, completions, answer, **columns):\n"
        "    assert prompts[0] == [{'role': 'user', 'content': 'two plus two?'}]\n"
        "    assert completions[0][0]['role'] == 'assistant'\n"
        "    return [float(answer[0] in c[0]['content']) for c in completions]\n"
    )
    model = save_small_model(tmp_path / "model")
    config = run_config(
        tmp_path, path, model, reward_funcs=[f"{tmp_path}/my_rewards.py:answered"], max_steps=1
    )
    trainer = Trainer(config)
    (batch,), metrics = trainer.collect(1, {})
    first = batch.select([0])
    prompt = first.input_ids[: int(first.mask.nonzero()[0]) + 1]
    assert trainer.policy.tokenizer.decode(prompt) == "[user]two plus two?\n[assistant]"
    assert 0 <= metrics["rewards/answered/mean"] <= 1


def test_assets_load_before_anything_is_written(tmp_path, word_problems, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = save_small_model(tmp_path / "model")
    config = run_config(tmp_path, word_problems, model, reward_funcs=["acuracy"])
    with pytest.raises(ValueError, match="accuracy"):
        Trainer(config)
    config = run_config(tmp_path, word_problems, str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match=r"has no config\.json"):
        Trainer(config)
    assert not (tmp_path / "run").exists()


def test_a_directory_that_holds_something_is_refused(tmp_path, word_problems):
    model = save_small_model(tmp_path / "model")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"output_dir: .* exists and is not an empty directory"):
        Trainer(run_config(tmp_path, word_problems, model))
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


def test_greedy_completions_of_a_trained_policy_are_those_of_generate(tmp_path, word_problems):
    model = save_small_model(tmp_path / "model")
    trainer = Trainer(run_config(tmp_path, word_problems, model, max_steps=3))
    trainer.train()
    final = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final")
    ids = trainer.policy.tokenizer("Ann has 4 eggs")["input_ids"]
    rollout = StaticCacheRollout(final, eos_token_ids=[1], pad_token_id=0)
    ours = rollout.generate([ids], 1, SamplingParams(max_completion_length=8, temperature=0))
    theirs = final.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=8)
    assert ours.token_lists()[0] == theirs[0, len(ids) :].tolist()


def test_own_objects_need_no_names(tmp_path, word_problems):
    model = save_small_model(tmp_path / "model")
    named = load_assets(run_config(tmp_path, word_problems, model))
    config = config_from({"output_dir": str(tmp_path / "run"), "max_completion_length": 8})
    with pytest.raises(ValueError, match="model_name_or_path: required"):
        Trainer(config)
    assert Trainer(config, named).num_steps == 3 * 32  # one prompt a step, three epochs


def test_truncated_sampling_is_said_and_its_log_probs_are_those_of_training(
    tmp_path, word_problems, capsys
):
    model = save_small_model(tmp_path / "model")
    Trainer(run_config(tmp_path, word_problems, model, top_k=60, top_p=0.9, max_steps=1)).train()
    assert "top_p=0.9 and top_k=60 truncate" in capsys.readouterr().out
    (metrics,) = lines(tmp_path / "run" / "metrics.jsonl")
    assert metrics["sampling/sampling_logp_difference/max"] < 1e-4


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo", "bnpo"])
def test_accumulation_changes_neither_loss_nor_gradient(tmp_path, word_problems, loss_type):
    model = save_small_model(tmp_path / "model")
    config = run_config(tmp_path, word_problems, model, loss_type=loss_type, learning_rate=0.0)
    trainer = Trainer(config)
    (batch,), _ = trainer.collect(1, {})
    for i in range(32):  # bnpo: with equal counts the mean of means is the mean
        where = batch.mask.nonzero()[batch.mask.nonzero()[:, 0] >= batch.starts[i]][0]
        batch.mask[where + 1 : batch.starts[i] + batch.lengths[i]] = False
    results = []
    for size in (32, 8, 1):
        object.__setattr__(config, "per_device_train_batch_size", size)
        results.append(trainer.optimise(batch, {}))
    for result in results[1:]:
        assert result["loss"] == pytest.approx(results[0]["loss"], rel=1e-4, abs=1e-7)
        assert result["grad_norm"] == pytest.approx(results[0]["grad_norm"], rel=1e-4)


def test_gradients_that_were_there_before_do_not_enter_a_step(tmp_path, word_problems):
    model = save_small_model(tmp_path / "model")
    trainer = Trainer(run_config(tmp_path, word_problems, model, learning_rate=0.0))
    (batch,), _ = trainer.collect(1, {})
    clean = trainer.optimise(batch, {})["grad_norm"]
    for parameter in trainer.policy.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    assert trainer.optimise(batch, {})["grad_norm"] == clean


def test_completions_of_every_logging_step_are_logged_also_when_they_are_reused(
    tmp_path, word_problems
):
    model = save_small_model(tmp_path / "model")
    config = run_config(
        tmp_path, word_problems, model, num_iterations=2, logging_steps=4, max_steps=8
    )
    Trainer(config).train()
    logged = lines(tmp_path / "run" / "completions.jsonl")
    assert sorted({c["step"] for c in logged}) == [1, 3, 7]  # sampled for 1-2, 3-4 and 7-8


def test_generation_in_parts_is_bounded_and_serves_the_same_batch(tmp_path, word_problems):
    model = save_small_model(tmp_path / "model")
    trainer = Trainer(run_config(tmp_path, word_problems, model, max_generation_batch_size=8))
    sizes = []
    trainer.policy.model.model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    (batch,), _ = trainer.collect(1, {})
    assert len(batch) == 32
    assert max(sizes) == 8
