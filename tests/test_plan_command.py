"""What `fastgrpo plan` prints, and what it refuses."""

import json
import os
import socket
import subprocess
import sys
import time

import pytest
import torch
from small_models import save_small_model

from fastgrpo.cli import main


@pytest.fixture
def config_file(tmp_path):
    model = save_small_model(tmp_path / "model")
    rows = [{"prompt": "1" * n, "answer": "1"} for n in (3, 17, 5)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "tiny.yaml"
    path.write_text(f"model_name_or_path: {model}\ndataset_name: {tmp_path / 'prompts.jsonl'}\n")
    return path


def test_a_plan_refuses_what_training_refuses(config_file, capsys):
    """The longest prompt is one of those that are tested on."""
    folder = config_file.parent / "folder"
    folder.mkdir()
    for split, length in (("train", 3), ("test", 21)):
        row = {"prompt": "1" * length, "answer": "1"}
        (folder / f"{split}.jsonl").write_text(json.dumps(row) + "\n")
    options = [f"dataset_name={folder}", "dataset_test_split=test", "max_tokens_per_microbatch=60"]
    options += ["max_completion_length=40", "gradient_checkpointing=false"]
    assert main(["train", str(config_file), *options]) == 2
    reason = (
        "has 21 tokens, which with 40 of the completion exceeds the 60 that "
        "max_tokens_per_microbatch has room for; lower max_completion_length, raise "
        "max_tokens_per_microbatch, or leave such prompts out of the dataset"
    )
    refused = capsys.readouterr().err.splitlines()[-1]
    assert refused == f"fastgrpo: max_completion_length: the prompt of row 0 {reason}"
    assert main(["plan", str(config_file), *options, "--gpu-memory", "9"]) == 0
    said = capsys.readouterr().out
    expected = f"It does not start: max_completion_length: the longest prompt {reason}."
    assert said.splitlines()[0] == expected
    (row,) = (line.split() for line in said.splitlines() if "max_completion_length  " in line)
    assert [word for word in row if word.isalnum() or "_" in word] == [
        "max_completion_length", "40", "39", "max_tokens_per_microbatch",
    ]  # fmt: skip


def test_a_run_that_does_not_fit_is_no_error(config_file, capsys):
    arguments = ["plan", str(config_file), "--gpu-memory", "0.5", "max_completion_length=64"]
    assert main(arguments) == 0
    verdict, *lines = capsys.readouterr().out.splitlines()
    assert verdict.startswith("It does not fit: the peak of 0.0")
    assert "in training, is 0.2" in verdict
    assert "prompts of 17 tokens (the longest of the dataset), completions of 64" in lines[1]
    assert "648 packed tokens" in lines[2]
    for word in ("weights", "KV cache", "training (peak)", "num_generations", "none", "saves GiB"):
        assert any(word in line for line in lines), word


def test_the_task_can_be_planned(capsys):
    assert (
        main(
            ["plan", "configs/demo_arithmetic.yaml", "--gpu-memory", "2GB", "--prompt-length", "7"]
        )
        == 0
    )
    printed = capsys.readouterr().out
    assert printed.startswith("It fits: ")
    assert "333,936 parameters" in printed
    assert "prompts of 7 tokens (as given)" in printed


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--gpu-memory", "much"], "--gpu-memory: must be like 24GiB, 24GB or 800MiB, got 'much'"),
        (["--gpu-memory", "0"], "--gpu-memory: must be like 24GiB, 24GB or 800MiB, got '0'"),
        (["--gpu-memory", "1", "model_name_or_path=./none"], "./none is not a model directory"),
        (["--gpu-memory", "1", "num_generation=4"], "did you mean num_generations?"),
        (["--gpu-memory", "1", "--prompt-length", "0"], "--prompt-length: must be at least 1"),
    ],
)
def test_wrong_input_is_one_sentence(config_file, capsys, arguments, sentence):
    assert main(["plan", str(config_file), *arguments]) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU to plan for")
def test_without_a_gpu_its_memory_must_be_told(config_file, capsys):
    assert main(["plan", str(config_file)]) == 2
    assert "this machine has no GPU: say which to plan for" in capsys.readouterr().err


def test_a_hub_that_does_not_answer_is_not_waited_for(tmp_path, config_file):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
    environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hub")}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    arguments = ["plan", str(config_file), "--gpu-memory", "1", "model_name_or_path=nobody/nothing"]
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "fastgrpo", *arguments],
        env=environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert time.perf_counter() - started < 30  # ten seconds and the imports
    assert done.returncode == 2
    assert done.stdout == ""
    told = [line for line in done.stderr.splitlines() if line.startswith("fastgrpo:")]
    assert told[0] == f"fastgrpo: planning {config_file}"
    assert told[1:] == [done.stderr.splitlines()[-1]]
    assert told[1].startswith("fastgrpo: model_name_or_path: nobody/nothing did not load within")
