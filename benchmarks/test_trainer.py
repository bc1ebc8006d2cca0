"""The trainer benchmark in miniature, on a CPU: what is compared is asserted, times are not."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from fastgrpo import learner as our_learner
from fastgrpo.advantages import group_advantages

from . import measure, runs, trainer, trainer_worker, trainers
from .peers import missing
from .trainer_cells import TrainerCell, given_completions, make_task, mean_id, quick_cells
from .trainer_recorder import Recorder, WrongResult

ALL, HALF = quick_cells()
PARTS = ("generation", "scoring", "training")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run of the command, as it is written."""
    path = tmp_path_factory.mktemp("results") / "run.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "quick_cells", lambda: [HALF])
        trainer.main(["--quick", "--out", str(path)])
    return json.loads(path.read_text())


def test_the_command_writes_a_record_for_each_trainer(report: dict[str, Any]) -> None:
    assert report["command"] == f"python -m benchmarks.trainer --quick --out {report_path(report)}"
    assert report["ceilings"] == [] and report["versions"]["torch"] == torch.__version__
    ours, theirs = report["records"]
    assert (ours["peer"], theirs["peer"]) == ("fastgrpo", "trl")
    for record in (ours, theirs):
        assert (record["op"], record["rho"], record["frozen"]) == ("trainer", 0.5, False)
        assert (record["H"], record["V"], record["N"]) == (96, 14, 4 * 4 * 6)
    check_measured(ours)
    if missing("trl"):
        assert theirs["status"] == "not installed" and theirs["ms_total"] is None


@pytest.mark.peers
@pytest.mark.skipif(missing("trl") is not None, reason="trl is not installed")
def test_trl_does_the_same_work(report: dict[str, Any]) -> None:
    ours, theirs = report["records"]
    check_measured(theirs)
    assert theirs["grad_norm"] == ours["grad_norm"]  # the same weights, prompts and completions


def report_path(report: dict[str, Any]) -> str:
    return report["command"].split()[-1]


def check_measured(record: dict[str, Any]) -> None:
    """A record is "ok" only if every step had the tokens and degenerate groups asked for."""
    assert record["status"] == "ok", record
    assert record["error_vs_fp64"]["gradient"] < 1e-5
    for part in (*PARTS, "total"):
        low, median, high = record[f"ms_{part}"]
        assert 0 < low <= median <= high
        assert record["tokens_per_second"][part] == pytest.approx(96 / median * 1e3, rel=1e-2)
    assert record["rounds"] == [record["ms_total"][1]]
    # Weights, two moments and, with the last backward, gradients: 334 thousand of each.
    assert 4 * 4 * 334_000 < record["peak_extra_bytes"] < 64 * 2**20


@pytest.fixture(scope="module")
def recorder(tmp_path_factory: pytest.TempPathFactory) -> Recorder:
    """A run of our trainer in this process."""
    recorder = Recorder(ALL, "cpu", [4, None, None])
    directory = tmp_path_factory.mktemp("trainer")
    trainers.load("fastgrpo").train(make_task(ALL, "cpu"), ALL, recorder, directory)
    return recorder


def test_phases_are_parts_of_a_step(recorder: Recorder) -> None:
    assert recorder.reported == len(recorder.steps) == 3
    for step in recorder.steps:
        assert 0 < step["generation"] < step["rollout"]
        assert step["rollout"] + step["training"] <= step["total"]


def test_completions_are_given_then_sampled(
    recorder: Recorder, tmp_path_factory: pytest.TempPathFactory
) -> None:
    lines = next(Path(tmp_path_factory.getbasetemp()).glob("trainer*/run/metrics.jsonl"))
    tokens = [json.loads(line)["num_tokens"] for line in lines.read_text().splitlines()]
    assert [b - a for a, b in itertools.pairwise(tokens)] == [tokens[0] + 2 * 16] * 2


@pytest.mark.parametrize("cell", [ALL, HALF], ids=["all", "half"])
def test_half_of_the_groups_have_no_advantage(cell: TrainerCell) -> None:
    task = make_task(cell, "cpu")
    rewards = []
    for row in task.dataset:
        completions = given_completions(task.tokenizer(row["prompt"])["input_ids"], cell, 6)
        rewards += mean_id(completions, [row["judged"]] * 4)
    found = group_advantages(torch.tensor(rewards)[:, None], [1.0], 4).advantages.view(4, 4)
    assert (found != 0).all(1).tolist() == [True, True, cell.rho == 1, cell.rho == 1]
    assert (found == 0).all(1).tolist() == [False, False, cell.rho < 1, cell.rho < 1]


def test_no_token_ends_a_completion() -> None:
    task = make_task(ALL, "cpu")
    assert task.tokenizer.eos_token_id == ALL.V == task.model.lm_head.weight.shape[0]


def metrics(**values: float) -> dict[str, float]:
    lengths = {"completions/min_length": 6.0, "completions/max_length": 6.0}
    return {**lengths, "frac_reward_zero_std": 0.0, "loss": 0.0, "grad_norm": 2.0, **values}


@pytest.mark.parametrize(
    "wrong",
    [
        {"completions/min_length": 5.0},
        {"frac_reward_zero_std": 0.5},
        {"loss": float("nan")},
        {"grad_norm": 2.001},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_a_wrong_result_is_not_timed(wrong: dict[str, float]) -> None:
    recorder = Recorder(ALL, "cpu", [None], {"weight": torch.tensor([[2.0]])})
    with pytest.raises(WrongResult, match="no step with the first gradient"):
        recorder.report(metrics())
    recorder.check_gradient(with_gradient([[1.0]]))  # clipped at 1
    recorder.report(metrics())
    recorder.reported = 0
    with pytest.raises(WrongResult, match=next(iter(wrong)).replace("grad_norm", "gradient")):
        recorder.report(metrics(**wrong))


def with_gradient(grad: list[list[float]]) -> nn.Module:
    model = nn.Linear(len(grad[0]), len(grad), bias=False)
    model.weight.grad = torch.tensor(grad)
    return model


@pytest.mark.parametrize("scale", [0.1, 1.0], ids=["as it is", "clipped"])
def test_a_gradient_is_a_vector(scale: float) -> None:
    exact = {"weight": scale * torch.tensor([[3.0, 4.0]])}
    right, length = torch.tensor([[0.6, 0.8]]), min(1.0, 5 * scale)
    found = {name: Recorder(ALL, "cpu", [None], exact) for name in ("right", "flipped", "turned")}
    found["right"].check_gradient(with_gradient((length * right).tolist()))
    assert found["right"].error == pytest.approx(0, abs=1e-7)
    with pytest.raises(WrongResult, match="off by 2 of its norm"):
        found["flipped"].check_gradient(with_gradient((-length * right).tolist()))
    with pytest.raises(WrongResult, match=r"off by 0\.28 of its norm"):
        found["turned"].check_gradient(with_gradient((length * right.flip(1)).tolist()))
    with pytest.raises(WrongResult, match=r"in excess, \['weight'\]"):
        Recorder(ALL, "cpu", [None], exact).check_gradient(nn.Linear(2, 1, bias=False))


def flipped(completion_ids: list[list[int]], judged: list[bool], **columns: Any) -> list[float]:
    """What `mean_id` says, with the sign of all advantages flipped."""
    return [-reward for reward in mean_id(completion_ids, judged)]


@pytest.mark.parametrize(
    "name",
    [
        "fastgrpo",
        pytest.param(
            "trl",
            marks=[
                pytest.mark.peers,
                pytest.mark.filterwarnings("ignore::FutureWarning"),  # TRL's
                pytest.mark.skipif(missing("trl") is not None, reason="trl is not installed"),
            ],
        ),
    ],
)
def test_flipped_advantages_are_wrong(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainers.load(name), "mean_id", flipped)
    with pytest.raises(WrongResult, match="the first gradient is off by 2 of its norm"):
        trainer_worker.measured(name, ALL, "cpu")


def test_a_rotated_gradient_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    clip = our_learner.clip_gradients

    def clip_and_rotate(model: nn.Module, most: float) -> float:
        norm = clip(model, most)
        head = model.get_output_embeddings().weight
        head.grad = head.grad.roll(1, 0)  # of the same norm
        return norm

    monkeypatch.setattr(our_learner, "clip_gradients", clip_and_rotate)
    with pytest.raises(WrongResult, match="the first gradient is off by"):
        trainer_worker.measured("fastgrpo", ALL, "cpu")


@pytest.mark.slow
def test_what_a_trainer_prints_is_not_in_the_record() -> None:
    program = (
        "import os, subprocess; from benchmarks import trainer_worker as worker\n"
        "def measured(*given):\n"
        "    os.write(1, b'noise'); subprocess.run(['echo', 'noise']); print('noise')\n"
        "    raise ValueError('why')\n"
        "worker.measured = measured; worker.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "fastgrpo"],
        input=json.dumps(asdict(ALL)),
        capture_output=True,
        text=True,
        check=True,
    )
    record = json.loads(done.stdout)
    assert record["status"] == "failed: ValueError: why" and done.stderr.count("noise") == 3


def test_a_trainer_that_is_not_installed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainers.load("trl"), "missing", lambda package: "not installed")
    assert trainer_worker.measured("trl", ALL, "cpu") == {"status": "not installed"}


def test_the_longest_completion_is_found_and_confirmed(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def measured(name: str, cell: TrainerCell, device: str, limit: float, given: tuple) -> Any:
        tried.append(cell.completion_length)
        fits = tried[-1] <= (4000 if "--sampled" in given else 5000)
        status = "ok" if fits else "failed: out of memory"
        return trainer_worker.record_of(name, cell, device, {"status": status})

    monkeypatch.setattr(trainer, "measured", measured)
    record = trainer.longest_completion("fastgrpo", 24.0, 1.0)
    assert tried == [1024, 2048, 4096, 8192, 6144, 5120, 4608, 4864, 4864, 3648]
    assert (record["longest_completion"], record["gib"], record["N"]) == (3648, 24.0, 8 * 3648)
    assert record["sampled"] is True
    assert trainer.longest_that_fits(lambda length: length <= 100) == 64
    assert trainer.longest_that_fits(lambda length: True) == 2**16


def test_what_takes_too_long_to_sample_is_not_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(name: str, cell: TrainerCell, device: str, limit: float, given: tuple) -> Any:
        assert "--sampled" not in given
        fits = cell.completion_length <= 10_000
        status = "ok" if fits else "failed: out of memory"
        return trainer_worker.record_of(name, cell, device, {"status": status})

    monkeypatch.setattr(trainer, "measured", measured)
    record = trainer.longest_completion("fastgrpo", 24.0, 1.0)
    assert (record["longest_completion"], record["sampled"]) == (9728, False)
    assert record["N"] == 8 * 9728


def test_a_smaller_gpu_is_emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    shares: list[float] = []
    large = SimpleNamespace(name="large", total_memory=96 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: large)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", shares.append)
    measure.emulate_memory(24.0)
    found = torch.cuda.get_device_properties(0)
    assert shares == [0.25] and (found.name, found.total_memory) == ("large", 24 * 2**30)


def test_a_failure_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(name: str, cell: TrainerCell, *args: Any) -> Any:
        return trainer_worker.record_of(name, cell, "cuda", {"status": "not installed"})

    monkeypatch.setattr(trainer, "measured", measured)
    record = trainer.longest_completion("trl", 24.0, 1.0)
    assert record["status"] == "not installed" and record["longest_completion"] is None


def test_a_process_cannot_hang_or_fail_unnoticed() -> None:
    sleep = ["-n", "1", "-r", "1", "import time; time.sleep(60)"]
    with pytest.raises(runs.ProcessFailed, match="killed after 1 s"):
        list(runs.records("timeit", sleep, None, seconds=1.0))
    with pytest.raises(runs.ProcessFailed, match="ended with 1: ValueError: why"):
        list(runs.records("timeit", ["raise ValueError('why')"], None, seconds=60.0))


def test_without_a_gpu_the_command_says_what_to_use(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    for arguments in (["--gpu"], ["--emulate-memory", "24GiB"]):
        with pytest.raises(SystemExit):
            trainer.main(arguments)
        assert "no GPU here: use --quick or --cpu" in capsys.readouterr().err


def test_cells_are_chosen_by_model(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    options = trainer._parse(["--gpu", "--model", "Qwen2.5-1.5B"])
    assert [(c.model, c.rho) for c in options.cells] == [
        ("Qwen2.5-1.5B", 1.0),
        ("Qwen2.5-1.5B", 0.5),
    ]
    assert options.rounds == 1
    with pytest.raises(SystemExit):
        trainer._parse(["--cpu", "--model", "tiny"])
    assert "--model tiny: no such cell; there are demo, toy, small" in capsys.readouterr().err


def test_the_toy_has_256_completions_of_32_tokens_with_and_without_degenerate_groups() -> None:
    options = trainer._parse(["--cpu", "--model", "toy"])
    assert [(c.completions, c.completion_length, c.rho, c.threads) for c in options.cells] == [
        (256, 32, 1.0, 1),
        (256, 32, 0.5, 1),
    ]


def test_rounds_are_merged() -> None:
    report: dict[str, Any] = {"records": []}
    for median in (2.0, 4.0):
        times = [median / 2, median, median * 2]
        record = {"peer": "a", "status": "ok", "ms_total": times, "ms_forward": None}
        runs.add(report, record, ("peer",))
    (found,) = report["records"]
    assert found["ms_total"] == [1.0, 3.0, 8.0] and found["rounds"] == [2.0, 4.0]
    assert found["ms_total_medians"] == [2.0, 4.0] and found["ms_forward"] is None
