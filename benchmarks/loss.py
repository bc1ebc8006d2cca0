"""Compare the loss with its peers: exactness, time, memory, FLOPs.

    python -m benchmarks.loss --quick                    tiny shapes on a CPU: does it all work?
    python -m benchmarks.loss --cpu                      a CPU-sized head, peers in turn, 3 rounds
    python -m benchmarks.loss --gpu                      the shapes that matter, on one GPU
    python -m benchmarks.loss --gpu --only trl --out run.json      one peer, anew, in a run
    python -m benchmarks.loss --emulate-memory 24GiB     the longest batch that fits, by peer

Every peer runs in a process of its own. A result that is wrong is not timed. The bare products and
a copy on the device are timed in the same run: what no method can beat.

A run that was interrupted goes on when it is started again, by the same code on the same machine.
What the processes say, the tracebacks of what failed, is in a .log beside the JSON.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from . import peers, runs
from .cells import QWEN, Cell, cpu_cells, gpu_cells, quick_cells
from .expected import surprises
from .worker import STICKY, record_of

KEY = ("peer", "method", "op", "N", "H", "V", "rho", "frozen", "dtype", "gib")
OUT_OF_TIME = "failed: no time was left, run the command again"
GPU_SECONDS = 530.0
"""So long a `--gpu` run takes at most; what is left over is measured when it is run again."""
LIMIT_SECONDS = {"quick": 300.0, "cpu": 3600.0, "gpu": 240.0, "emulate_memory": 3600.0}
RESTARTS = 3
"""How often a peer's process is started again after it left the GPU in error."""


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    options = _parse(arguments)
    report = runs.header("benchmarks.loss", options.arguments, options.device)
    if options.resume:
        report = runs.resumed(options.out, report)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    if not report["records"]:
        options.log.unlink(missing_ok=True)
    if not options.emulate_memory:
        _add_ceilings(report, options)
    for turn in range(options.rounds):
        for name in runs.rotated(options.only or peers.NAMES, turn):
            for record in _records(name, _missing(name, turn, report, options), turn, options):
                if turn > 0 and record["status"] != "ok":  # he keeps the rounds he has
                    print(f"{_name(record)} turn {turn}: {record['status']}", file=sys.stderr)
                    continue
                _show(runs.add(report, record, options.key, turn))
                runs.write(options.out, report)
            add_ratios(report)
            runs.write(options.out, report)
    print(f"wrote {options.out}")
    if any(record["status"].startswith("failed: ") for record in report["records"]):
        print(f"what failed, and where: {options.log}")
    if options.quick:
        found = {_name(record): surprises(record) for record in report["records"]}
        for name, words in found.items():
            for word in words:
                print(f"{name}: {word}", file=sys.stderr)
        if any(found.values()):
            raise SystemExit(1)
    return report


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    helps = (
        "tiny shapes on a CPU",
        "shapes that keep a CPU busy",
        "the shapes that matter on a GPU",
    )
    parser = runs.parser("benchmarks.loss", __doc__, helps, "peer", peers.NAMES)
    parser.add_argument("--n", type=_numbers, help="only cells with these numbers of tokens")
    options = runs.parsed(parser, "loss", arguments)
    kind = options.mode
    cells = {"quick": quick_cells, "cpu": cpu_cells, "gpu": gpu_cells}
    if options.emulate_memory:
        options.cells = [Cell("linear", 0, H, QWEN) for H in (896, 3584)]
    else:
        options.cells = [c for c in cells[kind]() if not options.n or c.N in options.n]
        if not options.cells:
            have = ", ".join(str(n) for n in sorted({c.N for c in cells[kind]()}))
            parser.error(f"--n {options.n}: no such cell; there are {have}")
    if (options.only or options.n) and not options.given_out:
        parser.error("--only and --n measure a part of a run: say of which with --out")
    options.log = options.out.with_suffix(".log")
    options.rounds = options.rounds or {"cpu": 3, "gpu": 2}.get(kind, 1)
    options.key = KEY
    if options.emulate_memory:  # N is what is looked for
        options.key, options.rounds = tuple(name for name in KEY if name != "N"), 1
    options.seconds = {"quick": 0.0, "cpu": 4.0}.get(kind, 0.5)
    options.limit = LIMIT_SECONDS[kind]
    options.end = time.monotonic() + GPU_SECONDS if kind == "gpu" else math.inf
    return options


def _add_ceilings(report: dict[str, Any], options: argparse.Namespace) -> None:
    """Time the bare products of the shapes that a run does not have yet."""
    shapes = {_shape(cell.facts()): cell.facts() for cell in options.cells}
    have = {_shape(ceiling) for ceiling in report["ceilings"]}
    asked = {"cells": [facts for shape, facts in shapes.items() if shape not in have]}
    try:
        for ceiling in _run("ceilings", asked, options) if asked["cells"] else ():
            report["ceilings"].append(ceiling)
            runs.write(options.out, report)
    except runs.ProcessFailed as error:
        what = "the process that times the bare products"
        raise SystemExit(f"error: {what} {error}; see {options.log}") from None


def _shape(facts: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(facts[name] for name in ("N", "H", "V", "dtype"))


def _missing(
    name: str, turn: int, report: dict[str, Any], options: argparse.Namespace
) -> list[tuple[Cell, str]]:
    """Return what a peer is to measure: what the run lacks, and all of it if he is named."""
    found = []
    for cell in options.cells:
        for method in (m.name for m in peers.load(name).METHODS if cell.op in m.ops):
            wanted = record_of(name, method, cell, {"gib": options.emulate_memory})
            record = runs.find(report, wanted, options.key)
            if turn == 0:
                missing = bool(options.only) or not runs.is_done(record, 0)
            else:
                is_right = record is not None and record["status"] == "ok"
                missing = is_right and not runs.is_done(record, turn)
            if missing:
                found.append((cell, method))
    return found


def _records(
    name: str, missing: list[tuple[Cell, str]], turn: int, options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Yield a record of each; if the process dies, that is what is recorded of the rest."""
    missing = list(missing)
    reason = peers.absent(name, options.device)
    for _ in range(1 + RESTARTS):
        if options.end <= time.monotonic():
            reason = reason or OUT_OF_TIME
        if reason is not None or not missing:
            break
        cells = list(dict.fromkeys(cell for cell, _ in missing))
        methods = [[method for other, method in missing if other == cell] for cell in cells]
        asked = {"cells": [cell.facts() for cell in cells], "methods": methods, "check": turn == 0}
        try:
            for record in _run(name, asked, options):
                cell = Cell(**{key: record[key] for key in Cell.__dataclass_fields__})
                cell = replace(cell, N=0) if options.emulate_memory else cell
                missing.remove((cell, record["method"]))
                yield record
        except runs.ProcessFailed as error:
            if error.code != STICKY:
                late = options.end <= time.monotonic()
                reason = OUT_OF_TIME if late else f"failed: {error}"
    reason = reason or "failed: the GPU was in error too often"
    for cell, method in missing:
        yield record_of(name, method, cell, {"status": reason, "gib": options.emulate_memory})


def _run(name: str, asked: dict[str, Any], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield what a process of its own finds."""
    arguments = [name, "--device", options.device, "--seconds", str(options.seconds)]
    if options.emulate_memory:
        arguments += ["--gib", str(options.emulate_memory)]
    seconds = options.limit
    if name != "ceilings":
        seconds = min(seconds, max(options.end - time.monotonic(), 0.0))
    return runs.records("benchmarks.worker", arguments, asked, seconds=seconds, log=options.log)


def add_ratios(report: dict[str, Any]) -> None:
    """Add the time over that of the bare products, or of the bytes at the speed of a copy."""
    ceilings = {_shape(ceiling): ceiling for ceiling in report["ceilings"]}
    for record in report["records"]:
        ceiling = ceilings.get(_shape(record))
        if ceiling is not None and record["ms_total"] is not None:
            record["ratio_to_ceiling"] = record["ms_total"][1] / ceiling_ms(record, ceiling)


def ceiling_ms(record: dict[str, Any], ceiling: dict[str, Any]) -> float:
    """Return the least time a cell can take, whatever its share of active rows."""
    if record["op"] == "logits":
        read_and_written = 2 * record["N"] * record["V"] * getattr(torch, record["dtype"]).itemsize
        return read_and_written / ceiling["copy_bytes_per_second"] * 1e3
    products = ceiling["ms_products"]
    if record["op"] == "logps":
        return products["logits"]
    return products["logits"] + products["dhidden"] + (not record["frozen"]) * products["dweight"]


def _show(record: dict[str, Any]) -> None:
    found = record["status"]
    if record["ms_total"] is not None:
        mib = record["peak_extra_bytes"] / 2**20
        found = f"{record['ms_total'][1]:10.2f} ms {mib:10.1f} MiB"
    print(f"{_name(record):89}{found}", flush=True)


def _name(record: dict[str, Any]) -> str:
    cell = f"{record['op']:6} N={record['N']} H={record['H']} V={record['V']} {record['dtype']}"
    frozen = " frozen" if record["frozen"] else ""
    return f"{record['peer']:13}{record['method']:18}{cell} rho={record['rho']}{frozen}"


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


if __name__ == "__main__":
    main()
