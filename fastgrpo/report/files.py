"""What a run directory holds, read with care: the run may be going on while we look."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import yaml

Line = dict[str, Any]


@dataclass(frozen=True)
class RunFiles:
    """The files of a run; what an older or shorter run lacks is empty."""

    path: Path
    config: Line
    metrics: list[Line]  # one a step, in order of steps
    completions: list[Line]
    rewards: list[Line]
    warnings: list[Line] | None  # None: not recorded
    evaluations: list[Line]  # the oldest first
    summary: Line | None  # None: the run is not finished
    remarks: list[str] = field(default_factory=list)  # what was skipped, in words

    @property
    def name(self) -> str:
        """What the run is called."""
        return str(self.config.get("run_name") or self.path.name)

    @property
    def training(self) -> list[Line]:
        """The metrics of optimisation steps, without lines that only an evaluation wrote."""
        return [line for line in self.metrics if number(line.get("loss")) or "reward" in line]

    @property
    def binary(self) -> bool:
        """Whether the judge, which is the first reward function, is known to give 0 and 1 alone."""
        judge, known = (self.summary or {}).get("judge"), set[float]()
        for line in self.rewards:
            rewards = line.get("rewards") or {}
            known.update(filter(number, rewards.get(judge or next(iter(rewards), None)) or []))
        return bool(known) and known <= {0, 1}

    @property
    def last_step(self) -> int:
        """The last optimisation step."""
        return self.metrics[-1]["step"]


def number(value: Any) -> TypeGuard[float]:
    """Return whether a JSON value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def read_run(path: Path) -> RunFiles:
    """Read a run directory.

    A last line that is not whole, because it is being written, is skipped and remarked on.

    Raises:
        ValueError: it is no run directory, has no step yet, or a file in it is damaged.
    """
    if not path.is_dir():
        raise ValueError(f"{path} is no directory: give the run directory that training printed")
    if not (path / "config.yaml").is_file():
        raise ValueError(
            f"{path} is no run directory, it holds no config.yaml: give the one that training "
            "printed"
        )
    remarks: list[str] = []
    summary = path / "summary.json"
    warnings = path / "warnings.jsonl"
    run = RunFiles(
        path=path,
        config=_mapping(path / "config.yaml", yaml.safe_load),
        metrics=_by_step(path / "metrics.jsonl", remarks),
        completions=list(_stepped(path / "completions.jsonl", remarks)),
        rewards=list(_stepped(path / "rewards.jsonl", remarks)),
        warnings=list(_told(warnings, remarks)) if warnings.is_file() else None,
        evaluations=[_evaluation(p) for p in sorted(path.glob("eval/*.json"), key=_age)],
        summary=_mapping(summary, json.loads) if summary.is_file() else None,
        remarks=remarks,
    )
    if not run.training:
        raise ValueError(f"{path} has no step in metrics.jsonl yet: try again after the first one")
    return run


def _by_step(path: Path, remarks: list[str]) -> list[Line]:
    """Return one line a step; of a name that a step has twice the later value counts."""
    steps: dict[int, Line] = {}
    for line in _stepped(path, remarks):
        steps.setdefault(line["step"], {}).update(line)
    return [steps[step] for step in sorted(steps)]


def _stepped(path: Path, remarks: list[str]) -> Iterator[Line]:
    for i, line in enumerate(_lines(path, remarks), 1):
        step = line.get("step")
        if not isinstance(step, int) or isinstance(step, bool):
            raise ValueError(
                f"{path}: object {i} has no whole number as its step: repair or remove that line"
            )
        yield line


def _told(path: Path, remarks: list[str]) -> Iterator[Line]:
    for i, line in enumerate(_stepped(path, remarks), 1):
        if not isinstance(line.get("text"), str):
            raise ValueError(f"{path}: object {i} has no text: repair or remove that line")
        yield line


def _age(path: Path) -> tuple[int, int, str]:
    """Return what sorts results by age; of files that were copied their numbers tell."""
    return path.stat().st_mtime_ns, len(path.name), path.name


def _evaluation(path: Path) -> Line:
    found = _mapping(path, json.loads)
    metrics = found.get("metrics")
    if not (
        isinstance(found.get("checkpoint"), str)
        and isinstance(metrics, dict)
        and all(isinstance(value, dict) for value in metrics.values())
    ):
        raise ValueError(f"{path} is no result of `fastgrpo eval`: repair or remove it")
    return found


def _lines(path: Path, remarks: list[str]) -> Iterator[Line]:
    if not path.is_file():
        return
    # Bytes, because text mode would also break lines elsewhere; a torn line may end in a torn
    # character.
    rows = [(i, row) for i, row in enumerate(path.read_bytes().split(b"\n"), 1) if row.strip()]
    for place, (i, row) in enumerate(rows, 1):
        try:
            line = json.loads(row)
            if not isinstance(line, dict):
                raise ValueError("no object")
        except (ValueError, RecursionError) as error:  # the second of brackets without end
            if place == len(rows) and isinstance(error, ValueError):
                remarks.append(
                    f"The last line of {path.name} is not whole, as while it is being written; it "
                    "is left out."
                )
                return
            raise ValueError(
                f"{path}: line {i} is no JSON object: repair or remove that line"
            ) from None
        yield line


def _mapping(path: Path, parse: Any) -> Line:
    try:
        found = parse(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, yaml.YAMLError):
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{path} does not hold names and values: repair or remove it")
    return found
