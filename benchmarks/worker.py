"""Measures one peer in a process of its own, so that memory peaks are that peer's; prints JSON.

`python -m benchmarks.worker` is called by `benchmarks.loss`, not by people.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from . import measure, peers, runs, timing
from .cells import Cell, make_inputs

STICKY = 3
"""How the process ends then."""


class Sticky(RuntimeError):
    """The GPU is in an error that only a new process is rid of."""


def records_of(
    name: str,
    cells: list[Cell],
    device: str,
    seconds: float,
    wanted: list[list[str]] | None = None,
) -> Iterator[dict[str, Any]]:
    """Check and measure the methods of a peer on every cell; `wanted`: only those, by cell."""
    adapter = peers.load(name)
    reason = adapter.unavailable(device)
    for cell, methods in zip(cells, _methods(adapter.METHODS, cells, wanted), strict=True):
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
            assert question is not None
            yield from _attempt(
                name, method, cell, lambda method, q=question: measured(method, q, seconds)
            )
            empty_caches(device)
        del question
        empty_caches(device)


def times_of(
    name: str, cells: list[Cell], wanted: list[list[str]], device: str, seconds: float
) -> Iterator[dict[str, Any]]:
    """Time once more, of each cell, the methods that an earlier round found to be right."""
    for cell, methods in zip(cells, _methods(peers.load(name).METHODS, cells, wanted), strict=True):

        def timed(method: peers.Method, cell: Cell = cell) -> dict[str, Any]:
            trial = measure.Trial(cell, make_inputs(cell, device), method)
            return {"status": "ok", **timing.time_call(trial, seconds=seconds)}

        for method in methods:
            yield from _attempt(name, method, cell, timed)
            empty_caches(device)


def _methods(
    have: list[peers.Method], cells: list[Cell], wanted: list[list[str]] | None
) -> Iterator[list[peers.Method]]:
    for i, cell in enumerate(cells):
        yield [m for m in have if cell.op in m.ops and (wanted is None or m.name in wanted[i])]


def _attempt(
    name: str,
    method: peers.Method,
    cell: Cell,
    measure_it: Callable[[peers.Method], dict[str, Any]],
    **facts: Any,
) -> Iterator[dict[str, Any]]:
    """Yield the record of a method, which may fail in any way: the run goes on, and it says how."""
    sticky = False
    try:
        found = measure_it(method)
    except Exception as error:
        traceback.print_exc()
        found = {"status": peers.failure(error)}
        # Older versions of PyTorch have no type for it.
        of_gpu = isinstance(error, getattr(torch, "AcceleratorError", ()))
        sticky = of_gpu or "CUDA error" in str(error)
    yield record_of(name, method.name, cell, facts | found)
    if sticky:
        raise Sticky(found["status"])


def record_of(name: str, method: str, cell: Cell, found: dict[str, Any]) -> dict[str, Any]:
    """Return a record: what identifies it, what was found, None for what was not."""
    return {
        "peer": name,
        "method": method,
        **cell.facts(),
        **dict.fromkeys(
            ("error_vs_fp64", "ms_forward", "ms_backward", "ms_total", "ratio_to_ceiling",
             "peak_extra_bytes", "flops", "chunk_rows", "gib")
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
    counts = method.products is None  # nothing that is compiled may run below the counter
    with measure.FlopCounter() if counts else contextlib.nullcontext() as counter:
        error = measure.errors(trial.result(), question.exact)
    facts = {"error_vs_fp64": error, "naive_error_vs_fp64": question.naive_error}
    if measure.is_wrong(error, question.naive_error, method.tolerance, getattr(torch, cell.dtype)):
        return {"status": "wrong", **facts}
    if counter is None:
        assert method.products is not None
        flops = method.products(cell) * 2 * cell.N * cell.H * cell.V
    else:
        flops = counter.get_total_flops()
    chunk_rows = method.chunk_rows and method.chunk_rows(cell, question.device)
    return {
        "status": "ok",
        **facts,
        "flops": flops,
        "flops_counted": counts,
        "chunk_rows": chunk_rows,
        "peak_extra_bytes": measure.peak_extra_bytes(trial),
        **timing.time_call(trial, seconds=seconds, warm_up=1),  # it has run twice by now
    }


MOST_TOKENS = 2**20


def largest_that_fits(
    name: str, cell: Cell, gib: float, wanted: list[str] | None = None
) -> Iterator[dict[str, Any]]:
    """Find the largest N of each method within a share of the GPU's memory, to 1 in 16."""
    adapter = peers.load(name)
    reason = adapter.unavailable("cuda")
    (methods,) = _methods(adapter.METHODS, [cell], None if wanted is None else [wanted])
    for method in methods:
        if reason is not None:
            yield record_of(name, method.name, cell, {"gib": gib, "status": reason})
        else:
            yield from _attempt(
                name, method, cell, lambda method: {"status": "ok", **_largest(method, cell)},
                gib=gib,
            )  # fmt: skip


def _largest(method: peers.Method, cell: Cell) -> dict[str, Any]:
    """Return the N that fits; `inputs_limit`: a little more is too much for the inputs alone."""
    tried: dict[int, bool | None] = {}

    def fits(N: int) -> bool:
        tried[N] = _fits(method, replace(cell, N=N))
        return tried[N] is True

    found: dict[str, Any] = {"N": runs.longest_that_fits(fits, 1024, MOST_TOKENS, step=1024)}
    least = min((N for N, fit in tried.items() if not fit), default=None)
    if least is None:
        found["most_tokens"] = MOST_TOKENS
    elif tried[least] is None:
        found["inputs_limit"] = True
    return found


def _fits(method: peers.Method, cell: Cell) -> bool | None:
    """Say whether two steps fit, the second beside the first one's gradients.

    None: not even the inputs do.
    """
    trial = None
    try:
        trial = measure.Trial(cell, make_inputs(cell, "cuda"), method)
        for _ in range(2):
            trial.refresh()
            trial.backward(trial.forward())
        return True
    except torch.OutOfMemoryError:
        return None if trial is None else False
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
    # Peers print, their C code and their child processes too: all of it goes to standard error.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    given = json.load(sys.stdin)
    cells = [Cell(**facts) for facts in given["cells"]]
    torch.manual_seed(0)
    if options.peer == "ceilings":
        found = (timing.ceilings(cell, options.device) for cell in cells)
    elif options.gib is not None:
        measure.emulate_memory(options.gib)
        found = (
            record
            for cell, methods in zip(cells, given["methods"], strict=True)
            for record in largest_that_fits(options.peer, cell, options.gib, methods)
        )
    else:
        of = records_of if given["check"] else times_of
        arguments = {"wanted": given["methods"], "device": options.device}
        found = of(options.peer, cells, seconds=options.seconds, **arguments)
    try:
        for record in found:
            print(json.dumps(record), file=out, flush=True)
    except Sticky:
        sys.stdout.flush()
        os._exit(STICKY)  # an orderly end would touch the GPU, and abort


if __name__ == "__main__":
    main()
