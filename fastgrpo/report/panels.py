"""Which charts a run has over its steps: of its metrics and of its evaluations."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from ..rewards.contract import is_reserved
from .chart import Chart, Series, binned
from .files import Line, RunFiles, number

MOST_POINTS = 400
"""Values in a curve; a longer run has several steps in each."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """A chart of metrics.jsonl."""

    title: str
    unit: str
    keys: tuple[str, ...]  # of metrics.jsonl, with * for any name
    band: tuple[str, str] | None = None
    whole: bool = False
    percent: bool = False
    smooth: bool = True
    note: str = ""


PANELS = (
    Panel(title="Reward", unit="weighted sum of the reward functions, mean", keys=("reward",)),
    Panel(title="Reward functions", unit="mean over completions", keys=("rewards/*/mean",)),
    Panel(
        title="Failures of reward functions",
        unit="batches so far that one did not judge",
        keys=("rewards/*/exceptions", "rewards/*/timeouts", "rewards/*/invalid"),
        smooth=False,
    ),
    Panel(
        title="Completion length",
        unit="tokens: mean, shortest and longest",
        keys=("completions/mean_length",),
        band=("completions/min_length", "completions/max_length"),
    ),
    Panel(
        title="Truncated completions",
        unit="share of completions",
        keys=("completions/clipped_ratio",),
        whole=True,
        percent=True,
    ),
    Panel(
        title="Groups without a signal",
        unit="share of groups whose rewards are all equal",
        keys=("frac_reward_zero_std",),
        whole=True,
        percent=True,
    ),
    Panel(title="Entropy", unit="nats per token", keys=("entropy",)),
    Panel(title="KL to the reference", unit="nats per token", keys=("kl",)),
    Panel(
        title="Clipped",
        unit="share of tokens, or of sequences",
        keys=(
            "clip_ratio/low_mean",
            "clip_ratio/high_mean",
            "clip_ratio/region_mean",
            "cispo_clip_ratio",
        ),
        percent=True,
        note="0 as long as every batch of completions serves a single step.",
    ),
    Panel(
        title="Loss",
        unit="no unit",
        keys=("loss",),
        note="Near 0 is normal where completions have one reward each: on-policy, advantages of a "
        "group cancel out. Those of steps need not. Look at the reward.",
    ),
    Panel(title="Gradient norm", unit="before clipping", keys=("grad_norm",)),
    Panel(title="Learning rate", unit="per step", keys=("learning_rate",), smooth=False),
    Panel(title="Entropy coefficient", unit="no unit", keys=("entropy_coef",), smooth=False),
    Panel(
        title="Sampler against training",
        unit="nats: difference of log-probs, mean",
        keys=("sampling/sampling_logp_difference/mean",),
    ),
    Panel(
        title="Sampler against training, at most",
        unit="nats: difference of log-probs, largest",
        keys=("sampling/sampling_logp_difference/max",),
    ),
    Panel(
        title="Importance of samples",
        unit="ratio: mean, smallest and largest",
        keys=("sampling/importance_sampling_ratio/mean",),
        band=("sampling/importance_sampling_ratio/min", "sampling/importance_sampling_ratio/max"),
    ),
    Panel(
        title="Throughput",
        unit="completion tokens of a step per second of it",
        keys=("tokens_per_second",),
        note="Of steps that share a batch of completions the first pays for the sampling.",
    ),
    Panel(title="Memory", unit="GiB at the peak so far", keys=("memory/peak_gib",), smooth=False),
)


_ELSEWHERE = ("step", "eval_reward", "eval_rewards/*/mean", "time/*")
"""Metrics that other charts of the page have."""


def curves(run: RunFiles) -> tuple[list[Chart], list[str]]:
    """Return the charts over the steps, and the titles of those the run has no values for."""
    lines = run.training
    steps = steps_of(lines)
    found: list[Chart] = []
    absent: list[str] = []
    for panel in PANELS:
        names = [name for key in panel.keys for name in names_of(lines, key)]
        width = bin_width(len(lines))
        series = [
            binned(_series(lines, name, panel, alone=len(names) == 1), width) for name in names
        ]
        if not series:
            absent.append(panel.title)
            continue
        found.append(
            Chart(
                title=panel.title,
                unit=panel.unit,
                x=steps,
                series=series,
                whole=panel.whole,
                percent=panel.percent,
                smooth=panel.smooth,
                note=panel.note,
            )
        )
    return found, absent


def bin_width(count: int) -> int:
    """Return how many steps are one value of a curve."""
    return -(-count // MOST_POINTS)


def steps_of(lines: Sequence[Line]) -> list[tuple[float, float]]:
    """Return first and last step of each value of a curve."""
    width = bin_width(len(lines))
    bins = [lines[i : i + width] for i in range(0, len(lines), width)]
    return [(each[0]["step"], each[-1]["step"]) for each in bins]


def names_of(lines: Sequence[Line], key: str) -> list[str]:
    """Return the metrics of a pattern that have a value anywhere, in their order."""
    names = dict.fromkeys(n for line in lines for n in line if fnmatchcase(n, key))
    return [name for name in names if any(number(line.get(name)) for line in lines)]


def _series(lines: Sequence[Line], key: str, panel: Panel, *, alone: bool) -> Series:
    low, high = (column(lines, k) for k in panel.band) if panel.band else (None, None)
    name = key if alone else short(key)
    return Series(name=name, key=key, values=column(lines, key), low=low, high=high)


def column(lines: Sequence[Line], key: str) -> list[float | None]:
    """Return a metric of every line, None where it is no finite number."""
    return [value if number(value := line.get(key)) else None for line in lines]


def short(key: str) -> str:
    """Return what a metric is called where its chart says the rest."""
    if match := re.fullmatch(r"(?:eval_)?rewards/(.*)/mean", key):
        return match[1]
    if match := re.fullmatch(r"rewards/(.*)/(exceptions|timeouts|invalid)", key):
        return f"{match[1]}: {match[2]}"
    clipped = {"low_mean": "below", "high_mean": "above", "region_mean": "either"}
    name = key.rpartition("/")[2]
    return clipped.get(name, name)


def others(run: RunFiles) -> tuple[list[Chart], list[Chart]]:
    """Return a chart for each metric that no panel has: of reward functions, and of the trainer."""
    keys = [*_ELSEWHERE]
    for panel in PANELS:
        keys += [*panel.keys, *(panel.band or ())]
    names = [n for n in names_of(run.metrics, "*") if not any(fnmatchcase(n, k) for k in keys)]
    logged: list[Chart] = []
    own: list[Chart] = []
    for name in names:
        lines = [line for line in run.metrics if number(line.get(name))]
        series = Series(name=name, key=name, values=column(lines, name))
        ours = is_reserved(name.removeprefix("eval_"))
        (own if ours else logged).append(
            Chart(
                title=name,
                unit="as in metrics.jsonl" if ours else "logged by a reward function",
                x=steps_of(lines),
                series=[binned(series, bin_width(len(lines)))],
                style="points" if name.startswith("eval_") else "lines",
            )
        )
    return logged, own


def evaluations(run: RunFiles) -> Iterator[Chart]:
    """Yield what was measured on held-out prompts, as points with what is known of their error."""
    lines = run.metrics
    names = [n for key in ("eval_reward", "eval_rewards/*/mean") for n in names_of(lines, key)]
    if names:
        seen = [line for line in lines if any(number(line.get(name)) for name in names)]
        yield Chart(
            title="Held-out reward",
            unit="reward, mean over completions",
            x=[(line["step"], line["step"]) for line in seen],
            series=[
                Series(name=short(name), key=name, values=column(seen, name)) for name in names
            ],
            style="points",
        )
    points = sorted(_measured(run), key=lambda point: point[1])
    if points:
        steps = sorted({step for _, step, _ in points})
        series: list[Series] = []
        for name in dict.fromkeys(name for name, _, _ in points):
            at = {step: value for n, step, value in points if n == name}
            values, lows, highs = (
                [at[step][i] if step in at else None for step in steps] for i in range(3)
            )
            series.append(Series(name=name, key=name, values=values, low=lows, high=highs))
        share = run.binary or not (run.summary or {}).get("test")  # what eval/ has are shares
        errors = any(v is not None for s in series for v in s.low or ())
        yield Chart(
            title="Held-out accuracy" if share else "Held-out reward and accuracy",
            unit=("share of prompts" if share else "rewards, and shares of prompts")
            + (", with confidence intervals" if errors else ""),
            x=[(step, step) for step in steps],
            series=series,
            style="points",
            whole=share,
            percent=share,
        )


Measured = tuple[float | None, float | None, float | None]  # value, low, high


def _measured(run: RunFiles) -> Iterator[tuple[str, int, Measured]]:
    """Yield name, step and value of what summary.json and eval/*.json say of checkpoints."""
    for how, shares in ((run.summary or {}).get("test") or {}).items():
        for when, step in (("before", 0), ("after", run.last_step)):
            if number(shares.get(when)):
                yield how, step, (shares[when], None, None)
    settings = {setting(found) for found in run.evaluations}
    best = ((run.summary or {}).get("best") or {}).get("step")
    for found in run.evaluations:
        step = step_of(found["checkpoint"], run.last_step, best)
        for name, value in found["metrics"].items():
            if step is not None and number(value.get("value")):
                full = name if len(settings) == 1 else f"{name} ({setting(found)})"
                yield full, step, (value["value"], value.get("low"), value.get("high"))


def setting(found: Line) -> str:
    """Return in words what an evaluation was over, and what was right."""
    threshold = found.get("threshold")
    return (
        f"{found.get('split') or 'no split'}, {found.get('num_prompts')} prompts × "
        f"{found.get('num_samples')}, temperature {found.get('temperature')}, judge "
        f"{found.get('judge')}{'' if threshold is None else f' from {threshold:g} on'}"
    )


def step_of(checkpoint: str, last: int, best: int | None) -> int | None:
    """Return the step of a checkpoint of the run; None: it is another model, by its directory."""
    if match := re.fullmatch(r"step-(\d+)", checkpoint):
        return int(match[1])
    return {"base": 0, "best": best, "final": last}.get(checkpoint)
