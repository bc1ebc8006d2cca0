"""What became of the faults that a run of the tests has injected, told at its end.

A test of a fault has `@pytest.mark.fault("what is injected", "what must follow")`.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import pytest

AS_EXPECTED, NOT, NOT_RUN = "as expected", "NOT as expected", "not run"
_RESULTS = {"passed": AS_EXPECTED, "skipped": NOT_RUN, "failed": NOT, "error": NOT, "xfailed": NOT}


def note_faults(items: Iterable[pytest.Item]) -> None:
    """Keep the marks where the reports of other processes bring them along."""
    for item in items:
        for mark in item.iter_markers("fault"):
            what, outcome = mark.args
            item.user_properties.append(("fault", (what, outcome)))


def fault_rows(stats: Mapping[str, Iterable[Any]]) -> dict[tuple[str, str, str], str]:
    """Return the result of each fault, outcome and test; cases of one test share a row.

    One that fails makes it fail, and one that runs is enough.
    """
    rows: dict[tuple[str, str, str], set[str]] = {}
    for category, result in _RESULTS.items():
        for report in stats.get(category, ()):
            for name, value in getattr(report, "user_properties", ()):
                if name == "fault":
                    file, _, test = report.nodeid.partition("[")[0].rpartition("::")
                    what, outcome = value
                    place = f"{file.rpartition('/')[2].removesuffix('.py')}.{test}"
                    rows.setdefault((what, outcome, place), set()).add(result)
    order = (NOT, AS_EXPECTED, NOT_RUN)
    return {row: min(results, key=order.index) for row, results in rows.items()}


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    rows = fault_rows(terminalreporter.stats)
    if not rows:
        return
    counts = [list(rows.values()).count(result) for result in (AS_EXPECTED, NOT, NOT_RUN)]
    terminalreporter.section("faults")
    if "not slow" not in config.option.markexpr:
        for row, result in sorted(rows.items(), key=lambda item: item[0][2]):
            terminalreporter.write_line(" | ".join((*row, result)))
    terminalreporter.write_line(
        f"faults: {counts[0]} as expected, {counts[1]} not, {counts[2]} not run"
    )
