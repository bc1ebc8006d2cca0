"""The files of a run: configuration, metrics, completions, summary and curves."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from .config import TrainConfig
from .experience import Sample
from .metrics import MetricsWriter, read_metrics
from .report import save_curves


class RunDirectory:
    """A directory that belongs to one run, and what is written into it."""

    def __init__(self, config: TrainConfig, name: str) -> None:
        """Make the directory, `config.output_dir` or a new one under `runs/`.

        Raises:
            ValueError: the directory holds something: a run is never overwritten.
        """
        self.path = _create(config.output_dir, name)
        self._write("config.yaml", yaml.safe_dump(config.flat(), sort_keys=False))

    def add_metrics(self, metrics: dict[str, Any]) -> None:
        """Append a step's line to metrics.jsonl."""
        with MetricsWriter(self.path / "metrics.jsonl") as writer:
            writer.write(metrics)

    def add_completions(
        self,
        step: int,
        samples: Sequence[Sample],
        reward_names: Sequence[str],
        advantages: Sequence[float],
    ) -> None:
        """Append completions, their rewards and advantages to completions.jsonl."""
        with open(self.path / "completions.jsonl", "a", encoding="utf-8") as file:
            for sample, advantage in zip(samples, advantages, strict=True):
                rewards = zip(reward_names, sample.rewards_K.tolist(), strict=True)
                line = {
                    "step": step,
                    "prompt": sample.prompt,
                    "completion": sample.text,
                    "rewards": {n: None if math.isnan(value) else value for n, value in rewards},
                    "advantage": advantage,
                }
                file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def finish(self, accuracy_key: str, **summary: Any) -> dict[str, Any]:
        """Write curves.png and summary.json; return what the summary holds."""
        metrics = read_metrics(self.path / "metrics.jsonl")
        save_curves(
            metrics, self.path / "curves.png", title=self.path.name, accuracy_key=accuracy_key
        )
        summary |= {"final_metrics": metrics[-1], "versions": _versions()}
        self._write("summary.json", json.dumps(summary, indent=2) + "\n")
        return summary

    def _write(self, name: str, text: str) -> None:
        (self.path / name).write_text(text, encoding="utf-8")


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


def _create(output_dir: str | None, name: str) -> Path:
    if output_dir is not None:
        check_free(output_dir)
        path = Path(output_dir).expanduser()
        path.mkdir(parents=True, exist_ok=True)
        return path
    stem = f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
    for attempt in range(1, 1000):
        path = Path("runs", stem if attempt == 1 else f"{stem}-{attempt}")
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        return path
    raise ValueError(f"runs/{stem} and 998 variants of it exist: set output_dir")


def _versions() -> dict[str, str]:
    found = {}
    for package in ("fastgrpo", "torch", "triton", "transformers", "datasets"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
