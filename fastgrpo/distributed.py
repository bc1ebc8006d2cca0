"""Several processes that share a run: who they are, and what they tell each other.

Every rank holds the whole batch of a step and runs its own part of the passes; what is decided from
the batch (advantages, denominators, who runs what) is decided by each rank in the same way.
"""

from __future__ import annotations

import json
import os
import pickle
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

_c10d: Any = dist.distributed_c10d
T = TypeVar("T")

_TIMEOUT = timedelta(hours=2)
"""For the slowest rank to sample and judge its completions. A rank that has died is no matter of
this: torchrun ends the others at once."""
_LOST = (  # of Gloo and of NCCL
    *("Connection closed by peer", "Connection reset by peer", "Broken pipe"),
    "remote process exited",
)


@dataclass(frozen=True)
class World:
    """The processes of a run; by default this one alone."""

    rank: int = 0
    size: int = 1
    joined: bool = False
    """Torchrun has started it, be it alone."""

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """Return this rank's part of so many things; parts differ by one at most."""
        return range(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks, in their order; all call it."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def on_main(self, function: Callable[[], T]) -> T:
        """Call a function on the first rank alone; what it returns or raises, all ranks do."""
        if self.size == 1:
            return function()
        box: list[Any] = [None, None]
        own = None
        if self.is_main:
            try:
                box[0] = function()
            except Exception as error:
                own, box[1] = error, sendable(error)
        dist.broadcast_object_list(box, src=0)
        if error := own or box[1]:
            raise error
        return box[0]

    def on_each(self, function: Callable[[], object]) -> None:
        """Call a function on all ranks; what any of them raises, all do."""
        own = None
        try:
            function()
        except Exception as error:
            own = error
        if error := next(filter(None, self.gather(own and sendable(own))), None):
            raise own or error

    def one_by_one(self, function: Callable[[], T]) -> T:
        """Call a function on the first rank of each machine, and then on the others.

        So that what is downloaded is downloaded once.
        """
        if self.size == 1:
            return function()
        first = int(os.environ.get("LOCAL_RANK", self.rank)) == 0
        result = function() if first else None
        self.gather(None)
        return result if first else function()  # pyright: ignore[reportReturnType]

    def largest(self, number: int) -> int:
        """Return the largest of the numbers that all ranks call it with."""
        if self.size == 1:
            return number
        box = torch.tensor(number)
        dist.all_reduce(box, dist.ReduceOp.MAX)
        return int(box)

    def sum_(self, x: Tensor) -> Tensor:
        """Add the tensors of all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(x)
        return x


def join_world() -> World:
    """Join the processes that torchrun has started; without it, this process is the world.

    Raises:
        ValueError: torchrun has started more processes on this machine than it has GPUs.
    """
    if not dist.is_initialized():
        if not dist.is_torchelastic_launched() and int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return World()
        on_gpu = torch.cuda.is_available()
        store, rank, size = next(rendezvous("env://", timeout=_TIMEOUT))
        # Of processes that are restarted PyTorch 2.13 leaves the keys, with addresses, in place.
        store = _c10d.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            store=store,
            rank=rank,
            world_size=size,
            timeout=_TIMEOUT,
        )
        if on_gpu:
            _take_gpu()
    return joined_world()


def joined_world() -> World:
    """Return the processes that have been joined, this one alone if there are no others."""
    if not dist.is_initialized():
        return World()
    return World(dist.get_rank(), dist.get_world_size(), joined=True)


def _take_gpu() -> None:
    """Compute on the GPU of this process, which has one for itself."""
    there, processes = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if processes > there:
        raise ValueError(
            f"torchrun has started {processes} processes on a machine with {there} "
            f"GPU{'s' if there > 1 else ''}: lower --nproc-per-node to {there}"
        )
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))


def leave_world() -> None:
    """Leave in peace; a rank that fails just ends."""
    if dist.is_initialized():
        dist.destroy_process_group()


def processes_per_machine(world: World) -> int:
    """Return the processes that torchrun has started on each machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world.size))


def is_first_to_fail() -> bool:
    """Say, once this process fails, whether no other has before: the others fail for its sake."""
    if not dist.is_initialized():
        return True
    try:
        return _store().add("fastgrpo/failures", 1) == 1
    except (RuntimeError, dist.DistError):  # torchrun itself has gone
        return dist.get_rank() == 0


def record_failure(text: str) -> None:
    """Tell torchrun what has ended this process, for its summary."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        failure = {"message": text, "timestamp": int(time.time())}
        Path(path).write_text(json.dumps(failure), encoding="utf-8")


def lost_peer(error: BaseException) -> bool:
    """Say whether a collective has failed because another process is no longer there."""
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _LOST)


def note_begun() -> None:
    """Let processes that torchrun starts in place of these know that the run had begun."""
    if dist.is_initialized():
        _store(of_all_attempts=True).set("fastgrpo/begun", "yes")


def is_restarted() -> bool:
    """Say whether torchrun has started these processes again, after the run had begun.

    If it had not, what is in its directory is another run's.
    """
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) == 0 or not dist.is_initialized():
        return False
    return _store(of_all_attempts=True).check(["fastgrpo/begun"])


def _store(*, of_all_attempts: bool = False) -> Any:
    """Return what processes share through torchrun: keys are those of one attempt, or of all."""
    store = _c10d._get_default_store()
    while of_all_attempts and isinstance(store, _c10d.PrefixStore):
        store = store.underlying_store
    return store


def sendable(error: Exception) -> Exception:
    """Return an exception that other processes can raise too: it, or one that says the same."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def deal(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Divide sequences among ranks: the longest first, in turns that go to and fro.

    Ranks get as many sequences as each other, or one more, and about as many tokens.

    Args:
        lengths: tokens of each sequence.
        size: the ranks.

    Returns:
        The sequences of each rank, by their place in `lengths`.
    """
    hands: list[list[int]] = [[] for _ in range(size)]
    for turn, i in enumerate(sorted(range(len(lengths)), key=lambda i: -lengths[i])):
        there, place = divmod(turn, size)
        hands[place if there % 2 == 0 else size - 1 - place].append(i)
    return [sorted(hand) for hand in hands]
