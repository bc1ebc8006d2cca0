"""What a person sees of a run: a live area on a terminal, plain lines anywhere else."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any

from rich.console import Console as RichConsole
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from .live_view import EVALUATED, TREND, Sample, State, live_lines
from .readable import changes, matching, number, plain, printable
from .rewards.contract import content

SHOWN = (
    "reward",
    "rewards/*/mean",
    "frac_reward_zero_std",
    "loss",
    "entropy",
    "kl",
    "grad_norm",
    "completions/mean_length",
    "completions/clipped_ratio",
    "tokens_per_second",
    "step_time",
)
"""The metrics in a plain line, in this order; metrics.jsonl has all of them."""

EVALUATION = "eval_"
"""What the names of an evaluation's metrics begin with."""


class Console:
    """Shows a run's progress; its methods work outside its `with` block too, without the live area.

    On a terminal progress, metrics and a completion are redrawn in place, below everything else.
    Elsewhere (a file, a pipe, CI) phases, messages and steps are lines.
    """

    def __init__(self, *, logging_steps: int = 1, console: RichConsole | None = None) -> None:
        """Prepare; nothing is written yet.

        Args:
            logging_steps: steps between plain lines; the live area shows every step.
            console: where to write; None: standard output.
        """
        self._console = console or RichConsole()
        self._logging_steps = logging_steps
        self._state = State()
        self._held_back: str | None = None
        self._live: Live | None = None

    @classmethod
    def mute(cls) -> Console:
        """Return a console that shows nothing, for all processes of a run but the first."""
        return cls(console=RichConsole(quiet=True, force_interactive=False))

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
            if error is None and self._state.total is None and not self._state.recent:
                self._state = State()  # a phase without steps says nothing once it is over
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
        if self._live is not None and self._state.recent and self._state.total is not None:
            self.message(self._line())  # what the live area showed last stays to be read
        self._state = State(title=title, total=total, started=time.monotonic())
        self._held_back = None
        if self._live is None:
            self.message(title if total is None else f"{title}: {total} steps")

    def step(self, metrics: Mapping[str, float | None]) -> None:
        """Show a step of the phase, an evaluation, or both.

        Args:
            metrics: by name. `step` is its number, without it steps are counted. Names that begin
                with `eval_` are those of an evaluation after that step. Lines have `SHOWN` only.
        """
        state, given = self._state, metrics.get("step")
        evaluated = {
            name.removeprefix(EVALUATION): value
            for name, value in metrics.items()
            if name.startswith(EVALUATION)
        }
        own = {n: value for n, value in metrics.items() if not n.startswith(EVALUATION)}
        trained = bool(own.keys() - {"step"}) or not evaluated
        step = int(given) if given is not None else state.step + trained
        self._state = replace(state, step=step)
        if trained:
            self._state = replace(
                self._state,
                recent=(*state.recent, own)[-TREND:],
                ends=(*state.ends, time.monotonic())[-TREND:],
            )
            self._plain_step(self._line())
        if evaluated:
            evaluations = (*state.evaluations, (step, evaluated))[-2:]
            self._state = replace(self._state, evaluations=evaluations)
            if self._live is None:
                self.message(_words(f"evaluation at step {step}", evaluated, EVALUATED))

    def sample(
        self,
        *,
        prompt: Any,
        completion: Any,
        rewards: Mapping[str, float | None],
        advantage: float | None = None,
    ) -> None:
        """Show a completion of the next step in the live area; completions.jsonl has more.

        Args:
            prompt: text or chat messages, of which the last is shown.
            completion: likewise.
            rewards: by function; None: not judged.
            advantage: of the completion.
        """
        self._state = replace(
            self._state,
            sample=Sample(
                step=self._state.step + 1,
                prompt=printable(str(content(prompt))),
                completion=printable(str(content(completion))),
                rewards=dict(rewards),
                advantage=advantage,
            ),
        )

    def warning(self, text: str) -> None:
        """Print a text as `message` does; the live area keeps the last one in sight."""
        self._state = replace(self._state, warning=printable(text))
        self.message(text)

    def message(self, text: str) -> None:
        """Print a text, `plain` but whole, above the live area."""
        # Without soft_wrap long paths would be broken.
        self._console.print(self._text(text), soft_wrap=True)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print a table, above the live area; all columns but the first are aligned right."""
        table = Table(title=self._text(title, style="bold"), title_justify="left")
        for i, column in enumerate(columns):
            table.add_column(self._text(column), justify="right" if i else "left")
        for row in rows:
            table.add_row(*map(self._text, row))
        self._console.print(table)

    def accuracies(
        self, title: str, found: Mapping[str, Mapping[str, float | None]], *, share: bool
    ) -> None:
        """Print what was reached: by way of decoding, the reward `before` and `after` training.

        Args:
            title: above it.
            found: the rewards.
            share: they are means of nothing but 0 and 1, and shown as percents.
        """
        rows = list(changes(found, share=share))
        self.table(title, ["decoding", "before", "after", "change"], rows)

    def _text(self, text: str, style: str = "") -> Text:
        """Return what the console can show, in which brackets are no markup."""
        encoding = self._console.encoding
        return Text(plain(text).encode(encoding, "replace").decode(encoding), style)

    def _plain_step(self, line: str) -> None:
        step = self._state.step
        if self._live is not None:
            return
        if step in (1, self._state.total) or step % self._logging_steps == 0:
            self.message(line)
            self._held_back = None
        else:
            self._held_back = line

    def _line(self) -> str:
        return _words(f"step {self._state.count}", self._state.recent[-1], SHOWN)

    def _view(self) -> Group:
        return Group(*live_lines(self._state, self._console, time.monotonic()))


def _words(title: str, metrics: Mapping[str, float | None], names: Sequence[str]) -> str:
    found = matching(metrics, names)
    return "  ".join([title, *(f"{name} {number(value)}" for name, value in found)])
