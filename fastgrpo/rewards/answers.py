"""Whether an answer is right: equal text, equal numbers, or equal by math-verify.

Completions are hostile text: math-verify reads them in a process that can be killed.
"""

from __future__ import annotations

import atexit
import functools
import json
import math
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from decimal import Decimal
from pathlib import Path

from ..signals import held_back, name_of
from .functions import TookTooLong

CHECK_TIMEOUT_S = 5.0
"""Seconds that math-verify may take over an answer, and over a pair of them."""
ANSWER_CHARACTERS = 2000
"""How much of an answer is read, from its end: math-verify is slow on long hostile text."""

_START_TIMEOUT_S = 300.0  # as that of other judges: a file system far away has SymPy to send
_GRACE_S = 5.0  # for the process to end by itself; one that is stopped does not
_BY_THE_TEXT = {
    number for name in ("SIGSEGV", "SIGBUS", "SIGABRT", "SIGFPE", "SIGILL")
    if (number := getattr(signal, name, None)) is not None
}  # fmt: skip
"""Signals that a text brings about, by a stack that overflows for example: it would again."""
_WORKER = Path(__file__).with_name("answers_worker.py")
_WRAPPED = re.compile(
    r"\$\$(.+)\$\$|\$(.+)\$|\\\((.+)\\\)|\\\[(.+)\\\]|\\text\{([^{}]+)\}", re.DOTALL
)
_NUMBER = re.compile(
    r"[+-]?\$?((\d+|\d{1,3}(,\d{3})+)(\.\d*)?|\.\d+)([eE][+-]?\d{1,3})?\$?", re.ASCII
)
_LATEX = re.compile(r"\\[a-zA-Z]+(\{[a-zA-Z\s]*\})?|\b(sin|cos|tan|log|exp|sqrt)\b")
_WORD = re.compile(r"[^\W\d_]{3}")
_NOTATION = re.compile(r"[\d\\^=+*/<>]")


def is_right(gold: str, completion: str) -> bool:
    """Say whether a completion's answer is the right one, by the rule of `rewards.accuracy`."""
    gold, answer = bare(gold.rpartition("####")[2]), answer_of(completion)
    if answer == gold:
        return gold != ""
    gold_number, number = _number(gold), _number(answer)
    if gold_number is not None and number is not None:
        return gold_number == number
    if not is_mathematics(gold):
        return False
    # Undelimited, math-verify would take the last number of "1/2" or "70, 71, 72".
    return _checker.equal(_delimited(gold), _delimited(answer))


def answer_of(completion: str) -> str:
    """Return a completion's answer as it is compared: of its tag or its box, or all of it."""
    end = completion.rfind("</answer>")
    start = completion.rfind("<answer>", 0, end) if end >= 0 else -1
    return bare(completion[start + len("<answer>") : end] if start >= 0 else completion)


def bare(text: str) -> str:
    """Return what the last box holds, or all, without space, delimiters and text command."""
    text = _last_box(text)[-ANSWER_CHARACTERS:].strip()
    while match := _WRAPPED.fullmatch(text):
        inner = next(group for group in match.groups() if group is not None).strip()
        if "$" in inner:  # "$1$ and $2$" is not one formula
            break
        text = inner
    return text


def _last_box(text: str) -> str:
    start = text.rfind(r"\boxed{")
    if start < 0:
        return text
    start += len(r"\boxed{")
    depth = 1
    for position in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[start:position]
    return text


def _number(text: str) -> Decimal | None:
    text = text.replace(r"\$", "$")
    return Decimal(re.sub("[$,]", "", text)) if _NUMBER.fullmatch(text) else None


def _delimited(text: str) -> str:
    return f"${text.replace('**', '^')}$" if is_mathematics(text) else text


def is_mathematics(text: str) -> bool:
    """Say whether a text is a formula, not words."""
    return bool(_NOTATION.search(text)) and not _WORD.search(_LATEX.sub(" ", text))


class _Checker:
    """math-verify in a process of its own.

    Its own timeouts are signals: they fail outside the main thread and do not interrupt C code.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()
        self._allowed = self._left = math.inf

    @contextmanager
    def limited(self, seconds: float | None) -> Generator[None]:
        """Let all checks within the block take so long together; None: as long as they need."""
        self._allowed = self._left = math.inf if seconds is None else seconds
        try:
            yield
        finally:
            self._allowed = self._left = math.inf

    def equal(self, gold: str, answer: str) -> bool:
        """Say whether math-verify holds two answers for equal; False if it takes too long.

        Raises:
            TookTooLong: all checks together have taken what they may.
            RuntimeError: the process does not start, or something ends it again and again.
        """
        # Each alone first: one that takes too long need not be tried with every other.
        return self._ask(gold) and self._ask(answer) and self._ask(gold, answer)

    @functools.lru_cache(maxsize=4096)  # noqa: B019 - there is one checker
    def _ask(self, *texts: str) -> bool:
        """Say whether an answer can be read, or two are equal.

        What is remembered is a reply, or that a text has ended the process; not that another has.
        """
        ended = 0
        with self._lock:
            for _ in range(2):
                if self._left <= 0:
                    raise TookTooLong(self._allowed)
                start = time.monotonic()
                try:
                    reply = self._exchange(texts, start)
                except TookTooLong:  # in starting
                    raise
                except BaseException:
                    self.close()  # a reply still to come would be taken for the next pair's
                    raise
                finally:
                    self._left -= time.monotonic() - start
                if reply:
                    return reply == "true\n"
                ended = self.close(_GRACE_S)
                if self._left <= 0:
                    raise TookTooLong(self._allowed)
                if ended >= 0 or -ended in _BY_THE_TEXT:
                    return False
        raise RuntimeError(
            f"the process that reads answers was ended twice by signal {name_of(-ended)}, "
            "as when memory runs out"
        )

    def _exchange(self, texts: tuple[str, ...], start: float) -> str:
        """Return the reply of the process, or nothing if it has ended."""
        if self._process is not None and self._process.poll() is not None:
            self.close()
        process = self._process or self._start()
        assert process.stdin is not None
        limit = min(CHECK_TIMEOUT_S, self._left - (time.monotonic() - start))
        if limit <= 0:
            raise TookTooLong(self._allowed)
        try:
            print(json.dumps([limit, *texts]), file=process.stdin, flush=True)
        except OSError:
            return ""
        return _line(process, limit + _GRACE_S)

    def _start(self) -> subprocess.Popen[str]:
        for _ in range(2):
            with held_back():
                self._process = subprocess.Popen(
                    [sys.executable, "-P", str(_WORKER)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    text=True,
                    start_new_session=True,  # Ctrl-C is for the parent
                )
            if _line(self._process, _START_TIMEOUT_S) == "ready\n":
                return self._process
            if self.close(_GRACE_S) >= 0:
                break
        raise RuntimeError(
            "reward function 'accuracy' could not start math-verify; "
            "see what python -c 'import math_verify' says"
        )

    def close(self, grace: float = 0.0) -> int:
        """End the process, which may take so long to do so itself; the next check starts another.

        Returns:
            Its status: that with which it has ended, or below 0 the signal that has ended it.
        """
        process, self._process = self._process, None
        if process is None:
            return 0
        with suppress(subprocess.TimeoutExpired):
            process.wait(grace)
        process.kill()
        process.communicate()
        return process.returncode


def _line(process: subprocess.Popen[str], seconds: float) -> str:
    """Return the next line that a process writes, which is ended if it takes longer."""
    assert process.stdout is not None
    timer = threading.Timer(seconds, process.kill)
    timer.daemon = True
    timer.start()
    try:
        return process.stdout.readline()
    finally:
        timer.cancel()


_checker = _Checker()
atexit.register(_checker.close)
checks_limited = _checker.limited
