"""Write the tables and plots of the benchmarks from their JSON: `python -m benchmarks.report`.

Tables stand between `<!-- name -->` and `<!-- /name -->`, in `benchmarks/README.md` and the README;
nobody types a number. `--check` changes nothing and fails if a table is not what the JSON gives.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
PAGES = (ROOT / "README.md", Path(__file__).parent / "README.md")
OURS = "single_pass"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing, fail if out of date")
    options = parser.parse_args()
    stale = []
    for page in PAGES:
        text = page.read_text()
        wanted = filled(text)
        if wanted != text and options.check:
            stale.append(page.relative_to(ROOT))
        elif wanted != text:
            page.write_text(wanted)
    if stale:
        sys.exit(f"{', '.join(map(str, stale))}: run python -m benchmarks.report")
    if not options.check:
        plot()


def filled(text: str) -> str:
    """Return a page with the tables that its markers ask for."""
    tables = {
        "loss-cpu": lambda: loss_table("loss_cpu"),
        "loss-gpu": lambda: loss_table("loss_gpu"),
    }
    for name, table in tables.items():
        marked = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        text = marked.sub(lambda found, t=table: found[1] + t() + found[2], text)
    return text


def newest(prefix: str) -> dict[str, Any] | None:
    """Return the newest run of a kind."""
    runs = sorted(RESULTS.glob(f"{prefix}_*.json"))
    return json.loads(runs[-1].read_text()) if runs else None


def loss_table(prefix: str) -> str:
    """Return a run as a table: time, ratio to ours in the same round, memory, exactness."""
    run = newest(prefix)
    if run is None:
        return "Not measured yet: no such device was at hand.\n"
    lines = [
        f"`{run['command']}`, {run['date']}, {_machine(run)}; "
        + ", ".join(f"{k} {v}" for k, v in run["versions"].items())
        + ".",
        "",
        "| N, H, V | type | rho | peer | method | ms, median (min to max) | times ours | times the "
        "bare products | MiB at the peak | GFLOP | error of dW over naive's |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for record in run["records"]:
        ours = _ours(run["records"], record)
        lines.append(_row(record, ours))
    return "\n".join(lines) + "\n"


def ratio(record: dict[str, Any], ours: dict[str, Any]) -> float:
    """Return the median over rounds of a peer's time over ours in the same round."""
    pairs = zip(record["rounds"], ours["rounds"], strict=False)
    return statistics.median(theirs / mine for theirs, mine in pairs)


def plot() -> None:
    """Draw time and memory against N, one line a peer."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    for prefix in ("loss_cpu", "loss_gpu"):
        run = newest(prefix)
        if run is None:
            continue
        figure, axes = plt.subplots(1, 2, figsize=(10, 4))
        for axis, key, unit in ((axes[0], "ms", "ms"), (axes[1], "MiB", "MiB")):
            for name, points in _lines(run["records"], key).items():
                axis.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
            axis.set(xlabel="N (tokens)", ylabel=unit, xscale="log", yscale="log")
        axes[0].legend(fontsize=7)
        figure.tight_layout()
        figure.savefig(RESULTS / f"{prefix}.png", dpi=120)
        plt.close(figure)


def _lines(records: Iterable[dict[str, Any]], key: str) -> dict[str, list[tuple[int, float]]]:
    lines: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        if record["status"] != "ok" or record["op"] != "linear":
            continue
        if record["rho"] != 1 or record["frozen"]:
            continue
        value = record["ms_total"][1] if key == "ms" else record["peak_extra_bytes"] / 2**20
        name = f"{record['peer']} {record['method']}, H={record['H']}, {record['dtype']}"
        lines.setdefault(name, []).append((record["N"], value))
    return lines


def _ours(records: list[dict[str, Any]], record: dict[str, Any]) -> dict[str, Any] | None:
    """Return our default method on the same cell."""
    same = ("op", "N", "H", "V", "rho", "frozen", "dtype")
    for other in records:
        if other["peer"] == "fastgrpo" and other["status"] == "ok":
            is_default = other["method"] in (OURS, "logits", "logps")
            if is_default and all(other[key] == record[key] for key in same):
                return other
    return None


def _row(record: dict[str, Any], ours: dict[str, Any] | None) -> str:
    shape = f"{record['N']}, {record['H']}, {record['V']}"
    kind = f"{record['rho']}" + (", frozen head" if record["frozen"] else "")
    cells = [shape, record["dtype"], kind, record["peer"], record["method"]]
    if record["status"] != "ok":
        return "| " + " | ".join([*cells, record["status"], *[""] * 5]) + " |"
    low, median, high = record["ms_total"]
    error, naive = record["error_vs_fp64"], record["naive_error_vs_fp64"]
    worst = max(error, key=lambda name: error[name] / max(naive[name], 1e-12))
    if "weight" in error:
        worst = "weight"
    return "| " + " | ".join(
        [
            *cells,
            f"{median:.0f} ({low:.0f} to {high:.0f})" if median > 100 else
            f"{median:.2f} ({low:.2f} to {high:.2f})",
            f"{ratio(record, ours):.2f}" if ours else "",
            f"{record['ratio_to_ceiling']:.2f}" if "ratio_to_ceiling" in record else "",
            f"{record['peak_extra_bytes'] / 2**20:.0f}",
            f"{record['flops'] / 1e9:.0f}" + ("" if record["flops_counted"] else " (stated)"),
            f"{error[worst] / max(naive[worst], 1e-12):.2f}",
        ]
    ) + " |"  # fmt: skip


def _machine(run: dict[str, Any]) -> str:
    machine = run["machine"]
    return machine.get("gpu") or f"{machine['processor']}, {machine['threads']} threads"


if __name__ == "__main__":
    main()
