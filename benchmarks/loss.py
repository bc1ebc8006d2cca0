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
import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from . import peers
from .cells import QWEN, Cell, cpu_cells, gpu_cells, quick_cells
from .measure import merged

RESULTS = Path(__file__).parent / "results"
_VERSIONS = (
    "torch", "triton", "transformers", "trl", "liger-kernel", "cut-cross-entropy", "verl",
    "nvidia-cutlass-dsl", "fastgrpo",
)  # fmt: skip
_KEY = ("peer", "method", "op", "N", "H", "V", "rho", "frozen", "dtype")


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    options = _parse(arguments)
    device = "cuda" if options.gpu or options.emulate_memory else "cpu"
    cells = quick_cells() if options.quick else cpu_cells() if options.cpu else gpu_cells()
    if options.emulate_memory:
        cells = [Cell("linear", 0, H, QWEN) for H in (896, 3584)]
    if options.n:
        cells = [cell for cell in cells if cell.N in options.n]
    names = options.only or peers.NAMES
    report = _header(options, device)
    if options.out.exists():
        report |= json.loads(options.out.read_text())
    if not options.emulate_memory and not report["ceilings"]:
        shapes = {(c.N, c.H, c.V, c.dtype): c for c in cells}
        report["ceilings"] = list(_run("ceilings", list(shapes.values()), device, options))
    for _ in range(options.rounds):
        for name in names:
            for record in _run(name, cells, device, options):
                _add(report, record)
                _show(record)
                _write(options.out, report)
    _add_ratios(report)
    _write(options.out, report)
    print(f"wrote {options.out}")
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
    mode.add_argument("--emulate-memory", type=_gib, metavar="24GiB", help="the longest that fits")
    parser.add_argument("--only", type=_names, help=f"some of {','.join(peers.NAMES)}")
    parser.add_argument("--n", type=_numbers, help="only cells with these numbers of tokens")
    parser.add_argument("--out", type=Path, help="JSON to write; one that exists is added to")
    parser.add_argument("--rounds", type=int, help="how often every peer has its turn")
    options = parser.parse_args(arguments)
    if (options.gpu or options.emulate_memory) and not torch.cuda.is_available():
        parser.error("no GPU here: use --quick or --cpu")
    kind = next(k for k in ("quick", "cpu", "gpu", "emulate_memory") if getattr(options, k))
    options.out = options.out or RESULTS / f"loss_{kind}_{date.today():%Y%m%d}.json"
    options.rounds = options.rounds or (3 if options.cpu else 1)
    options.arguments = sys.argv[1:] if arguments is None else arguments
    options.seconds = 0.0 if options.quick else 1.0 if options.gpu else 15.0
    return options


def _run(
    name: str, cells: list[Cell], device: str, options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Yield the records of one peer, from a process of its own."""
    command = [sys.executable, "-m", "benchmarks.worker", name, "--device", device]
    command += ["--seconds", str(options.seconds)]
    if options.emulate_memory:
        command += ["--gib", str(options.emulate_memory)]
    facts = json.dumps([cell.facts() for cell in cells])
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        ) as process,
    ):
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(facts)
        process.stdin.close()
        for line in process.stdout:
            yield json.loads(line)
        if process.wait() != 0:
            log.seek(0)
            last = (log.read().strip().splitlines() or ["no message"])[-1]
            raise SystemExit(f"the process of {name} ended with {process.returncode}: {last}")


def _header(options: argparse.Namespace, device: str) -> dict[str, Any]:
    versions = {"python": platform.python_version()}
    for package in _VERSIONS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    machine: dict[str, Any] = {"cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        machine |= {"gpu": properties.name, "memory_gib": properties.total_memory / 2**30}
    else:
        machine |= {"processor": _processor()}
    return {
        "command": "python -m benchmarks.loss " + " ".join(options.arguments),
        "date": f"{date.today():%Y-%m-%d}",
        "machine": machine,
        "versions": versions,
        "ceilings": [],
        "records": [],
    }


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor()


def _add(report: dict[str, Any], record: dict[str, Any]) -> None:
    """Add a record, or one more round to the record that is there."""
    key = [record[name] for name in _KEY]
    for i, other in enumerate(report["records"]):
        if [other[name] for name in _KEY] == key:
            report["records"][i] = merged(other, record)
            return
    report["records"].append(merged(None, record))


def _add_ratios(report: dict[str, Any]) -> None:
    """Add the time over that of the bare products, or of the bytes at the speed of a copy."""
    ceilings = {(c["N"], c["H"], c["V"], c["dtype"]): c for c in report["ceilings"]}
    for record in report["records"]:
        ceiling = ceilings.get((record["N"], record["H"], record["V"], record["dtype"]))
        if record["status"] == "ok" and ceiling is not None and "ms_total" in record:
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
    shape = f"{record['op']:6} N={record['N']} H={record['H']} V={record['V']} {record['dtype']}"
    shape += f" rho={record['rho']}" + (" frozen" if record["frozen"] else "")
    found = record["status"]
    if "ms_total" in record:
        mib = record["peak_extra_bytes"] / 2**20
        found = f"{record['ms_total'][1]:10.2f} ms {mib:10.1f} MiB"
    print(f"{record['peer']:13}{record['method']:18}{shape:58}{found}", flush=True)


def _write(path: Path, report: dict[str, Any]) -> None:
    """Replace the file as a whole: an interrupted run leaves what it has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(report, indent=1) + "\n")
    part.replace(path)


def _gib(text: str) -> float:
    number = text.removesuffix("GiB")
    try:
        return float(number)
    except ValueError:
        raise argparse.ArgumentTypeError(f"wanted 24GiB for example, got {text!r}") from None


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
