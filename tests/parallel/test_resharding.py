"""Runs saved by some number of processes, resumed by another, beside the run that went through.

Every case is trained to its end by some processes, with a checkpoint after each step; of its
directory copies are made whose last checkpoint is an earlier one, while the other files say all
that came later: what a run leaves that is killed. Copies go on with as many processes, and those of
the first cut with others too: four, two copies of two parts, two, one.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import torchrun
from resume_ranks import train
from safetensors.torch import load_file
from small_models import save_small_model
from small_runs import HALF_SILENT, STEADY, lines
from transformers import AutoModelForCausalLM

from fastgrpo.cli import main as fastgrpo

# Of transformers 5.23, when peft itself loads adapters.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated"),
]

STEPS = 6
COMPLETIONS = 16  # of a step, whatever the number of processes
CASES: dict[str, dict[str, Any]] = {
    "dapo, warmup and a cosine": {
        "lr_scheduler_type": "cosine", "warmup_steps": 2, "weight_decay": 0.1, "tie": False,
    },
    "a reference that moves, waiting batches": {
        "beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 2, "num_iterations": 2,
        "steps_per_generation": 2, "loss_type": "grpo",
    },
    "adaptive entropy, dynamic sampling": {
        "use_adaptive_entropy": True, "entropy_target": 4.585, "entropy_coef_delta": 0.01,
        "dynamic_sampling": True, "max_resample_rounds": 2,
    },
    "adapters": {"use_peft": True, "lora_r": 4, "beta": 0.1, "num_iterations": 2},
    "a warm start": {
        "task": "arithmetic", "warm_start_accuracy": 0.02, "beta": 0.1,
        "reward_funcs": ["fastgrpo.tasks.arithmetic:three_digits"], "max_completion_length": 4,
        "max_eval_samples": 16, "eval_strategy": "no",
    },
}  # fmt: skip
DROPOUT = {"use_peft": True, "lora_r": 4, "lora_dropout": 0.3}
"""What two processes draw is not what others would: it goes on with as many alone."""
CUTS = {
    "dapo, warmup and a cosine": [1, 4],
    # Of four steps on a generation the first, or the last, is done.
    "a reference that moves, waiting batches": [1, 4, 5],
    "adaptive entropy, dynamic sampling": [3],
    "adapters": [3],
    "a warm start": [2],
    "dropout": [3],
}
PROCESSES = {  # by name: how many, and how they share the model
    "4": (4, {"data": 1, "shard": 4}),
    "2x2": (4, {"data": 2, "shard": 2}),
    "2": (2, {"data": 1, "shard": 2}),
    "1": (1, None),
}
WORLDS = {  # who trains each case, and who else goes on with it
    "dapo, warmup and a cosine": ["4", "2x2", "2", "1"],
    "a reference that moves, waiting batches": ["2", "2x2", "1"],
    "adaptive entropy, dynamic sampling": ["2", "4", "1"],
    "adapters": ["2", "4", "1"],
    "a warm start": ["2", "1"],
    "dropout": ["2"],
}
FIRST = next(iter(CASES))
RESUMED = [
    (case, step, world)
    for case, steps in CUTS.items()
    for step in steps
    for world in (WORLDS[case] if step == steps[0] else WORLDS[case][:1])
]


def values(root: Path, case: str, world: str, name: str) -> dict[str, Any]:
    options = dict(DROPOUT if case == "dropout" else CASES[case])
    n, parallel = PROCESSES[world]
    passes = 2 if n == 1 else 1  # of a step on each process
    if "steps_per_generation" in options:
        options["steps_per_generation"] *= passes
    tie = options.pop("tie", True)
    if "task" not in options:
        options |= {
            "model_name_or_path": str(root / f"tied-{tie}"),
            "dataset_name": str(root / "problems.jsonl"),
            "reward_funcs": [f"{root}/silence.py:half_silent"],
        }
    return {
        **({} if parallel is None else {"parallel": parallel}),
        "output_dir": str(root / name),
        "num_generations": 4,
        "per_device_train_batch_size": COMPLETIONS // n // passes,
        "gradient_accumulation_steps": passes,
        "max_completion_length": 12,
        "reward_timeout": None,
        "lr_scheduler_type": "constant",
        "max_steps": STEPS,
        "save_steps": 1,
        "cpu_threads": 1,
        **STEADY,
        **options,
    }


def cut(source: Path, step: int, target: Path) -> None:
    """Copy a run without its end: later checkpoints, and what is written last of all."""
    shutil.copytree(source, target)
    for path in (target / "checkpoints").iterdir():
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    shutil.rmtree(target / "final")
    (target / "summary.json").unlink()
    with (target / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "rewa')  # killed as it was written


def name_of(case: str, step: int, world: str) -> str:
    return re.sub("[ ,]+", "-", f"{case} {step} on {world}")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train everything, everywhere; the tests look at what came of it."""
    root = tmp_path_factory.mktemp("runs")
    (root / "silence.py").write_text(HALF_SILENT)
    rows = [{"prompt": f"Ann has {n} eggs.\n"} for n in range(2, 34)]
    (root / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for tie in (True, False):
        save_small_model(root / f"tied-{tie}", tie=tie)

    def run(n: int, jobs: list[dict[str, Any]]) -> None:
        file = root / "jobs.json"
        file.write_text(json.dumps(jobs))
        script = Path(__file__).with_name("resume_ranks.py")
        done = torchrun(n, script, file, timeout=900)
        assert done.returncode == 0, done.stderr

    jobs: dict[int, list[dict[str, Any]]] = {4: [], 2: []}
    for case, (world, *_) in WORLDS.items():
        jobs[PROCESSES[world][0]].append(values(root, case, world, f"{case} whole"))
    for n, some in jobs.items():
        run(n, some)
        some.clear()
    train(values(root, FIRST, "1", "whole on 1"))
    for case, step, world in RESUMED:
        name = name_of(case, step, world)
        cut(root / f"{case} whole", step, root / name)
        job = values(root, case, world, name) | {"resume": True}
        if world == "1":
            train(job)
        else:
            jobs[PROCESSES[world][0]].append(job)
    cut(root / "whole on 1", 3, root / "1 to 2")
    jobs[2].append(values(root, FIRST, "2", "1 to 2") | {"resume": True})
    for n, some in jobs.items():
        run(n, some)
    return root


def metrics_of(run: Path) -> list[dict[str, Any]]:
    """Return what steps are, whenever and wherever they are taken."""
    passing = ("time", "memory", "parallel/", "tokens_per_second")
    return [
        {name: value for name, value in line.items() if not re.match("|".join(passing), name)}
        for line in lines(run / "metrics.jsonl")
        if line.pop("step_time", None) is not None
    ]


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    (file,) = (run / "final").glob("*.safetensors")
    return load_file(file)


def assert_same_run(found: Path, whole: Path, *, exactly: bool) -> None:
    wanted, metrics = metrics_of(whole), metrics_of(found)
    assert [line["step"] for line in metrics] == list(range(1, STEPS + 1))
    for ours, theirs in zip(metrics, wanted, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            if exactly or re.match("step|num_tokens|reward|completions|frac_|learning", name):
                assert ours[name] == value, name
            else:  # sums in another order; a loss is a difference of advantages of about 1
                assert ours[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    for name in ("completions", "rewards"):
        assert lines(found / f"{name}.jsonl") == lines(whole / f"{name}.jsonl")
    ours, theirs = weights_of(found), weights_of(whole)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype
        # Each of six steps moves a weight by up to 1e-2.
        atol = 0 if exactly else 2e-5
        torch.testing.assert_close(ours[name], value, atol=atol, rtol=0, msg=name)


@pytest.mark.parametrize(("case", "step", "world"), RESUMED)
def test_a_resumed_run_is_the_run_that_went_through(
    root: Path, case: str, step: int, world: str
) -> None:
    """With as many processes it is the same to the last bit."""
    run = root / name_of(case, step, world)
    assert_same_run(run, root / f"{case} whole", exactly=world == WORLDS[case][0])


def test_a_run_of_one_process_goes_on_with_two(root: Path) -> None:
    assert_same_run(root / "1 to 2", root / "whole on 1", exactly=False)
    assert_same_run(root / "1 to 2", root / f"{FIRST} whole", exactly=False)


@pytest.mark.parametrize(
    "case", ["dapo, warmup and a cosine", "adaptive entropy, dynamic sampling"]
)
def test_runs_learn_something_that_resuming_could_lose(root: Path, case: str) -> None:
    before = load_file(root / f"tied-{CASES[case].get('tie', True)}" / "model.safetensors")
    after = weights_of(root / f"{case} whole")
    assert max((after[name] - before[name]).abs().max() for name in after) > 0.02


@pytest.mark.parametrize("case", [case for case in CASES if case != "adapters"])
def test_checkpoints_are_those_of_one_process(root: Path, case: str) -> None:
    """Every one is a plain Hugging Face checkpoint, with the keys that a whole model saves."""
    for run in (root / f"{case} whole", root / name_of(case, CUTS[case][0], WORLDS[case][-2])):
        for path in (run / "final", run / "checkpoints" / f"step-{STEPS - 1}"):
            model, found = AutoModelForCausalLM.from_pretrained(
                path, dtype="auto", output_loading_info=True
            )
            assert not found["missing_keys"] and not found["unexpected_keys"]
            saved = load_file(path / "model.safetensors")
            assert saved.keys() == {name for name, _ in model.named_parameters()}
            assert {x.dtype for x in saved.values()} == {torch.float32}
            assert ("lm_head.weight" in saved) == (not CASES[case].get("tie", True))


def test_adapters_of_several_processes_find_their_base(root: Path) -> None:
    for run in (root / "adapters whole", root / name_of("adapters", 3, "4")):
        for path in (run / "final", run / "checkpoints" / "step-5"):
            described = json.loads((path / "adapter_config.json").read_text())
            assert described["base_model_name_or_path"] == str(root / "tied-True")
            assert not (path / "model.safetensors").exists()
            model = AutoModelForCausalLM.from_pretrained(path)
            adapters = {n: p for n, p in model.named_parameters() if "lora_" in n}
            saved = load_file(path / "adapter_model.safetensors")
            assert len(adapters) == len(saved) > 0
            assert any(p.abs().max() > 0 for n, p in adapters.items() if "lora_B" in n)


def test_eval_measures_a_checkpoint_of_four_processes(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = root / f"{FIRST} whole"
    options = ["--checkpoint", "step-3", "-n", "2", "--split", "train", "--max-samples", "2"]
    options += ["--threshold", "1"]
    assert fastgrpo(["eval", str(run), *options]) == 0, capsys.readouterr().err
