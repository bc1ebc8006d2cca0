"""Runs that are interrupted, go on, fail: with stubs where the benchmark has processes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from . import loss, measure, peers, runs, worker
from .cells import Cell, quick_cells

CELLS = quick_cells()
LINEAR = Cell("linear", 64, 48, 320)


class Workers:
    """In the place of the processes: what they were asked, and what they answer."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, list[Any]]] = []
        self.status: Callable[[str, bool, Cell], str] = lambda name, check, cell: "ok"

    def records(self, module: str, arguments: list[str], asked: Any, **_: Any) -> Iterator[Any]:
        name = arguments[0]
        self.asked.append((name, asked.get("methods", asked["cells"])))
        cells = [Cell(**facts) for facts in asked["cells"]]
        if name == "ceilings":
            products = dict.fromkeys(("logits", "dhidden", "dweight"), 1.0)
            for cell in cells:
                yield cell.facts() | {"ms_products": products, "copy_bytes_per_second": 1e9}
            return
        time = [float(len(self.asked))] * 3
        for cell, methods in zip(cells, asked["methods"], strict=True):
            for method in methods:
                status = self.status(name, asked["check"], cell)
                if status.startswith("ended"):
                    raise runs.ProcessFailed(status, -9)
                found: dict[str, Any] = {"status": status, "peak_extra_bytes": 1}
                ok = dict.fromkeys(("ms_forward", "ms_backward", "ms_total"), time)
                yield worker.record_of(name, method, cell, found | (ok if status == "ok" else {}))
                if "CUDA error" in status:
                    raise runs.ProcessFailed("ended with 3", worker.STICKY)


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> Workers:
    found = Workers()
    monkeypatch.setattr(runs, "records", found.records)
    monkeypatch.setattr(runs, "commit", lambda: "abc")
    monkeypatch.setattr(loss, "surprises", lambda record: [])
    monkeypatch.setattr(peers, "NAMES", ("fastgrpo", "naive"))
    return found


def run(out: Path, *arguments: str) -> dict[str, Any]:
    return loss.main(["--quick", *arguments, "--out", str(out / "run.json")])


def rounds(report: dict[str, Any], peer: str) -> list[Any]:
    return [r.get("rounds") for r in report["records"] if r["peer"] == peer]


def test_a_run_goes_on_where_it_was(tmp_path: Path, workers: Workers) -> None:
    run(tmp_path, "--only", "fastgrpo")
    assert len(workers.asked) == 2
    report = run(tmp_path, "--rounds", "2")
    turns = [name for name, _ in workers.asked[2:]]
    assert turns == ["naive", "naive", "fastgrpo"]  # whoever was second is first
    assert rounds(report, "naive") == [[3.0, 4.0]] * 5
    assert rounds(report, "fastgrpo") == [[2.0, 5.0]] * 8
    assert run(tmp_path, "--rounds", "2")["records"] == report["records"]
    assert len(workers.asked) == 5 and len(report["ceilings"]) == 2
    report = run(tmp_path, "--rounds", "2", "--only", "naive")
    assert rounds(report, "naive") == [[6.0, 7.0]] * 5
    assert len(report["records"]) == 13 and report["records"][0]["peer"] == "fastgrpo"


def test_only_ceilings_that_are_missing_are_timed(tmp_path: Path, workers: Workers) -> None:
    report = run(tmp_path)
    del report["ceilings"][0]
    runs.write(tmp_path / "run.json", report)
    run(tmp_path)
    name, (asked,) = workers.asked[-1]
    assert (name, asked["dtype"]) == ("ceilings", "float32")


@pytest.mark.parametrize("what", ["commit", "machine", "versions", "program"])
def test_a_run_of_other_code_is_not_added_to(tmp_path: Path, workers: Workers, what: str) -> None:
    report = run(tmp_path)
    changes = {"program": {"command": "python -m benchmarks.trainer --quick"}}
    runs.write(tmp_path / "run.json", report | changes.get(what, {what: "other"}))
    before = (tmp_path / "run.json").read_text()
    with pytest.raises(SystemExit, match=f"run.json has a run whose {what} is .*: give another"):
        run(tmp_path)
    assert (tmp_path / "run.json").read_text() == before


def test_the_commit_says_whether_there_are_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    git = {"rev-parse": "abc\n", "status": "", "diff": ""}
    monkeypatch.setattr(runs, "_git", lambda command, *_: git[command])
    assert runs.commit() == "abc"
    git["status"] = git["diff"] = "M loss.py"
    changed = runs.commit()
    assert changed is not None and changed.startswith("abc-dirty.")
    git["diff"] = "M other.py"
    assert runs.commit() != changed

    def fails(*_: str) -> str:
        raise subprocess.CalledProcessError(128, "git")

    monkeypatch.setattr(runs, "_git", fails)
    assert runs.commit() is None


def test_a_process_that_dies_is_recorded(tmp_path: Path, workers: Workers) -> None:
    """The cells it did not come to say why, the others go on, and are tried again."""
    workers.status = lambda name, check, cell: "ok" if cell == CELLS[0] else "ended with -9: Killed"
    report = run(tmp_path, "--only", "naive")
    assert [r["status"] for r in report["records"]] == [
        "ok",
        *["failed: ended with -9: Killed"] * 4,
    ]
    workers.status = lambda name, check, cell: "ok"
    report = run(tmp_path)
    assert {r["status"] for r in report["records"]} == {"ok"}
    assert workers.asked[-1] == ("naive", [["naive"]] * 4)


def test_the_products_are_not_optional(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dying(*_: Any, **__: Any) -> Iterator[Any]:
        raise runs.ProcessFailed("ended with 1: MemoryError")
        yield

    monkeypatch.setattr(runs, "records", dying)
    with pytest.raises(SystemExit, match=r"bare products ended with 1: MemoryError; see .*run.log"):
        run(tmp_path)


def test_who_fails_in_a_later_turn_has_a_hole(
    tmp_path: Path, workers: Workers, capsys: pytest.CaptureFixture[str]
) -> None:
    def status(name: str, check: bool, cell: Cell) -> str:
        return "failed: x" if len(workers.asked) == 3 and cell == CELLS[1] else "ok"

    workers.status = status
    report = run(tmp_path, "--only", "naive", "--rounds", "3")
    assert rounds(report, "naive")[:2] == [[2.0, 3.0, 4.0], [2.0, None, 4.0]]
    assert "turn 1: failed: x" in capsys.readouterr().err
    report = run(tmp_path, "--rounds", "3")
    assert rounds(report, "naive")[1] == [2.0, 6.0, 4.0]  # after fastgrpo's first


def test_a_gpu_in_error_gets_a_new_process(tmp_path: Path, workers: Workers) -> None:
    bad = {CELLS[1]}
    workers.status = lambda name, check, cell: "failed: CUDA error" if cell in bad else "ok"
    report = run(tmp_path, "--only", "naive")
    assert [r["status"] for r in report["records"]] == ["ok", "failed: CUDA error", *["ok"] * 3]
    bad |= set(CELLS)
    report = run(tmp_path, "--only", "naive")
    last = "failed: the GPU was in error too often"
    assert [r["status"] for r in report["records"]] == ["failed: CUDA error"] * 4 + [last]


def test_an_absent_peer_gets_no_process(
    tmp_path: Path, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "absent", lambda name, device: "not installed")
    report = run(tmp_path)
    assert {r["status"] for r in report["records"]} == {"not installed"}
    assert [name for name, _ in workers.asked] == ["ceilings"]


@pytest.fixture
def methods(monkeypatch: pytest.MonkeyPatch) -> list[peers.Method]:
    naive = peers.load("naive")
    found = [naive.METHODS[0]]
    adapter = SimpleNamespace(unavailable=naive.unavailable, METHODS=found)
    monkeypatch.setattr(peers, "load", lambda name: adapter)
    return found


def failing(error: Exception) -> peers.Method:
    def fails(inputs: Any) -> torch.Tensor:
        raise error

    return peers.Method("bad", ("linear",), fails)


def test_a_method_that_fails_later_lets_the_next_one_run(methods: list[peers.Method]) -> None:
    methods.insert(0, failing(RuntimeError("why")))
    found = list(worker.times_of("any", [LINEAR], [["bad", "naive"]], "cpu", 0.0))
    assert [r["status"] for r in found] == ["failed: RuntimeError: why", "ok"]
    (found,) = worker.times_of("any", [LINEAR], [["naive"]], "cpu", 0.0)
    assert found["ms_total"][1] > 0 and found["flops"] is None


def test_a_gpu_in_error_ends_the_process(methods: list[peers.Method]) -> None:
    methods.insert(0, failing(RuntimeError("CUDA error: an illegal memory access")))
    found = worker.records_of("any", [LINEAR], "cpu", 0.0)
    assert next(found)["status"].startswith("failed: RuntimeError: CUDA error")
    with pytest.raises(worker.Sticky):
        next(found)


@pytest.mark.parametrize(
    ("method_fits", "inputs_fit", "found"),
    [
        (100_000, 2**30, {"N": 98_304}),
        (500, 2**30, {"N": 0}),
        (2**30, 2**30, {"N": 2**20, "most_tokens": 2**20}),
        (100_000, 50_000, {"N": 49_152, "inputs_limit": True}),
        (50_000, 100_000, {"N": 49_152}),
    ],
)
def test_the_longest_is_found(
    methods: list[peers.Method],
    monkeypatch: pytest.MonkeyPatch,
    method_fits: int,
    inputs_fit: int,
    found: dict[str, Any],
) -> None:
    tried = []

    def inputs(cell: Cell, device: str) -> int:
        tried.append(cell.N)
        if inputs_fit < cell.N:
            raise torch.OutOfMemoryError
        return cell.N

    def forward() -> None:
        if tried[-1] > method_fits:
            raise torch.OutOfMemoryError

    trial = SimpleNamespace(refresh=lambda: None, forward=forward, backward=lambda loss: None)
    monkeypatch.setattr(worker, "make_inputs", inputs)
    monkeypatch.setattr(measure, "Trial", lambda *_: trial)
    monkeypatch.setattr(worker, "empty_caches", lambda device: None)
    (record,) = worker.largest_that_fits("any", Cell("linear", 0, 48, 320), 24.0)
    facts = ("N", "most_tokens", "inputs_limit")
    assert {name: record[name] for name in facts if name in record} == found
    assert record["status"] == "ok" and record["gib"] == 24.0
    assert all(N % 1024 == 0 for N in tried)


def test_memory_runs_are_kept_apart(
    tmp_path: Path, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    def records(module: str, arguments: list[str], asked: Any, **_: Any) -> Iterator[Any]:
        facts = asked["cells"][0] | {"N": 4096}
        yield worker.record_of("naive", "naive", Cell(**facts), {"status": "ok", "gib": gib})
        raise runs.ProcessFailed("killed after 1 s")

    monkeypatch.setattr(runs, "records", records)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    header = runs.header("benchmarks.loss", [], "cpu")
    monkeypatch.setattr(runs, "header", lambda *_: header | {"ceilings": [], "records": []})
    out = ["--only", "naive", "--out", str(tmp_path / "run.json")]
    for gib in (24.0, 12.0, 12.0):
        report = loss.main(["--emulate-memory", f"{gib}GiB", *out])
    found = [(r["gib"], r["N"], r["H"], r["status"]) for r in report["records"]]
    late = "failed: killed after 1 s"
    assert found == [
        (gib, N, H, status)
        for gib in (24.0, 12.0)
        for N, H, status in ((4096, 896, "ok"), (0, 3584, late))
    ]


def test_what_others_print_is_not_taken_for_records(tmp_path: Path) -> None:
    """C code writes to the file descriptor, past Python's `sys.stdout`."""
    noise = "import json, os\nload = json.load\n"
    noise += "json.load = lambda x: (print('noise'), os.write(1, b'noise\\n'), load(x))[-1]\n"
    (tmp_path / "sitecustomize.py").write_text(noise)
    (found,) = runs.records(
        "benchmarks.worker",
        ["ceilings"],
        {"cells": [LINEAR.facts()]},
        seconds=120.0,
        environment={"PYTHONPATH": ":".join([str(tmp_path), *sys.path])},
        log=tmp_path / "log",
    )
    assert found["N"] == 64 and (tmp_path / "log").read_text().count("noise") == 2


def test_a_child_that_holds_the_output_is_killed() -> None:
    child = "import os, subprocess; subprocess.Popen(['sleep', '60']); os._exit(0)"
    with pytest.raises(runs.ProcessFailed, match="killed after 3 s"):
        list(runs.records("timeit", ["-n", "1", "-r", "1", child], None, seconds=3.0))


def test_a_traceback_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for log in (tmp_path / "log", None):
        with pytest.raises(runs.ProcessFailed, match="ended with 1: ValueError: why"):
            list(runs.records("timeit", ["raise ValueError('why')"], None, seconds=60.0, log=log))
    assert "Traceback" in (tmp_path / "log").read_text()
    assert "Traceback" in capsys.readouterr().err
