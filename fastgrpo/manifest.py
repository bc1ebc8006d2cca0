"""What the files of a checkpoint are held to: `manifest.json` has the size and SHA-256 of each."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from .durable import sync

NAME = "manifest.json"


def seal(folder: Path) -> None:
    """Have all files of a checkpoint on the disk, and write down what they are.

    They are read once more, from memory as a rule, since they have just been written: 1 to 2 GB/s
    a file with the SHA-256 of today's processors, several files at a time.

    Raises:
        OSError: the disk is full, for example.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    with ThreadPoolExecutor() as pool:  # what hashes and what waits for a disk lets others run
        names = (path.relative_to(folder).as_posix() for path in files)
        found = dict(zip(names, pool.map(_seal, files), strict=True))
    manifest = folder / NAME
    manifest.write_text(json.dumps({"files": found}, indent=2) + "\n", encoding="utf-8")
    sync(manifest)
    for path in (*folder.rglob("*"), folder):
        if path.is_dir():
            sync(path)


def damage(folder: Path, *, without: str | None = None, read: bool = True) -> str | None:
    """Say what is wrong with a checkpoint, the first file that is not as it was saved; or None.

    Files that were added since are no damage.

    Args:
        folder: the checkpoint.
        without: a directory in it that does not matter.
        read: read the files; False: only look for them and at their sizes.
    """
    manifest = folder / NAME
    if not manifest.is_file():
        return f"{NAME} is missing"
    try:
        files: dict[str, dict[str, Any]] = json.loads(manifest.read_bytes())["files"]
        held = {name: (file["bytes"], file["sha256"]) for name, file in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{NAME} cannot be read"
    if without is not None:
        held = {name: file for name, file in held.items() if not name.startswith(f"{without}/")}
    for name, (size, _) in held.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} bytes in place of {size:,}"
    if read:
        try:
            with ThreadPoolExecutor() as pool:
                digests = list(pool.map(_digest, (folder / name for name in held)))
        except OSError as error:
            return f"{error.filename or 'a file'} cannot be read: {error.strerror}"
        for (name, (_, wanted)), found in zip(held.items(), digests, strict=True):
            if found != wanted:
                return f"{name} is not what was saved: its SHA-256 differs"
    return None


def _seal(path: Path) -> dict[str, Any]:
    sync(path)
    return {"bytes": path.stat().st_size, "sha256": _digest(path)}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
