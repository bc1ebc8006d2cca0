"""Start processes with torchrun, as a user does, and end them all if they take too long."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PYTHONPATH = [ROOT, ROOT / "kernels", ROOT / "tests", ROOT / "tests" / "parallel"]


def popen(n: int, *arguments: Any, env: dict[str, str] | None = None, **options: Any):
    """Start n processes; their output comes through pipes.

    Args:
        n: how many.
        arguments: of torchrun: its options, a script or `-m` and a module, and what these take.
        env: variables beside those of this process.
        options: of `subprocess.Popen`.
    """
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", str(n), *map(str, arguments)),
        ],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, PYTHONPATH)),
            "OMP_NUM_THREADS": "1",
            **(env or {}),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def torchrun(
    n: int, *arguments: Any, timeout: float = 300, env: dict[str, str] | None = None, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run n processes to their end, see `popen`.

    Raises:
        subprocess.TimeoutExpired: they took longer; none of them is left.
    """
    process = popen(n, *arguments, env=env, **options)
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired as late:
        end(process)
        late.stdout, late.stderr = process.communicate()
        raise
    except BaseException:
        end(process)
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def end(process: subprocess.Popen[str]) -> None:
    """End torchrun and all that it has started, which are process groups of their own."""
    process.terminate()  # torchrun ends the others, with SIGKILL those that do not obey in 30 s
    try:
        process.wait(timeout=40)
    except subprocess.TimeoutExpired:
        process.kill()
