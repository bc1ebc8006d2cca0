"""Where a run may write: a directory that holds nothing, or its own, and that nobody is at."""

from __future__ import annotations

import os
from datetime import datetime
from pathlib import Path

from .readable import shown
from .run_lock import LOCK, OWNER, check_unused

GIVEN = ("config.yaml", "objects.json")
"""Files that say what a run was given."""
_BEGINNINGS = {LOCK, OWNER, *(f".{name}.partial" for name in (*GIVEN, OWNER))}
"""Files that a process leaves which is killed as it begins."""


def is_bare(run: Path) -> bool:
    """Say whether a run directory holds nothing but what the run was given."""
    return {path.name for path in run.iterdir()} <= {*GIVEN, *_BEGINNINGS}


def check_restarts(output_dir: str | None) -> None:
    """Refuse a run without a named directory that torchrun would start again.

    Raises:
        ValueError: says what to do.
    """
    if output_dir is None and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0:
        raise ValueError(
            "output_dir: with --max-restarts torchrun starts a run again that has failed, which "
            "goes on in a directory that has a name; set output_dir, or leave --max-restarts out"
        )


def check_free(output_dir: str | None, *, resume: bool) -> None:
    """Refuse a directory that a process is at, or that holds something: no run is overwritten.

    Args:
        output_dir: the directory; None: it will be a new one.
        resume: it may hold a run.

    Raises:
        ValueError: names the directory, and the process; or nothing can be written there.
    """
    path = Path("runs" if output_dir is None else output_dir).expanduser()
    _check_place(path)
    if output_dir is None:
        return
    check_unused(path)
    if not (resume and (path / "config.yaml").is_file()):
        check_still_free(path)


def _check_place(path: Path) -> None:
    """Refuse a directory that is not there and cannot be made, or cannot be written into."""
    place = shown(str(path), quoted=False)
    try:
        there = next(each for each in (path, *path.absolute().parents) if each.exists())
        is_directory = there.is_dir()
    except OSError as error:  # too long a name, for example
        raise ValueError(
            f"output_dir: {place} cannot be made ({error.strerror}); choose another name"
        ) from error
    if not is_directory and there != path:
        raise ValueError(
            f"output_dir: {place} cannot be made, since {there} is no directory; choose another"
        )
    if is_directory and not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(
            f"output_dir: {place} cannot be made, since {there} may not be written into; choose "
            "another, or change the permissions"
        )


def check_still_free(path: Path) -> None:
    """Refuse a directory that holds something, but for what is left of a process as it began.

    Raises:
        ValueError: names the directory.
    """
    if not path.exists() or (
        path.is_dir() and {each.name for each in path.iterdir()} <= _BEGINNINGS
    ):
        return
    begun = (path / "config.yaml").is_file()
    rest = "go on with its run: --resume auto" if begun else "remove it if it is not needed"
    raise ValueError(
        f"output_dir: {path} exists and is not an empty directory; choose another name, or {rest}"
    )


def create(output_dir: str | None, name: str) -> tuple[Path, list[Path]]:
    """Return the directory, and those that were made for it, the innermost first.

    Raises:
        ValueError: it cannot be made.
    """
    if output_dir is not None:
        path = Path(output_dir).expanduser()
        made = _missing(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"output_dir: {path} cannot be made ({error.strerror}); choose another"
            ) from error
        return path, made
    if Path(name).name != name:
        raise ValueError(
            f"run_name: must be a name without a path, got {name!r}; set output_dir to say where"
        )
    stem = f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
    for attempt in range(1, 1000):
        path = Path("runs", stem if attempt == 1 else f"{stem}-{attempt}")
        made = _missing(path)
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        return path, made
    raise ValueError(f"runs/{stem} and 998 variants of it exist: set output_dir")


def _missing(path: Path) -> list[Path]:
    return [each for each in (path, *path.parents) if not each.exists()]
