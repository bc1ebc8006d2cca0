"""In which order rows are computed, and which of them together.

B sequences, N tokens, C rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ._inputs import ACTIVE, MASKED, TokenBatch

Run = tuple[int, int]  # from where to before where


class WholeSequences(NamedTuple):
    """Rows that fit in a chunk and are all counted rows of their sequences."""

    rows: Run  # in the order of the plan
    sequences: Run  # those between that have no row here are no part of it


class RowPlan:
    """Rows in the order they are computed: with a gradient, then for their statistics only.

    Reads from the device once what cannot be known without it: how many rows of either kind there
    are, of each sequence if its rows are coupled. Not at all with `skip_rows=False` or while a CUDA
    graph is captured: then every row is computed, masked ones too.
    """

    def __init__(
        self,
        batch: TokenBatch,
        *,
        wants_gradient: bool,
        only_active: bool,
        skip_rows: bool,
        coupled: bool,
    ) -> None:
        self.state_N, self.layout = batch.state_N, batch.layout
        self.order_N: Tensor | None = None  # of the tokens; None: as they are
        self._device, total = batch.ids_N.device, self.layout.num_tokens
        capturing = self.state_N.is_cuda and torch.cuda.is_current_stream_capturing()
        self.skips = skip_rows and not capturing
        active_N, counted_N = self.state_N == ACTIVE, self.state_N != MASKED
        self._lengths_B: Tensor | None = None  # rows with a gradient, if known here
        self._lengths: list[int] = []
        if not self.skips:
            num_active = num_counted = total
            if coupled:
                self._lengths = self._all_lengths()
        elif coupled:
            self._lengths_B = self._per_sequence(active_N)
            both = torch.stack([self._lengths_B, self._per_sequence(counted_N)]).tolist()
            self._lengths, num_active, num_counted = both[0], sum(both[0]), sum(both[1])
        else:
            num_active, num_counted = torch.stack([active_N.sum(), counted_N.sum()]).tolist()
        self.num_gradient = num_active if wants_gradient else 0
        self.num_computed = num_active if only_active and self.skips else num_counted
        if self.num_computed < total or 0 < self.num_gradient < total:
            self._order(self.state_N)

    @property
    def gradient(self) -> Run:
        """Rows with a gradient."""
        return 0, self.num_gradient

    @property
    def statistics(self) -> Run:
        """Rows without."""
        return self.num_gradient, self.num_computed

    def whole_sequences(self, chunk: int) -> tuple[list[WholeSequences], Run]:
        """Cut the rows with a gradient at the ends of sequences.

        Returns:
            Chunks of at most `chunk` rows, and the rows of sequences that are longer.
        """
        if not self.num_gradient:
            return [], (0, 0)
        fits = [length <= chunk for length in self._lengths]
        if not all(fits) or not fits:
            if self._lengths_B is None:
                return [], self.gradient
            fits_N = self.layout.spread(self._lengths_B <= chunk)
            self._order(self.state_N * 2 + ((self.state_N == ACTIVE) & fits_N))
        whole: list[WholeSequences] = []
        start = end = first = 0
        for i, length in enumerate(self._lengths):
            if not fits[i] or not length:
                continue
            if end + length - start > chunk:
                whole.append(WholeSequences((start, end), (first, i)))
                start = end
            if end == start:
                first = i
            end += length
        if end > start:
            whole.append(WholeSequences((start, end), (first, len(fits))))
        return whole, (end, self.num_gradient)

    def _order(self, rank_N: Tensor) -> None:
        self.order_N = rank_N.argsort(descending=True, stable=True).to(
            self._device, non_blocking=True
        )

    def _per_sequence(self, some_N: Tensor) -> Tensor:
        return self.layout.sum_sequences(some_N.long())

    def _all_lengths(self) -> list[int]:
        """Return the tokens of each sequence, or nothing where only the device knows."""
        cu_seqlens = self.layout.cu_seqlens
        if cu_seqlens is None:
            assert self.layout.num_sequences is not None
            return [self.layout.shape[1]] * self.layout.num_sequences
        return cu_seqlens.diff().tolist() if cu_seqlens.device.type == "cpu" else []


def pieces(run: Run, size: int) -> Iterator[Run]:
    """Cut a run into pieces of at most `size`."""
    for start in range(run[0], run[1], size):
        yield start, min(start + size, run[1])
