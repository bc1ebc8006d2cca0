"""Runs of one process that are resumed; tests/parallel/test_resharding.py has those of several."""

import dataclasses
import json
import re
import shutil
from contextlib import nullcontext
from hashlib import sha256

import pytest
import torch
import yaml
from safetensors.torch import load_file
from small_models import save_small_model, small_model, small_tokenizer
from small_runs import assert_same_run, left_by, lines, run_config
from transformers import AutoModelForCausalLM

from fastgrpo.assets import Assets
from fastgrpo.cli import main
from fastgrpo.config import config_from
from fastgrpo.json_lines import read_lines
from fastgrpo.manifest import seal
from fastgrpo.run_directory import RunDirectory
from fastgrpo.trainer import Trainer

# Of transformers 5.23, when peft itself loads adapters.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")

QUICK = {
    "reward_timeout": None,
    "max_steps": 3,
    "save_strategy": "steps",
    "save_steps": 1,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
}


def letter_e(completions, **columns):
    return [text.count("e") + 0.1 * len(text) for text in completions]


def brought(values, tmp_path, problems):
    """Return a configuration and objects without a name, new ones each time."""
    from datasets import load_dataset

    config = run_config(tmp_path, problems, None, **{**QUICK, **values})
    rows = load_dataset("json", data_files=str(problems), split="train")
    model = small_model()
    return config, Assets(model=model, tokenizer=small_tokenizer(), train_dataset=rows)


def cut(run, step):
    """Take a run's last checkpoints, as if it had been killed soon after an earlier one."""
    (run / "summary.json").unlink(missing_ok=True)
    for path in (run / "checkpoints").iterdir():
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    with (run / "metrics.jsonl").open("ab") as file:
        file.write('{"step": 5, "é'.encode()[:-1])  # in the middle of a character


def files(run):
    """Return what a run leaves that does not depend on how long it took."""
    metrics = [
        {name: value for name, value in line.items() if not re.search("time|memory|_per_", name)}
        for line in lines(run / "metrics.jsonl")
    ]
    return metrics, lines(run / "completions.jsonl"), lines(run / "rewards.jsonl")


@pytest.mark.parametrize(
    "values",
    [
        {
            # One of two steps on a generation is to come, and another generation.
            "num_iterations": 2, "beta": 0.1, "sync_ref_model": True,
            "ref_model_sync_steps": 1, "use_peft": False, "lr_scheduler_type": "linear",
        },
        {"use_peft": True, "lora_r": 2, "lora_dropout": 0.3},
    ],
    ids=["reference and waiting batches", "adapters with dropout on a base without a name"],
)  # fmt: skip
def test_a_resumed_run_is_the_run_that_went_through(tmp_path, word_problems, values):
    run = tmp_path / "run"
    config, assets = brought(values, tmp_path, word_problems)
    Trainer(config, assets, reward_funcs=letter_e).train()
    whole, final = files(run), tmp_path / "whole"
    (run / "final").rename(final)
    cut(run, 1)
    config, assets = brought(values, tmp_path, word_problems)
    if config.use_peft:  # the base is that of the run, and not what is brought again
        torch.nn.init.zeros_(assets.model.get_input_embeddings().weight)
    Trainer(config, assets, reward_funcs=letter_e, resume=True).train()
    assert files(run) == whole
    assert [line["step"] for line in whole[0]] == [1, 2, 3]
    (weights,) = (path.name for path in final.glob("*.safetensors"))
    found, wanted = load_file(run / "final" / weights), load_file(final / weights)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        logits = [
            AutoModelForCausalLM.from_pretrained(p)(ids).logits for p in (run / "final", final)
        ]
    assert torch.equal(*logits)


def test_a_run_without_a_checkpoint_begins_again(tmp_path, word_problems):
    run = tmp_path / "run"
    whole = None
    for resume in (False, True):
        config, assets = brought({"use_peft": True, "lora_r": 2}, tmp_path, word_problems)
        trainer = Trainer(config, assets, reward_funcs=letter_e, resume=resume)
        assert trainer.step == 0
        trainer.train()
        whole = whole or files(run)
        assert files(run) == whole
        cut(run, 0)


@pytest.mark.fault("resuming a run that is finished", "no byte changes, and it is no error")
def test_a_finished_run_is_left_as_it_is(tmp_path, word_problems, capsys):
    run = tmp_path / "run"
    model = save_small_model(tmp_path / "model")
    config = run_config(tmp_path, word_problems, model, **QUICK, lr_scheduler_type="linear")
    summary = Trainer(config, reward_funcs=letter_e).train()

    def left():
        return {
            path: (path.stat().st_mtime_ns, path.is_file() and sha256(path.read_bytes()).digest())
            for path in [run, *run.rglob("*")]
        }

    before = left()
    shutil.rmtree(model)  # is not loaded
    again = dataclasses.replace(config, logging_steps=2)
    assert Trainer(again, reward_funcs=letter_e, resume=True).train() == summary
    capsys.readouterr()
    assert main(["train", str(run / "config.yaml"), f"output_dir={run}", "--resume", "auto"]) == 0
    assert f"the run in {run} is finished: there is nothing to do\n" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"learning_rate: is 0.1 now, and 0.01 in the run in"):
        Trainer(dataclasses.replace(config, learning_rate=0.1), resume=True)
    with pytest.raises(ValueError, match="max_steps: is 4 now, and 3 in the run in"):
        Trainer(dataclasses.replace(config, max_steps=4), resume=True)  # the schedule has an end
    assert left() == before


def test_a_finished_run_whose_schedule_has_no_end_can_be_made_longer(tmp_path, word_problems):
    config, assets = brought({"max_steps": 2}, tmp_path, word_problems)
    Trainer(config, assets, reward_funcs=letter_e).train()
    config, assets = brought({}, tmp_path, word_problems)
    trainer = Trainer(config, assets, reward_funcs=letter_e, resume=True)
    assert trainer.step == 2 and not (tmp_path / "run" / "summary.json").exists()
    assert trainer.train()["steps"] == 3
    config, assets = brought({"output_dir": str(tmp_path / "whole")}, tmp_path, word_problems)
    Trainer(config, assets, reward_funcs=letter_e).train()
    assert_same_run(left_by(tmp_path / "run"), left_by(tmp_path / "whole"))


@pytest.mark.fault(
    "a finished run is to be made longer, and has no checkpoint that holds more than a model",
    "one sentence, and no byte changes: it is finished still",
)
@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (
            {"save_strategy": "no", "save_steps": None},
            "is finished and has no checkpoint to go on from; train on from where it ended in a "
            r"new run, with model_name_or_path: .*/run/final and another output_dir$",
        ),
        ({"save_only_model": True}, r"no checkpoint to go on from \(step-1 is a model alone, as "),
    ],
)
@pytest.mark.slow
def test_a_finished_run_without_a_state_cannot_be_made_longer(
    tmp_path, word_problems, values, sentence
):
    values = {name: value for name, value in {**QUICK, **values}.items() if value is not None}
    model = save_small_model(tmp_path / "model")
    config = run_config(tmp_path, word_problems, model, **{**values, "max_steps": 1})
    summary = Trainer(config, reward_funcs=letter_e).train()
    run = tmp_path / "run"
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=sentence):
        Trainer(dataclasses.replace(config, max_steps=2), reward_funcs=letter_e, resume=True)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert Trainer(config, reward_funcs=letter_e, resume=True).train() == summary


def config_of(tmp_path, **values):
    return config_from(
        {
            "model_name_or_path": "m", "dataset_name": "d", "reward_funcs": ["accuracy"],
            "output_dir": str(tmp_path / "run"), "per_device_train_batch_size": 8, "max_steps": 9,
            **values,
        }
    )  # fmt: skip


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"learning_rate": 1e-3}, "learning_rate: is 0.001 now, and 1e-06 in the run in "),
        ({"max_steps": 8}, "max_steps: is 8 now, and 9 in the run in "),
        ({"save_only_model": True}, "save_only_model: is True now, and False in the run in "),
        ({"beta": 0.1}, "beta: is 0.1 now, and 0.0 in the run in "),
        (
            {"per_device_train_batch_size": 16},
            "gradient_accumulation_steps: a step of the run in RUN has 8 completions, from 1 "
            "process, and now it would have 16; change it so that they are as many",
        ),
    ],
)
def test_a_run_is_resumed_as_it_was_begun(tmp_path, values, sentence):
    RunDirectory(config_of(tmp_path), "train")
    before = (tmp_path / "run" / "config.yaml").read_text()
    with pytest.raises(ValueError) as error:
        RunDirectory(config_of(tmp_path, **values), "train", resume=True)
    said = str(error.value).replace(str(tmp_path / "run"), "RUN")
    assert said.startswith(sentence)
    assert said.endswith(("for a new run", "as many"))
    assert (tmp_path / "run" / "config.yaml").read_text() == before


def test_how_a_run_is_computed_and_shown_may_change(tmp_path):
    RunDirectory(config_of(tmp_path), "train")
    values = {
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "logging_steps": 3,
        "parallel": {"data": 1, "shard": 2}, "gradient_checkpointing": False, "save_steps": 3,
        "reward_errors": "none",
    }  # fmt: skip
    before = (tmp_path / "run" / "config.yaml").read_text()
    run = RunDirectory(config_of(tmp_path, **values), "train", resume=True)
    assert (run.path / "config.yaml").read_text() == before  # it may still be refused
    run.cut(0)
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert {key: written[key] for key in values} == values


def test_a_generation_serves_as_many_steps_whatever_their_passes(tmp_path):
    """`steps_per_generation` counts passes, of which a step may have another number."""
    four = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    RunDirectory(config_of(tmp_path, **four, steps_per_generation=8), "train")
    two = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    for passes in (8, None):
        with pytest.raises(ValueError) as error:
            config = config_of(tmp_path, **two, steps_per_generation=passes)
            RunDirectory(config, "train", resume=True)
        assert str(error.value) == (
            f"steps_per_generation: completions serve 2 optimisation steps in the run in "
            f"{tmp_path}/run, and now they would serve {4 if passes else 1}; set it to 4"
        )
    parallel = {"parallel": {"data": 2, "shard": 1}, "per_device_train_batch_size": 2}
    for same in (two, two | parallel):
        RunDirectory(config_of(tmp_path, **same, steps_per_generation=4), "train", resume=True)


@pytest.mark.parametrize("every", [None, 4])
def test_evaluations_stay_where_they_were(tmp_path, every):
    """They come with the lines of the log, if nothing else is said."""
    values = {"eval_strategy": "steps", "dataset_test_split": "test", "eval_steps": every}
    RunDirectory(config_of(tmp_path, **values), "train")
    config = config_of(tmp_path, **values, logging_steps=3)
    refused = pytest.raises(ValueError, match="logging_steps: is 3 now, and 10 in the run")
    with nullcontext() if every else refused:
        RunDirectory(config, "train", resume=True)


@pytest.mark.fault(
    "a finished run is to be made longer, and something else has written to its files",
    "one sentence with the line; no byte changes: it is finished still",
)
def test_a_run_that_cannot_go_on_is_left_as_it_was(tmp_path):
    run = RunDirectory(config_of(tmp_path), "train")
    (run.path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    (run.path / "rewards.jsonl").write_text("{oops\n")
    (run.path / "summary.json").write_text("{}\n")
    (run.path / "checkpoints" / "step-2").mkdir(parents=True)
    run.close()
    before = {p: p.is_file() and p.read_bytes() for p in sorted(run.path.rglob("*"))}
    again = RunDirectory(config_of(tmp_path, logging_steps=2), "train", resume=True)
    with pytest.raises(ValueError, match=r"rewards.jsonl:1: is no JSON object of a run"):
        again.cut(1)
    again.close()
    assert {p: p.is_file() and p.read_bytes() for p in sorted(run.path.rglob("*"))} == before


@pytest.mark.parametrize("means", [{"loss_type": "bnpo"}, {"top_entropy_quantile": 0.5}])
def test_what_is_a_mean_over_micro_batches_keeps_their_size(tmp_path, means):
    RunDirectory(config_of(tmp_path, **means), "train")
    values = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, **means}
    with pytest.raises(ValueError, match="per_device_train_batch_size: is 4 now, and 8 in"):
        RunDirectory(config_of(tmp_path, **values), "train", resume=True)
    shared = {"parallel": {"data": 2, "shard": 1}, **means}
    begun = config_of(tmp_path, gradient_accumulation_steps=2, output_dir=f"{tmp_path}/2", **means)
    RunDirectory(begun, "train")
    RunDirectory(config_of(tmp_path, output_dir=f"{tmp_path}/2", **shared), "train", resume=True)


def test_lines_of_later_steps_and_torn_ones_are_taken_back(tmp_path):
    run = RunDirectory(config_of(tmp_path), "train")
    kept = [{"step": step, "text": "line\u2028separator é"} for step in (1, 2)]
    rewards = [{"step": step, "rewards": {"judge": [0.0, None, step / 2]}} for step in (1, 2)]
    for name, whole in (("metrics", kept), ("rewards", rewards)):
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in whole)
        (run.path / f"{name}.jsonl").write_text(text + text[:-3])
    for name in ("step-1", "step-2", "step-2-mine"):
        (run.path / "bad_steps" / name).mkdir(parents=True)
    run.cut(1)
    left = {path.name for path in (run.path / "bad_steps").iterdir()}
    assert left == {"step-1", "step-2-mine"}  # what has another name is another's
    assert lines(run.path / "rewards.jsonl") == rewards[:1] * 2
    assert read_lines(run.path / "metrics.jsonl") == kept[:1] * 2
    assert run.graded  # 0.5 is neither 0 nor 1
    run.cut(-1)
    assert (run.path / "metrics.jsonl").read_text() == ""
    assert not list(run.path.glob("*.partial"))


def test_parameters_that_no_step_has_reached_are_no_obstacle(tmp_path, word_problems):
    """As a vision tower is that text does not pass through."""
    found = []
    for resume in (False, True):
        config, assets = brought({}, tmp_path, word_problems)
        assets.model.tower = torch.nn.Linear(4, 4)
        Trainer(config, assets, reward_funcs=letter_e, resume=resume).train()
        found.append(files(tmp_path / "run"))
        cut(tmp_path / "run", 1)
    assert found[0] == found[1]


def test_checkpoints_of_later_steps_are_taken_back_too(tmp_path):
    run = RunDirectory(config_of(tmp_path), "train")
    for step in (4, 6):
        path = run.checkpoints.of_step(step)
        (path / "state").mkdir(parents=True)
        seal(path)
    run.cut(4)
    assert [path.name for path in (run.path / "checkpoints").iterdir()] == ["step-4"]
