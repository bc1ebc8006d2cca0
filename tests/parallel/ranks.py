"""One of several processes that take the steps of `step_cases`; started by torchrun.

`torchrun --nproc-per-node 2 tests/parallel/ranks.py GROUP:DATAxSHARD... DIRECTORY`: the first rank
writes what came out of each case of each group on each mesh to DIRECTORY.
"""

from __future__ import annotations

import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from step_cases import ALL, run

from fastgrpo.distributed import World, join_world, leave_world


def assert_agree(found: dict[str, Any], world: World, shard: int) -> None:
    """What ranks say of a step is the same to the last bit, and so is what copies hold."""
    steps, logps, parts = found["steps"], found["logps"], found["parts"]
    for others in world.gather((repr(steps), logps)):  # NaN is no equal of itself
        assert others[0] == repr(steps), (others[0], steps)
        for own, other in zip(logps, others[1], strict=True):
            assert (own is None and other is None) or torch.equal(own, other)
    held = world.gather(parts)
    for own, other in zip(parts, held[world.rank % shard], strict=True):
        assert torch.equal(own, other)


def main(jobs: list[str], directory: Path) -> None:
    world = join_world()
    for job in jobs:
        group, _, mesh = job.partition(":")
        data, shard = map(int, mesh.split("x"))
        for name, case in ALL[group].items():
            start = time.perf_counter()
            where = directory / f"{job} {name}".replace(":", " ").replace(",", "")
            found = run(case, where, {"data": data, "shard": shard}, world.size)
            assert_agree(found, world, shard)
            if world.is_main:
                del found["parts"]
                torch.save(found, directory / f"{job} {name}.pt")
                print(f"{job} {name}: {time.perf_counter() - start:.2f} s", flush=True)
    leave_world()


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # and memory that is not initialised is NaN
    warnings.simplefilter("error")
    main(sys.argv[1:-1], Path(sys.argv[-1]))
