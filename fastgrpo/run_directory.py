"""The files of a run: configuration, metrics, completions, summary and curves."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml

from .config import TrainConfig
from .experience import Experience
from .json_lines import append_lines, plain, read_lines
from .report import save_curves
from .rewards.names import as_object

_GIVEN = ("config.yaml", "objects.json")
"""Files that say what a run was given."""
_MAY_DIFFER = frozenset(
    {
        *("parallel", "per_device_train_batch_size", "gradient_accumulation_steps"),
        *("max_tokens_per_microbatch", "max_generation_batch_size", "per_device_eval_batch_size"),
        *("gradient_checkpointing", "activation_offloading", "offload_ref_model", "torch_compile"),
        *("cuda_graph", "cpu_threads", "reward_timeout", "max_bad_steps"),
        *("save_strategy", "save_steps", "save_only_model", "save_total_limit", "logging_steps"),
        *("num_completions_to_log", "output_dir", "report_to", "project", "run_name"),
    }
)
"""Options of a resumed run that change how it is computed or shown, not what."""


class RunDirectory:
    """A directory that belongs to one run, and what is written into it."""

    def __init__(
        self,
        config: TrainConfig,
        name: str,
        objects: Mapping[str, Any] | None = None,
        *,
        resume: bool = False,
    ) -> None:
        """Make the directory, `config.output_dir` or a new one under `runs/`.

        Args:
            config: the run.
            name: how a new directory under `runs/` is called.
            objects: what was given as objects in place of names of the configuration, if anything:
                `objects.json` says so.
            resume: a directory that holds a run is this one, to go on with.

        Raises:
            ValueError: the directory holds something: a run is never overwritten; or the run that
                is to go on is another one.
        """
        self.graded = False
        """The first reward function gave something else than 0 and 1."""
        given = {key: value for key, value in (objects or {}).items() if value is not None}
        values = config.flat()
        for key, names in given.items():  # a run from this file alone must not do without them
            one = isinstance(names, str)
            values[key] = as_object(names) if one else [as_object(name) for name in names]
        self._made: list[Path] = []
        if resume and (begun := _begun(config.output_dir)) is not None:
            self.path = begun
            _check_same(begun, values, config.completions_per_step)
            (begun / "summary.json").unlink(missing_ok=True)  # from now on it is not finished
        else:
            self.path, self._made = _create(config.output_dir, name)
        self._write("config.yaml", yaml.safe_dump(values, sort_keys=False))
        if given:
            self._write("objects.json", json.dumps(plain(given), indent=2) + "\n")

    @property
    def base(self) -> Path:
        """Where what adapters were put on is kept, if it has no name to load it by."""
        return self.path / "base"

    def newest_checkpoint(self) -> Path | None:
        """Return the last checkpoint that a run can go on from, if there is one."""
        steps = [s for s in self._checkpoints() if (self._checkpoint(s) / "state").is_dir()]
        return self._checkpoint(steps[-1]) if steps else None

    def cut(self, step: int) -> None:
        """Take back what was written of later steps, which come again."""
        for name in ("metrics", "completions", "rewards", "warnings"):
            path = self.path / f"{name}.jsonl"
            if path.exists():
                # What has no end was being written as the process died.
                text = path.read_bytes().splitlines(keepends=True)
                whole = [line for line in text if line.endswith(b"\n")]
                kept = [line for line in whole if json.loads(line)["step"] <= step]
                aside = path.with_suffix(".partial")
                aside.write_bytes(b"".join(kept))
                aside.replace(path)
                if name == "rewards":
                    for line in kept:
                        self._grade(next(iter(json.loads(line)["rewards"].values())))
        for later in self._checkpoints():
            if later > step:
                shutil.rmtree(self._checkpoint(later))

    def add_metrics(self, metrics: dict[str, Any]) -> None:
        """Append a step's line to metrics.jsonl."""
        append_lines(self.path / "metrics.jsonl", [metrics])

    def add_completions(
        self, step: int, found: Experience, reward_names: Sequence[str], count: int
    ) -> list[dict[str, Any]]:
        """Append the first completions of a generation to completions.jsonl; return the lines.

        Args:
            step: the first that they serve.
            found: the generation.
            reward_names: of the reward functions.
            count: how many.
        """
        some = zip(found.samples[:count], found.advantages, strict=False)
        lines = [
            {
                "step": step,
                **sample.line(reward_names),
                "advantage": advantage[0] if len(advantage) == 1 else advantage,
            }
            for sample, advantage in some
        ]
        append_lines(self.path / "completions.jsonl", lines)
        return [plain(line) for line in lines]

    def add_rewards(self, step: int, found: Experience, reward_names: Sequence[str]) -> None:
        """Append the rewards of all completions of a generation to rewards.jsonl."""
        columns = torch.stack([sample.rewards_K for sample in found.samples]).T.tolist()
        rewards = dict(zip(reward_names, columns, strict=True))
        self._grade(None if math.isnan(value) else value for value in columns[0])
        advantages = [advantage.mean() for advantage in found.advantages]
        line = {"step": step, "rewards": rewards, "advantages": advantages}
        append_lines(self.path / "rewards.jsonl", [line])

    def _grade(self, rewards: Iterable[float | None]) -> None:
        self.graded |= any(value not in (0, 1, None) for value in rewards)

    def add_warning(self, step: int, text: str) -> None:
        """Append a warning to warnings.jsonl."""
        append_lines(self.path / "warnings.jsonl", [{"step": step, "text": text}])

    def remove_old_checkpoints(self, limit: int | None) -> None:
        """Delete all but the newest `limit` checkpoints; None: keep all."""
        for step in [] if limit is None else self._checkpoints()[:-limit]:
            # Under another name first: what is half deleted is no checkpoint.
            path = self._checkpoint(step)
            shutil.rmtree(path.rename(path.with_name(f".step-{step}.old")))

    def _checkpoints(self) -> list[int]:
        """Return the steps of which there are checkpoints."""
        folder = self.path / "checkpoints"
        steps = (path.name.removeprefix("step-") for path in folder.glob("step-*"))
        return sorted(int(step) for step in steps if step.isdecimal())

    def _checkpoint(self, step: int) -> Path:
        return self.path / "checkpoints" / f"step-{step}"

    @property
    def is_bare(self) -> bool:
        """Whether nothing has been written but what the run was given."""
        return is_bare(self.path)

    def discard(self) -> None:
        """Delete what a run that could not begin has written and made.

        A directory that was there stays. Nothing is raised: why it could not begin is to be told.
        """
        with suppress(OSError):
            if not self.is_bare:
                return  # of a run that was to go on
            for name in _GIVEN:
                (self.path / name).unlink(missing_ok=True)
            if self._made:
                shutil.rmtree(self.path)
            for parent in self._made[1:]:
                parent.rmdir()

    def finish(self, accuracy_key: str, **summary: Any) -> dict[str, Any]:
        """Write curves.png and summary.json; return what the summary holds."""
        metrics = read_lines(self.path / "metrics.jsonl")
        save_curves(
            metrics,
            self.path / "curves.png",
            title=self.path.name,
            accuracy_key=accuracy_key,
            share=not self.graded,
        )
        summary |= {"final_metrics": metrics[-1], "versions": versions()}
        summary = plain(summary)
        self._write("summary.json", json.dumps(summary, indent=2) + "\n")
        return summary

    def _write(self, name: str, text: str) -> None:
        (self.path / name).write_text(text, encoding="utf-8")


def _begun(output_dir: str | None) -> Path | None:
    """Return the directory of a run that has begun, if there is one.

    Raises:
        ValueError: no directory is named.
    """
    if output_dir is None:
        raise ValueError(
            "output_dir: a run can only be resumed in a directory that has a name; set output_dir"
        )
    path = Path(output_dir).expanduser()
    return path if (path / "config.yaml").is_file() else None


def _check_same(path: Path, values: Mapping[str, Any], completions_per_step: int) -> None:
    """Refuse to go on with a run that was configured in another way.

    Raises:
        ValueError: names the first key that differs, and both values.
    """
    before: dict[str, Any] = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
    now: dict[str, Any] = yaml.safe_load(yaml.safe_dump(dict(values)))
    may_differ = _MAY_DIFFER
    if _is_longer(before, now):
        may_differ = may_differ | {"max_steps", "num_train_epochs"}
    if now["loss_type"] == "bnpo" or now["top_entropy_quantile"] < 1:  # means over micro-batches
        may_differ = may_differ - {"per_device_train_batch_size"}
    for key in [*now, *(before.keys() - now.keys())]:
        if key not in may_differ and before.get(key) != now.get(key):
            raise ValueError(
                f"{key}: is {now.get(key)!r} now, and {before.get(key)!r} in the run in {path}, "
                "which is to be resumed; give what it was, or another output_dir for a new run"
            )
    sizes = ("per_device_train_batch_size", "gradient_accumulation_steps")
    processes = math.prod((before.get("parallel") or {}).values())
    completions = before[sizes[0]] * before[sizes[1]] * processes
    if completions != completions_per_step:
        raise ValueError(
            f"gradient_accumulation_steps: a step of the run in {path} has {completions} "
            f"completions, from {processes} process{'es' if processes > 1 else ''}, and now it "
            f"would have {completions_per_step}; change it so that they are as many"
        )


def _is_longer(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Say whether a run is to have more steps than it had, and those it has taken are the same."""
    schedule, warmup = now["lr_scheduler_type"], now["warmup_steps"]
    ends_nowhere = schedule == "constant" or (
        schedule == "constant_with_warmup" and (warmup >= 1 or warmup == 0)
    )
    lengths = [(each["max_steps"], each["num_train_epochs"]) for each in (before, now)]
    same_unit = (lengths[0][0] > 0) == (lengths[1][0] > 0)
    return ends_nowhere and same_unit and lengths[1] > lengths[0]


def finished(config: TrainConfig) -> dict[str, Any] | None:
    """Return what summary.json holds if the run that is to go on is done.

    Raises:
        ValueError: it was configured in another way.
    """
    path = _begun(config.output_dir)
    if path is None or not (path / "summary.json").is_file():
        return None
    before: dict[str, Any] = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
    values, objects = config.flat(), path / "objects.json"
    for key in json.loads(objects.read_text(encoding="utf-8")) if objects.is_file() else ():
        values[key] = before[key]
    _check_same(path, values, config.completions_per_step)
    if _is_longer(before, values):
        return None
    return json.loads((path / "summary.json").read_text(encoding="utf-8"))


def is_bare(run: Path) -> bool:
    """Say whether a run directory holds nothing but what the run was given."""
    return {path.name for path in run.iterdir()} <= {*_GIVEN}


def check_restarts(output_dir: str | None) -> None:
    """Refuse a run without a named directory that torchrun would start again.

    Raises:
        ValueError: says what to do.
    """
    if output_dir is None and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0:
        raise ValueError(
            "output_dir: with --max-restarts torchrun starts a run again that has failed, which "
            "goes on in a directory that has a name; set output_dir, or leave --max-restarts out"
        )


def check_free(output_dir: str | None) -> None:
    """Refuse a directory that holds something: a run is never overwritten.

    Raises:
        ValueError: names the directory.
    """
    path = None if output_dir is None else Path(output_dir).expanduser()
    if path is not None and path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(
            f"output_dir: {path} exists and is not an empty directory; choose another name, or "
            "remove it if it is not needed"
        )


def _create(output_dir: str | None, name: str) -> tuple[Path, list[Path]]:
    """Return the directory, and those that were made for it, the innermost first."""
    if output_dir is not None:
        check_free(output_dir)
        path = Path(output_dir).expanduser()
        made = _missing(path)
        path.mkdir(parents=True, exist_ok=True)
        return path, made
    stem = f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
    for attempt in range(1, 1000):
        path = Path("runs", stem if attempt == 1 else f"{stem}-{attempt}")
        made = _missing(path)
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        return path, made
    raise ValueError(f"runs/{stem} and 998 variants of it exist: set output_dir")


def _missing(path: Path) -> list[Path]:
    return [each for each in (path, *path.parents) if not each.exists()]


def versions() -> dict[str, str]:
    """Return the versions of the packages that results depend on."""
    found = {}
    for package in ("fastgrpo", "torch", "triton", "transformers", "datasets"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
