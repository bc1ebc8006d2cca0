"""What the public functions refuse, before anything is computed."""

from __future__ import annotations

import numbers
import os

import torch
from torch import Tensor

from ._layout import same_tokens
from .config import Number


def check_ids(
    ids_N: Tensor, mask_N: Tensor | None, vocabulary: int, name: str = "completion_ids"
) -> None:
    """Refuse ids that count and are outside the vocabulary; on a GPU if FASTGRPO_DEBUG is set."""
    if ids_N.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{name} must be int64, got {ids_N.dtype}")
    if ids_N.device.type != "cpu" and not os.environ.get("FASTGRPO_DEBUG"):
        return
    wrong = (ids_N < 0) | (ids_N >= vocabulary)
    if mask_N is not None:
        wrong &= mask_N
    if wrong.any():
        where = int(wrong.nonzero()[0])
        raise ValueError(
            f"{name} holds {int(ids_N[where])} at token {where}, outside [0, {vocabulary}):"
            " mask it, or use the tokenizer that belongs to this head"
        )


def check_tensor(**tensors: object) -> None:
    """Refuse what is no tensor, a module for example."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            remedy = ": pass its .weight" if isinstance(tensor, torch.nn.Module) else ""
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}{remedy}")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse a word that is none of those known."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def check_statistics(statistics: str, skip_rows: bool) -> None:
    """Refuse to skip rows and not to skip them."""
    check_choice("statistics", statistics, ("all", "active"))
    if statistics == "active" and not skip_rows:
        raise ValueError("statistics='active' skips rows: it needs skip_rows=True")


def check_number(**given: Number | None) -> None:
    """Refuse a denominator that is negative, not finite or not 0-d."""
    for name, number in given.items():
        if isinstance(number, Tensor):
            if number.numel() != 1:
                raise ValueError(f"{name} must be a number, got shape {tuple(number.shape)}")
        elif number is None:
            continue
        elif not isinstance(number, numbers.Real) or not 0 <= float(number) < float("inf"):
            raise ValueError(f"{name} must be a finite number, 0 or more, got {number}")


def check_inplace(logits: Tensor) -> None:
    base = logits._base if logits._is_view() else None  # pyright: ignore[reportPrivateUsage]
    if logits.is_leaf or (base is not None and base.is_leaf and base.requires_grad):
        raise ValueError(
            "inplace=True would overwrite a leaf that requires its gradient: use inplace=False"
        )
    if 0 in logits.stride()[:-1] and logits.numel():
        raise ValueError(
            f"inplace=True would write rows that share memory (strides {logits.stride()}): use "
            "inplace=False"
        )


def check_logits(logits: Tensor, ids: Tensor) -> None:
    check_tensor(logits=logits, ids=ids)
    if not same_tokens(logits.shape[:-1], ids.shape):
        raise ValueError(
            f"logits must be {(*ids.shape, 'V')} for ids {tuple(ids.shape)}, "
            f"got {tuple(logits.shape)}"
        )
    if not logits.is_floating_point():
        raise ValueError(f"logits must be floating-point, got {logits.dtype}")
    if logits.stride(-1) != 1:
        raise ValueError(
            f"logits must have stride 1 along the vocabulary, got strides {logits.stride()}: "
            "call .contiguous()"
        )
