"""The process of one reward function, started by path, so that it imports nothing that is not used.

It reads where its function is, says what it found, and then answers requests until they end, in
frames: eight bytes of length, then a pickle of the parent's, or the answer in JSON. The parent
unpickles nothing that comes from a process in which completions are judged.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import math
import os
import pickle
import signal
import struct
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import IO, Any

LENGTH = struct.Struct("<Q")
MOST_BYTES = 1 << 30
"""Of a reply: more is no reply, but what something else has written into the pipe."""


def send(stream: IO[bytes], payload: bytes) -> None:
    """Write a frame."""
    stream.write(LENGTH.pack(len(payload)))
    stream.write(payload)
    stream.flush()


def receive(stream: IO[bytes], most: float = math.inf) -> bytes | None:
    """Read a frame; None where the stream ends.

    Raises:
        ValueError: it has more than `most` bytes.
    """
    header = stream.read(LENGTH.size)
    if len(header) < LENGTH.size:
        return None
    (length,) = LENGTH.unpack(header)
    if length > most:
        raise ValueError(f"a frame of {length:,} bytes")
    payload = stream.read(length)
    return payload if len(payload) == length else None


def die_with_parent(lifeline: int) -> None:
    """End this process and those it has started as soon as the other end of a pipe is closed.

    On Linux by the kernel, whatever the function does; elsewhere by a thread, which code in C that
    keeps the interpreter to itself can hold up.
    """
    if sys.platform == "linux":
        import fcntl

        fcntl.fcntl(lifeline, fcntl.F_SETOWN, -os.getpgrp())
        fcntl.fcntl(lifeline, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)

    def watch() -> None:
        os.read(lifeline, 1)
        if sys.platform != "win32":
            os.killpg(os.getpgrp(), signal.SIGKILL)

    # On Linux too: the pipe may have been closed before the kernel was asked.
    threading.Thread(target=watch, daemon=True).start()


def private_pipes() -> tuple[IO[bytes], IO[bytes]]:
    """Take standard input and output for the frames, away from what the function prints and reads.

    A process that the function forks off does not keep them open either.
    """
    sys.stdout.flush()
    requests, replies = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    os.close(nothing)
    sys.stdout = sys.stderr

    def forget() -> None:
        for pipe in (requests, replies):
            with contextlib.suppress(OSError):
                os.close(pipe)

    if sys.platform != "win32":
        os.register_at_fork(after_in_child=forget)
    return os.fdopen(requests, "rb"), os.fdopen(replies, "wb")


def load_beside(*names: str) -> list[Any]:
    """Return modules beside this file, in a package that imports nothing else."""
    package = ModuleType("fastgrpo_reward_process")
    package.__path__ = [str(Path(__file__).parent)]
    sys.modules[package.__name__] = package
    return [importlib.import_module(f"{package.__name__}.{name}") for name in names]


def spare_the_parent() -> None:
    """Let Linux end this process, not the run, if the two of them use up the memory."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def run(coroutine: Any) -> None:
    """Run a coroutine in the one event loop of this process, to which a client may be bound."""
    global _runner
    import asyncio

    _runner = _runner or asyncio.Runner()
    _runner.run(coroutine)


_runner: Any = None


def serve(requests: IO[bytes], replies: IO[bytes]) -> None:
    """Load the function, then answer until the requests end."""
    functions, seeding = load_beside("functions", "seeding")
    sys.meta_path.insert(0, seeding.SeedAtImport())
    start = receive(requests)
    if start is None:
        return
    sys.path[:], source = pickle.loads(start)
    try:
        function: Callable[..., Any] = functions.load(source)
        traits = functions.traits_of(function)
    except (ValueError, OSError, ImportError) as error:
        kinds = (FileNotFoundError, ModuleNotFoundError)
        kind = next((kind for kind in kinds if isinstance(error, kind)), ValueError)
        send(replies, functions.encoded([kind.__name__, str(error)]))
        return
    send(replies, functions.encoded([None, traits]))
    while (request := receive(requests)) is not None:
        try:
            number, lengths, arguments = pickle.loads(request)
        except Exception as error:
            what, where, trace = functions.describe(error)
            what = f"could not be given the columns of the dataset: {what}"
            outcome = functions.failed("exceptions", what, where, trace)
        else:
            seeding.seed_generators(number)
            (outcome,) = functions.call_all([(function, traits)], arguments, lengths, run)
        reply = functions.encoded(outcome)
        if len(reply) > MOST_BYTES:
            what = f"gave log_extra {len(reply):,} bytes, more than the {MOST_BYTES:,} it may"
            reply = functions.encoded(functions.failed("invalid", f"{what}; give it less"))
        send(replies, reply)


def stay(number: int, frame: object) -> None:
    """Do nothing about a signal."""


def main(pipes: list[str]) -> None:
    """Serve, with the parent's pipes: one it closes as it ends, one for stacks it asks for."""
    if sys.platform != "win32" and pipes:
        lifeline, stack = map(int, pipes)
        for pipe in (lifeline, stack):
            os.set_inheritable(pipe, False)
        die_with_parent(lifeline)
        faulthandler.register(signal.SIGUSR1, file=stack, all_threads=False)
    faulthandler.enable()
    # A scheduler may send these to all processes of a job; the run has a step to finish, and the
    # end of the parent is the end of this one. (Ignored, they would be so in programs it starts.)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stay)
    if sys.platform != "win32":  # held back until now: they do no harm any more
        numbers = signal.SIGINT, signal.SIGTERM, signal.SIGUSR1
        signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
    spare_the_parent()
    serve(*private_pipes())


if __name__ == "__main__":
    main(sys.argv[1:])
