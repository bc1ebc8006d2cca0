"""Memory that has run out: what says so, and how what was held is given back."""

from __future__ import annotations

import gc

import torch

_SAID = (  # of PyTorch's allocator on a CPU, and of cuBLAS, which allocates by itself
    *("DefaultCPUAllocator: can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED"),
)


def shortage(error: Exception) -> str | None:
    """Return what an error says of memory that ran out, in a sentence; None: it is another."""
    out = isinstance(error, torch.OutOfMemoryError | MemoryError)
    if not out and not (isinstance(error, RuntimeError) and any(x in str(error) for x in _SAID)):
        return None
    text = " ".join(str(error).split()) or type(error).__name__
    return text.partition(". GPU ")[0].removesuffix(".")  # what follows is advice about PyTorch


def free_memory() -> None:
    """Give back what an error, and the frames it came through, had held."""
    gc.collect()  # graphs have cycles
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
