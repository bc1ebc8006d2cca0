"""The benchmark in miniature, on a CPU: exactness, FLOPs and bytes are asserted, times printed.

`python -m pytest benchmarks --benchmark-enable` prints the times.
"""

from __future__ import annotations

from typing import Any

import pytest

from . import measure, peers, worker
from .cells import Cell, make_inputs, quick_cells

CELLS = quick_cells()
# Products of 2NHV: forward, backward of hidden states, backward of the head.
RUNNING = [(name, method) for name in ("fastgrpo", "naive") for method in peers.load(name).METHODS]


def name_of(value: Any) -> str:
    if isinstance(value, Cell):
        head = "-frozen" if value.frozen else ""
        return f"{value.op}-{value.dtype}-rho{value.rho}{head}"
    return f"{value[0]}-{value[1].name}"


@pytest.mark.parametrize(
    ("peer", "cell"),
    [(peer, cell) for peer in RUNNING for cell in CELLS if cell.op in peer[1].ops],
    ids=name_of,
)
def test_exactness_flops_and_bytes(peer: tuple[str, peers.Method], cell: Cell) -> None:
    name, method = peer
    record = worker.measured(method, cell, "cpu", seconds=0.0)
    assert record["status"] == "ok", record
    product = 2 * cell.N * cell.H * cell.V
    # Rows that cannot contribute get no gradient products, and naive PyTorch does not know them.
    share = cell.rho if name == "fastgrpo" else 1.0
    gradients = cell.products - 1
    products = 0 if cell.op == "logits" else 1 + share * gradients
    if method.name == "recompute":
        products += share
    assert record["flops"] == pytest.approx(products * product)
    logits = cell.N * cell.V * (4 if cell.dtype == "float32" else 2)
    if name == "naive" and cell.op == "linear":
        assert record["peak_extra_bytes"] > logits
    for part in ("ms_forward", "ms_backward", "ms_total"):
        low, median, high = record[part]
        assert 0 <= low <= median <= high


def test_a_wrong_result_is_not_timed() -> None:
    cell = CELLS[0]
    wrong = peers.Method(
        "wrong", ("linear",), lambda inputs: inputs.hidden.sum() + inputs.weight.sum()
    )
    record = worker.measured(wrong, cell, "cpu", seconds=0.0)
    assert record["status"] == "wrong" and "ms_total" not in record


def test_a_round_is_added_to_a_record() -> None:
    first = measure.merged(None, {"status": "ok", **times(2.0)})
    both = measure.merged(first, {"status": "ok", **times(4.0)})
    assert both["ms_total"] == [1.0, 3.0, 8.0] and both["rounds"] == [2.0, 4.0]
    assert measure.merged(both, {"status": "failed: x"}) == {"status": "failed: x"}


def times(median: float) -> dict[str, list[float]]:
    values = [median / 2, median, median * 2]
    return {"ms_forward": values, "ms_backward": values, "ms_total": values}


@pytest.mark.parametrize("method", RUNNING, ids=name_of)
def test_time(benchmark: Any, method: tuple[str, peers.Method]) -> None:
    cell = next(cell for cell in CELLS if cell.op in method[1].ops)
    benchmark.group = name_of(cell)
    trial = measure.Trial(cell, make_inputs(cell, "cpu"), method[1])

    def step() -> None:
        trial.refresh()
        trial.backward(trial.forward())

    benchmark(step)
