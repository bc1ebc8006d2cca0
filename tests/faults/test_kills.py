"""Runs that are killed again and again end as one that never was; see killed_runs.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="forks a process that has its imports"),
]
HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def kill(folder, how):
    """Return how often runs were killed; all that is asserted of them held."""
    paths = (ROOT, ROOT / "kernels", ROOT / "tests")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "killed_runs.py"), str(folder), how]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    return int(done.stdout.split()[-1])


@pytest.mark.fault(
    "kill -9 at 25 random times",
    "every checkpoint there is is whole, no line is torn or doubled, and the runs end bit by bit "
    "as one that was never killed",
)
def test_kills_at_random_times(tmp_path):
    assert kill(tmp_path, "random") >= 25


@pytest.mark.fault(
    "kill -9 in the midst of lines, and at every stage of writing and deleting checkpoints",
    "the same: the run ends bit by bit as one that was never killed",
)
def test_kills_that_are_aimed(tmp_path):
    assert kill(tmp_path, "aimed") >= 25
