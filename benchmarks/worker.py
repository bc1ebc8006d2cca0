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
from typing import Any

import torch

from . import measure, peers
from .cells import Cell, make_inputs


def records_of(
    name: str, cells: list[Cell], device: str, seconds: float
) -> Iterator[dict[str, Any]]:
    """Measure every method of a peer on every cell it can compute."""
    adapter = peers.load(name)
    reason = adapter.unavailable(device)
    for cell in cells:
        methods = [method for method in adapter.METHODS if cell.op in method.ops]
        for method in methods:
            record = {"peer": name, "method": method.name, **cell.facts()}
            if reason is not None:
                yield record | {"status": reason}
                continue
            try:
                yield record | measured(method, cell, device, seconds)
            except Exception as error:
                # A peer may fail in any way; the run goes on and the table says how it failed.
                traceback.print_exc()
                text = (str(error).splitlines() or [""])[0][:200]
                yield record | {"status": f"failed: {type(error).__name__}: {text}"}
            gc.collect()
            if device == "cuda":
                torch.cuda.empty_cache()


def measured(method: peers.Method, cell: Cell, device: str, seconds: float) -> dict[str, Any]:
    """Check a method on a cell, then time it."""
    inputs = make_inputs(cell, device)
    exact_of = measure.exact_logps if cell.op == "logps" else measure.exact_result
    exact = exact_of(cell, inputs, torch.float64)
    naive_error = measure.errors(exact_of(cell, inputs, getattr(torch, cell.dtype)), exact)
    trial = measure.Trial(cell, inputs, method)
    error = measure.errors(trial.result(), exact)
    del exact
    facts = {"error_vs_fp64": error, "naive_error_vs_fp64": naive_error}
    if measure.is_wrong(error, naive_error):
        return {"status": "wrong", **facts}
    if method.products is not None:
        flops, counted = method.products(cell) * 2 * cell.N * cell.H * cell.V, False
    else:
        flops, counted = measure.count_flops(trial), True
    return {
        "status": "ok",
        **facts,
        "flops": flops,
        "flops_counted": counted,
        "peak_extra_bytes": measure.peak_extra_bytes(trial),
        **measure.time_call(trial, seconds=seconds),
    }


def largest_that_fits(name: str, cell: Cell, gib: float) -> Iterator[dict[str, Any]]:
    """Find the largest N of each method within a share of the GPU's memory, by doubling."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(gib * 2**30 / total)
    adapter = peers.load(name)
    reason = adapter.unavailable("cuda")
    for method in adapter.METHODS:
        if "linear" not in method.ops:
            continue
        record = {"peer": name, "method": method.name, **cell.facts(), "gib": gib}
        if reason is not None:
            yield record | {"status": reason}
            continue
        fits, step = 0, 2048
        while step >= 512:
            trial = Cell("linear", fits + step, cell.H, cell.V, cell.rho, cell.frozen, cell.dtype)
            if _fits(method, trial):
                fits, step = fits + step, step * 2
            else:
                step //= 4
            if fits >= 2**20:
                break
        yield record | {"N": fits, "status": "ok"}


def _fits(method: peers.Method, cell: Cell) -> bool:
    try:
        method.call(make_inputs(cell, "cuda")).backward()
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        gc.collect()
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("peer")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--gib", type=float, help="find the largest N within so much memory")
    options = parser.parse_args()
    cells = [Cell(**facts) for facts in json.load(sys.stdin)]
    out = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # peers print
        torch.manual_seed(0)
        if options.peer == "ceilings":
            found = (measure.ceilings(cell, options.device) for cell in cells)
        elif options.gib is not None:
            found = largest_that_fits(options.peer, cells[0], options.gib)
        else:
            found = records_of(options.peer, cells, options.device, options.seconds)
        for record in found:
            print(json.dumps(record), file=out, flush=True)


if __name__ == "__main__":
    main()
