"""What is measured: a checkpoint of a run or a model by name, and the prompts it is put to."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..adapters import load_adapters
from ..config import EvalConfig, TrainConfig, load_config
from ..data import load_prompts
from ..json_lines import read_lines
from ..loading import computes_in_bf16, load_model, load_tokenizer
from ..manifest import damage
from ..model import Policy
from ..run_checkpoints import BEST, RunCheckpoints

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Subject:
    """A model, as a configuration and a place to load it from."""

    config: TrainConfig
    checkpoint: str
    """`final`, `best`, `step-N`, `base`, or the directory or Hub name of another model."""
    place: str | None
    """Directory or Hub name; None: what the configuration's task makes."""
    results: Path
    """Directory for what is found out about it."""
    training: TrainConfig
    """What it was, or would be, trained with: the configuration without overrides of the run's."""
    step: int
    """Optimisation steps that it has had, as far as its place tells; otherwise 0."""


def find_subject(run: str, checkpoint: str | None, overrides: Sequence[str]) -> Subject:
    """Find what is to be measured; nothing is loaded yet.

    Args:
        run: a run directory or a configuration file.
        checkpoint: one of those of `Subject`; None: `final` of a run, `base` of a file.
        overrides: `key=value` over the configuration.

    Raises:
        ValueError: there is no such run, configuration or checkpoint, or it is damaged.
    """
    path = Path(run).expanduser()
    if not path.is_dir():
        config = training = load_config(path, overrides, EvalConfig)
        checkpoint = checkpoint or "base"
        results = Path("runs", f"eval-{path.stem}")
        folders: dict[str, Path] = {}
    elif (path / "config.yaml").is_file():
        config, training = (
            load_config(path / "config.yaml", over, EvalConfig) for over in (overrides, ())
        )
        _check_objects(path, overrides)
        checkpoint = checkpoint or "final"
        results = path / "eval"
        folders = checkpoints(path)
    else:
        raise ValueError(
            f"{run} is no run directory, it holds no config.yaml: give the one that training "
            "printed, or a configuration file"
        )
    is_step = checkpoint.startswith("step-") and checkpoint.removeprefix("step-").isdecimal()
    place: str | None = checkpoint
    if checkpoint in folders:
        _check_whole(path, checkpoint, folders[checkpoint])
        place = str(folders[checkpoint])
    elif checkpoint == "base":
        place = config.model_name_or_path
        if place is None and config.task is None:
            raise ValueError("model_name_or_path: required (or set task: arithmetic)")
        if place is None and path.is_dir():  # made anew it would be one that nobody trained from
            raise ValueError(
                f"{run} began with a model that its task had warmed up and that is not kept; "
                "summary.json has its accuracy"
            )
    elif checkpoint in ("final", "best") or is_step:
        there = ", ".join(name for name in folders if name != "base") or "none"
        raise ValueError(
            f"{run} has no checkpoint {checkpoint!r} (checkpoints: {there}); say with --checkpoint "
            "which to measure, or base for the model before training"
        )
    return Subject(config, checkpoint, place, results, training, _step_of(place))


def _check_whole(run: Path, name: str, folder: Path) -> None:
    """Refuse a checkpoint of a run that is not as it was saved."""
    problem = damage(folder, without="state")  # which has no part in what is measured
    if problem is not None:
        raise ValueError(
            f"checkpoint {name} of {run} is damaged: {problem}; name another with --checkpoint, or "
            f"{folder} itself, to measure it as it is"
        )


def _check_objects(run: Path, overrides: Sequence[str]) -> None:
    """Refuse a run that was given objects in place of names, unless these are named now."""
    file = run / "objects.json"
    given = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    named = {override.partition("=")[0] for override in overrides}
    for key, names in given.items():
        if names is not None and key not in named:
            names = names if isinstance(names, str) else ", ".join(names)
            example = "[path.py:function]" if key == "reward_funcs" else "path.py:function"
            raise ValueError(
                f"{key}: the run was given {names} as objects of Python, and config.yaml does not "
                f"say where to find them; name them, {key}={example}"
            )


def _step_of(place: str | None) -> int:
    path = Path(place or "").expanduser()
    if path.name.startswith("step-") and path.is_dir():
        step = path.name.removeprefix("step-")
        return int(step) if step.isdecimal() else 0
    if path.name == "best" and (path / BEST).is_file():
        return json.loads((path / BEST).read_text(encoding="utf-8"))["step"]
    metrics = path.parent / "metrics.jsonl"
    lines = read_lines(metrics) if path.name == "final" and metrics.is_file() else []
    return lines[-1]["step"] if lines else 0


def checkpoints(run: Path) -> dict[str, Path]:
    """Return the checkpoints of a run by name, the steps in order; `base` if it was saved."""
    of_steps = RunCheckpoints(run)
    steps = [of_steps.of_step(step) for step in of_steps.steps()]
    folders = [run / "base", *steps, run / "best", run / "final"]
    return {folder.name: folder for folder in folders if folder.is_dir()}


def load_subject(subject: Subject) -> Policy:
    """Load the model and its tokenizer for sampling, on the device, as training holds them.

    Adapters stay beside the model they were trained on, as in training.

    Raises:
        ValueError: something cannot be loaded; says why.
    """
    config, place = subject.config, subject.place
    model: Any
    if place is None:
        from ..tasks import arithmetic

        tokenizer = arithmetic.build_tokenizer()
        model = arithmetic.build_model(tokenizer, config.seed)
    else:
        base = _base_of(Path(place).expanduser())
        # A task makes its own model; what it trained is a checkpoint like any other.
        source = dataclasses.replace(
            config,
            task=None,
            warm_start_accuracy=TrainConfig.warm_start_accuracy,
            model_name_or_path=base or place,
        )
        model, tokenizer = load_model(source), load_tokenizer(source)
        if base is not None:
            model = load_adapters(model, Path(place).expanduser())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if next(model.parameters()).device.type != device.type:
        model.to(device)
    return Policy(
        model.eval(), tokenizer, bf16=computes_in_bf16(config, device), padding_free=False
    )


def _base_of(path: Path) -> str | None:
    """Return what the adapters in a directory were trained on; None: there are no adapters."""
    file = path / "adapter_config.json"
    if not file.is_file():
        return None
    # A run saves a base that has no other name, and may have been moved since.
    for run in (path.parent, path.parent.parent):
        if (run / "config.yaml").is_file() and (run / "base").is_dir():
            _check_whole(run, "base", run / "base")
            return str(run / "base")
    base = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise ValueError(
            f"{path} holds adapters that do not say what they are for; merge them with their model "
            "(merge_and_unload) and save that"
        )
    return base


def load_split(
    config: TrainConfig, split: str | None, max_samples: int | None = None
) -> tuple[str, Dataset]:
    """Return the name of the held-out split and its prompts.

    Args:
        config: names the dataset, its test split, and how many prompts are measured.
        split: in place of the configuration's.
        max_samples: in place of the configuration's `max_eval_samples`.

    Raises:
        ValueError: there is no such split, or none but that of training.
    """
    if split is None:
        split = "test" if config.task is not None else config.test_split
        if split is None or split == config.dataset_train_split:
            raise ValueError(
                f"the configuration names no split beside {config.dataset_train_split!r}, "
                "which is trained on; say with --split which prompts to measure"
            )
    dataset = _load(config, split)
    count = max_samples or config.max_eval_samples
    if count is not None:
        dataset = dataset.select(range(min(count, len(dataset))))
    return split, dataset


def count_seen(dataset: Dataset, training: TrainConfig) -> int:
    """Return how many prompts are among those that are trained on.

    Two splits of other names may share rows, and a dataset may have the same prompt in both.

    Raises:
        ValueError, OSError, ImportError: the training split cannot be loaded.
    """
    prompts = [json.dumps(prompt, sort_keys=True) for prompt in dataset["prompt"]]
    trained_on = _load(training, training.dataset_train_split)["prompt"]
    seen = set(prompts).intersection(json.dumps(prompt, sort_keys=True) for prompt in trained_on)
    return sum(prompt in seen for prompt in prompts)


def _load(config: TrainConfig, split: str) -> Dataset:
    if config.task is None:
        if not config.dataset_name:
            raise ValueError("dataset_name: required (or set task: arithmetic)")
        return load_prompts(
            config.dataset_name,
            split,
            config_name=config.dataset_config,
            prompt_column=config.prompt_column,
        )
    from ..tasks import arithmetic

    datasets = arithmetic.build_dataset()
    if split not in datasets:
        raise ValueError(
            f"--split: there is no {split!r}; there are {', '.join(map(str, datasets))}"
        )
    return datasets[split]
