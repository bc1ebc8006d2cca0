"""`fastgrpo train`, in one process or in each of those that torchrun has started.

Of what fails one process tells, once: the first to fail, whose failure ends the others.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path

from .cli import complain
from .durable import WriteError
from .signals import SIGNALS, Stopped, exit_status

_PATIENCE = 5.0
"""Seconds for torchrun to see the process that has failed first."""
_PEER_LOST = (
    "another process of the run is gone, and the others end with it; what torchrun says below "
    "names it and how it ended, and --resume auto goes on from the last checkpoint"
)
_TERMINATED = (
    "interrupted by torchrun, which was told to end, or has lost another process (what it says "
    "below names that one)"
)


def train(config_file: str, overrides: Sequence[str], *, resume: bool) -> int:
    """Train as a file and overrides say, and return the exit status, as `cli.main` does.

    Errors that are the user's to mend are one sentence.
    """
    if os.environ.get("RANK", "0") == "0":
        print(f"fastgrpo: loading {config_file}", file=sys.stderr, flush=True)
    else:  # has nothing to tidy up, and the first process tells of an interrupt
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
    # Imported here, where an impatient Ctrl-C is caught: they take seconds.
    from .config import load_config
    from .distributed import is_restarted, join_world, leave_world, note_begun
    from .output_dir import check_restarts

    trainer = None
    try:
        join_world()
        with warnings.catch_warnings(record=True) as told:
            config = load_config(config_file, overrides)
        check_restarts(config.output_dir)
        resume = resume or is_restarted()
        from .trainer import Trainer  # takes longer to import than a wrong key should to be told

        trainer = Trainer(config, run_name=Path(config_file).stem, resume=resume)
        if trainer.summary is not None:  # of a run that is finished
            leave_world()
            return 0
        note_begun()
        for text in dict.fromkeys(str(each.message) for each in told):
            if trainer.step == 0:  # else it is in warnings.jsonl
                trainer.journal.warn(0, f"warning: {text}")
        trainer.train()
    except Stopped as stopped:
        return _stop(stopped)
    except (Exception, KeyboardInterrupt) as error:
        run = None if trainer is None else trainer.run.path
        return _fail(error, config_file, run, resume=resume)
    leave_world()
    return 0


def _stop(stopped: Stopped) -> int:
    """Tell of a run that was asked to stop; all processes are here, and end together."""
    from .distributed import joined_world, leave_world, record_failure

    world = joined_world()
    if world.size > 1:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, once one of them has ended
    if world.is_main:
        complain(stopped)
    record_failure(str(stopped))
    world.gather(None)  # what the first process has to close is closed by now
    if world.size > 1:
        sys.stderr.flush()
        os._exit(exit_status(stopped))
    leave_world()
    return exit_status(stopped)


def _fail(
    error: Exception | KeyboardInterrupt, config_file: str, run: Path | None, *, resume: bool
) -> int:
    """Tell of what has ended a run, if no other process has failed before; return the status.

    Args:
        error: it.
        config_file: of the run.
        run: its directory; None: it has not begun.
        resume: it may have been written before, and be changed before it goes on.
    """
    from .distributed import (
        is_first_to_fail,
        joined_world,
        leave_world,
        lost_peer,
        record_failure,
    )

    world = joined_world()
    if world.size > 1:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # nothing may keep it from being told
    status, text = _outcome(error, begun=run is not None, resume=resume)
    lines = [] if run is None else _place(run, again=not isinstance(error, FloatingPointError))
    if text is None and world.size == 1:
        # Before the traceback of what is nobody's input.
        print(*lines, sep="\n", file=sys.stderr)
        raise error
    if isinstance(error, _out_of_memory()):
        lines.insert(
            0,
            f"`fastgrpo plan {config_file}` says what takes memory, and which line of the "
            "configuration would save most",
        )
    text = "".join(traceback.format_exception(error)).rstrip() if text is None else text
    text = text if world.size == 1 else f"rank {world.rank}: {text}"
    first = is_first_to_fail()
    if first:
        complain(text, *lines)
    lost = lost_peer(error)
    if first or not lost:
        record_failure(text)
    # Torchrun takes what it sees end first for the cause, and ends this.
    if (lost or not first) and world.size > 1:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(_PATIENCE)
    if world.size > 1:
        sys.stderr.flush()
        os._exit(status)  # the others are waiting for this one, and it must not wait for them
    leave_world()
    return status


def _outcome(
    error: Exception | KeyboardInterrupt, *, begun: bool, resume: bool
) -> tuple[int, str | None]:
    """Return the exit status and what to say; None: the traceback."""
    from .distributed import joined_world, lost_peer

    if isinstance(error, KeyboardInterrupt):
        forwarded = joined_world().size > 1 and exit_status(error) == 128 + signal.SIGTERM
        what = _TERMINATED if forwarded else "interrupted"
        return exit_status(error), what + (
            "" if begun or resume else " before anything was written"
        )
    if lost_peer(error):
        return 1, _PEER_LOST
    if isinstance(error, ValueError | OSError | ImportError) and not (
        begun or isinstance(error, WriteError)  # a run that is resumed may have changed
    ):
        return 2, str(error)
    from .config import ConfigError
    from .rewards import RewardError
    from .rollout_fn import RolloutError

    theirs = (
        *(ConfigError, WriteError, RewardError, RolloutError),
        *(FloatingPointError, _out_of_memory()),
    )
    return 1, str(error) if isinstance(error, theirs) else None


def _out_of_memory() -> type[Exception]:
    from torch import OutOfMemoryError

    return OutOfMemoryError


def _place(run: Path, *, again: bool) -> list[str]:
    """Say where a run is that has ended, and how it goes on; one without a step leaves nothing.

    Args:
        run: its directory.
        again: it may go on; False: it would end in the same way.
    """
    from .output_dir import is_bare
    from .run_checkpoints import RunCheckpoints

    if not run.is_dir() or is_bare(run):
        return ["nothing was written"]
    checkpoints = RunCheckpoints(run)
    step = checkpoints.last_step()
    how = f"{checkpoints.how_to_go_on} after step {step}"
    return [f"run directory: {run}"] + ([how] if step and again else [])
