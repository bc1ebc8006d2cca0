"""Files of one JSON object a line, as every reader of JSON takes them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from torch import Tensor


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
    """
    with Path(path).open("a", encoding="utf-8", errors="backslashreplace") as file:
        for line in lines:
            file.write(json.dumps(plain(line), ensure_ascii=False, allow_nan=False) + "\n")


def read_lines(path: str | Path) -> list[dict[str, Any]]:
    """Return the objects of a file."""
    with Path(path).open(encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]
