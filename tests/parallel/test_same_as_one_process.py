"""Several processes take the very steps of one: loss, metrics, gradients, weights.

The one is a trainer that is not sharded, in this process, on the same batches. Both add the same
numbers in fp32 in different orders: a pass has other sequences, and FSDP2 adds the parts of ranks.
Such roundings are some units in the last place, 6e-8 of what is added. Bars are 3 to 5 times the
largest difference that any case has shown; a sequence that is lost or counted twice, or a mean of
means, differs by 1e-3 and more.

- Metrics, norms and the loss: 1e-5, of sums that cancel to about 0.1 or more, after up to 8 steps.
- Log-probs: 3e-6 where they are about 5, six units in their last place.
- Weights: 1e-6, a ten-thousandth of what AdamW moves them by in a step.
- Means of gradients and of their squares: 5e-5 of the largest in the parameter.

Where products are in bf16, autocast rounds at other places than FSDP2's mixed precision does (norms
and residuals are fp32 for the one, bf16 for the other). Sums of such roundings, 4e-3 of each term,
make 3 % of what a weight moves by and 6 % of a mean of squares, in the root mean square. That these
are roundings of the passes, and none of what ranks add, another test shows.
"""

from __future__ import annotations

import functools
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import end, popen, torchrun
from step_cases import ALL, MIXED, run
from torch import Tensor

RANKS = Path(__file__).parent / "ranks.py"
FEW = ("essential", "copies")
"""Groups that every mesh runs; but for "steps" others depend on there being several processes."""

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="both sides of the comparison are computed on the CPU"
)


@functools.cache
def by_one(group: str, name: str) -> dict[str, Any]:
    """Run a case in this process."""
    with tempfile.TemporaryDirectory() as directory:
        return run(ALL[group][name], Path(directory))


def compare(directory: Path, size: int, *jobs: str) -> None:
    """Run the cases of some groups by so many processes, and those of each by one meanwhile."""
    several = popen(size, RANKS, *jobs, directory)
    try:
        wanted = [
            (job, name, by_one(group, name))
            for job in jobs
            for group in [job.partition(":")[0]]
            for name in ALL[group]
        ]
        out, err = several.communicate(timeout=900)
    finally:
        end(several)
    assert several.returncode == 0, out + err
    for job, name, one in wanted:
        found = torch.load(directory / f"{job} {name}.pt")
        rough = ALL[job.partition(":")[0]][name].bf16
        problems = list(differences(found, one, rough=rough))
        assert not problems, "\n".join([f"{job} {name}", *problems])


def differences(
    found: dict[str, Any], wanted: dict[str, Any], *, rough: bool = False
) -> Iterator[str]:
    """Yield what is not the same, in words.

    Args:
        found: of several processes.
        wanted: of one.
        rough: but for roundings to bf16.
    """
    for i, (ours, theirs) in enumerate(zip(found["steps"], wanted["steps"], strict=True), 1):
        if others := (ours.keys() ^ theirs.keys()) - {"parallel/imbalance"}:
            yield f"step {i} has {sorted(others)} for one of them only"
        for name in theirs.keys() - {"memory/peak_gib", "parallel/imbalance"}:
            if not near(ours[name], theirs[name], 1e-2 if rough else 1e-5):
                yield f"step {i}: {name} is {ours[name]}, not {theirs[name]}"
    for i, (ours, theirs) in enumerate(zip(found["logps"], wanted["logps"], strict=True)):
        if (ours is None) != (theirs is None):
            yield f"log-probs {i} are there for one of them only"
        elif ours is not None and (error := (ours - theirs).abs().max()) > (0.1 if rough else 3e-6):
            yield f"log-probs {i} differ by {error}"
    for what, exact, share in (("moved", 1e-6, 0.1), ("moments", None, 0.2)):
        if found[what].keys() != wanted[what].keys():
            yield f"{what}: {sorted(found[what].keys() ^ wanted[what].keys())} for one of them only"
        for name, theirs in wanted[what].items():
            error = found[what][name].float() - theirs.float()
            if rough:
                size, bar = rms(error), share * rms(theirs)
            else:
                size = float(error.abs().max())
                bar = exact or 5e-5 * float(theirs.abs().max())
            if not size <= bar:
                yield f"{what} of {name} differ by {size}, more than {bar}"


def rms(x: Tensor) -> float:
    return float(x.float().square().mean().sqrt())


def near(found: float, wanted: float, bar: float) -> bool:
    """Say whether two numbers are the same but for roundings; NaN and infinity exactly."""
    if math.isfinite(wanted):
        return abs(found - wanted) <= bar * (abs(wanted) + 0.1)
    return found == wanted or (math.isnan(found) and math.isnan(wanted))


def test_two_processes_take_the_steps_of_one(tmp_path: Path) -> None:
    compare(tmp_path, 2, "essential:1x2", "copies:2x1")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "meshes", "more"),
    [(1, ["1x1"], []), (2, ["2x1"], []), (4, ["1x4", "2x2", "4x1"], ["steps:2x2"])],
)
def test_the_essential_cases_on_every_mesh(
    tmp_path: Path, size: int, meshes: list[str], more: list[str]
) -> None:
    compare(tmp_path, size, *(f"{group}:{mesh}" for mesh in meshes for group in FEW), *more)


@pytest.mark.slow
def test_every_case_on_two_processes(tmp_path: Path) -> None:
    compare(tmp_path, 2, *(f"{group}:1x2" for group in ALL if group != "mixed"))


@pytest.mark.slow
def test_ranks_add_in_fp32_what_passes_have_rounded_to_bf16(tmp_path: Path) -> None:
    """One sharded process does the same passes: in bf16 a sum of ranks would be 4e-3 off."""
    for size, mesh in ((1, "1x1"), (4, "2x2")):
        done = torchrun(size, RANKS, f"mixed:{mesh}", tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
    for name in MIXED:
        found, wanted = (torch.load(tmp_path / f"mixed:{x} {name}.pt") for x in ("2x2", "1x1"))
        problems = list(differences(found, wanted))
        assert not problems, "\n".join([name, *problems])
