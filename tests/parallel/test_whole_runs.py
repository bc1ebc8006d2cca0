"""The files of a run of several processes are those of the run of one.

A step has the same completions of the same prompts, whoever samples and judges which, and so the
texts are the very same. Numbers are to 1e-4 after some steps of AdamW whose epsilon is above
rounding: each step adds the differences of `test_same_as_one_process` to those before, and makes
them grow. (At a rate of 1e-2 one process differs from itself by 2e-4 after 8 steps, if only its
micro-batches are others.)
"""

from __future__ import annotations

import functools
import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from launch import torchrun
from safetensors.torch import load_file
from small_models import save_small_model
from small_runs import lines
from whole_runs import main

SCRIPT = Path(__file__).parent / "whole_runs.py"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        torch.cuda.is_available(), reason="both sides of the comparison are computed on the CPU"
    ),
]

# Judges that tell which prompts each call is about.
JUDGES = """
import json, os, uuid

def _note(prompts):
    with open(os.path.join(os.environ["SEEN"], f"{uuid.uuid4()}.json"), "w") as file:
        json.dump(prompts, file)

def letters(prompts, completions, answer, log_metric, log_extra, trainer_state, **columns):
    assert len(answer) == len(completions) == len(prompts)
    _note(prompts)
    log_metric("length", sum(map(len, completions)) / len(completions))
    log_metric("taken", trainer_state.global_step)
    log_extra("first", [text[:1] for text in completions])
    return [text.count("e") + 0.1 * len(set(text)) for text in completions]

def even(prompts, completions, answer, **columns):
    # Of prompts with an even number of eggs every completion is as good as the others.
    _note(prompts)
    return [
        0.5 if int(prompt.split()[2]) % 2 == 0 else len(set(text))
        for prompt, text in zip(prompts, completions)
    ]

def stepwise(completion_ids, **columns):
    return [
        [(len(ids) // 2 - 1, float(ids[0] % 3)), (len(ids) - 1, 1.0)]
        if len(ids) > 1 and ids[0] % 2
        else 0.5
        for ids in completion_ids
    ]

def recited(prompts, engine, answer):
    # What the function is asked for and what it makes of it depends on the prompt alone.
    _note(prompts)
    ids = [engine.encode(prompt) for prompt in prompts]
    engine.generate(ids[:1], max_completion_length=2)
    turns = [0] * len(prompts)
    for i in range(1, len(prompts)):
        turns[i] = turns[i - 1] + 1 if prompts[i] == prompts[i - 1] else 0
    made = [
        [2 + (sum(x) * (turn + 2) + t) % 60 for t in range(turn + 3)]
        for x, turn in zip(ids, turns)
    ]
    return {
        "prompt_ids": ids,
        "completion_ids": made,
        "logprobs": [[-4.5] * len(x) for x in made],
        "env_mask": [[1] * (len(x) - 1) + [0] for x in made],
        "turns": turns,
    }
"""

RUNS: dict[str, dict[str, Any]] = {
    "plain": {
        "beta": 0.1, "eval_strategy": "steps", "eval_steps": 2, "num_generations_eval": 2,
        "per_device_eval_batch_size": 4, "save_strategy": "steps", "save_steps": 2,
    },
    "epochs": {  # of 7 prompts each, all of them in a step
        "per_step": 28, "rows": 7, "max_steps": -1, "num_train_epochs": 3,
        "num_completions_to_log": 28,
    },
    "uneven": {  # 7 prompts in steps of 4: an epoch ends within a step
        "rows": 7, "max_steps": -1, "num_train_epochs": 2,
    },
    "two prompts": {  # fewer than ranks
        "per_step": 8, "rows": 5, "max_steps": 5,
        "mesh": {2: {"data": 2, "shard": 1}, 4: {"data": 2, "shard": 2}},
    },
    "resampled": {
        "reward_funcs": ["even"], "dynamic_sampling": True, "max_resample_rounds": 3,
    },
    "filtered": {
        "reward_funcs": ["even"], "loss_type": "grpo", "num_iterations": 2,
        "mesh": {2: "ddp"},
    },
    "several steps": {
        "steps_per_generation": 2, "num_iterations": 2, "max_steps": 8,
        "max_tokens_per_microbatch": 160, "importance_sampling_level": "sequence",
        "loss_type": "grpo", "learning_rate": 2e-3,
    },
    "played": {"rollout_fn": "recited"},
    "judged by step": {"reward_funcs": ["letters", "stepwise"], "reward_weights": [1.0, 0.5]},
    "adapters": {"use_peft": True, "beta": 0.1},
}  # fmt: skip
DEMO = {
    "task": "arithmetic", "warm_start_accuracy": 0.01, "max_steps": 3, "num_generations": 8,
    "max_completion_length": 4, "beta": 0.005, "cpu_threads": 1, "max_eval_samples": 50,
    "reward_funcs": ["fastgrpo.tasks.arithmetic:exact_match"], "seed": 0,
    "gradient_checkpointing": False, "save_strategy": "no",
    "learning_rate": 1e-3, "adam_epsilon": 1e-3,
}  # fmt: skip


NAMES = [*RUNS, "demo"]
DEALT = ["plain", "epochs", "uneven", "two prompts", "resampled", "several steps"]
"""Runs whose prompts and passes fall to other ranks where there are four; the rest are for two."""


def write_config(root: Path, name: str, size: int) -> Path:
    """Write the configuration of a run by `size` processes, whose steps are as large."""
    values = dict(DEMO if name == "demo" else RUNS[name])
    per_step = values.pop("per_step", 64 if name == "demo" else 16)
    values |= {
        "output_dir": str(root / f"{name} {size}"),
        "per_device_train_batch_size": per_step // 4,
        "gradient_accumulation_steps": 4 // size,
        "logging_steps": 1,
        "lr_scheduler_type": "constant",
    }
    if size > 1 and "mesh" in values:
        values["parallel"] = values["mesh"][size]
    values.pop("mesh", None)
    if "steps_per_generation" in values:
        values["steps_per_generation"] *= 4 // size
    if "per_device_eval_batch_size" in values:
        values["per_device_eval_batch_size"] = max(1, 8 // size)
    if name != "demo":
        judges, rows = f"{root}/judges.py", values.pop("rows", 32)
        data = root / f"data {name}"
        data.mkdir(exist_ok=True)
        problems = (root / "problems.jsonl").read_text().splitlines(keepends=True)
        (data / "train.jsonl").write_text("".join(problems[:rows]))
        (data / "test.jsonl").write_text("".join(problems[-5:]))
        if "rollout_fn" in values:
            values["rollout_fn"] = f"{judges}:{values['rollout_fn']}"
        values = {
            "model_name_or_path": str(root / "model"),
            "dataset_name": str(data),
            "max_steps": 4,
            "num_generations": 4,
            "max_completion_length": 12,
            "learning_rate": 1e-2,
            "adam_epsilon": 1e-3,
            "save_strategy": "no",
            "cpu_threads": 1,
            "reward_funcs": ["letters"],
            **values,
        }
        values["reward_funcs"] = [f"{judges}:{judge}" for judge in values["reward_funcs"]]
    path = root / f"{name} {size}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run everything: on one process, on two and on four."""
    root = tmp_path_factory.mktemp("runs")
    save_small_model(root / "model", tie=False)
    (root / "judges.py").write_text(JUDGES)
    rows = [{"prompt": f"Ann has {n} eggs and buys {n}.\n", "answer": str(n)} for n in range(2, 34)]
    (root / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SEEN", "")  # set by each run, and then what it was
        main([str(write_config(root, name, 1)) for name in NAMES])
    return root


@pytest.fixture(scope="module")
def run_by(root: Path) -> Callable[[int], None]:
    """Return what runs everything by so many processes, once."""

    @functools.cache
    def run_by(size: int) -> None:
        configs = (write_config(root, name, size) for name in (NAMES if size == 2 else DEALT))
        done = torchrun(size, SCRIPT, *configs, timeout=900)
        assert done.returncode == 0, done.stdout + done.stderr

    return run_by


def prompts_of(root: Path, name: str, size: int) -> Counter[str]:
    """Count how often calls of judges and rollout functions were about each prompt."""
    calls = [json.loads(path.read_text()) for path in (root / f"{name} {size} seen").iterdir()]
    return Counter(prompt for call in calls for prompt in call)


@pytest.mark.parametrize(
    ("name", "size"), [(name, 2) for name in NAMES] + [(name, 4) for name in DEALT]
)
def test_the_files_are_those_of_one_process(
    root: Path, run_by: Callable[[int], None], name: str, size: int
) -> None:
    run_by(size)
    found, wanted = root / f"{name} {size}", root / f"{name} 1"
    assert_same_lines(found / "metrics.jsonl", wanted / "metrics.jsonl")
    for file in ("rewards", "completions"):
        assert_same_lines(found / f"{file}.jsonl", wanted / f"{file}.jsonl")
    for checkpoint in [
        Path("final"),
        *(p.relative_to(wanted) for p in wanted.glob("checkpoints/*")),
    ]:
        weights = "adapter_model" if name == "adapters" else "model"
        ours = load_file(found / checkpoint / f"{weights}.safetensors")
        theirs = load_file(wanted / checkpoint / f"{weights}.safetensors")
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():  # a hundredth of a step of AdamW
            torch.testing.assert_close(ours[key], value, atol=1e-4 * (1 + (name == "demo")), rtol=0)
    assert prompts_of(root, name, size) == prompts_of(root, name, 1)
    assert {p.name for p in found.iterdir()} == {p.name for p in wanted.iterdir()}
    ours, theirs = (json.loads((path / "summary.json").read_text()) for path in (found, wanted))
    assert ours.get("test") == theirs.get("test")
    assert ours["num_tokens"] == theirs["num_tokens"]


@pytest.mark.parametrize("size", [2, 4])
def test_every_epoch_visits_every_prompt_once(
    root: Path, run_by: Callable[[int], None], size: int
) -> None:
    """Steps are of all 7 prompts, which neither 2 ranks nor 4 share evenly."""
    run_by(size)
    logged = lines(root / f"epochs {size}" / "completions.jsonl")
    for step in (1, 2, 3):
        seen = Counter(line["prompt"] for line in logged if line["step"] == step)
        assert sorted(seen.values()) == [4] * 7
    assert sorted(prompts_of(root, "epochs", size).values()) == [12] * 7


def assert_same_lines(found: Path, wanted: Path) -> None:
    ours, theirs = lines(found), lines(wanted)
    assert len(ours) == len(theirs) > 0
    for own, other in zip(ours, theirs, strict=True):
        assert_same(own, other, f"{found.name}, step {own['step']}")


def assert_same(found: Any, wanted: Any, where: str) -> None:
    """Texts, counts and names are the same, numbers to 1e-4; times and memory are what they are."""
    if isinstance(wanted, dict):
        names = [{name for name in side if measured(name)} for side in (found, wanted)]
        assert names[0] - {"parallel/imbalance"} == names[1], where
        for name in names[1]:
            assert_same(found[name], wanted[name], f"{where}: {name}")
    elif isinstance(wanted, list):
        assert len(found) == len(wanted), where
        for own, other in zip(found, wanted, strict=True):
            assert_same(own, other, where)
    elif isinstance(wanted, float) and math.isfinite(wanted):
        assert abs(found - wanted) <= 1e-4 * (abs(wanted) + 0.1), (where, found, wanted)
    else:
        assert found == wanted, where


def measured(name: str) -> bool:
    return not name.startswith(("time/", "memory/")) and name not in (
        "step_time",
        "tokens_per_second",
    )
