"""What the benchmarks share: processes of their own, rounds gathered in records, JSON."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
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

    def __init__(self, message: str, code: int | None = None) -> None:
        super().__init__(message)
        self.code = code


def records(
    module: str,
    arguments: Sequence[str],
    given: Any,
    *,
    seconds: float,
    environment: Mapping[str, str] | None = None,
    log: Path | None = None,
) -> Iterator[dict[str, Any]]:
    """Yield what a module, run in a process of its own, prints: a JSON object a line.

    Args:
        module: what `python -m` runs.
        arguments: of the command.
        given: what the process reads, as JSON, from its standard input.
        seconds: after so long the process is killed.
        environment: variables that differ from those here.
        log: file that what it says on its standard error is added to; without one, what has a
            traceback is repeated on the standard error of this process.

    Raises:
        ProcessFailed: the process was killed or did not end with 0.
    """
    with (
        log.open("a+") if log else tempfile.TemporaryFile("w+") as said,
        subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        ) as process,
    ):
        assert process.stdin is not None and process.stdout is not None
        begin = said.seek(0, os.SEEK_END)
        late = threading.Event()
        timer = threading.Timer(seconds, lambda: (late.set(), _kill(process)))
        timer.start()
        try:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(json.dumps(given))
                process.stdin.close()
            for line in process.stdout:
                if not line.endswith("\n"):
                    break  # killed while it wrote
                yield json.loads(line)
            code = process.wait()
        finally:
            timer.cancel()
            _kill(process)
            said.seek(begin)
            words = said.read().strip()
            if log is None and "Traceback" in words:
                print(words, file=sys.stderr)
        if late.is_set():
            raise ProcessFailed(f"killed after {seconds:.0f} s")
        if code != 0:
            last = (words.splitlines() or ["no message"])[-1]
            raise ProcessFailed(f"ended with {code}: {last}", code)


def _kill(process: subprocess.Popen[str]) -> None:
    """Kill a process and what it has started, which may hold its output open after its end."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def header(program: str, arguments: Sequence[str], device: str) -> dict[str, Any]:
    """Return what the JSON of a run starts with: the command, the code, the machine, versions."""
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
        "commit": commit(),
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


def commit() -> str | None:
    """Return the commit of this code; with changes, `-dirty.` and their hash; None without git."""
    try:
        head = _git("rev-parse", "HEAD").strip()
        # Only code: results and pages that are written in the course of a run change no run.
        changes = _git("status", "--porcelain", "--", ":/*.py") + _git("diff", "HEAD", ":/*.py")
    except (OSError, subprocess.SubprocessError):
        return None
    return head + (f"-dirty.{hashlib.sha1(changes.encode()).hexdigest()[:8]}" if changes else "")


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    return found.stdout


def resumed(path: Path, now: dict[str, Any]) -> dict[str, Any]:
    """Return the run in a file, to be completed, or `now`, a header, if there is no file.

    Raises:
        SystemExit: the run is of another program, code or machine.
    """
    if not path.exists():
        return now
    run = json.loads(path.read_text(encoding="utf-8"))
    old, new = (r | {"program": r["command"].split()[2]} for r in (run, now))
    for what in ("program", "commit", "machine", "versions"):
        if old.get(what) != new[what]:
            raise SystemExit(
                f"error: {path} has a run whose {what} is {old.get(what)}, now it is {new[what]}: "
                "give another --out"
            )
    run.setdefault("resumed", []).append(now["command"])
    return run


def find(
    report: dict[str, Any], record: dict[str, Any], key: Sequence[str]
) -> dict[str, Any] | None:
    """Return the record that a run has with the same key."""
    wanted = [record[name] for name in key]
    same = (r for r in report["records"] if [r[name] for name in key] == wanted)
    return next(same, None)


def is_done(record: dict[str, Any] | None, turn: int) -> bool:
    """Say whether a record has what a turn is to find; what has no time has it at once."""
    if record is None or record["status"] != "ok":
        return False
    rounds = record.get("rounds")
    return rounds is None or (turn < len(rounds) and rounds[turn] is not None)


def add(
    report: dict[str, Any], record: dict[str, Any], key: Sequence[str], turn: int | None = None
) -> dict[str, Any]:
    """Add a record, or a turn to the record with the same key; return what is there."""
    other = find(report, record, key)
    found = merged(other, record, turn)
    if other is None:
        report["records"].append(found)
    else:
        report["records"][next(i for i, r in enumerate(report["records"]) if r is other)] = found
    return found


def merged(
    record: dict[str, Any] | None, round: dict[str, Any], turn: int | None = None
) -> dict[str, Any]:
    """Add a turn to a record: medians of medians, the widest range, each turn's median.

    `rounds` has them by turn, None where there is none. Turn 0 makes a record anew; without a turn
    it is the next.
    """
    total = round.get("ms_total")
    if record is None or record["status"] != "ok" or total is None or turn == 0:
        return round | ({} if total is None else {"rounds": [*[None] * (turn or 0), total[1]]})
    found = record | {name: value for name, value in round.items() if value is not None}
    rounds = found["rounds"] = list(record.get("rounds", []))
    turn = len(rounds) if turn is None else turn
    rounds += [None] * (turn + 1 - len(rounds))
    rounds[turn] = total[1]
    for name, value in round.items():
        if not name.startswith("ms_") or value is None:
            continue
        (low, median, high), (low2, median2, high2) = record[name], value
        medians = [*record.get(f"{name}_medians", [median]), median2]
        found[f"{name}_medians"] = medians
        found[name] = [min(low, low2), statistics.median(medians), max(high, high2)]
    return found


def rotated(names: Sequence[str], turn: int) -> list[str]:
    """Return the names, each turn beginning with the next one: no one is always the first."""
    first = turn % len(names)
    return [*names[first:], *names[:first]]


def longest_that_fits(
    fits: Callable[[int], bool], first: int = 1024, most: int = 2**16, step: int = 64
) -> int:
    """Return the largest length that fits, to 1 in 16 or a step: by doubling, then by halving."""
    low, high = 0, first
    while fits(high):
        low, high = high, high * 2
        if high > most:
            return low
    while high - low > max(step, low // 16):
        middle = (low + high) // 2 // step * step
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def write(path: Path, report: dict[str, Any]) -> None:
    """Replace the file as a whole: an interrupted run leaves what it has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(report, indent=1) + "\n")
    part.replace(path)


RESULTS = Path(__file__).parent / "results"
MODES = ("quick", "cpu", "gpu", "emulate_memory")


def parser(
    program: str, text: str | None, helps: Sequence[str], noun: str, names: Sequence[str]
) -> argparse.ArgumentParser:
    """Return what both programs understand: a mode, with its help, and the options of a run."""

    def some(given: str) -> list[str]:
        for name in given.split(","):
            if name not in names:
                raise argparse.ArgumentTypeError(
                    f"no {noun} {name!r}; there are {', '.join(names)}"
                )
        return given.split(",")

    found = argparse.ArgumentParser(
        f"python -m {program}",
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    mode = found.add_mutually_exclusive_group(required=True)
    for name, words in zip(MODES[:3], helps, strict=True):
        mode.add_argument(f"--{name}", action="store_true", help=words)
    mode.add_argument("--emulate-memory", type=gib, metavar="24GiB", help="the longest that fits")
    found.add_argument("--only", type=some, help=f"some of {','.join(names)}")
    found.add_argument("--out", type=Path, help="JSON to write; one that exists is completed")
    found.add_argument("--rounds", type=int, help=f"how often every {noun} has its turn")
    return found


def parsed(
    parser: argparse.ArgumentParser, what: str, arguments: list[str] | None
) -> argparse.Namespace:
    """Return the options of a run, with its mode, its device and its file: by default the day's."""
    options = parser.parse_args(arguments)
    if (options.gpu or options.emulate_memory) and not torch.cuda.is_available():
        parser.error("no GPU here: use --quick or --cpu")
    options.mode = next(name for name in MODES if getattr(options, name))
    options.device = "cpu" if options.mode in ("quick", "cpu") else "cuda"
    options.arguments = sys.argv[1:] if arguments is None else arguments
    options.resume = options.out or not options.quick  # that one asks whether it works now
    options.given_out = options.out is not None
    options.out = options.out or RESULTS / f"{what}_{options.mode}_{date.today():%Y%m%d}.json"
    return options


def gib(text: str) -> float:
    """Read an argument such as 24GiB."""
    try:
        return float(text.removesuffix("GiB"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"wanted 24GiB for example, got {text!r}") from None
