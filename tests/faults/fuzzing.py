"""Many made-up inputs, and what every refusal of one must look like.

The cases are the same every time. `FUZZ_RANDOM=1` makes others, `FUZZ_CASES=100000` that many:

    FUZZ_RANDOM=1 FUZZ_CASES=100000 pytest -m slow tests/faults/test_fuzz_config.py
"""

import os
import re
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import SearchStrategy

FEW, MANY = 200, 10_000
"""Cases of the usual tests, and of the slow ones."""
LONGEST = 600
"""Characters of a sentence, whatever it quotes."""

_INTERNAL = re.compile(
    r"Traceback|File \"|line \d+, in |<[a-z_.]+ object|object at 0x|<class|yaml\.|pyarrow|Arrow|"
    r"datetime\.|Error\(|Exception\(|site-packages|/fastgrpo/"
)
_REMEDY = re.compile(
    r"; |must |needs |did you mean|look like|leave|write|use |name |give |take |set |"
    r" in front|instead$"
)


def check_each(
    cases: SearchStrategy[Any], check: Callable[[Any], object], count: int, least: int | None = None
) -> None:
    """Run a check on so many cases; it fails with the shortest that fails.

    Args:
        cases: where they come from.
        check: raises what is wrong.
        count: how many.
        least: of them must be different ones; None: all.
    """
    count, seen = int(os.environ.get("FUZZ_CASES", count)), 0

    @settings(
        max_examples=count,
        derandomize="FUZZ_RANDOM" not in os.environ,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(cases)
    def run(case: Any) -> None:
        nonlocal seen
        seen += 1
        check(case)

    run()
    assert seen >= (count if least is None else least)


def assert_sentences(error: BaseException, place: str) -> None:
    """Hold an error to what a user can read: short lines, each a place and a remedy.

    Args:
        error: of whatever was refused.
        place: what the first line begins with, a regular expression.
    """
    assert isinstance(error, ValueError) and not isinstance(error, UnicodeError), repr(error)
    lines = str(error).splitlines()
    assert re.match(place, lines[0]), error
    assert len(lines) <= 102
    sentences = lines[1:] if lines[0].endswith(":") else lines
    assert sentences, error
    for line in sentences:
        assert len(line) <= LONGEST, line
        assert line.isprintable(), line
        assert not _INTERNAL.search(line), line
        assert re.match(r"and \d+ more$", line) or _REMEDY.search(line), line
