"""Compare the loss with its peers: exactness, time, memory, FLOPs.

    python -m benchmarks.loss --quick                    tiny shapes on a CPU: does it all work?
    python -m benchmarks.loss --cpu                      a CPU-sized head, peers in turn, 3 rounds
    python -m benchmarks.loss --gpu                      the shapes that matter, on one GPU
    python -m benchmarks.loss --gpu --only trl --out run.json      one peer, added to a run
    python -m benchmarks.loss --emulate-memory 24GiB     the longest batch that fits, by peer

Every peer runs in a process of its own. A result that is wrong is not timed. The bare products and
a copy on the device are timed in the same run: what no method can beat.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import torch

from . import peers, runs
from .cells import QWEN, Cell, cpu_cells, gpu_cells, quick_cells
from .expected import surprises
from .worker import record_of

RESULTS = Path(__file__).parent / "results"
KEY = ("peer", "method", "op", "N", "H", "V", "rho", "frozen", "dtype")
LIMIT_SECONDS = 3600.0  # of a peer's process


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    options = _parse(arguments)
    report = runs.header("benchmarks.loss", options.arguments, options.device)
    if options.out.exists():
        report |= json.loads(options.out.read_text())
    if not options.emulate_memory and not report["ceilings"]:
        shapes = {(c.N, c.H, c.V, c.dtype): c for c in options.cells}
        asked = {"cells": [cell.facts() for cell in shapes.values()]}
        report["ceilings"] = list(_run("ceilings", asked, options))
    for turn in range(options.rounds):
        for name in options.only or peers.NAMES:
            found = _records(name, options) if turn == 0 else _times(name, report, options)
            for record in found:
                key = KEY if options.emulate_memory is None else (*KEY[:3], *KEY[4:])
                _show(runs.add(report, record, key))
            add_ratios(report)
            runs.write(options.out, report)
    print(f"wrote {options.out}")
    if options.quick:
        found = {_name(record): surprises(record) for record in report["records"]}
        for name, words in found.items():
            for word in words:
                print(f"{name}: {word}", file=sys.stderr)
        if any(found.values()):
            raise SystemExit(1)
    return report


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.loss",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--quick", action="store_true", help="tiny shapes on a CPU")
    mode.add_argument("--cpu", action="store_true", help="N = 2048, H = 512, V = 32,000 on a CPU")
    mode.add_argument("--gpu", action="store_true", help="the shapes that matter on a GPU")
    mode.add_argument(
        "--emulate-memory", type=runs.gib, metavar="24GiB", help="the longest that fits"
    )
    parser.add_argument("--only", type=_names, help=f"some of {','.join(peers.NAMES)}")
    parser.add_argument("--n", type=_numbers, help="only cells with these numbers of tokens")
    parser.add_argument("--out", type=Path, help="JSON to write; one that exists is added to")
    parser.add_argument("--rounds", type=int, help="how often every peer has its turn")
    options = parser.parse_args(arguments)
    if (options.gpu or options.emulate_memory) and not torch.cuda.is_available():
        parser.error("no GPU here: use --quick or --cpu")
    kind = next(k for k in ("quick", "cpu", "gpu", "emulate_memory") if getattr(options, k))
    options.device = "cpu" if kind in ("quick", "cpu") else "cuda"
    cells = {"quick": quick_cells, "cpu": cpu_cells, "gpu": gpu_cells}
    if options.emulate_memory:
        options.cells = [Cell("linear", 0, H, QWEN) for H in (896, 3584)]
    else:
        options.cells = [c for c in cells[kind]() if not options.n or c.N in options.n]
        if not options.cells:
            have = ", ".join(str(n) for n in sorted({c.N for c in cells[kind]()}))
            parser.error(f"--n {options.n}: no such cell; there are {have}")
    options.out = options.out or RESULTS / f"loss_{kind}_{date.today():%Y%m%d}.json"
    options.rounds = options.rounds or (3 if options.cpu else 1)
    options.arguments = sys.argv[1:] if arguments is None else arguments
    options.seconds = {"quick": 0.0, "cpu": 4.0}.get(kind, 0.5)
    return options


def _records(name: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the records of a peer; if its process dies, that is what is recorded of the rest."""
    missing = {
        (method.name, cell): method
        for cell in options.cells
        for method in peers.load(name).METHODS
        if cell.op in method.ops
    }
    asked = {"cells": [cell.facts() for cell in options.cells]}
    try:
        for record in _run(name, asked, options):
            facts = {key: record[key] for key in Cell.__dataclass_fields__}
            missing.pop((record["method"], Cell(**facts)), None)
            yield record
    except runs.ProcessFailed as error:
        for method, cell in missing:
            yield record_of(name, method, cell, {"status": f"failed: {error}"})


def _times(
    name: str, report: dict[str, Any], options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Yield one more round of the times of what is right; whoever fails now keeps his rounds."""
    right: dict[Cell, list[str]] = {}
    for record in report["records"]:
        cell = Cell(**{key: record[key] for key in Cell.__dataclass_fields__})
        if record["peer"] == name and record["status"] == "ok" and cell in options.cells:
            right.setdefault(cell, []).append(record["method"])
    asked = {"cells": [cell.facts() for cell in right], "methods": list(right.values())}
    try:
        yield from _run(name, asked, options) if right else ()
    except runs.ProcessFailed as error:
        print(f"{name}: {error}", file=sys.stderr)


def _run(name: str, asked: dict[str, Any], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield what a process of its own finds."""
    arguments = [name, "--device", options.device, "--seconds", str(options.seconds)]
    if options.emulate_memory:
        arguments += ["--gib", str(options.emulate_memory)]
    return runs.records("benchmarks.worker", arguments, asked, seconds=LIMIT_SECONDS)


def add_ratios(report: dict[str, Any]) -> None:
    """Add the time over that of the bare products, or of the bytes at the speed of a copy."""
    ceilings = {(c["N"], c["H"], c["V"], c["dtype"]): c for c in report["ceilings"]}
    for record in report["records"]:
        ceiling = ceilings.get((record["N"], record["H"], record["V"], record["dtype"]))
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


def _names(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in peers.NAMES:
            known = ", ".join(peers.NAMES)
            raise argparse.ArgumentTypeError(f"no peer {name!r}; there are {known}")
    return names


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


if __name__ == "__main__":
    main()
