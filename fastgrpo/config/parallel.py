"""How several processes share a run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from ..readable import shown


@dataclass(frozen=True, kw_only=True)
class ParallelOptions:
    """The part of a `TrainConfig` that is about more than one GPU."""

    parallel: Literal["ddp"] | dict[str, int] | None = None
    """Under torchrun: {data: N, shard: M} shards the model over M processes and copies that N times
    (HSDP), ddp is shard: 1. None: sharded within a machine, copied between machines."""

    @property
    def num_processes(self) -> int:
        """Processes that share a step: as `parallel` says, else as many as torchrun has started."""
        if isinstance(self.parallel, dict):
            return self.data_size * self.shard_size
        return int(os.environ.get("WORLD_SIZE", "1"))

    @property
    def data_size(self) -> int:
        """Copies of the model."""
        return self._size("data")

    @property
    def shard_size(self) -> int:
        """Processes that have a part of each copy."""
        return self._size("shard")

    def parallel_problems(self) -> Iterator[str]:
        """Yield what is wrong with these values."""
        sizes = self.parallel
        if isinstance(sizes, dict) and (
            set(sizes) != {"data", "shard"}
            or any(type(n) is not int or n < 1 for n in sizes.values())
        ):
            yield (
                f"parallel: must be ddp, or {{data: N, shard: M}} with whole numbers from 1 on, "
                f"got {shown(sizes)}"
            )

    def _size(self, axis: str) -> int:
        size = self.parallel.get(axis) if isinstance(self.parallel, dict) else None
        return size if isinstance(size, int) and size > 0 else 1


def resolve_parallel(
    parallel: Literal["ddp"] | dict[str, int] | None, num_processes: int, per_machine: int
) -> dict[str, int]:
    """Return how many copies of the model there are, and over how many processes each is sharded.

    Args:
        parallel: the option.
        num_processes: of the run.
        per_machine: of them on each machine.

    Raises:
        ValueError: the option is made for another number of processes.
    """
    if parallel is None:
        shard = per_machine if num_processes % per_machine == 0 else num_processes
        return {"data": num_processes // shard, "shard": shard}
    if parallel == "ddp":
        return {"data": num_processes, "shard": 1}
    needed = parallel["data"] * parallel["shard"]
    if needed != num_processes:
        raise ValueError(
            f"parallel: data {parallel['data']} times shard {parallel['shard']} are {needed} "
            f"processes, and there {'is' if num_processes == 1 else 'are'} {num_processes}; start "
            f"the run with torchrun --nproc-per-node {needed}, or leave parallel out"
        )
    return parallel
