"""Write the tables and plots of the benchmarks from their JSON: `python -m benchmarks.report`.

Tables stand between `<!-- name -->` and `<!-- /name -->` in the README and `benchmarks/README.md`;
nobody types a number. `--check` changes nothing and fails if a page is not what the JSON gives.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from PIL import Image

from . import bars, plots, tables
from .facts import (
    Record,
    Run,
    cells,
    device,
    escaped,
    facts,
    is_ok,
    mib,
    newest,
    number,
    ours,
    ratio,
    reason,
)

ROOT = Path(__file__).parents[1]
GIB = 24
SHORT = {
    "fastgrpo": "fastgrpo",
    "naive": "plain PyTorch",
    "compiled": "PyTorch, `torch.compile`",
    "trl": "TRL, fused head",
    "liger_linear": "Liger, fused linear",
    "liger_sm90": "Liger, for Hopper",
    "cce": "Apple's CCE",
    "verl": "verl, Triton",
}
"""The peers of the README's table, all that start from hidden states, and their names there."""


def main(arguments: list[str] | None = None, root: Path = ROOT) -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        "python -m benchmarks.report", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--check", action="store_true", help="change nothing, fail if out of date")
    options = parser.parse_args(arguments)
    results = root / "benchmarks" / "results"
    wanted = pages(root)
    drawings = {figure.name: figure for kind in plots.KINDS for figure in _figures(results, kind)}
    drawn = {path.name for path in results.glob("*.png")}
    if options.check:
        right = {name for name, figure in drawings.items() if _is_saved(figure, results)}
        stale = [name for name, text in wanted.items() if _read(root / name) != text]
        wrong = (drawn | drawings.keys()) - right
        stale += [f"benchmarks/results/{name}" for name in sorted(wrong)]
        if stale:
            sys.exit(f"out of date: {', '.join(stale)}; run python -m benchmarks.report")
        return
    for name, text in wanted.items():
        (root / name).write_text(text, encoding="utf-8")
    for name in drawn - drawings.keys():
        (results / name).unlink()
    for figure in drawings.values():
        figure.save(results)


def pages(root: Path) -> dict[str, str]:
    """Return the pages as they should be.

    Raises:
        SystemExit: a page has no place for a table.
    """
    results = root / "benchmarks" / "results"
    blocks = {
        "README.md": {"loss": short(results)},
        "benchmarks/README.md": {
            "trainer-gpu": _trainer(results, "gpu"),
            "trainer-24gib": _largest_completion(results),
            "trainer-cpu": _trainer(results, "cpu"),
            "loss-gpu": _loss(results, "gpu"),
            "memory-24gib": _largest_batch(results),
            "loss-cpu": _loss(results, "cpu"),
        },
        "fastgrpo/PARALLEL.md": {
            "parallel-gpu": _parallel(results, "gpu"),
            "parallel-cpu": _parallel(results, "cpu"),
        },
    }
    return {name: filled(name, _read(root / name), texts) for name, texts in blocks.items()}


def filled(page: str, text: str, blocks: dict[str, str]) -> str:
    """Return the text of a page with its blocks between their markers."""
    for name, block in blocks.items():
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
            sys.exit(
                f"{page}: needs {begin} and {end} once, in this order, around what is generated"
            )
        before, rest = text.split(begin)
        text = f"{before}{begin}\n\n{block}\n\n{end}{rest.split(end)[1]}"
    return text


def short(results: Path) -> str:
    """Return the README's table: the methods a newcomer compares, at one cell."""
    gpu = newest(results, "loss_gpu")
    run = gpu or newest(results, "loss_cpu")
    cell = _short_cell(run) if run else None
    if run is None or cell is None:
        return "Nothing has been measured on a GPU yet, so no speed is claimed here."
    base = ours(cell)
    rows = []
    for record in filter(is_ok, cell):
        times = number(ratio(record, base)) if base else ""
        rows.append([_called(record, cell), number(record["ms_total"][1]), times, mib(record)])
    why = [f"{_called(r, cell)} ({escaped(reason(r))})" for r in cell if not is_ok(r)]
    present = {record["peer"] for record in cell}
    why += [f"{name} ({tables.NO_RECORD})" for peer, name in SHORT.items() if peer not in present]
    shape = facts(cell[0], ("N", "H", "V", "dtype", "rho"))
    said = (
        f"Loss and gradients from hidden states, {shape}, on {escaped(device(run))}, {run['date']}:"
    )
    if gpu is None:
        said = f"Nothing has been measured on a GPU yet, so no speed is claimed for one. {said}"
    columns = ["", ">ms", ">over single pass", ">extra memory, MiB"]
    notes = []
    if base and (rows_of_chunk := base.get("chunk_rows")) is not None:
        notes.append(f"The single pass takes {rows_of_chunk:,} of {base['N']:,} rows at a time.")
    if why:
        notes.append(f"Without a number: {'; '.join(why)}.")
    return "\n\n".join([said, tables.table(columns, rows), *notes])


def _called(record: Record, cell: list[Record]) -> str:
    """Return what a newcomer calls a method; that of a peer with one needs no name of its own."""
    alone = len({r["method"] for r in cell if r["peer"] == record["peer"]}) == 1
    peer: str = record["peer"]
    name, method = SHORT.get(peer, peer), record["method"].replace("_", " ")
    return name if alone and peer != "fastgrpo" else f"{name}, {method}"


def _short_cell(run: Run) -> list | None:
    full = [
        cell
        for cell in cells(run["records"])
        if (cell[0]["op"], cell[0]["rho"], cell[0]["frozen"]) == ("linear", 1, False)
    ]
    return next(
        (cell for cell in full if cell[0]["dtype"] == "bfloat16"), full[0] if full else None
    )


def _parallel(results: Path, kind: str) -> str:
    """Return what sharding costs, on GPUs or on a CPU."""
    run = newest(results, f"parallel_{kind}")
    if run is None:
        return "Not measured yet."
    source = tables.provenance(run).replace("](results/", "](../benchmarks/results/")
    return f"{tables.ways(run)}\n\n{source}"


def _loss(results: Path, where: str) -> str:
    run = newest(results, f"loss_{where}")
    if run is None:
        return f"No run of the loss on a {where.upper()} is committed yet."
    judged = bars.table_of_bars(run, bars.GPU if where == "gpu" else bars.CPU)
    pictures = [figure.link for figure in _figures(results, f"loss_{where}")]
    if len(pictures) > 4:
        others = ["<details>\n<summary>The other heads</summary>", *pictures[1:-1], "</details>"]
        pictures = [pictures[0], pictures[-1], *others]
    return "\n\n".join([tables.provenance(run), judged, *pictures, *tables.loss(run)])


def _figures(results: Path, kind: str) -> list[plots.Drawing]:
    run = newest(results, kind)
    return plots.drawings(run, kind) if run else []


def _is_saved(figure: plots.Drawing, results: Path) -> bool:
    """Say whether the file of a picture is there, whole, and of this run."""
    try:
        with Image.open(results / figure.name, formats=["PNG"]) as picture:
            picture.load()
            return picture.info.get("Description") == figure.digest
    except (OSError, SyntaxError, ValueError):  # what Pillow raises for a file that is broken
        return False


def _trainer(results: Path, where: str) -> str:
    run = newest(results, f"trainer_{where}")
    if run is None:
        return f"No run of the trainers on a {where.upper()} is committed yet."
    return "\n\n".join([tables.provenance(run), *tables.trainer(run)])


def _largest_batch(results: Path) -> str:
    run = newest(results, "loss_emulate_memory", GIB)
    if run is None:
        return f"No search for the largest batch within {GIB} GiB is committed yet."
    found = tables.largest(run, GIB, "N", ("H", "V", "dtype", "frozen"), "largest N")
    return "\n\n".join([tables.provenance(run), *found])


def _largest_completion(results: Path) -> str:
    run = newest(results, "trainer_emulate_memory", GIB)
    if run is None:
        return f"No search for the longest completion within {GIB} GiB is committed yet."
    keys = ("model", "prompts", "num_generations", "dtype", "frozen")
    found = tables.largest(run, GIB, "longest_completion", keys, "longest completion, tokens")
    return "\n\n".join([tables.provenance(run), *found])


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


if __name__ == "__main__":
    main()
