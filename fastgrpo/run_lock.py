"""A run directory belongs to one process at a time, which can be named.

What holds is a lock of the operating system on the file `.lock`: it ends with its process, however
that ends. `.running.json` says whose it is; where a process has died it is still there.
"""

from __future__ import annotations

import json
import os
import shlex
import socket
import sys
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .durable import write_whole

LOCK, OWNER = ".lock", ".running.json"


class RunLock:
    """The lock of a run directory, from when this is made until it is released."""

    def __init__(self, run: Path) -> None:
        """Take the lock.

        Args:
            run: the directory.

        Raises:
            ValueError: a process has it; says which.
        """
        self.run = run
        # What this process starts does not have the file open; what is forked off gives nothing
        # back as it ends, from filelock 3.30 on.
        self._lock = FileLock(run / LOCK, thread_local=False)
        try:
            self._lock.acquire(blocking=False)
        except Timeout:
            raise ValueError(_in_use(run)) from None
        self.left_by = _owner(run) if (run / OWNER).exists() else None
        """Who had the lock and died without giving it back, as a person reads it; None: nobody."""
        command = [Path(sys.argv[0]).name, *sys.argv[1:]]
        owner = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": f"{datetime.now().astimezone():%Y-%m-%d %H:%M:%S %z}",
            "command": shlex.join(command),
        }
        try:
            write_whole(run / OWNER, json.dumps(owner, indent=2) + "\n")
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Give the lock back, and remove its files."""
        if not self._lock.is_locked:
            return
        # Held still, so that nobody takes it by a file that is about to go.
        for name in (OWNER, LOCK):
            with suppress(OSError):  # Windows does not remove what is open
                (self.run / name).unlink(missing_ok=True)
        self._lock.release()


def check_unused(run: Path) -> None:
    """Refuse a run directory that a process has; nothing is changed.

    Raises:
        ValueError: says which.
    """
    if (run / LOCK).exists():
        lock = FileLock(run / LOCK, thread_local=False)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            raise ValueError(_in_use(run)) from None
        lock.release()


def _in_use(run: Path) -> str:
    return (
        f"output_dir: {run} is in use by {_owner(run)}; wait until it has ended, end it, or choose "
        "another output_dir"
    )


def _owner(run: Path) -> str:
    """Return who has written `.running.json`, as far as it can be read."""
    try:
        owner: dict[str, Any] = json.loads((run / OWNER).read_text(encoding="utf-8"))
        return (
            f"process {owner['pid']} on {owner['host']}, since {owner['since']}: {owner['command']}"
        )
    except (OSError, ValueError, KeyError, TypeError):
        return "a process that has not said which"
