"""The best model of a run by its evaluations."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from small_models import save_small_model
from small_runs import lines, run_config

from fastgrpo.cli import main
from fastgrpo.config import ConfigError
from fastgrpo.manifest import damage
from fastgrpo.trainer import Trainer

JUDGE = """
VALUES = [0.2, 0.5, 0.5, float("nan"), 0.4, 0.7]

def judged(completions, trainer_state, log_metric, **columns):
    # What evaluations find depends on the step alone.
    value = VALUES[min(trainer_state.global_step, 5)]
    log_metric("fuel_loss", 1 - value if value == value else 1e9)
    return [None if value != value else value] * len(completions)
"""


@pytest.fixture
def start(tmp_path, two_splits):
    (tmp_path / "judge.py").write_text(JUDGE)
    model = save_small_model(tmp_path / "model")

    def make(name="run", resume=False, **values):
        values = {
            "reward_funcs": [f"{tmp_path}/judge.py:judged"], "reward_timeout": None,
            "max_steps": 5, "output_dir": str(tmp_path / name), "max_eval_samples": 2,
            "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "save_steps": 1,
            "eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "reward",
            "num_generations_eval": 2, **values,
        }  # fmt: skip
        return Trainer(run_config(tmp_path, two_splits, model, **values), resume=resume)

    return make


def best_of(run):
    return json.loads((run / "best" / "best.json").read_text())


@pytest.mark.parametrize(
    ("values", "kept"),
    [
        ({"metric_for_best_model": "eval_reward"}, {0: 0.5, 4: 0.7}),
        ({"metric_for_best_model": "reward", "greater_is_better": False}, {0: 0.5, 3: 0.4}),
        ({"metric_for_best_model": "fuel_loss"}, {0: 0.5, 3: 0.4}),
        ({"metric_for_best_model": "fuel_loss", "greater_is_better": True}, {0: 0.5, 4: 0.7}),
    ],
)
def test_the_best_model_is_kept(start, values, kept):
    trainer = start(**values)
    name = "eval_" + values["metric_for_best_model"].removeprefix("eval_")
    run, found = trainer.run.path, {}
    for step, value in enumerate((0.5, math.nan, 0.5, 0.4, 0.7, math.inf)):
        trainer.step = step
        with torch.no_grad():
            trainer.policy.model.get_input_embeddings().weight.fill_(step)
        trainer.saver.after_evaluation({name: value, "eval_other": 9.0})
        trainer.saver.after_evaluation({})  # a step without one
        told = json.loads((run / "best" / "best.json").read_text())
        saved = load_file(run / "best" / "model.safetensors")["model.embed_tokens.weight"]
        assert (told["metric"], saved[0, 0]) == (name, told["step"])
        found[told["step"]] = told["value"]
        assert trainer.saver.summary() == {"best": told}
        assert damage(run / "best") is None
    assert found == kept
    trainer.run.discard()


@pytest.mark.fault(
    "a run killed after its best evaluation, and the best checkpoint damaged before it goes on",
    "the best is what it would have been; a damaged one is put aside, and told",
)
@pytest.mark.slow
def test_a_resumed_run_keeps_the_best(start, tmp_path):
    for name, damaged in (("killed", False), ("damaged", True)):
        trainer = start(name, save_total_limit=1)
        take = trainer.take_step

        def killed(take=take, trainer=trainer):
            if trainer.step == 4:
                raise KeyboardInterrupt
            return take()

        trainer.take_step = killed
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        run = trainer.run.path
        assert best_of(run)["step"] == 1  # its checkpoint is gone
        if damaged:
            (run / "best" / "config.json").unlink()
        trainer = start(name, resume=True, save_total_limit=1)
        assert trainer.saver.best == (None if damaged else best_of(run))
        assert trainer.train()["best"] == best_of(run) == start_best(0.7, 5)
        metrics = {line["step"]: line["eval_reward"] for line in lines(run / "metrics.jsonl")}
        assert metrics[5] == best_of(run)["value"]
        assert (run / "damaged-best").is_dir() == damaged
        warnings = run / "warnings.jsonl"
        told = [line["text"] for line in lines(warnings)] if warnings.exists() else []
        assert [text for text in told if "best" in text] == damaged * [
            "checkpoint best is damaged and now called damaged-best: config.json is missing; the "
            "next evaluation begins another"
        ]


@pytest.mark.fault(
    "a run goes back to a step before its best, or to its beginning",
    "the best is still that in the directory, and nothing worse takes its place",
)
@pytest.mark.parametrize("saved", [True, False])
def test_going_back_keeps_a_later_best(start, saved):
    trainer = start(save_steps=2)
    run, saver = trainer.run.path, trainer.saver
    trainer.step = 2
    saver.after_evaluation({"eval_reward": 0.3})
    if saved:
        saver.save_step()
    trainer.step = 3
    saver.after_evaluation({"eval_reward": 0.9})
    trainer.run.close()  # and no more, as if it had been killed
    trainer = start(resume=True, save_steps=2)
    assert trainer.step == 2 * saved
    told = {"best": start_best(0.9, 3)}
    assert trainer.saver.summary() == told
    for value in (0.9, 0.8):  # the same again, as of a run that goes on, and a worse one
        trainer.step = 3
        trainer.saver.after_evaluation({"eval_reward": value})
    assert trainer.saver.summary() == told == {"best": best_of(run)}
    trainer.run.close()


def start_best(value, step):
    return {"metric": "eval_reward", "value": pytest.approx(value, abs=1e-6), "step": step}


def test_the_best_model_is_measured_by_its_name(start, capsys):
    trainer = start(max_steps=2)
    trainer.train()
    run = trainer.run.path
    arguments = ["eval", str(run), "--checkpoint", "best", "--threshold", "0.5", "-n", "1"]
    assert main(arguments) == 0
    assert "best" in capsys.readouterr().out
    (found,) = run.glob("eval/best-*.json")
    assert json.loads(found.read_text())["checkpoint"] == "best"


@pytest.mark.parametrize(
    "name", ["rewards/other/mean", "eval_rewards/judged/median", "completions/length", "pass@8"]
)
def test_a_metric_that_no_evaluation_can_have_is_refused_at_once(start, tmp_path, name):
    with pytest.raises(ConfigError) as error:
        start(metric_for_best_model=name)
    bare = name.removeprefix("eval_")
    said = str(error.value)
    assert said.startswith(f"metric_for_best_model: evaluations of this run have no {bare}; write")
    assert "completions/clipped_ratio, " in said and said.endswith("rewards/judged/std")
    assert not (tmp_path / "run").exists()


def test_a_metric_that_is_not_there_is_refused_by_the_first_evaluation(start):
    trainer = start(metric_for_best_model="fuel")
    with pytest.raises(ConfigError, match=r"have no fuel; write one of .*, fuel_loss, .*reward"):
        trainer.train()
    assert len(lines(trainer.run.path / "metrics.jsonl")) == 1
