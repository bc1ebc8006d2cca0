"""The process that runs math-verify for `answers.py`: started by path, so that it imports no torch.

It reads JSON lines of a limit in seconds and one or two answers, and writes whether it could read
the one, or whether the two are equal. What takes too long ends it; what comes next starts another.
"""

import contextlib
import faulthandler
import functools
import json
import logging
import signal
import sys
from typing import Any

import sympy
from math_verify import parse, verify


@functools.lru_cache(maxsize=4096)
def read(text: str) -> list[Any]:
    """Return what math-verify makes of a text."""
    parsed = parse(text, parsing_timeout=0)
    for formula in parsed:
        if isinstance(formula, sympy.Basic):
            with contextlib.suppress(Exception):  # what it cannot do is not needed
                sympy.simplify(formula)  # as comparing does: a tower of powers hangs here, alone
    return parsed


def serve() -> None:
    """Answer until standard input ends."""
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):  # are for the parent, which closes stdin
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    logging.disable()
    replies, sys.stdout = sys.stdout, sys.stderr  # nothing math-verify prints is taken for a reply
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        limit_s, *texts = json.loads(line)
        # The watchdog ends the process even inside the C code of a huge power.
        faulthandler.dump_traceback_later(limit_s, exit=True)
        try:
            parsed = [read(text) for text in texts]
            good = len(parsed) == 1 or bool(verify(parsed[0], parsed[1], timeout_seconds=0))
        except Exception:
            good = False
        faulthandler.cancel_dump_traceback_later()
        print(json.dumps(good), file=replies, flush=True)


if __name__ == "__main__":
    serve()
