"""Where sequences are among the tokens: rows of (B, T), or slices of a packed (N,).

B sequences, T positions, N tokens (B * T, or packed).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Layout:
    """Where the sequences are: rows of (B, T), or slices of a packed (N,) by `cu_seqlens`."""

    def __init__(self, completion_ids: Tensor, cu_seqlens: Tensor | None = None) -> None:
        shape = completion_ids.shape
        if cu_seqlens is not None and not (len(shape) == 1 or (len(shape) == 2 and shape[0] == 1)):
            raise ValueError(
                "cu_seqlens belongs to the packed layout, completion_ids (N,) or (1, N); "
                f"got {tuple(shape)}"
            )
        if len(shape) not in (1, 2):
            raise ValueError(f"completion_ids must be (B, T) or packed (N,), got {tuple(shape)}")
        self.shape = shape
        self.num_tokens = completion_ids.numel()
        # Kernels read it entry after entry.
        self.cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
        self.packed = len(shape) == 1 or cu_seqlens is not None
        if cu_seqlens is not None:
            self.num_sequences = _check_cu_seqlens(cu_seqlens, self.num_tokens, completion_ids)
        else:
            self.num_sequences = None if self.packed else shape[0]

    def tokens_of(self, first: int, last: int) -> tuple[int, int]:
        """Return where the tokens of the sequences from `first` up to `last` begin and end."""
        if self.cu_seqlens is None:
            return first * self.shape[1], last * self.shape[1]
        return int(self.cu_seqlens[first]), int(self.cu_seqlens[last])

    def like_tokens(self, name: str, value: Tensor) -> Tensor:
        """Flatten a value per token to (N,)."""
        shapes = [tuple(self.shape)]
        if self.packed:
            shapes = [(self.num_tokens,), (1, self.num_tokens)]
        if tuple(value.shape) not in shapes:
            raise _shape_error(name, value, shapes)
        return flat(value)

    def per_token(self, name: str, value: Tensor) -> Tensor:
        """Flatten a value per token, or spread one per sequence over its tokens, to (N,)."""
        shape, sequences, tokens = tuple(value.shape), self.num_sequences, self.num_tokens
        if self.is_per_sequence(value):
            return self.spread(value.reshape(-1))
        if self.packed and shape == (tokens, 1):
            return flat(value)
        try:
            return self.like_tokens(name, value)
        except ValueError:
            a_sequence = [] if sequences is None else [(sequences,), (sequences, 1)]
            a_token = [(tokens,), (tokens, 1)] if self.packed else [tuple(self.shape)]
            remedy = "; one value per sequence needs cu_seqlens" if sequences is None else ""
            raise _shape_error(name, value, a_sequence + a_token, remedy) from None

    def spread(self, value_B: Tensor) -> Tensor:
        """Give each token the value of its sequence: (B,) to (N,)."""
        if self.cu_seqlens is None:
            return flat(value_B[:, None].expand(self.shape))
        ends = self.cu_seqlens[1:]
        position = torch.arange(self.num_tokens, device=ends.device, dtype=ends.dtype)
        sequence_of_token = torch.searchsorted(ends, position, right=True)
        return value_B.to(ends.device, non_blocking=True)[sequence_of_token]

    def is_per_sequence(self, value: Tensor) -> bool:
        """Say whether `per_token` would spread this value."""
        shape, sequences = tuple(value.shape), self.num_sequences
        if sequences is None or shape not in ((sequences,), (sequences, 1)):
            return False
        return not self.packed or shape == (sequences,) or sequences != self.num_tokens

    def sum_sequences(self, value_N: Tensor) -> Tensor:
        """Sum a value per token over each sequence: (N,) to (B,); no atomics."""
        assert self.num_sequences is not None
        if self.cu_seqlens is None:
            return value_N.view(self.shape).sum(1)
        lengths_B = self.cu_seqlens.diff().long()
        sums_B = torch.segment_reduce(value_N.double(), "sum", lengths=lengths_B, unsafe=True)
        return sums_B.to(value_N.dtype)


def same_tokens(rows: torch.Size, ids: torch.Size) -> bool:
    """Say whether rows of hidden states or logits belong to ids: (1, N) and (N,) are the same."""
    return len(rows) in (1, 2) and (rows == ids or (1, *rows) == ids or rows == (1, *ids))


def flat(value: Tensor) -> Tensor:
    """Flatten; kernels read token after token, and reshape may return a view with any stride."""
    return value.reshape(-1).contiguous()


def check_device(device: torch.device, **tensors: Tensor | None) -> None:
    """Refuse tensors on another device than the hidden states or logits."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, the rest is on {device}: move it")


def _check_cu_seqlens(cu_seqlens: Tensor, num_tokens: int, ids: Tensor) -> int:
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2 or cu_seqlens.is_floating_point():
        raise ValueError(
            f"cu_seqlens must be (B + 1,) integers, got {tuple(cu_seqlens.shape)} "
            f"{cu_seqlens.dtype}"
        )
    check_device(ids.device, cu_seqlens=cu_seqlens)
    if cu_seqlens.device.type == "cpu":
        first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
        if first != 0 or last != num_tokens or (cu_seqlens.diff() < 0).any():
            raise ValueError(
                f"cu_seqlens must rise from 0 to the number of tokens {num_tokens}, got "
                f"{cu_seqlens.tolist()[:8]} ... {last}"
            )
    return len(cu_seqlens) - 1


def _shape_error(
    name: str, value: Tensor, shapes: Sequence[tuple[int, ...]], remedy: str = ""
) -> ValueError:
    wanted = " or ".join(map(str, shapes))
    return ValueError(f"{name} must have shape {wanted}, got {tuple(value.shape)}{remedy}")
