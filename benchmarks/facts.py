"""Reads the committed runs: the newest of a kind, what belongs together, how a fact is written."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .measure import is_wrong
from .peers import NAMES

Record = dict[str, Any]
Run = dict[str, Any]

LOSS_CELL = ("op", "N", "H", "V", "dtype", "rho", "frozen")
TRAINER_CELL = (
    "model", "prompts", "num_generations", "completion_length", "prompt_length", "micro_batch",
    "dtype", "gradient_checkpointing", "rho", "frozen",
)  # fmt: skip
DEFAULTS = ("single_pass", "logits", "logps")
"""Our methods that others are compared with; of the trainer it is the one there is."""
_WORDS = {
    "op": "{}",
    "dtype": "{}",
    "model": "{}",
    "rho": "rho = {:g}",
    "frozen": "frozen head",
    "prompts": "prompts {:,}",
    "num_generations": "completions of each {:,}",
    "completion_length": "tokens of a completion {:,}",
    "prompt_length": "longest prompt {:,}",
    "micro_batch": "micro-batch {:,}",
    "gradient_checkpointing": "gradient checkpointing",
}


def newest(results: Path, kind: str, gib: float | None = None) -> Run | None:
    """Return the newest run of a kind, with its `file`; `gib`: of those with so much memory."""
    found = []
    for path in results.glob(f"{kind}_*.json"):
        run = json.loads(path.read_text(encoding="utf-8")) | {"file": path.name}
        if gib is None or any(record.get("gib") == gib for record in run["records"]):
            found.append(run)
    return max(found, key=lambda run: (run["date"], run["file"]), default=None)


def cells(records: Iterable[Record], keys: tuple[str, ...] = LOSS_CELL) -> list[list[Record]]:
    """Return the records of each cell, in the order of the file."""
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        groups.setdefault(tuple(record.get(key) for key in keys), []).append(record)
    return list(groups.values())


def is_ok(record: Record) -> bool:
    return record["status"] == "ok"


def ours(cell: list[Record]) -> Record | None:
    """Return our default method of a cell, if it ran there."""
    mine = [record for record in cell if record["peer"] == "fastgrpo"]
    if cell[0]["op"] != "trainer":
        mine = [record for record in mine if record["method"] in DEFAULTS]
    return next((record for record in mine[:1] if is_ok(record)), None)


def of_peer(cell: list[Record], peer: str, method: str | None = None) -> Record | None:
    found = (r for r in cell if r["peer"] == peer and method in (None, r["method"]))
    return next(found, None)


def ratio(record: Record, base: Record) -> float:
    """Return a time over the base's in the same turn, the median over the turns both have."""
    pairs = zip(_rounds(record), _rounds(base), strict=False)
    ratios = [theirs / mine for theirs, mine in pairs if theirs is not None and mine is not None]
    return statistics.median(ratios) if ratios else record["ms_total"][1] / base["ms_total"][1]


def _rounds(record: Record) -> list[float | None]:
    rounds = record.get("rounds")
    return rounds if isinstance(rounds, list) and rounds else [record["ms_total"][1]]


def ceiling(run: Run, record: Record) -> Record | None:
    """Return the bare products and the copy that were timed for a cell."""
    keys = ("N", "H", "V", "dtype")
    found = (c for c in run["ceilings"] if all(c[key] == record[key] for key in keys))
    return next(found, None)


def products_ms(products: dict[str, float], record: Record) -> float:
    """Return the time of the bare products that the gradients of a cell need."""
    names = ("logits", "dhidden") if record["frozen"] else ("logits", "dhidden", "dweight")
    return sum(products[name] for name in names)


def error_over_naive(record: Record) -> float:
    """Return the error of a gradient over naive PyTorch's in the same type, the largest if several.

    The loss does not take part where there are gradients: as a single number it can be right by
    luck, of which no multiple says anything.
    """
    error, naive = record["error_vs_fp64"], record["naive_error_vs_fp64"]
    names = [name for name in error if name != "loss"] or list(error)
    return max(error[name] / max(naive[name], 1e-30) for name in names)


def absent(run: Run) -> list[str]:
    """Return the peers that a run says nothing about."""
    present = {record["peer"] for record in run["records"]}
    return [name for name in NAMES if name not in present]


def label(record: Record) -> str:
    peer, method = record["peer"], record["method"]
    return peer if method == peer else f"{peer} {method}"


def reason(record: Record) -> str:
    """Say why a record has no time."""
    if record["status"] != "wrong" or not record.get("error_vs_fp64"):
        return record["status"]
    error, naive = record["error_vs_fp64"], record["naive_error_vs_fp64"]
    far = [name for name in naive if is_wrong({name: error[name]}, {name: naive[name]})]
    found = (f"{name} {error[name]:.1e}, of naive {naive[name]:.1e}" for name in far)
    return f"wrong: error of {'; of '.join(found)}"


def escaped(text: str) -> str:
    """Return text that Markdown takes as it is."""
    return re.sub(r"([\\`*_|<\[\]])", r"\\\1", " ".join(text.split()))


def number(x: float) -> str:
    """Return about three digits, all those before the point, thousands set apart."""
    size = abs(x)
    digits = 0 if size >= 99.95 or x == 0 else 1 if size >= 9.995 else 2 if size >= 0.0995 else 3
    return f"{x:,.{digits}f}"


def rate(flops_per_second: float) -> str:
    tera = flops_per_second >= 1e12
    return f"{number(flops_per_second / (1e12 if tera else 1e9))} {'T' if tera else 'G'}FLOP/s"


def mib(record: Record) -> str:
    size = record.get("peak_extra_bytes")
    return "" if size is None else number(size / 2**20)


def facts(record: Record, keys: Iterable[str]) -> str:
    """Return the facts that make a cell, in words."""
    words = []
    for key in keys:
        value = record.get(key)
        if value is not None and value is not False:
            words.append(_WORDS.get(key, f"{key} = {{:,}}").format(value))
    return ", ".join(words)


def device(run: Run) -> str:
    machine = run["machine"]
    if "gpu" in machine:
        return machine["gpu"]
    return f"{machine.get('processor') or 'a CPU'}, {machine['threads']} threads"
