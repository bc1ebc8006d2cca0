"""The pages are what the committed JSON gives, and a made-up run gives what it should."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from . import bars, report, tables
from .facts import device, escaped, newest, number, ratio

MIB = 2**20
UNKNOWN = (
    "error_vs_fp64", "ms_forward", "ms_backward", "ms_total", "ratio_to_ceiling",
    "peak_extra_bytes", "flops", "chunk_rows",
)  # fmt: skip
"""What `worker.record_of` gives as None where it was not found."""


def record(peer: str, method: str, **facts: Any) -> dict[str, Any]:
    """Return a record of a made-up run; `rounds` are its times in ms."""
    rounds = facts.pop("rounds", [100.0])
    given = dict.fromkeys(UNKNOWN) | {"peer": peer, "method": method, "op": "linear", "N": 64}
    given |= {"H": 32, "V": 1000, "rho": 1.0, "frozen": False, "dtype": "float32", "status": "ok"}
    if (given | facts)["status"] != "ok":
        return given | facts
    times = [min(rounds), sorted(rounds)[len(rounds) // 2], max(rounds)]
    error = {"loss": 1e-3, "hidden": 2e-3, "weight": 3e-3}
    return given | {
        "error_vs_fp64": error, "naive_error_vs_fp64": error, "flops": 6 * 64 * 32 * 1000,
        "flops_counted": True, "peak_extra_bytes": 3 * MIB, "ms_total": times, "rounds": rounds,
    } | facts  # fmt: skip


def ceiling(N: int = 64) -> dict[str, Any]:
    products = {"logits": 20.0, "dhidden": 20.0, "dweight": 20.0}
    facts = {"N": N, "H": 32, "V": 1000, "dtype": "float32", "ms_products": products}
    return facts | {"copy_bytes_per_second": 1e9}


def run(*records: dict[str, Any], **facts: Any) -> dict[str, Any]:
    return {
        "command": "python -m benchmarks.loss --cpu", "date": "2026-01-02", "file": "a.json",
        "machine": {"cores": 2, "threads": 2, "processor": "Abacus"}, "versions": {"torch": "9.9"},
        "ceilings": [ceiling()], "records": list(records),
    } | facts  # fmt: skip


OURS = record("fastgrpo", "single_pass", rounds=[10.0, 20.0, 40.0], peak_extra_bytes=2 * MIB)
NAIVE = record("naive", "naive", rounds=[20.0, 60.0, 44.0], peak_extra_bytes=8 * MIB)


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """Return the root of a project with our pages and no run."""
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "fastgrpo").mkdir()
    for name in ("README.md", "benchmarks/README.md", "fastgrpo/PARALLEL.md"):
        shutil.copy(report.ROOT / name, tmp_path / name)
    report.main([], tmp_path)
    return tmp_path


def commit(site: Path, name: str, made: dict[str, Any]) -> None:
    (site / "benchmarks" / "results" / f"{name}.json").write_text(json.dumps(made))


def row(text: str, *starts: str) -> list[str]:
    """Return the cells of the only row that begins with these cells."""
    rows = [line[2:-2].split(" | ") for line in text.splitlines() if line.startswith("|")]
    found = [cells for cells in rows if cells[: len(starts)] == list(starts)]
    assert len(found) == 1, (starts, found)
    return found[0]


def test_committed_pages_are_what_the_committed_runs_give() -> None:
    report.main(["--check"])


def test_a_ratio_is_taken_round_by_round() -> None:
    assert ratio(NAIVE, OURS) == 2.0  # of 2, 3 and 1.1; the medians would give 2.2
    text = "\n".join(tables.loss(run(OURS, NAIVE)))
    assert row(text, "naive", "44.0")[2:4] == ["20.0 to 60.0", "2.00"]
    assert row(text, "20.0") == ["20.0", "2.00"]  # ours in ms, naive over it


def test_every_fact_of_a_cell_stands_in_its_table() -> None:
    mine = OURS | {"ratio_to_ceiling": 1.25, "chunk_rows": 4096, "flops_counted": False}
    mine |= {"error_vs_fp64": {"loss": 1.0, "hidden": 1e-3, "weight": 6e-3}}
    text = "\n".join(tables.loss(run(mine)))
    assert row(text, "fastgrpo single_pass", "20.0")[1:] == [
        "20.0", "10.0 to 40.0", "1.00", "1.25", "2.00", "6 (stated)", "2.00", "ok",
    ]  # fmt: skip
    assert "<summary>N = 64, H = 32, V = 1,000, float32, rho = 1</summary>" in text
    assert "fastgrpo single_pass 4,096" in text
    assert row(text, "2.00") == ["2.00", "4,096"]  # MiB, and rows of our chunk
    clocks = {"clocks.sm": "1980 MHz", "power.draw": "600 W"}
    text = "\n".join(tables.loss(run(mine, ceilings=[ceiling() | {"clocks": clocks}])))
    assert "GB/s. The GPU right after them: clocks sm 1980 MHz, power draw 600 W." in text
    assert "logits 20.0 ms (0.20 GFLOP/s)" in text and "a copy 1.00 GB/s" in text


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"status": "not installed"}, "not installed"),
        ({"status": "failed: a | b <c>"}, r"failed: a \| b \<c>"),
        (
            {"status": "wrong", "error_vs_fp64": {"loss": 0.0, "hidden": 0.5},
             "naive_error_vs_fp64": {"loss": 0.0, "hidden": 0.1}, "ms_total": [1, 2, 3]},
            "wrong: error of hidden 5.0e-01, of naive 1.0e-01",
        ),
    ],
)  # fmt: skip
def test_a_peer_without_a_time_has_empty_cells_and_a_reason(
    facts: dict[str, Any], said: str
) -> None:
    text = "\n".join(tables.loss(run(OURS, record("trl", "fused_head", **facts))))
    (line,) = [line for line in text.splitlines() if line.startswith("| trl fused_head |")]
    assert line == f"| trl fused_head | {' | '.join([''] * 7)} | {said} |"
    assert f"- trl fused_head, 1 of 1 cells: {said}" in text
    assert "No record of these peers in this run: naive, compiled, liger_triton" in text


def test_a_method_that_a_cell_lacks_is_named_there() -> None:
    other = OURS | {"rho": 0.5}
    text = "\n".join(tables.loss(run(OURS, NAIVE, other)))
    assert row(text, "naive", "")[-1] == "no record in this run"
    assert row(text, "0.5", "20.0") == ["0.5", "20.0", ""]
    assert "- naive, 1 of 2 cells: no record in this run" in text


def test_unknown_flops_stay_empty() -> None:
    cce = record("cce", "filtered", flops=0)
    logits = record("fastgrpo", "logits", op="logits", flops=0)
    text = "\n".join(tables.loss(run(OURS, cce, logits)))
    assert row(text, "cce filtered", "100")[6] == ""
    assert row(text, "fastgrpo logits", "100")[6] == "0"
    text = "\n".join(tables.loss(run(OURS, logits | {"flops": None})))
    assert row(text, "fastgrpo logits", "100")[6] == ""


def judged(bar_what: str, *records: dict[str, Any], of: Any = bars.CPU, **facts: Any) -> list[str]:
    return row(bars.table_of_bars(run(*records, **facts), of), bar_what)[1:]


def test_a_missed_bar_is_printed_as_missed() -> None:
    slow = NAIVE | {"rounds": [5.0, 10.0, 20.0]}
    worse = [record | {"rho": 0.5} for record in (OURS, NAIVE)]
    found = judged("time over naive's", OURS, slow, *worse)
    assert found == ["≤ 1.00", "float32", "2.00", "rho = 1", "1 of 2", "**MISSED**"]
    assert judged("time over naive's", OURS, NAIVE)[2:] == ["0.50", "", "1 of 1", "met"]


def test_less_memory_than_every_peer_means_less() -> None:
    trl = record("trl", "fused_head", peak_extra_bytes=2 * MIB)
    assert judged("memory over the least of any peer", OURS, NAIVE)[2:] == [
        "0.25", "", "1 of 1", "met",
    ]  # fmt: skip
    assert judged("memory over the least of any peer", OURS, NAIVE, trl)[-1] == "**MISSED**"


def test_memory_is_judged_by_the_budget_of_the_device() -> None:
    what = "memory over chunk budget + 4VH + 16N"
    allowed = 256 * MIB + 4 * 1000 * 32 + 16 * 64
    exact = OURS | {"peak_extra_bytes": allowed}
    assert judged(what, exact)[2::3] == ["1.00", "met"]
    missed = ["1.0005", "**MISSED**"]  # by less than two decimals say
    assert judged(what, exact | {"frozen": True})[2::3] == missed
    assert judged(what, exact | {"peak_extra_bytes": 1.02 * allowed})[-1] == "**MISSED**"
    gpu = {"gpu": "G", "memory_gib": 64.0}
    large = OURS | {"peak_extra_bytes": 2048 * MIB}
    assert judged(what, large, machine=gpu)[-1] == "met"
    assert judged(what, large | {"frozen": True}, machine=gpu)[-1] == "**MISSED**"
    mine = record("fastgrpo", "recompute", peak_extra_bytes=129 * MIB)
    assert judged("memory over 4NH + 128 MiB", mine)[2] == "1.01"


@pytest.mark.parametrize(
    ("what", "facts", "limit"),
    [
        ("time over the bare products, H = 896", {"H": 896}, 1.35),
        ("time over the bare products, H = 1,536", {"H": 1536}, 1.20),
        ("time over the bare products, H ≥ 3,584", {"H": 5120}, 1.12),
        ("time over the bare products, frozen head", {"frozen": True}, 1.25),
        ("log-probs only: time over one bare product", {"op": "logps", "method": "logps"}, 1.25),
    ],
)
def test_bars_of_the_ceiling(what: str, facts: dict[str, Any], limit: float) -> None:
    for value, verdict in ((limit, "met"), (limit + 0.01, "**MISSED**")):
        found = judged(what, OURS | {"ratio_to_ceiling": value} | facts, of=bars.GPU)
        assert (found[2], found[-1]) == (f"{value:.2f}", verdict)
    assert judged(what, OURS | facts, of=bars.GPU)[-1] == "not judged: no ceiling in this run"
    assert judged(what, NAIVE, of=bars.GPU)[-1] == "not judged: no such cell in this run"


def test_bars_against_a_peer() -> None:
    def verdict(what: str, mine: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
        return judged(what, mine, theirs, of=bars.GPU)[2:]

    trl = record("trl", "fused_head", rounds=[26.0])
    mine = record("fastgrpo", "single_pass", rounds=[20.0])
    assert verdict("TRL's time over ours", mine, trl) == ["1.30", "", "1 of 1", "met"]
    assert verdict("TRL's time over ours", mine, trl | {"rounds": [25.0]})[-1] == "**MISSED**"
    half = [mine | {"rho": 0.5}, trl | {"rho": 0.5}]
    assert verdict("TRL's time over ours, rho = 0.5", *half)[-1] == "**MISSED**"
    slow = [mine | {"N": 128}, trl | {"N": 128, "rounds": [40.0]}]
    assert judged("TRL's time over ours", mine, trl, *slow, of=bars.GPU)[2:4] == ["1.30", "N = 64"]
    gone = record("trl", "fused_head", status="not installed")
    assert verdict("TRL's time over ours", mine, gone)[-1] == "not judged: trl not installed"
    logits = {"op": "logits", "method": "logits"}
    liger = record("liger_triton", "triton_grpo_loss", op="logits", rounds=[28.0])
    assert verdict("from logits: Liger Triton's time over ours", mine | logits, liger)[0] == "1.40"
    share = "from logits: 4NV bytes over time, as a share of a copy's speed"
    assert verdict(share, mine | logits | {"ratio_to_ceiling": 1.6}, liger)[0] == "0.62"


def test_errors_are_judged_by_naive() -> None:
    error = {"loss": 1e-3, "hidden": 2.1e-3, "weight": 1e-3}
    found = judged(
        "error of gradients or log-probs over naive's, to 1%", OURS | {"error_vs_fp64": error}
    )
    assert found[2:] == ["1.05", "single_pass", "0 of 1", "**MISSED**"]
    what = f"error of the loss over naive's + {bars.FLOOR:.1e}, to 1%"
    lucky = {"error_vs_fp64": {"loss": 4e-7}, "naive_error_vs_fp64": {"loss": 1e-9}}
    assert judged(what, OURS | lucky)[-1] == "met"
    assert judged(what, OURS | {"error_vs_fp64": {"loss": 2e-3}})[2] == "2.00"


def test_the_newest_run_wins(site: Path) -> None:
    for name, day in (("loss_cpu_b", "2026-01-01"), ("loss_cpu_a", "2026-03-01")):
        commit(site, name, run(OURS, date=day))
    commit(site, "loss_cpu_c", run(OURS, date="2026-02-01"))
    found = newest(site / "benchmarks" / "results", "loss_cpu")
    assert found is not None and found["file"] == "loss_cpu_a.json"
    text = report.pages(site)["benchmarks/README.md"]
    assert "2026-03-01, [loss_cpu_a.json](results/loss_cpu_a.json)" in text
    assert "2026-02-01" not in text and "No run of the loss on a GPU is committed yet." in text


def test_the_readme_compares_one_cell(site: Path) -> None:
    before = report.pages(site)["README.md"]
    assert "Nothing has been measured on a GPU yet" in before
    half, trl = OURS | {"rho": 0.5}, record("trl", "fused_head", status="not installed")
    commit(site, "loss_cpu_1", run(half, OURS, NAIVE, trl))
    text = report.pages(site)["README.md"]
    assert "no speed is claimed for one. Loss and gradients from hidden states, N = 64" in text
    assert row(text, "plain PyTorch") == ["plain PyTorch", "44.0", "2.00", "8.00"]
    assert "Without a number: TRL, fused head (not installed); PyTorch, `torch.compile`" in text
    methods = ("compiled", ""), ("cce", "exact"), ("cce", "filtered"), ("verl", ""), ("new", "")
    others = [record(*names, rounds=[40.0]) for names in methods]
    recompute = record("fastgrpo", "recompute", rounds=[30.0])
    commit(site, "loss_cpu_1", run(OURS | {"chunk_rows": 48}, recompute, NAIVE, *others))
    text = report.pages(site)["README.md"]
    for name in ("fastgrpo, single pass", "fastgrpo, recompute", "PyTorch, `torch.compile`",
                 "Apple's CCE, exact", "Apple's CCE, filtered", "verl, Triton", "new"):  # fmt: skip
        assert row(text, name)[1] != ""
    assert "The single pass takes 48 of 64 rows at a time." in text
    commit(site, "loss_gpu_1", run(OURS, machine={"gpu": "G200", "memory_gib": 99.0}))
    text = report.pages(site)["README.md"]
    assert "on G200, 2026-01-02" in text and "Nothing has been measured" not in text


def trainer(peer: str, **facts: Any) -> dict[str, Any]:
    given = {"model": "small", "prompts": 4, "num_generations": 8, "completion_length": 64}
    given |= {"op": "trainer", "peak_extra_bytes": 5 * MIB, "rounds": [4000.0]}
    given |= {"ms_total": [3e3, 4e3, 5e3], "ms_generation": [1e3] * 3, "ms_scoring": None}
    given |= {"ms_training": [3e3] * 3, "tokens_per_second": {"total": 512.0}, "gib": None}
    return record(peer, "T", status="ok") | given | facts


def test_trainers_and_what_fits(site: Path) -> None:
    wrong = trainer("trl", status="wrong: no", ms_total=None, tokens_per_second=None)
    full = wrong | {"status": "failed: out of memory", "peak_extra_bytes": None}
    commit(
        site, "trainer_cpu_1", run(trainer("fastgrpo"), trainer("trl", rounds=[6e3]), wrong, full)
    )
    fits = [trainer("fastgrpo", gib=24.0, longest_completion=3000)]
    fits += [trainer("trl", gib=24.0, longest_completion=1200)]
    commit(site, "trainer_emulate_memory_1", run(*fits))
    largest = [record("fastgrpo", "single_pass", N=9216, gib=24.0)]
    largest += [record("trl", "fused_head", N=3072, gib=24.0)]
    commit(site, "loss_emulate_memory_1", run(*largest))
    commit(site, "loss_emulate_memory_2", run(*(r | {"gib": 8.0} for r in largest)))
    text = report.pages(site)["benchmarks/README.md"]
    assert "**small, prompts 4, completions of each 8, tokens of a completion 64, float32" in text
    assert row(text, "trl T", "4.00") == [
        "trl T", "4.00", "3.00 to 5.00", "1.50", "1.00", "", "3.00", "512", "5.00", "ok",
    ]  # fmt: skip
    assert f"| trl T | {' | '.join([''] * 8)} | wrong: no |" in text
    assert f"| trl T | {' | '.join([''] * 8)} | failed: out of memory |" in text
    assert row(text, "trl T", "1,200") == ["trl T", "1,200", "0.40", "ok"]
    assert row(text, "trl fused_head") == ["trl fused_head", "3,072", "0.33", "ok"]
    assert "loss_emulate_memory_2" not in text


@pytest.mark.parametrize("edit", [("<!-- /loss-cpu -->", ""), ("", "<!-- loss-cpu -->")])
def test_a_page_without_its_markers_is_refused(site: Path, edit: tuple[str, str]) -> None:
    page = site / "benchmarks" / "README.md"
    removed, added = edit
    page.write_text(page.read_text().replace(removed, "") if removed else page.read_text() + added)
    with pytest.raises(SystemExit, match=r"benchmarks/README\.md: needs <!-- loss-cpu -->"):
        report.main([], site)


def test_check_names_what_is_out_of_date_and_changes_nothing(site: Path) -> None:
    report.main(["--check"], site)
    commit(site, "loss_cpu_1", run(OURS, NAIVE))
    before = (site / "README.md").read_text()
    with pytest.raises(
        SystemExit, match=r"README\.md, benchmarks/README\.md, benchmarks/results/loss"
    ):
        report.main(["--check"], site)
    assert (site / "README.md").read_text() == before
    report.main([], site)
    report.main(["--check"], site)
    results = site / "benchmarks" / "results"
    (results / "loss_cpu_old.png").touch()
    with pytest.raises(SystemExit, match=r"date: benchmarks/results/loss_cpu_old\.png"):
        report.main(["--check"], site)
    report.main([], site)
    picture, roofs = (results / f"loss_cpu_{x}.png" for x in ("H32_V1000_float32", "roofline"))
    assert set(results.glob("*.png")) == {picture, roofs}
    right = picture.read_bytes()
    broken = right[:5000] + bytes(100) + right[5100:]
    for content in (b"", b"garbage", right[:5000], broken, roofs.read_bytes()):
        picture.write_bytes(content)
        with pytest.raises(SystemExit, match=r"date: benchmarks/results/loss_cpu_H32_V1000_float"):
            report.main(["--check"], site)
    commit(site, "loss_cpu_1", run(OURS, NAIVE, versions={"torch": "9.8"}))
    report.main([], site)
    report.main(["--check"], site)
    picture.write_bytes(right)  # of another run
    with pytest.raises(SystemExit, match=r"date: benchmarks/results/loss_cpu_H32_V1000_float"):
        report.main(["--check"], site)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.0123, "0.012"), (0.33, "0.33"), (9.994, "9.99"), (9.996, "10.0"), (99.96, "100"),
     (1234.5, "1,234")],
)  # fmt: skip
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert number(value) == text


def test_words_of_others_do_not_become_markup() -> None:
    assert escaped("a|b\n`c` *d* [e](f) <!-- g") == r"a\|b \`c\` \*d\* \[e\](f) \<!-- g"
    assert device(run()) == "Abacus, 2 threads"


def test_what_sharding_costs(site: Path) -> None:
    plain = {
        "way": "plain",
        "processes": 1,
        "seconds_step": [1, 2.0, 3],
        "seconds_whole": [1, 4.0, 9],
    }
    copied = plain | {"way": "copied", "processes": 2, "seconds_step": [1, 3.0, 9]}
    copied |= {"seconds_whole": [1, 2.0, 2], "seconds_pieces": [6, 7.0, 8]}
    commit(site, "parallel_cpu_1", run(plain, copied))
    text = report.pages(site)["fastgrpo/PARALLEL.md"]
    assert row(text, "plain", "1") == ["plain", "1", "2.00", "1.00", "4.00", "1.00", ""]
    assert row(text, "copied", "2") == ["copied", "2", "3.00", "1.50", "2.00", "0.50", "7.00"]
    assert "[parallel_cpu_1.json](../benchmarks/results/parallel_cpu_1.json)" in text
    assert "On GPUs:\n\n<!-- parallel-gpu -->\n\nNot measured yet." in text
