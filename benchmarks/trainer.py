"""Compare trainers end to end on one device: generation, scoring, training, memory.

    python -m benchmarks.trainer --quick                    a miniature on a CPU: does it all work?
    python -m benchmarks.trainer --cpu                      the demo and a small model, 3 rounds
    python -m benchmarks.trainer --gpu                      the shapes of Qwen2.5-0.5B and 1.5B
    python -m benchmarks.trainer --gpu --only trl --out run.json    one trainer anew in a run
    python -m benchmarks.trainer --gpu --model Qwen2.5-0.5B         one model
    python -m benchmarks.trainer --emulate-memory 24GiB     the longest completion that fits

`fastgrpo.Trainer` and `trl.GRPOTrainer` as their users get them: the same random weights, prompts,
rewards, options and number of tokens, each cell in a process of its own, in turn. The first step
has given completions, and its gradient, as the optimizer gets it, must be that of plain PyTorch in
fp64, in size and direction: a trainer that is wrong is not timed. Nothing is downloaded. Memory is
the absolute peak, weights included; on a CPU an upper bound (see `trainer_recorder`).

No completion ends early: the tokenizer's end-of-sequence token has an id that the head has no row
for. So both trainers sample, look for the end and count as always, with nothing suppressed, which
would cost one of them time. In half of the cells half of the prompts have a constant reward: their
groups are degenerate, with advantages of exactly 0.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from . import runs, trainers
from .runs import longest_that_fits
from .trainer_cells import TrainerCell, cpu_cells, gpu_cells, memory_cell, quick_cells
from .trainer_worker import OUT_OF_MEMORY, record_of

KEY = (
    "peer", "method", "op", "model", "prompts", "num_generations", "rho", "dtype", "gib",
)  # fmt: skip
PHASES = ("generation", "scoring", "training", "total")
LIMIT_SECONDS = {"quick": 300.0, "cpu": 1800.0, "gpu": 3600.0, "emulate_memory": 3600.0}

SAMPLED_MOST = 8192
"""The longest completions that are also sampled before they count as fitting: at 30 ms a token they
take four minutes, the longest that are tried half an hour."""


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    options = _parse(arguments)
    report = runs.header("benchmarks.trainer", options.arguments, options.device)
    if options.resume:
        report = runs.resumed(options.out, report)
    key = KEY if options.emulate_memory else (*KEY, "completion_length")
    for turn in range(options.rounds):
        for cell in options.cells:
            for name in runs.rotated(options.only or trainers.NAMES, turn):
                wanted = record_of(name, cell, options.device, {"gib": options.emulate_memory})
                anew = turn == 0 and options.only
                if not anew and runs.is_done(runs.find(report, wanted, key), turn):
                    continue
                if options.emulate_memory:
                    record = longest_completion(name, options.emulate_memory, options.limit)
                    runs.add(report, record, key, turn)
                else:
                    record = measured(name, cell, options.device, options.limit)
                    add_speeds(runs.add(report, record, key, turn))
                _show(record)
                runs.write(options.out, report)
    print(f"wrote {options.out}")
    return report


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    helps = (
        "a miniature on a CPU",
        "the demo and a small model on a CPU",
        "Qwen2.5-0.5B and 1.5B on a GPU",
    )
    parser = runs.parser("benchmarks.trainer", __doc__, helps, "trainer", trainers.NAMES)
    parser.add_argument("--model", help="only cells of this model")
    options = runs.parsed(parser, "trainer", arguments)
    cells = {
        "quick": quick_cells, "cpu": cpu_cells, "gpu": gpu_cells,
        "emulate_memory": lambda: [memory_cell(0)],
    }[options.mode]()  # fmt: skip
    options.cells = [cell for cell in cells if options.model in (None, cell.model)]
    if not options.cells:
        have = ", ".join(dict.fromkeys(cell.model for cell in cells))
        parser.error(f"--model {options.model}: no such cell; there are {have}")
    if options.only and not options.given_out:
        parser.error("--only measures a part of a run: say of which with --out")
    options.rounds = 1 if options.emulate_memory else options.rounds or (3 if options.cpu else 1)
    options.limit = LIMIT_SECONDS[options.mode]
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

    It is looked for with given completions, which take no time to sample. Then a step that samples
    must fit as well, or they are shortened until one does; but only up to `SAMPLED_MOST` tokens.
    Beyond, the record says `sampled: false`: the training fits, and whether the cache of keys and
    values does while sampling was not tried.
    """
    given_steps: dict[int, dict[str, Any]] = {}

    def step(length: int, *arguments: str) -> dict[str, Any]:
        given = ("--gib", str(gib), *arguments)
        record = measured(name, memory_cell(length), "cuda", limit, given)
        if record["status"] not in ("ok", OUT_OF_MEMORY):
            raise _NoAnswer(record)
        return record

    def fits(length: int) -> bool:
        given_steps[length] = step(length)
        return given_steps[length]["status"] == "ok"

    answer = {"gib": gib, "longest_completion": 0}
    try:
        longest = longest_that_fits(fits)
        while longest:
            sampled = longest <= SAMPLED_MOST
            record = step(longest, "--sampled") if sampled else given_steps[longest]
            if record["status"] == "ok":
                return record | answer | {"longest_completion": longest, "sampled": sampled}
            longest = longest * 3 // 4
    except _NoAnswer as failed:
        return failed.args[0] | {"gib": gib}
    return record_of(name, memory_cell(0), "cuda", {"status": "ok", **answer})


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
        found += ", not sampled" if record["sampled"] is False else ""
    elif record["ms_total"] is not None:
        parts = [f"{phase} {record[f'ms_{phase}'][1]:.1f}" for phase in PHASES]
        found = f"ms: {', '.join(parts)}; {record['peak_extra_bytes'] / 2**20:.1f} MiB"
    print(f"{record['peer']:10}{cell:52}{found}", flush=True)


if __name__ == "__main__":
    main()
