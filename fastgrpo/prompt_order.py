"""In which order prompts are visited, and the random numbers that belong to each."""

from __future__ import annotations

import hashlib
from typing import Any, Literal

import torch


class PromptSampler:
    """An endless order over row indices: every epoch visits every row once.

    The order depends on (num_rows, seed, epoch) alone, so that (epoch, index) is all the state.

    Args:
        num_rows: rows of the dataset.
        seed: of the permutations.
        shuffle: a fresh permutation every epoch; otherwise the order of the dataset.
    """

    def __init__(self, num_rows: int, seed: int, shuffle: bool = True) -> None:
        if num_rows < 1:
            raise ValueError(f"num_rows must be at least 1, got {num_rows}")
        self._num_rows, self._seed, self._shuffle = num_rows, seed, shuffle
        self._start(0, 0)

    @property
    def num_taken(self) -> int:
        """Rows taken so far, those of earlier epochs included."""
        return self._epoch * self._num_rows + self._index

    @property
    def epoch(self) -> float:
        """Passes over the dataset so far, 1.5 in the middle of the second."""
        return self._epoch + self._index / self._num_rows

    def take(self, n: int) -> list[int]:
        """Return the next `n` row indices; those of two epochs may meet in one call."""
        taken: list[int] = []
        while len(taken) < n:
            if self._index == self._num_rows:
                self._start(self._epoch + 1, 0)
            stop = min(self._index + n - len(taken), self._num_rows)
            taken += self._order[self._index : stop]
            self._index = stop
        return taken

    def state_dict(self) -> dict[str, int]:
        """Return the position, plain integers."""
        return {"epoch": self._epoch, "index": self._index}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue at a position that `state_dict` returned."""
        if not 0 <= state["index"] <= self._num_rows:
            raise ValueError(
                f"the saved position is row {state['index']} but there are {self._num_rows} rows; "
                "resume with the dataset of the saved run"
            )
        self._start(state["epoch"], state["index"])

    def _start(self, epoch: int, index: int) -> None:
        self._epoch, self._index = epoch, index
        self._order: list[int] = list(range(self._num_rows))
        if self._shuffle:
            generator = torch.Generator().manual_seed(hashed_seed(self._seed, epoch))
            permutation: Any = torch.randperm(self._num_rows, generator=generator)
            self._order = permutation.tolist()


def prompt_seeds(seed: int, first: int, count: int, purpose: Literal["train", "eval"]) -> list[int]:
    """Return the seeds of some prompts, one after the other, as `Rollout.generate` takes them.

    They depend on nothing else, so that a prompt's completions are the same whatever is sampled
    with them and wherever a run begins.

    Args:
        seed: of the run.
        first: the number of the first prompt among all that the run draws, from 0.
        count: prompts.
        purpose: training and evaluation have random numbers of their own.
    """
    return [hashed_seed(purpose, seed, n) for n in range(first, first + count)]


def hashed_seed(*words: object) -> int:
    """Return a seed for `torch.manual_seed`, from 0 to 2**62 - 1, that hashes some words.

    Sums would meet: seed + epoch is the same for the second epoch of seed 0 and the first of 1.
    """
    digest = hashlib.sha256(" ".join(map(str, words)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 2
