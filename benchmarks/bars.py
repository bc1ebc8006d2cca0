"""What the loss must reach, judged by a run: met or MISSED."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .facts import (
    LOSS_CELL,
    Record,
    Run,
    cells,
    error_over_naive,
    escaped,
    facts,
    is_ok,
    of_peer,
    ratio,
    reason,
)
from .tables import NO_RECORD, table

MIB = 2**20
FLOOR = 4 * torch.finfo(torch.float32).eps
"""Relative error below which naive PyTorch's loss is right by luck; the tests allow as much."""

Measure = Callable[[Run, list[Record], Record], float | str]
"""From a run, a cell and our record in it to a number, or to the reason why there is none."""


@dataclass(frozen=True)
class Bar:
    """What is judged, of which of our records, and the limit."""

    what: str
    applies: Callable[[Record], bool]
    measure: Measure
    sign: str
    limit: float
    by_method: bool = True  # each of our methods has a row of its own

    def is_met(self, value: float) -> bool:
        """Judge a value as it was measured, not as it is printed."""
        if self.sign == "<":
            return value < self.limit
        return value <= self.limit if self.sign == "<=" else value >= self.limit

    def printed(self, value: float) -> str:
        """Return two decimals, and more where these alone would be judged otherwise."""
        digits = 2
        while self.is_met(round(value, digits)) != self.is_met(value):
            digits += 1
        return f"{value:,.{digits}f}"

    def badness(self, value: float) -> float:
        return -value if self.sign == ">=" else value


def table_of_bars(run: Run, bars: tuple[Bar, ...]) -> str:
    """Return each bar, the worst that was measured, and the verdict."""
    columns = ["bar", "must be", "type", ">worst", "at", ">cells met", "verdict"]
    return table(columns, [row for bar in bars for row in _rows(run, bar)])


def _rows(run: Run, bar: Bar) -> list[list[str]]:
    """Return a row for each of our methods and types that a bar is about."""
    judged: dict[tuple[str, str], list[tuple[float | str, Record]]] = {}
    for cell in cells(run["records"]):
        for mine in cell:
            if mine["peer"] == "fastgrpo" and bar.applies(mine):
                found = bar.measure(run, cell, mine) if is_ok(mine) else reason(mine)
                key = mine["method"] if bar.by_method else "", mine["dtype"]
                judged.setdefault(key, []).append((found, mine))
    must = f"{bar.sign} {bar.limit:.2f}".replace("<=", "≤").replace(">=", "≥")
    if not judged:
        return [[bar.what, must, "", "", "", "", "not judged: no such cell in this run"]]
    several = len({method for method, _ in judged}) > 1
    return [
        [f"{bar.what}, {method}" if several else bar.what, must, dtype, *_verdict(run, bar, found)]
        for (method, dtype), found in judged.items()
    ]


def _verdict(run: Run, bar: Bar, found: list[tuple[float | str, Record]]) -> list[str]:
    values = [(value, mine) for value, mine in found if not isinstance(value, str)]
    reasons = dict.fromkeys(value for value, _ in found if isinstance(value, str))
    unjudged = f"not judged: {escaped('; '.join(reasons))}" if reasons else ""
    if not values:
        return ["", "", "", unjudged]
    worst, mine = max(values, key=lambda pair: bar.badness(pair[0]))
    met = sum(bar.is_met(value) for value, _ in values)
    verdict = "met" if met == len(values) else "**MISSED**"
    if unjudged:
        verdict += f"; {len(found) - len(values)} {unjudged}"
    varying = [key for key in LOSS_CELL[1:] if len({r[key] for r in run["records"]}) > 1]
    at = facts(mine, [key for key in varying if key != "dtype"])
    if not bar.by_method:
        at = f"{mine['method']}, {at}" if at else mine["method"]
    return [bar.printed(worst), at, f"{met} of {len(values)}", verdict]


def linear(
    method: str | None = None,
    rho: float | None = None,
    frozen: bool | None = None,
    hidden: Callable[[int], bool] = lambda H: True,
) -> Callable[[Record], bool]:
    """Return whether a record is of ours from hidden states, of a kind."""
    return lambda r: (
        r["op"] == "linear"
        and method in (None, r["method"])
        and rho in (None, r["rho"])
        and frozen in (None, r["frozen"])
        and hidden(r["H"])
    )


def op(name: str) -> Callable[[Record], bool]:
    return lambda record: record["op"] == name


def over_ceiling(run: Run, cell: list[Record], mine: Record) -> float | str:
    return mine.get("ratio_to_ceiling") or "no ceiling in this run"


def share_of_copy(run: Run, cell: list[Record], mine: Record) -> float | str:
    found = over_ceiling(run, cell, mine)
    return found if isinstance(found, str) else 1 / found


def against(peer: str, *, ours_over_theirs: bool = False) -> Measure:
    """Return how often ours fits into a peer's time in the same round, or the inverse."""

    def measure(run: Run, cell: list[Record], mine: Record) -> float | str:
        theirs = of_peer(cell, peer)
        if theirs is None or not is_ok(theirs):
            return f"{peer} {reason(theirs) if theirs else NO_RECORD}"
        return ratio(mine, theirs) if ours_over_theirs else ratio(theirs, mine)

    return measure


def over_least_memory(run: Run, cell: list[Record], mine: Record) -> float | str:
    others = [r["peak_extra_bytes"] for r in cell if r["peer"] != "fastgrpo" and is_ok(r)]
    return mine["peak_extra_bytes"] / min(others) if others else "no peer ran"


def over_single_pass_memory(run: Run, cell: list[Record], mine: Record) -> float | str:
    """Return bytes over the chunk's budget, the fp32 gradient of a trained head, 16 a token."""
    budget = 256.0 * MIB
    if "gpu" in run["machine"] and not mine["frozen"]:
        budget = min(max(run["machine"]["memory_gib"] * 1024 / 32 * MIB, budget), 4096 * MIB)
    head = 0 if mine["frozen"] else 4 * mine["V"] * mine["H"]
    return mine["peak_extra_bytes"] / (budget + head + 16 * mine["N"])


def over_recompute_memory(run: Run, cell: list[Record], mine: Record) -> float | str:
    return mine["peak_extra_bytes"] / (4 * mine["N"] * mine["H"] + 128 * MIB)


def gradient_error(run: Run, cell: list[Record], mine: Record) -> float | str:
    return error_over_naive(mine)


def loss_error(run: Run, cell: list[Record], mine: Record) -> float | str:
    return mine["error_vs_fp64"]["loss"] / (mine["naive_error_vs_fp64"]["loss"] + FLOOR)


ALWAYS = (
    Bar(
        "memory over chunk budget + 4VH + 16N", linear("single_pass"),
        over_single_pass_memory, "<=", 1.0,
    ),
    Bar("memory over 4NH + 128 MiB", linear("recompute"), over_recompute_memory, "<=", 1.0),
    Bar(
        "error of gradients or log-probs over naive's, to 1%", lambda _: True,
        gradient_error, "<=", 1.01, False,
    ),
    Bar(
        f"error of the loss over naive's + {FLOOR:.1e}, to 1%",
        lambda record: record["op"] != "logps",
        loss_error, "<=", 1.01, False,
    ),
)  # fmt: skip

CPU = (
    Bar("time over naive's", linear(), against("naive", ours_over_theirs=True), "<=", 1.0),
    Bar("memory over the least of any peer", linear(), over_least_memory, "<", 1.0),
    *ALWAYS,
)

_FULL = ("single_pass", 1.0, False)
GPU = (
    Bar(
        "time over the bare products, H = 896", linear(*_FULL, lambda H: H == 896),
        over_ceiling, "<=", 1.35,
    ),
    Bar(
        "time over the bare products, H = 1,536", linear(*_FULL, lambda H: H == 1536),
        over_ceiling, "<=", 1.20,
    ),
    Bar(
        "time over the bare products, H ≥ 3,584", linear(*_FULL, lambda H: H >= 3584),
        over_ceiling, "<=", 1.12,
    ),
    Bar(
        "time over the bare products, frozen head", linear("single_pass", 1.0, True),
        over_ceiling, "<=", 1.25,
    ),
    Bar("TRL's time over ours", linear(*_FULL), against("trl"), ">=", 1.3),
    Bar(
        "TRL's time over ours, rho = 0.5", linear("single_pass", 0.5, False),
        against("trl"), ">=", 1.8,
    ),
    Bar("Liger SM90's time over ours", linear(*_FULL), against("liger_sm90"), ">=", 1.2),
    Bar("from logits: 4NV bytes over time, as a share of a copy's speed", op("logits"),
        share_of_copy, ">=", 0.70),
    Bar("from logits: Liger Triton's time over ours", op("logits"), against("liger_triton"),
        ">=", 1.4),
    Bar("log-probs only: time over one bare product", op("logps"), over_ceiling, "<=", 1.25),
    *ALWAYS,
)  # fmt: skip
