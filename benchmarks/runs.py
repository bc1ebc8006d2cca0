"""What the benchmarks share: processes of their own, rounds gathered in records, JSON."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

_VERSIONS = (
    "torch", "triton", "transformers", "trl", "liger-kernel", "cut-cross-entropy", "verl",
    "nvidia-cutlass-dsl", "fastgrpo",
)  # fmt: skip


class ProcessFailed(RuntimeError):
    """A process ended badly or took too long; the message says which, with its last words."""


def records(
    module: str,
    arguments: Sequence[str],
    given: Any,
    *,
    seconds: float,
    environment: Mapping[str, str] | None = None,
) -> Iterator[dict[str, Any]]:
    """Yield what a module, run in a process of its own, prints: a JSON object a line.

    Args:
        module: what `python -m` runs.
        arguments: of the command.
        given: what the process reads, as JSON, from its standard input.
        seconds: after so long the process is killed.
        environment: variables that differ from those here.

    Raises:
        ProcessFailed: the process was killed or did not end with 0.
    """
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        ) as process,
    ):
        assert process.stdin is not None and process.stdout is not None
        late = threading.Event()
        timer = threading.Timer(seconds, lambda: (late.set(), _kill(process)))
        timer.start()
        try:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(json.dumps(given))
                process.stdin.close()
            for line in process.stdout:
                yield json.loads(line)
            code = process.wait()
        finally:
            timer.cancel()
            _kill(process)
        if late.is_set():
            raise ProcessFailed(f"killed after {seconds:.0f} s")
        if code != 0:
            log.seek(0)
            last = (log.read().strip().splitlines() or ["no message"])[-1]
            raise ProcessFailed(f"ended with {code}: {last}")


def _kill(process: subprocess.Popen[str]) -> None:
    """Kill a process and what it has started, which may hold its output open."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def header(program: str, arguments: Sequence[str], device: str) -> dict[str, Any]:
    """Return what the JSON of a run starts with: the command, the machine, the versions."""
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
        "command": " ".join([f"python -m {program}", *arguments]),
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


def add(report: dict[str, Any], record: dict[str, Any], key: Sequence[str]) -> dict[str, Any]:
    """Add a record, or one more round to the record with the same key; return what is there."""
    wanted = [record[name] for name in key]
    for i, other in enumerate(report["records"]):
        if [other[name] for name in key] == wanted:
            report["records"][i] = merged(other, record)
            return report["records"][i]
    report["records"].append(merged(None, record))
    return report["records"][-1]


def merged(record: dict[str, Any] | None, round: dict[str, Any]) -> dict[str, Any]:
    """Add a round to a record: medians of medians, the widest range, each round's median."""
    total = round.get("ms_total")
    if record is None or record["status"] != "ok" or total is None:
        return round | ({} if total is None else {"rounds": [total[1]]})
    found = record | {name: value for name, value in round.items() if value is not None}
    found["rounds"] = [*record["rounds"], total[1]]
    for name, value in round.items():
        if not name.startswith("ms_") or value is None:
            continue
        (low, median, high), (low2, median2, high2) = record[name], value
        medians = [*record.get(f"{name}_medians", [median]), median2]
        found[f"{name}_medians"] = medians
        found[name] = [min(low, low2), statistics.median(medians), max(high, high2)]
    return found


def write(path: Path, report: dict[str, Any]) -> None:
    """Replace the file as a whole: an interrupted run leaves what it has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(report, indent=1) + "\n")
    part.replace(path)


def gib(text: str) -> float:
    """Read an argument such as 24GiB."""
    try:
        return float(text.removesuffix("GiB"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"wanted 24GiB for example, got {text!r}") from None
