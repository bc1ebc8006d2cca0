"""The live area of a terminal: what of a run is worth a glance, in the rows and columns there are.

It is made of lines, none wider than the terminal, so that nothing wraps by itself; what there is no
room for is left out, samples first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from itertools import zip_longest

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from .readable import SPARKS, Metrics, matching, number, plain, printable, short_name, sparkline

TREND = 64
"""Steps that a sparkline looks back, and over which shares of time are taken."""

COLUMN, GAP = 29, 2
"""The least width of a column of metrics, and the space between two."""

EVALUATED = ("reward", "rewards/*/mean", "completions/mean_length", "completions/clipped_ratio")
_IN_ASCII = str.maketrans(SPARKS + "━─…↵", "_.,-=+*#=-~/")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A completion as it is shown: its texts are `printable`."""

    step: int
    prompt: str
    completion: str
    rewards: Metrics
    advantage: float | None


@dataclass(frozen=True, kw_only=True)
class State:
    """What is known of a phase. It is replaced, never changed: another thread draws it."""

    title: str = ""
    total: int | None = None
    step: int = 0
    started: float = 0.0
    """Seconds of the clock whose time `live_lines` is told."""
    ends: tuple[float, ...] = ()
    """When the last steps ended."""
    recent: tuple[Metrics, ...] = ()
    """Metrics of the last steps."""
    evaluations: tuple[tuple[int, Metrics], ...] = ()
    """The last two and their steps; the names are those of training."""
    sample: Sample | None = None
    warning: str = ""

    @property
    def count(self) -> str:
        """Steps done, and of how many."""
        if self.total is None:
            return str(self.step) if self.step else ""
        return f"{self.step}/{self.total}"


def live_lines(state: State, console: Console, now: float) -> list[Text]:
    """Return what to draw, no more than fits below one line of other output.

    Args:
        state: of the run.
        console: where it will be drawn; its size and its characters are those of now.
        now: seconds of the clock that the times of `state` are from.
    """
    width, height = console.size.width, console.size.height - 1
    if not state.title:
        return []
    between = [Text()] if height > 30 else []
    lines = [_progress(state, width, now), *between]
    below = _wrap(_evaluation(state), console, 2 if height > 16 else 1)
    below += _wrap(Text(state.warning, style="yellow"), console, min(max(height // 8, 1), 3))
    if below:
        below += between
    room = height - len(lines) - len(below)
    least = 5 if state.sample and room > 12 else 0  # rows that a sample should have
    lines += [*_metrics(state, console, room - least), *between, *below]
    if state.sample:
        lines += _sample(state.sample, console, height - len(lines))
    for line in lines:
        line.plain = plain(line.plain)  # of names of functions
        if console.options.ascii_only:
            in_ascii = line.plain.translate(_IN_ASCII)
            line.plain = in_ascii.encode("ascii", "replace").decode("ascii")
        line.truncate(width)
    return lines[:height]


def _progress(state: State, width: int, now: float) -> Text:
    line = Text.assemble((printable(state.title), "bold"), " ", state.count)
    tail = f"{_duration(now - state.started)} elapsed"
    if state.total:
        tail = f"{state.step / state.total:4.0%}  {tail}"
        tail += "".join(f", {_duration(left)} left" for left in _remaining(state, now))
        bar = min(width - line.cell_len - len(tail) - 4, 60)
        done = bar * min(state.step, state.total) // state.total
        line.append("  " + "━" * done, "green").append("━" * (bar - done), "bright_black")
    return line.append(f"  {tail}")


def _remaining(state: State, now: float) -> Iterator[float]:
    """Yield, if it can be told, the seconds that the steps to come take at the pace of the last."""
    ends = (state.started, *state.ends) if len(state.ends) == state.step else state.ends
    if state.total is not None and 0 < state.step < state.total and len(ends) > 1:
        pace = (ends[-1] - ends[0]) / (len(ends) - 1)
        yield max(0.0, pace * (state.total - state.step) - (now - ends[-1]))


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=int(seconds)))


@dataclass(frozen=True)
class _Row:
    """A metric in a column."""

    label: str
    value: str
    course: Callable[[int], str]
    """Draws the way to the value, or its share, in as many columns as it is told."""

    def line(self, width: int) -> Text:
        """Return the row, exactly as wide as told."""
        course = width // 5
        label = Text(self.label, style="dim")
        label.truncate(width - course - 11, overflow="ellipsis", pad=True)
        line = Text.assemble(label, f" {self.value:>9} ", (self.course(course), "cyan"))
        line.truncate(width, pad=True)
        return line


def _percent(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.0%}"


def _seconds(value: float | None) -> str:
    return f"{_brief(value)} s"


def _brief(value: float | None) -> str:
    """Return a number in 8 characters at most."""
    text = number(value)
    return text if value is None or len(text) <= 8 else f"{value:.1e}"


def _per_second(value: float | None) -> str:
    return f"{_brief(value)}/s"


def _gib(value: float | None) -> str:
    return f"{_brief(value)} GiB"


_Format = Callable[[float | None], str]
_REWARD: dict[str, tuple[str, _Format]] = {"reward": ("reward", _brief)}
_COMPLETIONS: dict[str, tuple[str, _Format]] = {
    "frac_reward_zero_std": ("silent groups", _percent),
    "completions/mean_length": ("mean length", _brief),
    "completions/clipped_ratio": ("truncated", _percent),
}
_POLICY: dict[str, tuple[str, _Format]] = {
    "loss": ("loss", _brief),
    "entropy": ("entropy", _brief),
    "kl": ("kl", _brief),
    "clip_ratio/region_mean": ("clip ratio", _percent),
    "cispo_clip_ratio": ("clip ratio", _percent),
    "grad_norm": ("grad norm", _brief),
    "learning_rate": ("learning rate", _brief),
}
_SPEED: dict[str, tuple[str, _Format]] = {
    "tokens_per_second": ("tokens", _per_second),
    "step_time": ("step", _seconds),
}
_MEMORY: dict[str, tuple[str, _Format]] = {"memory/peak_gib": ("memory", _gib)}


def _metrics(state: State, console: Console, room: int) -> list[Text]:
    """Return the groups of metrics side by side; speed as text if it has no column."""
    if not state.recent:
        return []
    width = console.size.width
    columns = min(max((width + GAP) // (COLUMN + GAP), 1), 3)
    each = min((width + GAP) // columns - GAP, 42)
    speed = [*_rows(state, _SPEED), *_share_rows(state), *_rows(state, _MEMORY)]
    below: list[Text] = []
    if columns < 3 and room > 6:
        parts = (f"{row.label.strip()} {row.value}" for row in speed)
        below = _flow(parts, "dim", console, 2)
    room = max(room - len(below), 0)
    policy = list(_rows(state, _POLICY))
    rewards = _reward_rows(state, room - len(policy) * (columns == 1))
    groups = [rewards + policy] if columns == 1 else [rewards, policy, speed][:columns]
    blank = Text(" " * each)
    cells = zip_longest(*([row.line(each) for row in group] for group in groups), fillvalue=blank)
    return [*[Text(" " * GAP).join(row) for row in cells][:room], *below]


def _rows(state: State, group: Mapping[str, tuple[str, _Format]]) -> Iterator[_Row]:
    last = state.recent[-1]
    for name, (label, form) in group.items():
        if name in last:
            course = partial(sparkline, [metrics.get(name) for metrics in state.recent])
            yield _Row(label, form(last[name]), course)


def _reward_rows(state: State, room: int) -> list[_Row]:
    """Return the rows of the rewards and completions; of many functions the first."""
    above, below = list(_rows(state, _REWARD)), list(_rows(state, _COMPLETIONS))
    names = [name for name, _ in matching(state.recent[-1], ["rewards/*/mean"])]
    each = list(_rows(state, {name: (f" {short_name(name)}", _brief) for name in names}))
    spare = max(room - len(above) - len(below), 1)
    if len(each) > spare:
        each = [*each[: spare - 1], _Row(f" and {len(each) - spare + 1} more", "", lambda _: "")]
    return above + each + below


def _share_rows(state: State) -> Iterator[_Row]:
    """Yield what share of the last steps each part of a step took."""
    seconds = {
        name.removeprefix("time/"): sum(metrics.get(name) or 0.0 for metrics in state.recent)
        for name in dict.fromkeys(name for metrics in state.recent for name in metrics)
        if name.startswith("time/")
    }
    total = sum(seconds.values())
    for name, value in seconds.items() if total else ():
        yield _Row(f" {name}", f"{value / total:.0%}", partial(_bar, value / total))


def _bar(share: float, width: int) -> str:
    return "━" * round(share * width)


def _evaluation(state: State) -> Text:
    """Return the last evaluation and what changed since the one before."""
    if not state.evaluations:
        return Text()
    step, metrics = state.evaluations[-1]
    before = state.evaluations[0][1] if len(state.evaluations) > 1 else {}
    line = Text(f"evaluation at step {step}", style="bold")
    for name, value in matching(metrics, EVALUATED):
        line.append(f"  {short_name(name)} {number(value)}", "not bold")
        was = before.get(name)
        if value is not None and was is not None and math.isfinite(value - was):
            line.append(f" ({value - was:+.2g})", "not bold dim")
    return line


def _sample(sample: Sample, console: Console, room: int) -> list[Text]:
    """Return a rule, the end of the prompt, the completion or its both ends, and its rewards."""
    width = console.size.width
    title = f"─ a completion of step {sample.step} "
    scores = [f"{short_name(name)} {number(value)}" for name, value in sample.rewards.items()]
    if sample.advantage is not None:
        scores.append(f"advantage {sample.advantage:+.3g}")
    if room < 4:
        return []
    judged = _flow(scores, "green", console, 2 if room > 5 else 1)
    prompt = _wrap(Text(sample.prompt, style="dim"), console)[-max(room // 4, 1) :]
    completion = _wrap(Text(sample.completion or "(empty)"), console)
    spare = room - 1 - len(judged) - len(prompt)
    if len(completion) > spare:
        first, last = (spare - 1) // 2, spare // 2
        left_out = f"… {len(completion) - first - last} lines …"
        completion[first : len(completion) - last] = [Text(left_out, style="dim")]
    rule = Text(title + "─" * (width - len(title)), style="bright_black")
    return [rule, *prompt, *completion, *judged]


def _flow(parts: Iterable[str], style: str, console: Console, most: int) -> list[Text]:
    """Return lines of phrases that are not broken, `most` of them."""
    lines: list[str] = []
    for part in parts:
        if lines and cell_len(lines[-1]) + 2 + cell_len(part) <= console.size.width:
            lines[-1] += f"  {part}"
        else:
            lines.append(part)
    if len(lines) > most:
        lines[most - 1] += "  …"
    return [Text(line, style) for line in lines[:most]]


def _wrap(text: Text, console: Console, most: int | None = None) -> list[Text]:
    """Return the lines of a text that are not empty, as wide as the terminal, `most` of them."""
    width = console.size.width
    wrapped = text.wrap(console, width, overflow="fold")
    lines = [line for line in wrapped if line.plain.strip()]
    if most is not None and len(lines) > most:
        lines[most - 1].truncate(width - 1, overflow="crop")
        lines[most - 1].append("…")
    return lines[:most]
