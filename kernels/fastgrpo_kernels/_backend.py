"""Which row step runs, and how many rows a chunk has."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from types import ModuleType

import torch

MIB = 2**20


def row_backend(backend: str, device: torch.device, dtype: torch.dtype) -> ModuleType:
    """Return `_row_triton` or `_row_torch`, which have the same functions.

    Raises:
        ValueError: an unknown backend, or Triton asked for where it cannot run.
    """
    if backend not in ("auto", "triton", "torch"):
        raise ValueError(f"backend must be 'auto', 'triton' or 'torch', got {backend!r}")
    installed = importlib.util.find_spec("triton") is not None
    if backend == "auto":
        can_triton = device.type == "cuda" and installed and dtype != torch.float64
        backend = "triton" if can_triton else "torch"
        if device.type == "cuda" and not installed:
            # Python shows a warning of one place once.
            warnings.warn("triton is not installed: using the slower torch backend", stacklevel=3)
    if backend == "torch":
        return importlib.import_module("._row_torch", __package__)
    if not installed:
        raise ValueError("backend='triton' needs the package triton: install it or use 'torch'")
    if dtype == torch.float64:
        raise ValueError("backend='triton' computes in float32: use 'torch' for float64 inputs")
    from triton import knobs

    if device.type == "cpu" and not knobs.runtime.interpret:
        raise ValueError(
            "backend='triton' on CPU tensors runs only under TRITON_INTERPRET=1, set before triton "
            "is imported: use 'torch'"
        )
    return importlib.import_module("._row_triton", __package__)


def chunk_rows_for(
    chunk_rows: int | None,
    *,
    num_rows: int,
    hidden_size: int,
    vocabulary: int,
    dtype: torch.dtype,
    logits_dtype: torch.dtype,
    device: torch.device,
    backend: ModuleType,
    with_weight_gradient: bool,
) -> int:
    """Return the rows of a chunk: `chunk_rows`, or what fits the byte budget of the device.

    The budget is 256 MiB on the CPU. On a GPU it is 1/32 of the total memory, between 256 MiB and
    4 GiB, when the gradient of the weight is wanted: each chunk reads the weight and reads and
    writes its fp32 gradient, so few and large chunks are fast. Else 256 MiB. It never depends on
    free memory: results repeat.

    Raises:
        ValueError: `chunk_rows` below 1.
    """
    if chunk_rows is not None:
        check_chunk_rows(chunk_rows)
        return min(chunk_rows, max(num_rows, 1))
    budget = 256 * MIB
    if device.type == "cuda" and with_weight_gradient:
        total = torch.cuda.get_device_properties(device).total_memory
        budget = min(max(total // 32, budget), 4096 * MIB)
    budget -= backend.temporary_bytes(device)
    # Logits, and of each row its hidden state and the fp32 gradient of that.
    row = vocabulary * dtype.itemsize + hidden_size * (dtype.itemsize + 4)
    row += vocabulary * logits_dtype.itemsize if logits_dtype != dtype else 0
    rows = budget // row
    return max(1, min(rows - rows % 16 if rows >= 16 else rows, max(num_rows, 1)))


def check_chunk_rows(chunk_rows: int | None) -> None:
    """Refuse chunks of nothing."""
    if chunk_rows is None:
        return
    if not isinstance(chunk_rows, int):
        raise ValueError(f"chunk_rows must be a whole number, got {chunk_rows}")
    if chunk_rows < 1:
        raise ValueError(f"chunk_rows must be at least 1, got {chunk_rows}")
