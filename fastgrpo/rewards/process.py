"""A reward function in a process of its own, which can be ended whatever the function does."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
import secrets
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any, cast

from ..signals import held_back, name_of
from .functions import Outcome, Source, Traits, expired, failed, place
from .worker import MOST_BYTES, receive, send

_CLOSE_TIMEOUT_S = 2.0  # for what a function has registered with atexit
_KILL_TIMEOUT_S = 10.0  # a process that a driver or a dead disk holds does not even end when killed
_STACK_TIMEOUT_S = 0.5

_WORKER = Path(__file__).with_name("worker.py")
_MARK = "FASTGRPO_REWARD_PROCESS"
"""The variable by which what a function has started is known, wherever it has gone."""
_STRAY = "wrote into the pipe that its rewards go through"
_LOADING_ERRORS = {e.__name__: e for e in (ValueError, ModuleNotFoundError, FileNotFoundError)}
_FRAME = re.compile(r'  File "(.+)", line (\d+) in (.+)')


class _Expired(Exception):
    """The process took too long and was ended; carries where it was."""


class _Ended(Exception):
    """The process ended by itself; carries how."""


class Process:
    """The parent's side of `worker.py`: one call at a time, from any thread."""

    def __init__(self, source: Source) -> None:
        """Take where the function is; `start` loads it."""
        self.source = source
        self._popen: subprocess.Popen[bytes] | None = None
        self._talk: threading.Thread | None = None
        self._lifeline = self._stack = -1
        self._mark = secrets.token_hex(8)
        self._killed: set[int] = set()

    def start(self, seconds: float) -> Traits:
        """Start the process, in so much time, and return what it found.

        Raises:
            ValueError: loading the function raised something, took too long or ended the process.
            ModuleNotFoundError, FileNotFoundError: there is no such module or file.
        """
        self._popen = self._spawn()
        start = pickle.dumps((list(map(str, sys.path)), self.source))
        try:
            kind, found = json.loads(self._exchange(start, seconds))
        except _Expired as error:
            raise ValueError(f"{self._named} was not loaded in {seconds:g} s{error}") from None
        except _Ended as error:
            raise ValueError(f"{self._named} {error} while it was loaded") from None
        except ValueError as error:
            self.kill()
            raise ValueError(f"{self._named} {_STRAY}: {error}") from None
        if kind is not None:
            self.kill()
            raise _LOADING_ERRORS[kind](found)
        return found

    @property
    def _named(self) -> str:
        name = repr(self.source[1]) if self.source[0] == "name" else "given as an object"
        return f"reward function {name}"

    def call(self, request: bytes, seconds: float, start_seconds: float) -> Outcome:
        """Call the function; a process that was ended is started again, which does not count.

        Args:
            request: a pickle of a seed, the completions' lengths and the arguments.
            seconds: that the call may take.
            start_seconds: that starting may take.
        """
        try:
            if self._popen is None:
                self.start(start_seconds)
        except (ValueError, ImportError, OSError) as error:
            return failed("exceptions", f"could not be started again: {error}")
        try:
            return _outcome(json.loads(self._exchange(request, seconds)))
        except _Expired as error:
            return expired(seconds, str(error))
        except _Ended as error:
            return failed("exceptions", str(error))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            self.kill()  # what comes next may be the rest of it
            return failed("invalid", f"{_STRAY} ({error!r:.200}); let it leave descriptors alone")

    def close(self) -> None:
        """Let the process end, and end it if it does not; a call starts it again."""
        if self._popen is not None and self._popen.stdin is not None:
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                self._popen.stdin.close()
                self._popen.wait(_CLOSE_TIMEOUT_S)
        self.kill()

    def interrupt(self) -> None:
        """End the process and those it has started, at once; a call in progress returns."""
        popen = self._popen
        if popen is None:
            return
        with contextlib.suppress(OSError):  # there is nothing left of them
            if sys.platform == "win32":
                popen.kill()
            else:
                os.killpg(popen.pid, signal.SIGKILL)
        self._killed |= _end_marked(f"{_MARK}={self._mark}\0".encode())

    def kill(self) -> int | None:
        """End the process; return its exit status, which is its own if it was ending already."""
        self.interrupt()
        popen, self._popen = self._popen, None
        if popen is None:
            return None
        with contextlib.suppress(subprocess.TimeoutExpired):
            popen.wait(_KILL_TIMEOUT_S)
            _reap(-popen.pid, *self._killed)
        self._killed.clear()
        if self._talk is None or not self._talk.is_alive():  # closing would wait for it
            _close_pipes(popen)
        for end in (self._lifeline, self._stack):
            if end >= 0:
                os.close(end)
        self._lifeline = self._stack = -1
        return popen.returncode

    def _spawn(self) -> subprocess.Popen[bytes]:
        ours: list[int] = []
        theirs: list[int] = []
        if sys.platform != "win32":
            (life, self._lifeline), (self._stack, stack) = os.pipe(), os.pipe()
            ours, theirs = [self._lifeline, self._stack], [life, stack]
            os.set_blocking(stack, False)  # stacks that nobody asked for hold nothing up
        try:
            with held_back():
                return subprocess.Popen(
                    [sys.executable, "-P", str(_WORKER), *map(str, theirs)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    env=os.environ | {_MARK: self._mark},
                    pass_fds=theirs,
                    start_new_session=True,  # Ctrl-C is for the parent; one signal ends them all
                )
        except OSError:
            for end in ours:
                os.close(end)
            self._lifeline = self._stack = -1
            raise
        finally:
            for end in theirs:
                os.close(end)

    def _exchange(self, payload: bytes, seconds: float) -> bytes:
        """Send a frame and wait for another, so long.

        Raises:
            _Expired, _Ended: there was none.
            ValueError: there was something else.
        """
        popen = self._popen
        assert popen is not None
        stdin, stdout = popen.stdin, popen.stdout
        assert stdin is not None and stdout is not None
        replies: list[bytes | ValueError | None] = []

        def talk() -> None:
            try:
                send(stdin, payload)
                replies.append(receive(stdout, MOST_BYTES))
            except OSError:  # it ended before it had read everything
                replies.append(None)
            except ValueError as error:
                replies.append(error)
            if self._popen is not popen:  # it has been given up
                _close_pipes(popen)

        # In a thread, which is left behind with a process that does not end even when killed.
        self._talk = threading.Thread(target=talk, daemon=True)
        self._talk.start()
        self._talk.join(seconds)
        if self._talk.is_alive():
            stack = self._ask_stack(popen.pid)
            self.interrupt()
            self._talk.join(_KILL_TIMEOUT_S)
            self.kill()
            raise _Expired(stack)
        reply = replies[0] if replies else None
        if isinstance(reply, ValueError):
            raise reply
        if reply is None:
            raise _Ended(self._how_it_ended())
        return reply

    def _how_it_ended(self) -> str:
        """End what is left of a process that has closed its pipe, which it does as it ends."""
        assert self._popen is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(_CLOSE_TIMEOUT_S)  # for a status of its own
        status = self.kill()
        if status is None:
            return "ended its process"
        if status >= 0:
            return f"ended its process with status {status}"
        name = name_of(-status)
        memory = ", as when memory runs out" if name == "SIGKILL" else ""
        return f"ended its process by signal {name}{memory}"

    def _ask_stack(self, pid: int) -> str:
        """Return where the function is, as far as the process can still say."""
        if sys.platform == "win32":
            return ""
        text, patience = b"", _STACK_TIMEOUT_S
        with contextlib.suppress(OSError):
            while select.select([self._stack], [], [], 0)[0] and os.read(self._stack, 1 << 16):
                pass  # of a signal that somebody else has sent before
            os.kill(pid, signal.SIGUSR1)
            while select.select([self._stack], [], [], patience)[0]:
                more = os.read(self._stack, 1 << 16)
                if not more:
                    break
                text, patience = text + more, 0.05
        frames = [
            traceback.FrameSummary(file, int(line), function)
            for file, line, function in _FRAME.findall(text.decode(errors="replace"))
        ]
        return place(frames[::-1])


def _outcome(reply: dict[str, Any]) -> Outcome:
    """Return an outcome that went through JSON, which has no tuples."""
    values = [[(int(e), r) for e, r in x] if isinstance(x, list) else x for x in reply["values"]]
    metrics = [(str(name), float(value)) for name, value in reply["metrics"]]
    return cast("Outcome", {**reply, "values": values, "metrics": metrics})


def _end_marked(mark: bytes) -> set[int]:
    """End what a function has started in a session of its own, where /proc tells of it.

    Returns:
        The ids of what has been sent a signal, whether it has ended of it yet or not.
    """
    killed: set[int] = set()
    more = True
    while more:  # another may have been started meanwhile
        more = False
        for entry in Path("/proc").glob("[0-9]*/environ"):
            pid = int(entry.parent.name)
            with contextlib.suppress(OSError):  # it is somebody else's, or has ended
                if pid not in killed and mark in entry.read_bytes():
                    os.kill(pid, signal.SIGKILL)
                    killed.add(pid)
                    more = True
    return killed


def _close_pipes(popen: subprocess.Popen[bytes]) -> None:
    for pipe in (popen.stdin, popen.stdout):
        assert pipe is not None
        with contextlib.suppress(OSError):
            pipe.close()


def _reap(*targets: int) -> None:
    """Wait for those of killed processes and groups that are left to this process, as to PID 1."""
    if sys.platform == "win32":
        return
    end = time.monotonic() + _KILL_TIMEOUT_S
    for target in targets:
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(target, os.WNOHANG)[0] or time.monotonic() < end:
                time.sleep(0.001)
