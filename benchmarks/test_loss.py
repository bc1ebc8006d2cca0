"""The benchmark in miniature, on a CPU: exactness, FLOPs and bytes are asserted, times printed.

`python -m pytest benchmarks --benchmark-enable` prints the times.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from . import facts, loss, measure, peers, runs, worker
from .cells import Cell, every_cell, make_inputs, quick_cells
from .expected import surprises

CELLS = every_cell()
FACTS = {
    "peer", "method", "op", "N", "H", "V", "rho", "frozen", "dtype", "status", "error_vs_fp64",
    "ms_forward", "ms_backward", "ms_total", "ratio_to_ceiling", "peak_extra_bytes", "flops",
}  # fmt: skip
RUNNING = [(name, method) for name in ("fastgrpo", "naive") for method in peers.load(name).METHODS]


@pytest.fixture(autouse=True)
def same_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever edits the code while its tests run must not disturb them."""
    monkeypatch.setattr(runs, "commit", lambda: "abc")


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
    question = worker.Question(cell, "cpu")
    record = worker.record_of(
        name, method.name, cell, worker.measured(method, question, seconds=0.0)
    )
    assert surprises(record) == []
    for part in ("ms_forward", "ms_backward", "ms_total"):
        low, median, high = record[part]
        assert 0 <= low <= median <= high


@pytest.mark.parametrize(
    "change",
    [
        {"status": "wrong"},
        {"flops": 1},
        {"peak_extra_bytes": 1},
        {"peak_extra_bytes": 10**9},
    ],
    ids=str,
)
def test_a_surprise_is_named(change: dict[str, Any]) -> None:
    cell = CELLS[0]
    method = peers.load("fastgrpo").METHODS[0]
    found = worker.measured(method, worker.Question(cell, "cpu"), seconds=0.0)
    record = worker.record_of("fastgrpo", method.name, cell, found | change)
    (words,) = surprises(record)
    assert str(next(iter(change.values()))) in words


def test_a_wrong_result_is_not_timed() -> None:
    cell = CELLS[0]
    wrong = peers.Method(
        "wrong", ("linear",), lambda inputs: inputs.hidden.sum() + inputs.weight.sum()
    )
    record = worker.measured(wrong, worker.Question(cell, "cpu"), seconds=0.0)
    assert record["status"] == "wrong" and "ms_total" not in record


def test_a_round_is_added_to_a_record() -> None:
    first = runs.merged(None, {"status": "ok", **times(2.0)}, 0)
    both = runs.merged(first, {"status": "ok", **times(4.0)}, 2)
    assert both["ms_total"] == [1.0, 3.0, 8.0] and both["rounds"] == [2.0, None, 4.0]
    assert not runs.is_done(both, 1) and runs.is_done(both, 2) and not runs.is_done(both, 3)
    assert runs.merged(both, {"status": "ok", **times(8.0)}, 0)["rounds"] == [8.0]
    assert runs.merged(both, {"status": "failed: x"}) == {"status": "failed: x"}


def test_times_are_compared_in_the_same_turn() -> None:
    ours = {"rounds": [1.0, 2.0, None, 10.0], "ms_total": [1.0, 2.0, 10.0]}
    theirs = {"rounds": [3.0, None, 7.0, 30.0], "ms_total": [3.0, 7.0, 30.0]}
    assert facts.ratio(theirs, ours) == 3.0
    assert facts.ratio(theirs | {"rounds": [None, None, 7.0]}, ours) == 3.5


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


def test_a_run_writes_every_fact_and_is_completed(tmp_path: Path) -> None:
    out = tmp_path / "run.json"
    loss.main(["--quick", "--only", "naive", "--rounds", "2", "--out", str(out)])
    loss.main(["--quick", "--only", "verl", "--out", str(out)])
    run = json.loads(out.read_text())
    assert run["versions"]["torch"] == torch.__version__ and run["machine"]["cores"] >= 1
    assert {(c["N"], c["H"], c["V"]) for c in run["ceilings"]} == {(64, 48, 320)}
    assert all(c["copy_bytes_per_second"] > 0 for c in run["ceilings"])
    records = run["records"]
    assert [r["op"] for r in records if r["peer"] == "naive"] == [c.op for c in quick_cells()]
    for record in records:
        assert record.keys() >= FACTS
        if record["peer"] == "naive":
            ceiling = run["ceilings"][0 if record["dtype"] == "float32" else 1]
            least = loss.ceiling_ms(record, ceiling)
            assert record["ratio_to_ceiling"] == record["ms_total"][1] / least
            assert len(record["rounds"]) == 2 and None not in record["rounds"]
        else:
            assert record["status"] in ("not installed", "failed: needs a GPU")
            assert record["ms_total"] is None and record["flops"] is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--quick", "--only", "tlr"], "no peer 'tlr'; there are fastgrpo, naive"),
        (["--quick", "--only", "trl"], "--only and --n measure a part of a run"),
        (["--quick", "--n", "64"], "say of which with --out"),
        (["--quick", "--n", "65"], "no such cell; there are 64"),
        (["--emulate-memory", "much"], "wanted 24GiB for example, got 'much'"),
        ([], "one of the arguments --quick --cpu --gpu --emulate-memory is required"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        loss.main(arguments)
    assert words in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_on_a_gpu_ends_in_time_and_is_taken_up_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With no time left nothing is started, and it is said; the next run measures what is left."""
    out = tmp_path / "run.json"
    arguments = ["--quick", "--only", "naive", "--out", str(out)]
    with monkeypatch.context() as patch:
        patch.setattr(
            loss, "math", SimpleNamespace(inf=0.0)
        )  # where a run on a GPU has the end of its minutes
        with pytest.raises(SystemExit):
            loss.main(arguments)
    found = json.loads(out.read_text())["records"]
    assert {record["status"] for record in found} == {loss.OUT_OF_TIME}
    assert {r["status"] for r in loss.main(arguments)["records"]} == {"ok"}
