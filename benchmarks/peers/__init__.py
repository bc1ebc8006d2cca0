"""The peers: one thin adapter a file, each importing its package only when it is asked to.

An adapter says why it cannot run here, and gives the methods it has. A method takes the inputs of a
cell to a loss with its graph (`op` "linear" and "logits") or to log-probs ("logps").
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from fastgrpo_kernels import GRPOLossConfig

from ..cells import Cell, Inputs

NAMES = (
    "fastgrpo", "naive", "compiled", "trl", "liger_triton", "liger_linear", "liger_sm90", "cce",
    "verl",
)  # fmt: skip

CONFIG = GRPOLossConfig(loss_type="dapo", epsilon_low=0.2, epsilon_high=0.28)
"""The loss that every peer computes."""


@dataclass(frozen=True)
class Method:
    """One way of a peer to compute what a cell asks for."""

    name: str
    ops: tuple[str, ...]
    call: Callable[[Inputs], Tensor]
    products: Callable[[Cell], int] | None = None
    """FLOPs in units of 2NHV, where the products run inside of kernels and nobody counts them."""
    extra_position: bool = False
    """The method wants logits (B, T + 1, V) and ignores the last position."""
    chunk_rows: Callable[[Cell, str], int] | None = None
    """Rows whose logits exist at a time, on a device, where one can ask."""
    tolerance: float = 4.0
    """How many times naive PyTorch's error, in the same type, an error may be and not be wrong."""


def load(name: str) -> ModuleType:
    """Return the adapter of a peer.

    It has `METHODS`, and two functions that say why it cannot run on a device, or None:
    `absent(device)`, which imports nothing, and `unavailable(device)`, which does.
    """
    return importlib.import_module(f".{name}", __package__)


def absent(name: str, device: str) -> str | None:
    """Say why a peer cannot run on a device, as far as one can tell without importing it."""
    return load(name).absent(device)


def missing(*packages: str) -> str | None:
    """Say that a package is not installed, if one is not."""
    absent = any(importlib.util.find_spec(package) is None for package in packages)
    return "not installed" if absent else None


def needs_gpu(device: str) -> str | None:
    """Say that a device is no GPU, if it is not."""
    return None if device == "cuda" else "failed: needs a GPU"


def broken(imports: Callable[[], object]) -> str | None:
    """Say why what is installed cannot be imported, if it cannot."""
    try:
        imports()
    except Exception as error:  # other people's packages fail to import in every way there is
        return failure(error)
    return None


def failure(error: Exception) -> str:
    """Return the status of a peer that failed."""
    text = (str(error).splitlines() or [""])[0][:200]
    return f"failed: {type(error).__name__}: {text}"


def recomputes(cell: Cell) -> int:
    """Products of a method that computes the logits again in backward."""
    return 1 if cell.op == "logps" else 3 if cell.frozen else 4


def recomputes_always(cell: Cell) -> int:
    """Products of a method that also computes the gradient of a frozen head, and drops it."""
    return 1 if cell.op == "logps" else 4


def torch_loss(logps: Tensor, inputs: Inputs) -> Tensor:
    """Return DAPO's loss from log-probs (B, T), as one writes it in PyTorch."""
    advantages = inputs.advantages[:, None]
    ratio = torch.exp(logps - inputs.old_logps)
    low, high = 1 - CONFIG.epsilon_low, 1 + CONFIG.epsilon_high
    loss = -torch.min(ratio * advantages, ratio.clamp(low, high) * advantages)
    return (loss * inputs.mask).sum() / inputs.mask.sum()
