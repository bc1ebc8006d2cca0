"""Files of one JSON object a line, as every reader of JSON takes them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from .durable import writing


def plain(value: Any) -> Any:
    """Return what JSON has for a value: tensors are numbers or lists, NaN and infinities null.

    What JSON has nothing for, in columns of a dataset for example, becomes text.
    """
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        pairs = cast("Mapping[Any, Any]", value).items()
        return {str(name): plain(item) for name, item in pairs}
    if isinstance(value, list | tuple):
        return [plain(item) for item in cast("Sequence[Any]", value)]
    return value if value is None or isinstance(value, str | int) else str(value)


def append_lines(path: str | Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Append objects to a file, which is made if it is not there; they are written when it returns.

    A half of a character, which has no UTF-8, is written as its code.

    Raises:
        WriteError: the disk is full, for example; the file is as it was before.
    """
    text = "".join(
        json.dumps(plain(line), ensure_ascii=False, allow_nan=False) + "\n" for line in lines
    )
    # As few writes as there can be: who reads it meanwhile finds whole lines.
    rest = memoryview(text.encode("utf-8", "backslashreplace"))
    with writing(Path(path)), Path(path).open("ab", buffering=0) as file:
        size = file.tell()
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except BaseException:
            file.truncate(size)
            raise


def read_lines(path: str | Path) -> list[dict[str, Any]]:
    """Return the objects of a file, but for a last one that is only being written.

    Raises:
        ValueError: a line is none; says which.
    """
    return [line for _, line in whole_lines(Path(path))]


def whole_lines(path: Path, key: str | None = None) -> list[tuple[bytes, dict[str, Any]]]:
    """Return the lines of a file, as they are and as objects.

    Left out is a last one without an end: its process was killed as it wrote it, or writes it now.

    Args:
        path: of the file.
        key: one that each object has; None: any objects.

    Raises:
        ValueError: a line is no such object; says which.
    """
    found: list[tuple[bytes, dict[str, Any]]] = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                value = json.loads(line) if line.endswith(b"\n") and line.strip() else None
            except (ValueError, RecursionError):
                value = "damaged"
            if isinstance(value, dict) and (key is None or key in value):
                found.append((line, cast("dict[str, Any]", value)))
            elif value is not None:
                raise ValueError(
                    f"{path}:{number}: is no JSON object of a run, so that something else has "
                    "written to the file; mend the line, or take it out"
                )
    return found
