"""Signals that end a run: the first lets it finish its step and save, a second ends it at once.

Nothing heavy is imported here: the command line catches an interrupt before it imports PyTorch.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from queue import SimpleQueue
from types import FrameType
from typing import Any

SIGNALS = tuple(
    signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)
)
"""Ctrl-C; what kill, torchrun and most schedulers send; what SLURM sends ahead of the end of its
time, with --signal=USR1@300."""

_SAME_S = 2.0
"""What torchrun forwards is the signal that a scheduler may have sent to all processes already."""

Handler = Callable[[int, FrameType | None], Any]


class Interrupted(KeyboardInterrupt):
    """A signal has ended the process at once."""

    def __init__(self, number: int, text: str = "") -> None:
        super().__init__(*([text] if text else []))
        self.number = number

    def __reduce__(self) -> tuple[type[Interrupted], tuple[Any, ...]]:
        """Be pickled as it was made: processes tell each other what has ended a checkpoint."""
        return type(self), (self.number, *self.args)


class Stopped(Interrupted):
    """A run has ended early because a signal asked it to, and said what is saved of it."""


class StopAsked(Exception):
    """Carries a signal to where the run is saved; raised at places where that is possible."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def exit_status(error: KeyboardInterrupt) -> int:
    """Return the status of a process that a signal has ended, 128 and its number, as shells do."""
    return 128 + getattr(error, "number", signal.SIGINT)


def interrupt(number: int, frame: FrameType | None) -> None:
    """Handle a signal by ending at once.

    Raises:
        Interrupted: always.
    """
    raise Interrupted(number)


@contextmanager
def handled(handler: Handler) -> Generator[dict[int, Any]]:
    """Let a function handle the signals within the block, and yield what did so before.

    Handlers of the user's own stay, and so do signals that are ignored, as a shell has it of what
    runs in its background. In another thread than the main one nothing changes.
    """
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        found = {number: signal.getsignal(number) for number in SIGNALS}
        ours = (signal.SIG_DFL, signal.default_int_handler, interrupt)
        before = {number: was for number, was in found.items() if was in ours}
    for number in before:
        signal.signal(number, handler)
    try:
        yield before
    finally:
        for number, was in before.items():
            if signal.getsignal(number) == handler:
                signal.signal(number, was)


@contextmanager
def held_back() -> Generator[None]:
    """Let a process that is started within the block begin with the signals held back.

    A scheduler may send one to all processes of a job, and one that is only beginning would end of
    it. It lets them through once it has seen to them, or never.
    """
    if sys.platform == "win32":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def name_of(number: int) -> str:
    """Return the name of a signal; those between SIGRTMIN and SIGRTMAX have none but a number."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)


class StopRequest:
    """Whether a run has been asked to stop after the step that it is in."""

    def __init__(self, largest: Callable[[int], int], *, joined: bool) -> None:
        """Begin with none.

        Args:
            largest: returns the largest number of all processes: it is enough that one is asked.
            joined: torchrun has started the process, and forwards signals to it.
        """
        self._largest, self._joined = largest, joined
        self._number, self._since = 0, 0.0
        self._before: dict[int, Any] | None = None
        self._texts: SimpleQueue[str | None] = SimpleQueue()

    @contextmanager
    def listening(self, say: Callable[[str], None]) -> Generator[None]:
        """Take signals for requests within the block.

        Args:
            say: told of the first, in a thread, since a signal may come in the midst of printing.
        """
        teller = threading.Thread(target=self._tell, args=(say,), daemon=True)
        teller.start()
        try:
            with handled(self._note) as self._before:
                yield
        finally:
            self._before = None
            self._texts.put(None)
            teller.join()

    def check(self) -> None:
        """Leave the run here if it is to stop; all processes call it at the same places.

        Raises:
            StopAsked: it is.
        """
        if self._before is not None and (number := self._largest(self._number)):
            raise StopAsked(number)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self._number:
            self._number, self._since = number, now
            self._texts.put("stopping after this step; again to stop now")
        elif not self._joined or now - self._since > _SAME_S:
            self._end(number, frame)

    def _end(self, number: int, frame: FrameType | None) -> None:
        """Do what the signals did before, from now on."""
        before = self._before or {}
        for each, was in before.items():
            signal.signal(each, was)
        if callable(before[number]):
            before[number](number, frame)
        else:
            signal.raise_signal(number)

    def _tell(self, say: Callable[[str], None]) -> None:
        while (text := self._texts.get()) is not None:
            say(text)
