"""What a person sees of a run: a live table on a terminal, plain lines anywhere else."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from types import TracebackType

from rich.console import Console as RichConsole
from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

SHOWN = (
    "reward",
    "rewards/*/mean",
    "loss",
    "entropy",
    "kl",
    "grad_norm",
    "completions/mean_length",
    "tokens_per_second",
    "step_time",
)
"""The metrics worth a look during a run, in this order; metrics.jsonl has all of them."""


class Console:
    """Shows a run's progress; its methods work outside its `with` block too, without the live area.

    On a terminal a progress bar and the metrics of the last step are redrawn in place, below
    everything else. Elsewhere (a file, a pipe, CI) phases, messages and steps are lines.
    """

    def __init__(self, *, logging_steps: int = 1, console: RichConsole | None = None) -> None:
        """Prepare; nothing is written yet.

        Args:
            logging_steps: steps between plain lines; the live table shows every step.
            console: where to write; None: standard output.
        """
        self._console = console or RichConsole()
        self._logging_steps = logging_steps
        self._total: int | None = None
        self._step = 0
        self._metrics: list[tuple[str, str]] = []
        self._held_back: str | None = None
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[count]}"),
            TimeElapsedColumn(),
            TextColumn("elapsed"),
            TextColumn("{task.fields[remaining]}"),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._live: Live | None = None

    def __enter__(self) -> Console:
        if self._console.is_interactive:
            self._live = Live(get_renderable=self._view, console=self._console)
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._live is not None:
            # Draws the last state once more and gives the terminal back before any traceback.
            self._live.stop()
            self._live = None
        elif self._held_back is not None:
            # The steps just before an error are the ones to look at.
            self.message(self._held_back)
            self._held_back = None

    def phase(self, title: str, total: int | None) -> None:
        """Begin a part of the run.

        Args:
            title: its name.
            total: steps it will have; None: unknown.
        """
        if self._live is not None and self._total is not None:
            self.message(self._line())  # what the live area showed last stays to be read
        self._total, self._step, self._metrics, self._held_back = total, 0, [], None
        for task in self._progress.task_ids:
            self._progress.remove_task(task)
        self._progress.add_task(
            title, total=total, count=self._count(), remaining="remaining" if total else ""
        )
        if self._live is None:
            self.message(title if total is None else f"{title}: {total} steps")

    def step(self, metrics: Mapping[str, float | None]) -> None:
        """Show a step of the phase.

        Args:
            metrics: by name; `step` is its number, without it steps are counted. Only the names
                in `SHOWN` are shown.
        """
        self._step = int(metrics.get("step") or self._step + 1)
        self._metrics = [
            (name, _format(value))
            for pattern in SHOWN
            for name, value in metrics.items()
            if fnmatchcase(name, pattern)
        ]
        for task in self._progress.task_ids:
            self._progress.update(task, completed=self._step, count=self._count())
        if self._live is not None:
            return
        line = self._line()
        if self._step in (1, self._total) or self._step % self._logging_steps == 0:
            self.message(line)
            self._held_back = None
        else:
            self._held_back = line

    def message(self, text: str) -> None:
        """Print a text as it is, above the live area."""
        # Without soft_wrap long paths would be broken, without Text brackets would be markup.
        self._console.print(Text(text), soft_wrap=True)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print a table, above the live area; all columns but the first are aligned right."""
        table = Table(title=Text(title, style="bold"), title_justify="left")
        for i, column in enumerate(columns):
            table.add_column(Text(column), justify="right" if i else "left")
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        self._console.print(table)

    def accuracies(self, title: str, found: Mapping[str, Mapping[str, float]]) -> None:
        """Print what was reached: by way of decoding, the share `before` and `after` training."""
        rows: list[list[str]] = []
        for how, share in found.items():
            before, after = share["before"], share["after"]
            change = f"{100 * (after - before):+.1f} points"
            rows.append([how, f"{before:.1%}", f"{after:.1%}", change])
        self.table(title, ["decoding", "before", "after", "change"], rows)

    def _line(self) -> str:
        return "  ".join(
            [f"step {self._count()}", *(f"{name} {text}" for name, text in self._metrics)]
        )

    def _count(self) -> str:
        if self._total is None:
            return str(self._step) if self._step else ""
        return f"{self._step}/{self._total}"

    def _view(self) -> Group:
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="dim")
        grid.add_column(justify="right")
        for name, text in self._metrics:
            grid.add_row(Text(name), Text(text))
        return Group(self._progress, grid)


def _format(value: float | None) -> str:
    """Return three significant digits, or all digits of the whole part of a large number."""
    if value is None or math.isnan(value):
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
