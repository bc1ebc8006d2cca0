import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from small_models import save_small_model

from fastgrpo.cli import main


@pytest.fixture
def config_file(tmp_path):
    """A configuration that would run, in a directory of its own."""
    model = save_small_model(tmp_path / "model")
    (tmp_path / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": f"{n}+1=", "answer": str(n + 1)}) + "\n" for n in range(8))
    )
    path = tmp_path / "tiny.yaml"
    path.write_text(
        f"model_name_or_path: {model}\ndataset_name: {tmp_path / 'prompts.jsonl'}\n"
        "max_steps: 2\nnum_generations: 2\nmax_completion_length: 4\nsave_strategy: no\n"
    )
    return path


def test_a_new_run_directory_every_time(tmp_path, monkeypatch, config_file, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", str(config_file), "learning_rate=1e-4"]) == 0
    assert main(["train", str(config_file)]) == 0
    first, second = sorted((tmp_path / "runs").iterdir())
    assert first.name.startswith("tiny-")
    printed = capsys.readouterr().out
    for run in (first, second):
        assert {p.name for p in run.iterdir()} - {"warnings.jsonl"} == {
            "config.yaml", "metrics.jsonl", "completions.jsonl", "rewards.jsonl", "summary.json",
            "curves.png",
            "final",
        }  # fmt: skip
        assert f"run directory: {run.relative_to(tmp_path)}\n" in printed
    assert "learning_rate: 0.0001" in (first / "config.yaml").read_text()


def test_a_run_can_be_repeated_from_its_own_config(tmp_path, monkeypatch, config_file):
    monkeypatch.chdir(tmp_path)
    assert main(["train", str(config_file), "output_dir=one"]) == 0
    assert main(["train", "one/config.yaml", "output_dir=two"]) == 0

    def rewards(run):
        with open(tmp_path / run / "metrics.jsonl") as file:
            return [json.loads(line)["loss"] for line in file]

    assert rewards("one") == rewards("two")


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["num_generation=4"], "num_generation: unknown key; did you mean num_generations?"),
        (["num_generations=1"], "num_generations: must be at least 2, got 1"),
        (["dataset_name=./none.jsonl"], "none.jsonl' looks like a path but nothing is there"),
        (["prompt_column=question"], "question"),
        (["model_name_or_path=./none"], "./none is not a model directory"),
        (["reward_funcs=[acuracy]"], "accuracy"),
        (["reward_weights=[1, 2]"], "reward_weights"),
        (["lr_scheduler_type=linaer"], "lr_scheduler_type: must be one of linear"),
        (
            ["max_completion_length=253"],
            "max_completion_length: the prompt of row 0 has 4 tokens, which with 253 of the "
            "completion exceeds the 256 that the model has room for",
        ),
        (["reward_funcs=[nope:f]"], "nope"),
        (["reward_weights=[.nan]"], "reward_weights: must be finite"),
        (["temperature=.inf"], "temperature: must be finite, got inf"),
        (["adam_beta1=1.5"], "adam_beta1: must be 0 or more and below 1, got 1.5"),
        (["epsilon=0.1", "epsilon_low=0.2"], "epsilon: is TRL's name of epsilon_low"),
        (["output_dir=occupied"], "output_dir: occupied exists"),
    ],
)
def test_wrong_input_is_one_sentence_and_leaves_nothing_behind(
    tmp_path, monkeypatch, config_file, capsys, overrides, sentence
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "occupied").mkdir()
    (tmp_path / "occupied" / "file").touch()
    assert main(["train", str(config_file), *overrides]) == 2
    error = capsys.readouterr().err
    assert "fastgrpo: " in error
    assert sentence in error
    assert "Traceback" not in error
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ("return [1.0]", "reward function 'judge' returned 1 values for 8 completions"),
        ("return [float('nan')] * len(completions)", "returned nan for completion 0"),
    ],
)
def test_a_reward_that_breaks_its_contract_ends_the_run_with_a_sentence(
    tmp_path, monkeypatch, config_file, capsys, body, sentence
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "judge.py").write_text(f"def judge(completions, **columns):\n    {body}\n")
    assert main(["train", str(config_file), "reward_funcs=[judge.py:judge]"]) == 1
    error = capsys.readouterr().err
    assert sentence in error
    assert "nothing was written" in error
    assert "Traceback" not in error


def test_a_rollout_that_breaks_its_contract_ends_the_run_with_a_sentence(
    tmp_path, monkeypatch, config_file, capsys
):
    monkeypatch.chdir(tmp_path)
    body = "def rollout(prompts, engine, **columns):\n    return {'prompt_ids': '\\x1b[2J'}\n"
    (tmp_path / "play.py").write_text(body)
    assert main(["train", str(config_file), "rollout_fn=play.py:rollout"]) == 1
    error = capsys.readouterr().err
    assert "rollout_fn 'rollout' returned nothing under completion_ids, logprobs" in error
    assert "nothing was written" in error
    assert "Traceback" not in error


def test_what_an_error_quotes_does_not_move_the_terminal(
    tmp_path, monkeypatch, config_file, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "judge.py").write_text(
        "def judge(completions, **columns):\n    raise ValueError('\\x1b]0;owned\\x07 \\u202e')\n"
    )
    assert main(["train", str(config_file), "reward_funcs=[judge.py:judge]"]) == 1
    error = capsys.readouterr().err
    assert "reward function 'judge' raised ValueError: \ufffd]0;owned\ufffd " in error
    assert not set("\x1b\x07\u202e") & set(error)


def test_a_reward_that_needs_a_column_that_is_not_there_is_named(
    tmp_path, monkeypatch, config_file, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "judge.py").write_text("def judge(completions, gold):\n    return []\n")
    assert main(["train", str(config_file), "reward_funcs=[judge.py:judge]"]) == 2
    assert "reward function 'judge' needs 'gold', and the dataset has prompt" in (
        capsys.readouterr().err
    )


def test_a_key_given_twice_and_a_model_without_tokenizer_are_named(
    tmp_path, monkeypatch, config_file, capsys
):
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / "model").glob("token*"):
        path.unlink()
    assert main(["train", str(config_file)]) == 2
    assert "holds no tokenizer; save it there" in capsys.readouterr().err
    config_file.write_text(config_file.read_text() + "max_steps: 9\n")
    assert main(["train", str(config_file)]) == 2
    assert "max_steps is given twice, first in line" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"prompt": "1+1="}, "answer"),
        ({"prompt": "1+1=", "answer": "2", "completions": "x"}, "a column named 'completions'"),
    ],
)
def test_columns_that_do_not_serve_the_rewards_are_named(
    tmp_path, monkeypatch, config_file, capsys, row, sentence
):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    assert main(["train", str(config_file), f"dataset_name={path}"]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "is empty"),
        ('{"prompt": "a"}\n{"prompt": ', "not"),
        ('{"question": "a"}\n', "question"),
        ('{"prompt": ""}\n', "row 0"),
    ],
)
def test_wrong_datasets_are_named(tmp_path, monkeypatch, config_file, capsys, text, sentence):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "wrong.jsonl"
    path.write_text(text)
    assert main(["train", str(config_file), f"dataset_name={path}"]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert "wrong.jsonl" in error


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["--max_steps", "3"], "--max_steps; keys of the configuration are written max_steps=3"),
        (["--lr=1e-5", "--beta"], "are written learning_rate=1e-5 beta=VALUE"),
        (["--frobnicate", "3"], "unrecognized arguments: --frobnicate\n"),
    ],
)
@pytest.mark.parametrize("command", ["train", "eval"])
def test_options_of_a_run_written_as_options_of_the_command_are_led_to_their_keys(
    config_file, capsys, command, arguments, hint
):
    with pytest.raises(SystemExit) as end:
        main([command, str(config_file), *arguments])
    assert end.value.code == 2
    assert hint in capsys.readouterr().err


def test_options_of_training_are_refused_where_nothing_is_trained(config_file, capsys):
    overrides = ["seed=3", "learning_rate=1e-5", "warmup_ratio=0.1", "epsilon=0.1", "output_dir=x"]
    overrides += ["max_steps=7"]
    assert main(["eval", str(config_file), *overrides]) == 2
    said = capsys.readouterr().err.splitlines()[1:]
    of_training = "is of training, and `fastgrpo eval` does not train; "
    assert sorted(line.removeprefix("fastgrpo: ") for line in said) == [
        f"epsilon_high: {of_training}leave it out",
        f"epsilon_low: {of_training}leave it out",
        f"learning_rate: {of_training}leave it out",
        f"max_steps: {of_training}leave it out",
        f"output_dir: {of_training}--out says where results go",
        f"warmup_steps: {of_training}leave it out",
    ]


def test_the_module_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "fastgrpo", "train", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0
    assert "key=value" in done.stdout


def test_an_error_of_the_users_own_code_is_told_with_what_there_is_of_the_run(
    tmp_path, monkeypatch, config_file, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("def roll(prompts, engine):\n    raise KeyError('mine')\n")
    with pytest.raises(KeyError, match="mine"):
        main(["train", str(config_file), "rollout_fn=mine.py:roll"])
    assert "nothing was written" in capsys.readouterr().err


@pytest.mark.parametrize("saved", [True, False])
def test_a_run_that_fails_says_how_to_go_on(tmp_path, monkeypatch, config_file, capsys, saved):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(
        "def judge(completions, trainer_state, **columns):\n"
        "    return [1.0 / (1 - trainer_state.global_step)] * len(completions)\n"
    )
    saving = ["save_strategy=steps", "save_steps=1"] if saved else []
    overrides = [*saving, "reward_funcs=[mine.py:judge]", "reward_timeout=null", "output_dir=run"]
    assert main(["train", str(config_file), *overrides]) == 1
    told = capsys.readouterr().err.partition("ZeroDivisionError")[2].splitlines()[1:]
    how = "start it again with output_dir=run and --resume auto to go on after step 1"
    assert told == ["run directory: run"] + [how] * saved


def test_a_run_whose_numbers_went_wrong_is_not_told_to_go_on(
    tmp_path, monkeypatch, config_file, capsys
):
    """It would end in the same way; what is advised is a new run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(
        "def judge(completions, trainer_state, **columns):\n"
        "    return [1e3**trainer_state.global_step * i for i in range(len(completions))]\n"
    )
    overrides = ["reward_funcs=[mine.py:judge]", "reward_timeout=null", "scale_rewards=none"]
    overrides += ["max_grad_norm_ratio=10", "grad_norm_window=1", "max_bad_steps=0"]
    overrides += ["save_strategy=steps", "save_steps=1", "output_dir=run"]
    assert main(["train", str(config_file), *overrides]) == 1
    assert (tmp_path / "run" / "checkpoints" / "step-1").is_dir()
    error = capsys.readouterr().err
    assert "begin a new run with a lower learning_rate" in error
    assert error.endswith("\nrun directory: run\n")


@pytest.mark.parametrize("kind", ["a link", "empty", "new", "in new ones"])
def test_a_run_without_a_step_leaves_the_directories_that_were_there(
    tmp_path, monkeypatch, config_file, capsys, kind
):
    (tmp_path / "mine.py").write_text("def roll(prompts, engine):\n    raise KeyError('mine')\n")
    place = tmp_path / "place"
    place.mkdir()
    monkeypatch.chdir(place)
    out = Path("out/of/mine" if kind == "in new ones" else "out")
    if kind == "a link":
        Path("real").mkdir()
        out.symlink_to("real")
    elif kind == "empty":
        out.mkdir(mode=0o750)
    there = {path: path.lstat().st_mode for path in place.rglob("*")}
    with pytest.raises(KeyError, match="mine"):
        main(["train", str(config_file), "rollout_fn=../mine.py:roll", f"output_dir={out}"])
    assert "nothing was written" in capsys.readouterr().err
    assert {path: path.lstat().st_mode for path in place.rglob("*")} == there


@pytest.mark.fault(
    "SIGTERM before the first step, and in it",
    "the run ends at once and leaves nothing; it is saved, and the command says how to go on",
)
@pytest.mark.parametrize("trains", [False, True])
def test_sigterm_ends_a_run_with_its_own_status(tmp_path, monkeypatch, config_file, capsys, trains):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(
        "import os, signal\n"
        "def judge(completions, **columns):\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return [1.0] * len(completions)\n"
    )
    handler = signal.getsignal(signal.SIGTERM)
    overrides = ["reward_funcs=[mine.py:judge]", "reward_timeout=null", "output_dir=run"]
    overrides += [] if trains else ["dataset_test_split=train"]  # measured first
    assert main(["train", str(config_file), *overrides]) == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is handler
    error = capsys.readouterr().err
    told = "interrupted\nnothing was written"
    if trains:
        told = (
            "stopped by SIGTERM after step 1, saved in run/checkpoints/step-1; start it again with "
            "output_dir=run and --resume auto to go on"
        )
    assert error.endswith(f"fastgrpo: {told}\n")
    assert (tmp_path / "run").exists() == trains


@pytest.mark.filterwarnings("default:.*caps ratios")
def test_a_warning_of_the_configuration_is_one_of_the_run(
    tmp_path, monkeypatch, config_file, capsys
):
    monkeypatch.chdir(tmp_path)
    overrides = ["loss_type=cispo", "epsilon_high=0.28", "max_steps=2", "reward_funcs=[tag_count]"]
    assert main(["train", str(config_file), *overrides, "output_dir=run"]) == 0
    shown = capsys.readouterr()
    assert shown.out.count("warning: loss_type='cispo' caps ratios at epsilon_high") == 1
    assert "UserWarning" not in shown.err
    first = (tmp_path / "run" / "warnings.jsonl").read_text().splitlines()[0]
    assert json.loads(first)["step"] == 0 and "caps ratios" in first
