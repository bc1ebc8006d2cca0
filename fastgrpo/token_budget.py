"""The tokens of a pass, and what happens when they do not fit in memory.

What was tried is tried again with half as many in each pass, from its beginning: packing does not
change what a step computes, so nothing is lost but time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch

from .batch import Batch
from .config import TrainConfig
from .distributed import World
from .gradient import Passes, depends_on_passes, divide
from .shortage import free_memory, shortage

T = TypeVar("T")


class TokenBudget:
    """Divides batches among passes, and makes passes smaller when memory runs out in one."""

    def __init__(self, config: TrainConfig, world: World, *, packed: bool) -> None:
        """Begin with what is configured.

        Args:
            config: the run.
            world: its processes.
            packed: sequences are not padded to the longest.
        """
        self.config, self.world, self.packed = config, world, packed
        self.max_tokens = config.max_tokens_per_microbatch
        """Of a pass; None: it has per_device_train_batch_size sequences."""
        self._problems: list[str] = []

    @property
    def lowered(self) -> bool:
        """Whether memory has run out."""
        return self.max_tokens != self.config.max_tokens_per_microbatch

    def passes(self, batch: Batch) -> Passes:
        """Divide a batch among the ranks, and what falls to each among its passes."""
        return divide(
            batch, self.config, self.world, max_tokens=self.max_tokens, packed=self.packed
        )

    def run(self, batch: Batch, run: Callable[[Passes, Iterable[list[int]]], T]) -> T:
        """Run the passes of a batch; with smaller ones, if memory runs out.

        Args:
            batch: what is divided.
            run: takes all passes, and those of this rank to be run in turn; called again it begins
                from its beginning.

        Raises:
            torch.OutOfMemoryError: passes cannot be made smaller; says why, and what to do.
        """
        while True:
            passes, running = self.passes(batch), list[list[int]]()

            def noted(own: list[list[int]], running: list[list[int]]) -> Iterator[list[int]]:
                for rows in own:
                    running[:] = [rows]
                    yield rows

            try:
                return run(passes, noted(passes.of(self.world.rank), running))
            except Exception as error:
                said = shortage(error)
                if said is None or not running:
                    raise
            # The exception is gone here, and with it the frames that held the pass.
            self._halve(batch, running[0], said)
            free_memory()

    def _halve(self, batch: Batch, rows: list[int], said: str) -> None:
        """Allow half the tokens of a pass that did not fit."""
        lengths = [batch.lengths[i] for i in rows] or [min(batch.lengths)]
        tokens = sum(lengths) if self.packed else max(lengths) * len(lengths)
        many = len(lengths) > 1
        what = f"{len(lengths)} sequences" if many else "one sequence"
        failed = f"out of memory in a pass of {what}, {tokens:,} tokens ({said})"
        if depends_on_passes(self.config):
            raise torch.OutOfMemoryError(
                f"{failed}, and the loss depends on what is in a pass, so that it cannot be made "
                "smaller on the way: lower per_device_train_batch_size"
            )
        if not many:
            raise torch.OutOfMemoryError(
                f"{failed}, which cannot be divided: lower max_completion_length, or write one of "
                "the lines that save memory"
            )
        if self.world.size > 1:
            raise torch.OutOfMemoryError(
                f"{failed}, which one of several processes cannot repeat alone: write "
                f"max_tokens_per_microbatch={tokens // 2}"
            )
        self.max_tokens = tokens // 2
        self._problems.append(
            f"{failed}: from now on passes have at most {self.max_tokens:,}; "
            f"max_tokens_per_microbatch={self.max_tokens} says so from the start"
        )

    def take_problems(self) -> list[str]:
        """Return what went wrong since the last time, a sentence each."""
        problems, self._problems = self._problems, []
        return problems

    def state_dict(self) -> dict[str, Any]:
        """Return what has changed since the start of the run."""
        return {"max_tokens": self.max_tokens if self.lowered else None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was called, or with what is configured now if that is less."""
        now = [n for n in (self.max_tokens, state["max_tokens"]) if n is not None]
        self.max_tokens = min(now, default=None)
