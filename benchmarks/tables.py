"""The tables: a run of the loss, a run of the trainers, and what fits into so much memory."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence

from .facts import (
    LOSS_CELL,
    TRAINER_CELL,
    Record,
    Run,
    absent,
    ceiling,
    cells,
    error_over_naive,
    escaped,
    facts,
    is_ok,
    label,
    mib,
    number,
    ours,
    rate,
    ratio,
    reason,
)

_TITLES = {
    "linear": "Loss and gradients from hidden states",
    "logits": "Loss and gradient from logits",
    "logps": "Log-probs from hidden states, no gradient",
}
NO_RECORD = "no record in this run"


def provenance(run: Run) -> str:
    """Return where the numbers of a run come from."""
    machine = ", ".join(
        f"memory {value:.4g} GiB" if name == "memory_gib" else f"{name.replace('_', ' ')} {value}"
        for name, value in run["machine"].items()
    )
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    return (
        f"- Run: `{run['command']}`, {run['date']}, [{run['file']}](results/{run['file']})\n"
        f"- Code: commit {(run.get('commit') or 'not known')[:12]}\n"
        f"- Machine: {escaped(machine)}\n- Versions: {escaped(versions)}"
    )


def loss(run: Run) -> list[str]:
    """Return a run of the loss: an overview of each operation, and behind it every cell."""
    parts = []
    for records in cells(run["records"], ("op",)):
        groups = cells(records)
        labels = list(dict.fromkeys(map(label, records)))
        varying = [key for key in LOSS_CELL if len({cell[0][key] for cell in groups}) > 1]
        common = facts(groups[0][0], [key for key in LOSS_CELL[1:] if key not in varying])
        parts += [f"**{_TITLES[records[0]['op']]}**" + (f": {common}." if common else ".")]
        parts += [_times(groups, labels, varying), _memory(groups, labels, varying)]
        parts += [_empty(groups, labels)]
        parts += [_cell(run, cell, labels) for cell in groups]
    if missing := absent(run):
        parts += [f"No record of these peers in this run: {', '.join(missing)}."]
    return [part for part in parts if part]


def trainer(run: Run) -> list[str]:
    """Return a run of the trainers: a table for each thing that was trained."""
    parts = []
    for cell in cells(run["records"], TRAINER_CELL):
        base = ours(cell)
        columns = ["trainer", ">s a step", ">min to max", ">over ours", ">generation, s"]
        columns += [">scoring, s", ">training, s", ">tokens/s", ">MiB at the peak", "status"]
        rows = []
        for record in cell:
            row = [label(record), *[""] * 8, escaped(reason(record))]
            if is_ok(record):
                row[1:3] = _spread(record["ms_total"], 1e3)
                row[3] = number(ratio(record, base)) if base else ""
                row[4:7] = [
                    _seconds(record, part) for part in ("generation", "scoring", "training")
                ]
                tokens = (record.get("tokens_per_second") or {}).get("total")
                row[7:9] = "" if tokens is None else number(tokens), mib(record)
            rows.append(row)
        parts += [f"**{escaped(facts(cell[0], TRAINER_CELL))}**", table(columns, rows)]
    return parts


def largest(run: Run, gib: float, what: str, keys: tuple[str, ...], title: str) -> list[str]:
    """Return the largest `what` of every peer that fits, a table for each cell of `keys`."""
    parts = []
    for cell in cells((r for r in run["records"] if r.get("gib") == gib), keys):
        base = ours(cell)
        rows = []
        for record in cell:
            row = [label(record), "", "", escaped(reason(record))]
            if is_ok(record):
                row[1] = f"{record[what]:,}"
                row[2] = number(record[what] / base[what]) if base and base[what] else ""
            rows.append(row)
        heading = f"**{escaped(facts(cell[0], keys))}, within {gib:g} GiB**"
        parts += [heading, table(["peer", f">{title}", ">over ours", "status"], rows)]
    return parts


def ways(run: Run) -> str:
    """Return a run of `benchmarks.parallel`: what each way of sharing a step costs."""
    base = run["records"][0]
    columns = ["way", ">processes", ">s a step", ">over plain"]
    columns += [">sampling the whole model, s", ">over plain", ">sampling the pieces, s"]
    rows = []
    for record in run["records"]:
        row = [record["way"], str(record["processes"])]
        for what in ("seconds_step", "seconds_whole"):
            median = record[what][1]
            row += [number(median), number(median / base[what][1])]
        rows.append(
            [*row, number(record["seconds_pieces"][1]) if "seconds_pieces" in record else ""]
        )
    return table(columns, rows)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table; a column whose name begins with > stands on the right."""
    lines = [[name.removeprefix(">") for name in columns]]
    lines += [["---:" if name.startswith(">") else "---" for name in columns], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _times(groups: list[list[Record]], labels: list[str], varying: list[str]) -> str:
    """Return our time in every cell, and those of the others over ours."""
    others = _with_numbers(groups, labels)
    mine = next((label(base) for base in map(ours, groups) if base), None)
    if mine is None:
        return "No time to compare with: ours did not run."
    others.remove(mine)
    rows = []
    for cell in groups:
        base = ours(cell)
        found = {label(record): record for record in cell if is_ok(record)}
        row = [number(base["ms_total"][1]) if base else ""]
        row += [number(ratio(found[n], base)) if base and n in found else "" for n in others]
        rows.append(_shape(cell[0], varying) + row)
    columns = [*_shape_columns(varying), f">{mine}, ms", *(f">{name}" for name in others)]
    return f"Time of {mine}, and that of the others over it:\n\n{table(columns, rows)}"


def _memory(groups: list[list[Record]], labels: list[str], varying: list[str]) -> str:
    names = _with_numbers(groups, labels)
    chunked = any(map(_chunk, groups))
    rows = []
    for cell in groups:
        found = {label(record): mib(record) for record in cell if is_ok(record)}
        chunk = [_chunk(cell)] if chunked else []
        rows.append(_shape(cell[0], varying) + [found.get(name, "") for name in names] + chunk)
    columns = [*_shape_columns(varying), *(f">{name}" for name in names)]
    columns += [">rows of our chunk"] if chunked else []
    return f"Extra memory at the peak, MiB:\n\n{table(columns, rows)}" if names else ""


def _chunk(cell: list[Record]) -> str:
    """Return how many rows our default method takes at a time."""
    rows = (ours(cell) or {}).get("chunk_rows")
    return "" if rows is None else f"{rows:,}"


def _with_numbers(groups: list[list[Record]], labels: list[str]) -> list[str]:
    ran = {label(record) for cell in groups for record in cell if is_ok(record)}
    return [name for name in labels if name in ran]


def _shape_columns(varying: list[str]) -> list[str]:
    return [f"{'>' * (key in ('N', 'H', 'V', 'rho'))}{key}" for key in varying]


def _shape(record: Record, varying: list[str]) -> list[str]:
    written = {"frozen": "yes" if record["frozen"] else "", "dtype": record["dtype"]}
    written["rho"] = f"{record['rho']:g}"
    return [written[key] if key in written else f"{record[key]:,}" for key in varying]


def _empty(groups: list[list[Record]], labels: list[str]) -> str:
    """Say why cells are empty."""
    why: dict[tuple[str, str], int] = {}
    for cell in groups:
        found = {label(record): reason(record) for record in cell}
        for name in labels:
            if (text := found.get(name, NO_RECORD)) != "ok":
                why[name, text] = why.get((name, text), 0) + 1
    said = [
        f"- {name}, {n} of {len(groups)} cells: {escaped(_shortened(text))}"
        for (name, text), n in why.items()
    ]
    return "Cells are empty because:\n\n" + "\n".join(said) if said else ""


def _shortened(text: str) -> str:
    return textwrap.shorten(text, 90, placeholder=" ...")


def _cell(run: Run, cell: list[Record], labels: list[str]) -> str:
    """Return every fact of a cell, folded."""
    base = ours(cell)
    columns = ["method", ">ms", ">min to max", ">over ours", ">over the ceiling", ">extra MiB"]
    columns += [">FLOPs / NHV", ">error over naive's", "status"]
    found = {label(record): record for record in cell}
    rows = []
    for name in labels:
        record = found.get(name)
        row = [name, *[""] * 7, escaped(reason(record) if record else NO_RECORD)]
        if record and is_ok(record):
            row[1:3] = _spread(record["ms_total"])
            row[3] = number(ratio(record, base)) if base else ""
            if record.get("ratio_to_ceiling") is not None:
                row[4] = number(record["ratio_to_ceiling"])
            row[5:7] = mib(record), _flops(record)
            if record.get("error_vs_fp64"):
                row[7] = number(error_over_naive(record))
        rows.append(row)
    summary = f"<details>\n<summary>{facts(cell[0], LOSS_CELL[1:])}</summary>"
    parts = [summary, table(columns, rows), _ceilings(run, cell[0]), _chunks(cell), "</details>"]
    return "\n\n".join(filter(None, parts))


def _ceilings(run: Run, record: Record) -> str:
    """Say how fast the bare products and a copy were."""
    found = ceiling(run, record)
    if found is None:
        return ""
    said = []
    for key, name in (("logits", "logits"), ("dhidden", "dX"), ("dweight", "dW")):
        ms = found["ms_products"][key]
        speed = rate(2 * record["N"] * record["H"] * record["V"] / (ms / 1e3))
        said.append(f"{name} {number(ms)} ms ({speed})")
    copy = number(found["copy_bytes_per_second"] / 1e9)
    text = f"Ceilings: the bare products {', '.join(said)}; a copy {copy} GB/s."
    if clocks := found.get("clocks"):
        facts = (f"{name.replace('.', ' ')} {value}" for name, value in clocks.items())
        text += f" The GPU right after them: {escaped(', '.join(facts))}."
    return text


def _chunks(cell: list[Record]) -> str:
    said = [f"{label(r)} {r['chunk_rows']:,}" for r in cell if r.get("chunk_rows") is not None]
    return f"Rows of a chunk: {', '.join(said)}." if said else ""


def _flops(record: Record) -> str:
    """Return FLOPs in units of NHV; none counted where there are products means unknown."""
    flops = record.get("flops")
    if flops is None or (flops == 0 and record["op"] != "logits"):
        return ""
    times = f"{flops / (record['N'] * record['H'] * record['V']):.3g}"
    return times if record.get("flops_counted", True) else f"{times} (stated)"


def _spread(times: list[float], unit: float = 1.0) -> list[str]:
    low, median, high = (number(time / unit) for time in times)
    return [median, f"{low} to {high}"]


def _seconds(record: Record, part: str) -> str:
    times = record.get(f"ms_{part}")
    return "" if times is None else number(times[1] / 1e3)
