"""The process that runs math-verify for `answers.py`: started by path, so that it imports no torch.

It reads pairs of answers as JSON lines and writes true or false for each. A pair that takes too
long ends it; the next pair starts another.
"""

import faulthandler
import json
import logging
import signal
import sys

from math_verify import parse, verify


def serve(timeout_s: float) -> None:
    """Answer until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which closes stdin
    logging.disable()
    replies, sys.stdout = sys.stdout, sys.stderr  # nothing math-verify prints is taken for a reply
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        gold, answer = json.loads(line)
        # The watchdog ends the process even inside the C code of a huge power.
        faulthandler.dump_traceback_later(timeout_s, exit=True)
        try:
            expected, got = (parse(text, parsing_timeout=0) for text in (gold, answer))
            equal = bool(verify(expected, got, timeout_seconds=0))
        except Exception:
            equal = False
        faulthandler.cancel_dump_traceback_later()
        print(json.dumps(equal), file=replies, flush=True)


if __name__ == "__main__":
    serve(float(sys.argv[1]))
