"""Compare trainers end to end on one device: generation, scoring, training, memory.

    python -m benchmarks.trainer --quick                    a miniature on a CPU: does it all work?
    python -m benchmarks.trainer --cpu                      the demo and a small model, 3 rounds
    python -m benchmarks.trainer --gpu                      the shapes of Qwen2.5-0.5B and 1.5B
    python -m benchmarks.trainer --gpu --only trl --out run.json    one trainer, added to a run
    python -m benchmarks.trainer --emulate-memory 24GiB     the longest completion that fits

`fastgrpo.Trainer` and `trl.GRPOTrainer` as their users get them: the same random weights, prompts,
rewards, options and number of tokens, each cell in a process of its own, in turn. The first step
has given completions, and its gradient must be that of plain PyTorch in fp64: a trainer that is
wrong is not timed. Nothing is downloaded.

No completion ends early: the tokenizer's end-of-sequence token has an id that the head has no row
for. So both trainers sample, look for the end and count as always, with nothing suppressed, which
would cost one of them time. In half of the cells half of the prompts have a constant reward: their
groups are degenerate, with advantages of exactly 0.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import torch

from . import runs, trainers
from .trainer_cells import TrainerCell, cpu_cells, gpu_cells, memory_cell, quick_cells
from .trainer_worker import record_of

RESULTS = Path(__file__).parent / "results"
KEY = (
    "peer", "method", "op", "model", "prompts", "num_generations", "rho", "dtype", "gib",
)  # fmt: skip
PHASES = ("generation", "scoring", "training", "total")
LIMIT_SECONDS = {"quick": 300.0, "cpu": 1800.0, "gpu": 3600.0, "emulate_memory": 3600.0}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    options = _parse(arguments)
    report = runs.header("benchmarks.trainer", options.arguments, options.device)
    if options.out.exists():
        report |= json.loads(options.out.read_text())
    for _ in range(options.rounds):
        for cell in options.cells:
            for name in options.only or trainers.NAMES:
                if options.emulate_memory:
                    record = longest_completion(name, options.emulate_memory, options.limit)
                    found = runs.add(report, record, KEY)
                else:
                    record = measured(name, cell, options.device, options.limit)
                    found = runs.add(report, record, (*KEY, "completion_length"))
                    add_speeds(found)
                _show(record)
                runs.write(options.out, report)
    print(f"wrote {options.out}")
    return report


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.trainer",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--quick", action="store_true", help="a miniature on a CPU")
    mode.add_argument("--cpu", action="store_true", help="the demo and a small model on a CPU")
    mode.add_argument("--gpu", action="store_true", help="Qwen2.5-0.5B and 1.5B on a GPU")
    mode.add_argument(
        "--emulate-memory", type=runs.gib, metavar="24GiB", help="the longest that fits"
    )
    parser.add_argument("--only", type=_names, help=f"some of {','.join(trainers.NAMES)}")
    parser.add_argument("--out", type=Path, help="JSON to write; one that exists is added to")
    parser.add_argument("--rounds", type=int, help="how often every trainer has its turn")
    options = parser.parse_args(arguments)
    if (options.gpu or options.emulate_memory) and not torch.cuda.is_available():
        parser.error("no GPU here: use --quick or --cpu")
    kind = next(k for k in ("quick", "cpu", "gpu", "emulate_memory") if getattr(options, k))
    options.device = "cpu" if kind in ("quick", "cpu") else "cuda"
    options.cells = {
        "quick": quick_cells, "cpu": cpu_cells, "gpu": gpu_cells,
        "emulate_memory": lambda: [memory_cell(0)],
    }[kind]()  # fmt: skip
    options.out = options.out or RESULTS / f"trainer_{kind}_{date.today():%Y%m%d}.json"
    options.rounds = options.rounds or (3 if kind in ("cpu", "gpu") else 1)
    options.arguments = sys.argv[1:] if arguments is None else arguments
    options.limit = LIMIT_SECONDS[kind]
    return options


def measured(
    name: str, cell: TrainerCell, device: str, limit: float, arguments: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Return the record of a trainer on a cell, from a process of its own."""
    try:
        (record,) = runs.records(
            "benchmarks.trainer_worker",
            [name, "--device", device, *arguments],
            asdict(cell),
            seconds=limit,
            # Nothing is downloaded; and our trainer takes a GPU where there is one.
            environment={"HF_HUB_OFFLINE": "1"}
            | ({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}),
        )
    except runs.ProcessFailed as error:
        return record_of(name, cell, device, {"status": f"failed: {error}"})
    return record


class _NoAnswer(Exception):
    """A step failed for another reason than memory; its record says why."""


def longest_completion(name: str, gib: float, limit: float) -> dict[str, Any]:
    """Return the longest completions of one group with which a step fits in so much memory.

    It is looked for with given completions, which take no time to sample; then a step that samples
    must fit as well, or they are shortened until one does.
    """

    def step(length: int, *arguments: str) -> dict[str, Any]:
        given = ("--gib", str(gib), *arguments)
        record = measured(name, memory_cell(length), "cuda", limit, given)
        if record["status"] not in ("ok", "out of memory"):
            raise _NoAnswer(record)
        return record

    answer = {"gib": gib, "longest_completion": 0}
    try:
        longest = longest_that_fits(lambda length: step(length)["status"] == "ok")
        while longest:
            record = step(longest, "--sampled")
            if record["status"] == "ok":
                return record | answer | {"longest_completion": longest}
            longest = longest * 3 // 4
    except _NoAnswer as failed:
        return failed.args[0] | {"gib": gib}
    return record_of(name, memory_cell(0), "cuda", {"status": "ok", **answer})


def longest_that_fits(fits: Callable[[int], bool], first: int = 1024, most: int = 2**16) -> int:
    """Return the largest length that fits, at least to 1 in 16: by doubling, then by halving."""
    low, high = 0, first
    while fits(high):
        low, high = high, high * 2
        if high > most:
            return low
    while high - low > max(64, low // 16):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def add_speeds(record: dict[str, Any]) -> None:
    """Add completion tokens a second, of each phase and of the whole step."""
    if record["ms_total"] is not None:
        record["tokens_per_second"] = {
            phase: round(1e3 * record["N"] / record[f"ms_{phase}"][1], 1) for phase in PHASES
        }


def _show(record: dict[str, Any]) -> None:
    cell = f"{record['model']} {record['prompts']}x{record['num_generations']} completions of "
    cell += f"{record['completion_length']} rho={record['rho']}"
    found = record["status"]
    if record["longest_completion"] is not None:
        found = f"longest completion in {record['gib']} GiB"
    elif record["ms_total"] is not None:
        parts = [f"{phase} {record[f'ms_{phase}'][1]:.1f}" for phase in PHASES]
        found = f"ms: {', '.join(parts)}; {record['peak_extra_bytes'] / 2**20:.1f} MiB"
    print(f"{record['peer']:10}{cell:52}{found}", flush=True)


def _names(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in trainers.NAMES:
            known = ", ".join(trainers.NAMES)
            raise argparse.ArgumentTypeError(f"no trainer {name!r}; there are {known}")
    return names


if __name__ == "__main__":
    main()
