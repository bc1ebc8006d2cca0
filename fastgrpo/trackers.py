"""Experiment trackers beside metrics.jsonl: TensorBoard, Weights & Biases, trackio.

Metrics have the names that TRL's runs have in them (`train/reward`, `eval/reward`), so that
dashboards carry over. A tracker that fails during a run is told of once and does not stop it.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

from .config import TrainConfig

Cell = str | float | None


class Backend(Protocol):
    """What is different between trackers. May raise anything."""

    def numbers(self, metrics: dict[str, float], step: int) -> None:
        """Write numbers by name."""
        ...

    def table(self, columns: list[str], rows: list[list[Cell]], step: int) -> None:
        """Write completions."""
        ...

    def close(self, *, failed: bool) -> None:
        """Write what is left, and how the run ended."""
        ...


class TensorBoard:
    """Event files in TENSORBOARD_LOGGING_DIR or the folder `tensorboard` of the run directory."""

    def __init__(self, config: TrainConfig, run_path: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = os.environ.get("TENSORBOARD_LOGGING_DIR") or run_path / "tensorboard"
        self._writer: Any = SummaryWriter(str(folder))
        self._writer.add_text("args", f"```\n{json.dumps(config.flat(), indent=2)}\n```")

    def numbers(self, metrics: dict[str, float], step: int) -> None:
        """Write numbers by name."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def table(self, columns: list[str], rows: list[list[Cell]], step: int) -> None:
        """Write completions as a table in Markdown."""
        self._writer.add_text("completions", markdown_table(columns, rows), step)
        self._writer.flush()

    def close(self, *, failed: bool) -> None:
        """Close the event file."""
        self._writer.close()


class WandB:
    """A run of Weights & Biases; its own variables (WANDB_MODE, WANDB_PROJECT, ...) count."""

    def __init__(self, config: TrainConfig, run_path: Path) -> None:
        self._wandb: Any = import_module("wandb")
        self._own = self._wandb.run is None  # else it is the user's, who finishes it
        # A recorded live area would be a file of nothing but redrawn lines.
        quiet = {"console": "off"} if sys.stdout.isatty() else {}
        # A run that goes on is the same run there.
        known = run_path / "wandb" / "run_id.txt"
        before = known.read_text(encoding="utf-8") if known.is_file() else None
        self._run = self._wandb.run or self._wandb.init(
            id=before,
            resume="allow" if before else None,
            project=os.environ.get("WANDB_PROJECT", config.project),
            name=_name(config, run_path, unless="WANDB_NAME"),
            dir=os.environ.get("WANDB_DIR", run_path),
            settings=self._wandb.Settings(**quiet),
        )
        if self._own:
            known.parent.mkdir(parents=True, exist_ok=True)
            known.write_text(self._run.id, encoding="utf-8")
        self._run.config.update(config.flat(), allow_val_change=True)
        self._run.define_metric("train/global_step")
        self._run.define_metric("*", step_metric="train/global_step", step_sync=True)

    def numbers(self, metrics: dict[str, float], step: int) -> None:
        """Write numbers by name."""
        self._run.log({**metrics, "train/global_step": step})

    def table(self, columns: list[str], rows: list[list[Cell]], step: int) -> None:
        """Write completions."""
        table = self._wandb.Table(columns=columns, data=rows)
        self._run.log({"completions": table, "train/global_step": step})

    def close(self, *, failed: bool) -> None:
        """Send what is left."""
        if self._own:
            self._run.finish(exit_code=int(failed))


class Trackio:
    """A run of trackio, in its local database or, with TRACKIO_SPACE_ID, in a Space.

    The database has all runs of a project, for `trackio show` to compare, and lies in trackio's
    cache or in TRACKIO_DIR, which is read once, as trackio is imported: a run has no part in that.
    """

    def __init__(self, config: TrainConfig, run_path: Path) -> None:
        self._trackio: Any = import_module("trackio")
        self._run = self._trackio.init(
            project=config.project,
            name=_name(config, run_path),
            config=config.flat(),
            resume="allow",
            embed=False,
        )

    def numbers(self, metrics: dict[str, float], step: int) -> None:
        """Write numbers by name."""
        self._run.log({**metrics, "train/global_step": step}, step=step)

    def table(self, columns: list[str], rows: list[list[Cell]], step: int) -> None:
        """Write completions."""
        from pandas import DataFrame

        table = self._trackio.Table(dataframe=DataFrame(rows, columns=columns))
        self._run.log({"completions": table}, step=step)

    def close(self, *, failed: bool) -> None:
        """Send what is left."""
        self._trackio.finish()


BACKENDS: dict[str, Callable[[TrainConfig, Path], Backend]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "trackio": Trackio,
}


class Tracker:
    """A tracker that cannot end a run."""

    def __init__(self, name: str, backend: Backend, say: Callable[[str], None]) -> None:
        self._name, self._backend, self._say = name, backend, say
        self._failed = False

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Write the numbers of a step; names that begin with `eval_` are an evaluation's.

        Args:
            metrics: by name; what is no number is left out.
            step: optimisation steps done.
        """
        named = {
            tracked_name(name): float(value)
            for name, value in metrics.items()
            if isinstance(value, int | float) and name != "step"
        }
        if named:
            self._try(lambda: self._backend.numbers(named, step))

    def completions(self, samples: Sequence[Mapping[str, Any]], step: int) -> None:
        """Write a table of completions.

        Args:
            samples: each with the keys of a line of completions.jsonl.
            step: the optimisation step they are for.
        """
        if not samples:
            return
        rewards = list(samples[0]["rewards"])
        columns = ["step", "prompt", "completion", *rewards, "advantage"]
        rows: list[list[Cell]] = [
            [
                step,
                _text(sample["prompt"]),
                _text(sample["completion"]),
                *(sample["rewards"][name] for name in rewards),
                _mean(sample["advantage"]),
            ]
            for sample in samples
        ]
        self._try(lambda: self._backend.table(columns, rows, step))

    def close(self, *, failed: bool = False) -> None:
        """Write what is left.

        Args:
            failed: the run ended with an error.
        """
        self._try(lambda: self._backend.close(failed=failed))

    def _try(self, write: Callable[[], None]) -> None:
        try:
            write()
        except Exception as error:  # whatever a service and the network between may raise
            if not self._failed:
                self._failed = True
                self._say(
                    f"warning: {self._name} failed, {type(error).__name__}: {error}; the run goes "
                    "on, metrics.jsonl has everything. Further failures are not reported"
                )


def check_trackers(report_to: str | Sequence[str]) -> list[str]:
    """Return the trackers that `report_to` names, before anything is loaded.

    Args:
        report_to: names; "all" for those installed, "none" or nothing for none.

    Raises:
        ValueError: there is no such tracker, or its package is not installed.
    """
    names = [report_to] if isinstance(report_to, str) else list(report_to)
    if names in (["none"], []):
        return []
    if names == ["all"]:
        return [name for name in BACKENDS if _installed(name)]
    for name in names:
        if name not in BACKENDS:
            words = [*BACKENDS, "all", "none"]
            nearest = difflib.get_close_matches(name, words, n=1, cutoff=0.0)[0]
            alone = ", which stands alone" if name in words else f", did you mean {nearest!r}?"
            raise ValueError(f"report_to: {name!r} is not one of {', '.join(BACKENDS)}{alone}")
        if not _installed(name):
            raise ValueError(
                f"report_to: needs {name}, which is not installed; pip install 'fastgrpo[{name}]'"
            )
    return list(dict.fromkeys(names))


def build_trackers(
    config: TrainConfig, run_path: str | Path, say: Callable[[str], None] = print
) -> list[Tracker]:
    """Start the trackers of a run.

    Args:
        config: which ones (`report_to`), and their `project` and `run_name`.
        run_path: the run directory; the name of a run that has none.
        say: told once if a tracker fails later.

    Raises:
        ValueError: one cannot be started; says why.
    """
    trackers: list[Tracker] = []
    for name in check_trackers(config.report_to):
        try:
            backend = BACKENDS[name](config, Path(run_path))
        except Exception as error:
            for tracker in trackers:
                tracker.close(failed=True)
            raise ValueError(
                f"report_to: {name} cannot be started, {type(error).__name__}: {error}; "
                "make it work, or leave it out"
            ) from error
        trackers.append(Tracker(name, backend, say))
    return trackers


def tracked_name(name: str) -> str:
    """Return what a metric is called in a tracker, as transformers' callbacks call it."""
    if name.startswith("eval_"):
        return f"eval/{name.removeprefix('eval_')}"
    return f"train/{name}"


def _installed(package: str) -> bool:
    # A folder that a tracker left in the working directory, such as wandb/, has no origin.
    spec = find_spec(package)
    return spec is not None and spec.origin is not None


def _name(config: TrainConfig, run_path: Path, unless: str = "") -> str | None:
    """Return what the run is called; None if the environment says so."""
    if config.run_name is None and unless in os.environ:
        return None
    return config.run_name or run_path.name


def _mean(advantage: float | list[float]) -> float:
    """Return the mean of the advantages of tokens; a table's column has values of one kind."""
    return fmean(advantage or [0.0]) if isinstance(advantage, list) else advantage


def _text(prompt_or_completion: Any) -> str:
    """Return chat messages as JSON, text as it is."""
    if isinstance(prompt_or_completion, str):
        return prompt_or_completion
    return json.dumps(prompt_or_completion, ensure_ascii=False)


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """Return a table in Markdown, in which no text is markup.

    TensorBoard makes it HTML with pictures and links, which the browser of whoever looks at a
    completion would fetch.
    """
    lines = [list(map(_escaped, columns)), ["---"] * len(columns)]
    lines += [list(map(_escaped, row)) for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _escaped(cell: Cell) -> str:
    if not isinstance(cell, str):
        return "" if cell is None else f"{cell:.4g}"
    # Markdown is made of nothing but punctuation and line breaks.
    text = re.sub(r"[!-/:-@\[-`{-~]", lambda found: f"&#{ord(found[0])};", cell)
    return text.replace("\r", "").replace("\n", "<br>")
