"""Files that are there whole or not at all, also after a power cut or on a full disk."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

_NO_NAMES = {errno.EACCES, errno.EBADF, errno.EINVAL, errno.ENOTSUP}
"""What systems say that sync no directories, or let this one not be opened."""


class WriteError(OSError):
    """Something could not be written: a sentence with the file, the reason and the remedy."""


def sync(path: Path) -> None:
    """Have a file, or the names in a directory, on the disk when it returns.

    Names are the system's matter where it does not sync them, and in a directory that may not be
    read, such as another's in which the run directory is.
    """
    if not path.is_dir():
        _sync(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)  # a file may be read-only
    elif os.name != "nt":  # Windows keeps names by itself
        try:
            _sync(path, os.O_RDONLY)
        except OSError as error:
            if error.errno not in _NO_NAMES:
                raise


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, data: bytes | str) -> None:
    """Write a file in place of what is there, which stays as it is if that fails.

    Args:
        path: of the file.
        data: bytes, or text that is written as UTF-8.

    Raises:
        WriteError: the disk is full, for example.
    """
    aside = path.with_name(f".{path.name}.partial")
    with writing(path):
        try:
            aside.write_bytes(data.encode() if isinstance(data, str) else data)
            sync(aside)
            aside.replace(path)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
        sync(path.parent)


@contextmanager
def writing(path: Path) -> Generator[None]:
    """Return the context in which something is written: what the disk refuses is one sentence.

    Raises:
        WriteError: in place of what the disk or safetensors have raised.
    """
    try:
        yield
    except WriteError:
        raise
    except Exception as error:
        reason = _refusal(error)
        if reason is None:
            raise
        raise WriteError(
            f"{path} could not be written: {reason}; make room, or mend what is in the way, before "
            "you go on"
        ) from error


def _refusal(error: Exception) -> str | None:
    """Return why nothing could be written, if that is what an error says."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    # Imported here: who writes lines has no need of them.
    from safetensors import SafetensorError

    if isinstance(error, SafetensorError):
        found = re.search(r"\(os error (\d+)\)", str(error))
        return None if found is None else os.strerror(int(found[1]))
    return None
