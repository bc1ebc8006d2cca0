"""The files of a run: configuration, metrics, completions, summary and curves."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from itertools import accumulate
from pathlib import Path
from shutil import rmtree
from typing import Any

import torch
import yaml

from .config import TrainConfig
from .durable import sync, write_whole, writing
from .experience import Experience
from .json_lines import append_lines, plain, read_lines, whole_lines
from .output_dir import GIVEN, check_still_free, create, is_bare
from .report import save_curves
from .rewards.names import as_object
from .run_checkpoints import RunCheckpoints
from .run_lock import RunLock
from .same_run import check_same, is_longer

_LINES = ("metrics", "completions", "rewards", "warnings")
"""Files of one line after the other, each with its step."""


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
                is to go on is another one; or a process is at it.
        """
        self.graded = False
        """The first reward function gave something else than 0 and 1."""
        given = {key: value for key, value in (objects or {}).items() if value is not None}
        values = config.flat()
        for key, names in given.items():  # a run from this file alone must not do without them
            one = isinstance(names, str)
            values[key] = as_object(names) if one else [as_object(name) for name in names]
        self._given = {"config.yaml": yaml.safe_dump(values, sort_keys=False)}
        if given:
            self._given["objects.json"] = json.dumps(plain(given), indent=2) + "\n"
        self._made: list[Path] = []
        begun = _begun(config.output_dir) if resume else None
        if begun is None:
            self.path, self._made = create(config.output_dir, name)
        else:
            self.path = begun
        self.checkpoints = RunCheckpoints(self.path)
        self._lock: RunLock | None = None
        try:
            self._lock = RunLock(self.path)
            if begun is None:
                check_still_free(self.path)
                self._write_given()
            else:  # what it holds stays until there is something to go on from, see `cut`
                check_same(begun, values, config)
        except BaseException:
            (self.close if begun else self.discard)()
            raise

    def __getstate__(self) -> dict[str, Any]:
        """Return what other processes get of it: the lock stays with the first."""
        return {**vars(self), "_lock": None}

    def close(self) -> None:
        """Let other processes have the directory."""
        if self._lock is not None:
            self._lock.release()

    @property
    def left_by(self) -> str | None:
        """The process that has died at this run, if one has, as a person reads it."""
        return None if self._lock is None else self._lock.left_by

    @property
    def base(self) -> Path:
        """Where what adapters were put on is kept, if it has no name to load it by."""
        return self.path / "base"

    def sizes(self) -> dict[str, int]:
        """Return how many bytes the files of lines have, for `cut`."""
        paths = {name: self.path / f"{name}.jsonl" for name in _LINES}
        return {name: path.stat().st_size for name, path in paths.items() if path.exists()}

    def cut(self, step: int, sizes: Mapping[str, int] | None = None) -> None:
        """Go on: take back what was written after a checkpoint, which comes again.

        From now on the run is not finished, and its configuration is the one of now.

        Args:
            step: of the checkpoint.
            sizes: of the files then; None: there is no checkpoint. Of the step itself something may
                have been written since, a warning of an evaluation that had still to come.

        Raises:
            ValueError: something else has written to one of the files; says which.
        """
        kept: dict[Path, bytes] = {}  # all is read before anything changes
        for name in _LINES:
            path = self.path / f"{name}.jsonl"
            if path.exists():
                lines = whole_lines(path, key="step")
                ends = accumulate(len(text) for text, _ in lines)
                most = math.inf if sizes is None else sizes.get(name, 0)
                lines = [
                    (text, line)
                    for (text, line), end in zip(lines, ends, strict=True)
                    if line["step"] <= step and end <= most
                ]
                kept[path] = b"".join(text for text, _ in lines)
                if name == "rewards":
                    for _, line in lines:
                        self._grade(next(iter(line["rewards"].values())))
        (self.path / "summary.json").unlink(missing_ok=True)
        self._write_given()
        self.checkpoints.take_back(step)  # with the lines of all their steps still there
        for path, text in kept.items():
            write_whole(path, text)
        for path in (self.path / "bad_steps").glob("step-*"):
            number = path.name.removeprefix("step-")
            if number.isdecimal() and int(number) > step:
                rmtree(path, ignore_errors=True)  # what is in use still is in nobody's way

    def sync(self) -> None:
        """Have all lines on the disk: a checkpoint must not outlast those of its steps.

        Raises:
            WriteError: the disk refuses.
        """
        for name in _LINES:
            path = self.path / f"{name}.jsonl"
            if path.exists():
                with writing(path):
                    sync(path)
        with writing(self.path):
            sync(self.path)  # their names

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

    @property
    def is_bare(self) -> bool:
        """Whether nothing has been written but what the run was given."""
        return is_bare(self.path)

    def discard(self) -> None:
        """Delete what a run that could not begin has written and made.

        A directory that was there stays. Nothing is raised: why it could not begin is to be told.
        """
        with suppress(OSError):
            # Else of a run that was to go on, or of the one that has the directory.
            ours = self._lock is not None and self.is_bare
            for name in GIVEN if ours else ():
                (self.path / name).unlink(missing_ok=True)
            self.close()
            for path in self._made:  # those that are empty
                path.rmdir()

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

    def _write_given(self) -> None:
        for name, text in self._given.items():
            self._write(name, text)

    def _write(self, name: str, text: str) -> None:
        write_whole(self.path / name, text)


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
    check_same(path, values, config)
    if is_longer(before, values):
        return None
    return json.loads((path / "summary.json").read_text(encoding="utf-8"))


def versions() -> dict[str, str]:
    """Return the versions of the packages that results depend on."""
    found = {}
    for package in ("fastgrpo", "torch", "triton", "transformers", "datasets"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
