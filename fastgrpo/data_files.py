"""Files of prompts, looked through before `datasets` reads them.

Its readers end the process on what is nested without end, keep the last of two columns of the same
name, make infinities of large numbers and indices of columns too many. Here each is refused, with
its line. What passes is left to them, which are told what to keep as it stands.
"""

from __future__ import annotations

import codecs
import csv
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO, cast

from .readable import shown

FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_DEEPEST = 40
"""Lists and objects in each other; Arrow takes 64, of which an object in a list is two."""
_DATE = re.compile(r"\d{4}-\d\d-\d\d([ T][\d:.]+ *(Z|[+-][\d:]+)?)?")
"""Text that Arrow takes for a point in time."""
_TEXT = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z)', re.DOTALL)
"""A text of JSON, or one without an end."""
_EXACT = 2**53
"""Up to here whole numbers are kept in a column that has fractions too."""


class FileError(ValueError):
    """Something in a file of prompts is wrong; names it, the line, and what to do."""


class _Wrong(Exception):
    """What is wrong with a file, and what to do; its line if it is known here."""

    def __init__(self, what: str, line: int | None = None) -> None:
        super().__init__(what)
        self.line = line


def check_file(path: Path) -> set[str]:
    """Refuse a file that would not become what it says.

    Returns:
        The columns of JSON with texts that look like dates, or with whole numbers that fractions
        in the same column would round: they must be read as they are.

    Raises:
        FileError: names the file, the line where there are lines, and what to do.
        OSError: it cannot be read.
    """
    if path.suffix not in FORMATS:
        raise FileError(
            f"dataset file {shown(str(path))} has the unknown extension {shown(path.suffix)}; "
            f"use one of {', '.join(FORMATS)}"
        )
    check_not_empty(path)
    line, changed = 0, set[str]()
    if path.suffix == ".parquet":
        return changed
    try:
        _check_encoding(path)
        with path.open(encoding="utf-8-sig", newline="" if path.suffix == ".csv" else "\n") as file:
            if path.suffix == ".csv":
                _check_csv(file)
            elif path.suffix == ".jsonl" or _is_lines(file):
                for line, text in enumerate(file, start=1):  # noqa: B007
                    if text.strip():
                        _check_row(row := _parse(text))
                        changed |= _changed([row])
            else:
                _check_document(document := _parse(file.read()))
                rows = document if isinstance(document, list) else [document]
                changed = _changed(cast("list[dict[str, Any]]", rows))
    except _Wrong as wrong:
        line = wrong.line or line
        place = f", line {line}" if line else ""
        raise FileError(f"dataset file {shown(str(path))}{place}: {wrong}") from None
    return changed


def read_files(
    datasets: Any, kind: str, where: dict[str, Any], split: str, changed: set[str]
) -> Any:
    """Have `datasets` read files that are checked, each value as it stands there.

    Args:
        datasets: the package.
        kind: of files, as `datasets` calls it.
        where: what it is told of where they are.
        split: for example "train".
        changed: columns of JSON whose values its reader would change.
    """
    options: dict[str, Any] = {}
    if kind == "csv":  # 007 and NA are texts; nothing at all is None
        options = {"keep_default_na": False, "na_values": [""]}
        first = next(iter(datasets.load_dataset(**where, **options, nrows=1).values()))
        options["features"] = datasets.Features(
            dict.fromkeys(first.column_names, datasets.Value("string"))
        )
    dataset = datasets.load_dataset(**where, **options, split=split)
    if changed := changed & set(dataset.column_names):
        as_written = dict.fromkeys(changed, datasets.Json())
        features = datasets.Features(dataset.features | as_written)
        dataset = datasets.load_dataset(**where, features=features, split=split)
    return dataset


def check_not_empty(path: Path) -> None:
    """Refuse a file without a byte.

    Raises:
        FileError: names it, and what to do.
    """
    if path.stat().st_size == 0:
        raise FileError(f"dataset file {shown(str(path))} is empty; put one prompt in each row")


def _check_encoding(path: Path) -> None:
    decoder, line = codecs.getincrementaldecoder("utf-8")(), 1
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            try:
                decoder.decode(part)
            except UnicodeDecodeError as error:
                line += error.object[: error.start].count(b"\n")
                raise _Wrong("is not UTF-8; save the file as such, uncompressed", line) from None
            line += part.count(b"\n")
    try:
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        raise _Wrong("ends within a character of UTF-8; save the file again", line) from None


def _is_lines(file: TextIO) -> bool:
    """Say whether a .json file has an object in each line, and is not one as a whole."""
    first = next((text for text in file if text.strip()), "")
    more = any(text.strip() for text in file)
    file.seek(0)
    try:
        return more and isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False


def _parse(text: str) -> Any:
    if text.count("[") + text.count("{") > _DEEPEST and _depth(text) > _DEEPEST:
        raise _Wrong(f"has lists and objects nested more than {_DEEPEST} deep; flatten them")
    try:
        return json.loads(
            text, object_pairs_hook=_object, parse_int=_whole_number, parse_float=_number
        )
    except json.JSONDecodeError as error:
        line = error.lineno if "\n" in text.strip() else None
        what = error.msg[:1].lower() + error.msg[1:]
        raise _Wrong(
            f"is not JSON: {what} at character {error.colno}; write one object with the columns "
            "of each prompt",
            line,
        ) from None


def _depth(text: str) -> int:
    """Return how deep brackets are nested at most, those within texts left out."""
    deepest = depth = 0
    for bracket in re.findall(r"[\[\]{}]", _TEXT.sub("", text)):
        depth += 1 if bracket in "[{" else -1
        deepest = max(deepest, depth)
    return deepest


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _Wrong(f"has {shown(twice)} twice in one object; leave one out")
    return found


def _whole_number(text: str) -> int:
    if len(text) > 20 or not -(2**63) <= int(text) < 2**63:
        raise _Wrong(
            f"has the number {shown(text, quoted=False)}, beyond 64 bits; put it in quotes"
        )
    return int(text)


def _number(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise _Wrong(
            f"has the number {shown(text, quoted=False)}, beyond 64 bits; put it in quotes"
        )
    return number


def _check_row(row: Any) -> None:
    if not isinstance(row, dict):
        raise _Wrong(
            f'must be an object with the columns of a prompt, {{"prompt": ...}}, got {shown(row)}'
        )


def _check_document(document: Any) -> None:
    """Hold a .json file to a list of rows, or to one object of columns."""
    if isinstance(document, list):
        for row in cast("list[Any]", document):
            _check_row(row)
    else:
        _check_row(document)


def _changed(rows: list[dict[str, Any]]) -> set[str]:
    """Return the columns with what Arrow would change."""
    return {name for row in rows for name, value in row.items() if _changes(value)}


def _changes(value: Any) -> bool:
    if isinstance(value, str):
        return _DATE.fullmatch(value) is not None
    if isinstance(value, dict):
        value = list(cast("dict[str, Any]", value).values())
    if isinstance(value, list):
        return any(map(_changes, cast("list[Any]", value)))
    return isinstance(value, int) and abs(value) > _EXACT


def _records(reader: Any) -> Iterator[list[str]]:
    """Yield what lines hold that are not empty."""
    for record in cast("Iterator[list[str]]", reader):
        if len(record) == 1 and record[0].isspace():  # readers differ in what they make of it
            raise _Wrong("is blank; remove it", reader.line_num)
        if record:
            yield record


def _check_csv(file: TextIO) -> None:
    """Hold every record to the columns of the first."""
    before = csv.field_size_limit(sys.maxsize)
    reader = csv.reader(file, strict=True)
    try:
        records = _records(reader)
        header = next(records, [])
        for name in header:
            if header.count(name) > 1:
                raise _Wrong(f"has two columns {shown(name)}; rename one", reader.line_num)
        for record in records:
            if len(record) != len(header):
                raise _Wrong(
                    f"has {len(record)} fields, and the header {len(header)}; put texts with "
                    "commas in quotes",
                    reader.line_num,
                )
    except csv.Error as error:
        raise _Wrong(
            f"is not CSV: {error}; double the quotes within quotes", reader.line_num
        ) from None
    finally:
        csv.field_size_limit(before)
