"""One self-contained HTML page of a run: no request leaves it, and nothing in it is trusted."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import re
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from fastgrpo_kernels import GRPOLossConfig

from ..config import LOSS_KEYS, TrainConfig
from ..readable import changes, plain
from .chart import HEIGHT, WIDTH, draw, smoothing, tenths
from .completions import browsable
from .files import Line, RunFiles, number, read_run
from .panels import bin_width, column, curves, evaluations, others, setting
from .totals import histograms, timings

TEMPLATE = Path(__file__).parent / "template"


def write_report(run: Path, out: Path | None = None) -> Path:
    """Write the page of a run, finished or going on, and return its path.

    Args:
        run: a run directory.
        out: the file to write, overwritten if it exists; None: `report.html` in the run directory.

    Raises:
        ValueError: `run` is no run directory, has no step yet or a file in it is damaged; or `out`
            cannot be written.
    """
    page = render(read_run(run))
    path = out or run / "report.html"
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ValueError(
            f"{path} cannot be written ({error.strerror}): name another file"
        ) from None
    return path


def render(run: RunFiles) -> str:
    """Return the page."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_plain,
    )
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False}  # reward functions in order
    environment.filters |= {"percent": _percent, "breakable": _breakable}
    charts, absent = curves(run)
    logged, own = others(run)
    time_chart, times = timings(run)
    style, script = (
        (TEMPLATE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js")
    )
    changed, defaults = options(run.config)
    steps = len(run.training)
    return environment.get_template("page.html").render(
        run=run,
        state=state(run),
        about=about(run),
        headline=list(headline(run)),
        held_out=[draw(chart) for chart in evaluations(run)],
        evaluations=[{**found, "setting": setting(found)} for found in run.evaluations],
        curves=[draw(chart) for chart in charts],
        logged=[draw(chart) for chart in logged],
        others=[draw(chart) for chart in own],
        absent=absent,
        bin_width=bin_width(steps),
        smoothing=smoothing(-(-steps // bin_width(steps))),
        # A function that judged nothing has no bars, only words.
        histograms=[(chart, draw(chart) if chart.x else None) for chart in histograms(run)],
        time_chart=draw(time_chart) if time_chart else None,
        timings=times,
        browser=browsable(run.completions),
        changed=changed,
        defaults=defaults,
        versions=(run.summary or {}).get("versions") or {},
        written=f"{datetime.now():%Y-%m-%d %H:%M}",
        width=WIDTH,
        height=HEIGHT,
        # Not escaped, because these two are ours; the page runs nothing but them.
        style=Markup(style),
        script=Markup(script),
        style_hash=_hash(style),
        script_hash=_hash(script),
    )


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def state(run: RunFiles) -> str:
    """Return how far the run is, in words."""
    step = run.last_step
    planned = (run.summary or {}).get("steps") or run.config.get("max_steps") or -1
    count = f"step {step:,} of {planned:,}" if planned >= step else f"step {step:,}"
    if run.summary is not None:
        return f"finished, {count}"
    at = datetime.fromtimestamp((run.path / "metrics.jsonl").stat().st_mtime)
    return f"not finished: {count}, logged {at:%Y-%m-%d %H:%M}"


def about(run: RunFiles) -> list[tuple[str, str]]:
    """Return the model and the dataset of a run."""
    config = run.config
    task = config.get("task")
    made = f"made on the spot (task {task})" if task else "an object given to Trainer"
    dataset = [config.get(key) for key in ("dataset_name", "dataset_config", "dataset_train_split")]
    return [
        ("Model", str(config.get("model_name_or_path") or made)),
        ("Dataset", " · ".join(str(d) for d in dataset if d) if dataset[0] else made),
    ]


@dataclasses.dataclass(frozen=True)
class Fact:
    """A number at the top of the page."""

    name: str
    value: str
    detail: str


def headline(run: RunFiles) -> Iterator[Fact]:
    """Yield the numbers a reader asks for first."""
    summary, lines = run.summary or {}, run.training
    named = str((run.config.get("reward_funcs") or ["reward"])[0]).rpartition(":")[2]
    judge = summary.get("judge") or named
    for how, before, after, difference in changes(summary.get("test") or {}, share=run.binary):
        yield Fact(
            f"Test, {how}", f"{before} → {after}", f"{difference}, {judge} on held-out prompts"
        )
    rewards = column(lines, "reward")
    first, last = ([v for v in part if v is not None] for part in tenths(rewards))
    if first and last:
        count = len(tenths(rewards)[0])
        over = f"{count} step{'s' if count > 1 else ''}"
        yield Fact(
            "Reward",
            f"{fmean(first):.4g} → {fmean(last):.4g}",
            f"mean of the first {over} → of the last {over}",
        )
    if tokens := _known(column(lines, "num_tokens")):
        yield Fact("Tokens", _count(tokens[-1]), "of prompts and completions")
    if number(summary.get("seconds")):
        yield Fact("Wall time", _duration(summary["seconds"]), "tests and checkpoints included")
    elif spent := _known(column(lines, "step_time")):
        yield Fact("Time in steps", _duration(sum(spent)), "without tests and checkpoints")
    if rate := throughput(run):
        detail = "of completions, over all seconds of the steps, sampling included"
        yield Fact("Tokens per second", f"{rate:,.0f}", detail)
    if peaks := _known(column(lines, "memory/peak_gib")):
        yield Fact("Peak memory", f"{max(peaks):.3g} GiB", "of the GPU, or resident without one")


def throughput(run: RunFiles) -> float:
    """Return completion tokens per second of the run's steps; 0 if they were not measured.

    A step's own rate is of no use if a batch of completions serves several: one of them has all the
    seconds of sampling. And with num_iterations each of them trains on the same tokens again.
    """
    accumulated = run.config.get("gradient_accumulation_steps") or 1
    parts = (run.config.get("steps_per_generation") or accumulated) // accumulated
    period = parts * (run.config.get("num_iterations") or 1)
    tokens = seconds = 0.0
    for line in run.training:
        rate, spent = line.get("tokens_per_second"), line.get("step_time")
        if number(rate) and number(spent):
            seconds += spent
            tokens += rate * spent if (line["step"] - 1) % period < parts else 0.0
    return tokens / seconds if seconds else 0.0


def _plain(value: Any) -> Any:
    """Return a text of the run as the page may show it; what is markup is ours."""
    return plain(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _percent(value: Any) -> str:
    return f"{value:.1%}" if number(value) else "-"


def _breakable(name: str) -> Markup:
    """Return a name that a narrow page breaks between its words."""
    return Markup("<wbr>").join(escape(part) for part in re.split(r"(?<=[_/.:])", plain(name)))


def _known(values: list[float | None]) -> list[float]:
    return [v for v in values if v is not None]


def _count(value: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= size:
            return f"{value / (1e3 if letter == 'k' else size):.3g} {letter}"
    return f"{value:,.0f}"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def options(config: Line) -> tuple[list[tuple[str, str, str]], list[tuple[str, str]]]:
    """Return the keys of a run that differ from their defaults, with both values; and the rest.

    A key that this version does not know, because another one wrote it, counts as changed.
    """
    defaults: dict[str, Any] = {}
    for f in dataclasses.fields(TrainConfig):
        made = f.default_factory
        defaults[f.name] = f.default if made is dataclasses.MISSING else made()
    defaults |= {name: getattr(GRPOLossConfig(), name) for name in LOSS_KEYS}
    changed: list[tuple[str, str, str]] = []
    same: list[tuple[str, str]] = []
    for name, value in config.items():
        if name in defaults and defaults[name] == value:
            same.append((name, _yaml(value)))
        else:
            default = _yaml(defaults[name]) if name in defaults else "unknown to this version"
            changed.append((name, _yaml(value), default))
    return changed, same


def _yaml(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6)
    return text.removesuffix("\n").removesuffix("\n...")
