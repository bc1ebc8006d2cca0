"""Times: of methods, of the bare products and of a copy, on a CPU and by a GPU's own events.

N tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch

from .cells import Cell
from .measure import Trial


def time_call(
    trial: Trial, *, seconds: float, most: int = 30, warm_up: int = 2
) -> dict[str, list[float]]:
    """Time forward, backward and both, three times at least, after some calls of warm-up.

    Returns:
        `[min, median, max]` in milliseconds of each.
    """
    stopwatch = _GpuStopwatch() if trial.inputs.hidden.is_cuda else _CpuStopwatch()
    forward, backward, total = [], [], []
    begin = time.perf_counter()
    for repeat in range(most + warm_up):
        trial.refresh()
        stopwatch.get_ahead()
        marks = [stopwatch.mark()]
        loss = trial.forward()
        marks.append(stopwatch.mark())
        trial.backward(loss)
        del loss
        marks.append(stopwatch.mark())
        stopwatch.wait()
        if repeat < warm_up:
            continue
        forward.append(stopwatch.between(marks[0], marks[1]))
        backward.append(stopwatch.between(marks[1], marks[2]))
        total.append(stopwatch.between(marks[0], marks[2]))
        if len(total) >= 3 and time.perf_counter() - begin > seconds:
            break
    trial.refresh()
    return {
        "ms_forward": summary(forward),
        "ms_backward": summary(backward),
        "ms_total": summary(total),
    }


def ceilings(cell: Cell, device: str) -> dict[str, Any]:
    """Time the bare products of a cell, and a copy on the device: what no method can beat.

    Results are written to memory that is there. Where all logits take more than 4 GiB, the products
    are of an equal part of the rows, as many times.
    """
    dtype = getattr(torch, cell.dtype)
    parts = 1
    while cell.N // parts * cell.V * dtype.itemsize > 2**32:
        parts *= 2
    options: dict[str, Any] = {"device": device, "dtype": dtype}
    hidden, weight = (torch.randn(n, cell.H, **options) for n in (cell.N // parts, cell.V))
    logits = torch.randn(cell.N // parts, cell.V, **options)
    dhidden, dweight = torch.empty_like(hidden), torch.empty_like(weight)
    products = {
        "logits": lambda: torch.mm(hidden, weight.t(), out=logits),
        "dhidden": lambda: torch.mm(logits, weight, out=dhidden),
        "dweight": lambda: torch.mm(logits.t(), hidden, out=dweight),
    }
    # The other two before the logits, which are no longer random then.
    times = {name: _median_ms(products[name], device) * parts for name in reversed(products)}
    source = torch.empty(2**31 if device == "cuda" else 2**28, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    copy_ms = _median_ms(lambda: target.copy_(source), device)
    return {
        "N": cell.N, "H": cell.H, "V": cell.V, "dtype": cell.dtype, "ms_products": times,
        "copy_bytes_per_second": 2 * source.numel() / (copy_ms / 1e3),
        "clocks": gpu_clocks() if device == "cuda" else None,
    }  # fmt: skip


def gpu_clocks() -> dict[str, str] | None:
    """Return what the driver says of the GPU's clocks, right after it was busy."""
    names = "clocks.sm,clocks.mem,clocks.max.sm,power.draw,temperature.gpu"
    command = ["nvidia-smi", f"--query-gpu={names}", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    values = found.stdout.splitlines()[0].split(",")
    return dict(zip(names.split(","), map(str.strip, values), strict=True))


def summary(values: list[float]) -> list[float]:
    return [round(x, 4) for x in (min(values), statistics.median(values), max(values))]


class _CpuStopwatch:
    def get_ahead(self) -> None:
        pass

    def mark(self) -> float:
        return time.perf_counter()

    def wait(self) -> None:
        pass

    def between(self, start: float, end: float) -> float:
        return (end - start) * 1e3


class _GpuStopwatch:
    def get_ahead(self) -> None:
        """Keep the GPU busy for some milliseconds, while its work is prepared."""
        torch.cuda._sleep(10_000_000)

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait(self) -> None:
        torch.cuda.synchronize()

    def between(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return start.elapsed_time(end)


def _median_ms(function: Callable[[], object], device: str) -> float:
    stopwatch = _GpuStopwatch() if device == "cuda" else _CpuStopwatch()
    times = []
    for repeat in range(7):
        stopwatch.get_ahead()
        start = stopwatch.mark()
        function()
        end = stopwatch.mark()
        stopwatch.wait()
        if repeat >= 2:
            times.append(stopwatch.between(start, end))
    return statistics.median(times)
