"""The table of faults in fastgrpo/RECOVERY.md, from the marks of the tests.

`python tests/faults/table.py` prints it, with `--write` it goes into the page.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).parents[1]
PAGE = TESTS.parent / "fastgrpo" / "RECOVERY.md"
BEGIN, END = "<!-- faults: written by tests/faults/table.py -->", "<!-- end of faults -->"


def marked_tests(file: Path) -> Iterator[tuple[str, str, str]]:
    """Yield what is injected, what must follow, and the test, in the order of a file.

    Raises:
        ValueError: a mark has anything but two texts.
    """
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        for mark in getattr(node, "decorator_list", []):
            if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.fault":
                texts = [x.value for x in mark.args if isinstance(x, ast.Constant)]
                if len(texts) != 2 or len(mark.args) != 2 or mark.keywords:
                    raise ValueError(f"{file.name}:{mark.lineno}: fault takes two plain texts")
                yield texts[0], texts[1], f"{file.stem}.{node.name}"


def table() -> str:
    """Return the rows in Markdown, those of a file together."""
    rows = ["| fault | what follows | test |", "|---|---|---|"]
    for file in sorted(TESTS.rglob("test_*.py"), key=lambda file: file.name):
        for what, outcome, test in marked_tests(file):
            rows.append(f"| {what} | {outcome} | `{test}` |")
    return "\n".join(rows)


def page_with(rows: str, page: str) -> str:
    """Return the text of a page with these rows between its two comments."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{rows}\n{END}{after}"


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        PAGE.write_text(page_with(table(), PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(table())
