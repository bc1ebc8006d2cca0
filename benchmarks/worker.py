"""Measures one peer in a process of its own, so that memory peaks are that peer's; prints JSON.

`python -m benchmarks.worker` is called by `benchmarks.loss`, not by people.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import sys
import traceback
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from . import measure, peers
from .cells import Cell, make_inputs


def records_of(
    name: str, cells: list[Cell], device: str, seconds: float
) -> Iterator[dict[str, Any]]:
    """Check and measure every method of a peer on every cell it can compute."""
    adapter = peers.load(name)
    reason = adapter.unavailable(device)
    for cell in cells:
        methods = [method for method in adapter.METHODS if cell.op in method.ops]
        if reason is not None:
            yield from (
                record_of(name, method.name, cell, {"status": reason}) for method in methods
            )
            continue
        try:
            question = Question(cell, device) if methods else None
        except torch.OutOfMemoryError:
            found = {"status": "failed: no memory for the exact result"}
            yield from (record_of(name, method.name, cell, found) for method in methods)
            continue
        for method in methods:
            try:
                assert question is not None
                found = measured(method, question, seconds)
            except Exception as error:
                # A peer may fail in any way; the run goes on and the table says how it failed.
                traceback.print_exc()
                found = {"status": peers.failure(error)}
            yield record_of(name, method.name, cell, found)
            empty_caches(device)
        del question
        empty_caches(device)


def times_of(
    name: str, cells: list[Cell], methods: list[list[str]], device: str, seconds: float
) -> Iterator[dict[str, Any]]:
    """Time once more, of each cell, the methods that an earlier round found to be right."""
    for cell, right in zip(cells, methods, strict=True):
        inputs = make_inputs(cell, device)
        for method in peers.load(name).METHODS:
            if cell.op in method.ops and method.name in right:
                trial = measure.Trial(cell, inputs, method)
                times = measure.time_call(trial, seconds=seconds)
                yield record_of(name, method.name, cell, {"status": "ok", **times})
                empty_caches(device)


def record_of(name: str, method: str, cell: Cell, found: dict[str, Any]) -> dict[str, Any]:
    """Return a record: what identifies it, what was found, None for what was not."""
    return {
        "peer": name,
        "method": method,
        **cell.facts(),
        **dict.fromkeys(
            ("error_vs_fp64", "ms_forward", "ms_backward", "ms_total", "ratio_to_ceiling",
             "peak_extra_bytes", "flops", "chunk_rows")
        ),
        **found,
    }  # fmt: skip


class Question:
    """The inputs of a cell, the exact answer, and the error of naive PyTorch in the same type."""

    def __init__(self, cell: Cell, device: str) -> None:
        self.cell, self.device = cell, device
        self.inputs = make_inputs(cell, device)
        exact_of = measure.exact_logps if cell.op == "logps" else measure.exact_result
        self.exact = exact_of(cell, self.inputs, torch.float64)
        naive = exact_of(cell, self.inputs, getattr(torch, cell.dtype))
        self.naive_error = measure.errors(naive, self.exact)


def measured(method: peers.Method, question: Question, seconds: float) -> dict[str, Any]:
    """Check a method on a cell, then time it."""
    cell = question.cell
    trial = measure.Trial(cell, question.inputs, method)
    error = measure.errors(trial.result(), question.exact)
    facts = {"error_vs_fp64": error, "naive_error_vs_fp64": question.naive_error}
    if measure.is_wrong(error, question.naive_error, method.tolerance):
        return {"status": "wrong", **facts}
    if method.products is not None:
        flops, counted = method.products(cell) * 2 * cell.N * cell.H * cell.V, False
    else:
        flops, counted = measure.count_flops(trial), True
    chunk_rows = method.chunk_rows and method.chunk_rows(cell, question.device)
    return {
        "status": "ok",
        **facts,
        "flops": flops,
        "flops_counted": counted,
        "chunk_rows": chunk_rows,
        "peak_extra_bytes": measure.peak_extra_bytes(trial),
        **measure.time_call(trial, seconds=seconds),
    }


MOST_TOKENS = 2**20


def largest_that_fits(name: str, cell: Cell, gib: float) -> Iterator[dict[str, Any]]:
    """Find the largest N of each method within a share of the GPU's memory, by doubling."""
    adapter = peers.load(name)
    reason = adapter.unavailable("cuda")
    for method in adapter.METHODS:
        if "linear" not in method.ops:
            continue
        found = {"gib": gib, "status": reason or "ok"}
        try:
            if reason is None:
                found |= {"N": _largest(method, cell), "most_tokens": MOST_TOKENS}
        except Exception as error:
            traceback.print_exc()
            found["status"] = peers.failure(error)
        yield record_of(name, method.name, cell, found)


def _largest(method: peers.Method, cell: Cell) -> int:
    fits, step = 0, 4096
    while step >= 1024 and fits < MOST_TOKENS:
        if _fits(method, replace(cell, N=min(fits + step, MOST_TOKENS))):
            fits, step = min(fits + step, MOST_TOKENS), step * 2
        else:
            step //= 4
    return fits


def _fits(method: peers.Method, cell: Cell) -> bool:
    """Say whether two steps fit: the second finds the first one's gradients replaced."""
    try:
        trial = measure.Trial(cell, make_inputs(cell, "cuda"), method)
        for _ in range(2):
            trial.refresh()
            trial.backward(trial.forward())
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        trial = None
        empty_caches("cuda")


def empty_caches(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("peer")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--gib", type=float, help="find the largest N within so much memory")
    options = parser.parse_args()
    given = json.load(sys.stdin)
    cells = [Cell(**facts) for facts in given["cells"]]
    out = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # peers print
        torch.manual_seed(0)
        if options.peer == "ceilings":
            found = (measure.ceilings(cell, options.device) for cell in cells)
        elif options.gib is not None:
            measure.emulate_memory(options.gib)
            found = (
                record
                for cell in cells
                for record in largest_that_fits(options.peer, cell, options.gib)
            )
        elif "methods" in given:
            found = times_of(options.peer, cells, given["methods"], options.device, options.seconds)
        else:
            found = records_of(options.peer, cells, options.device, options.seconds)
        for record in found:
            print(json.dumps(record), file=out, flush=True)


if __name__ == "__main__":
    main()
