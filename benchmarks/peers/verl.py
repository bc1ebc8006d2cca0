"""verl's Triton linear cross-entropy, then a GRPO loss in torch."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..cells import Inputs
from . import Method, broken, missing, needs_gpu, recomputes_always, torch_loss


def absent(device: str) -> str | None:
    return missing("verl") or needs_gpu(device)


def unavailable(device: str) -> str | None:
    return absent(device) or broken(_imports)


def _imports() -> Callable[..., Any]:
    """Import the kernel alone: `verl` and `verl.utils` import Ray and more, which it does not use.

    Those two packages are put in place with their folders, and their own code is not run.
    """
    for name in ("verl", "verl.utils"):
        if name not in sys.modules:
            spec = importlib.util.find_spec(name)
            assert spec is not None
            sys.modules[name] = importlib.util.module_from_spec(spec)
    return importlib.import_module("verl.utils.kernel.linear_cross_entropy").linear_cross_entropy


def logps(inputs: Inputs) -> Tensor:
    hidden = inputs.hidden.view(-1, inputs.hidden.shape[-1])
    found, _entropy = _imports()(hidden, inputs.weight, inputs.ids.view(-1), 1.0, "none")
    return found.view(inputs.ids.shape)


# `efficient_entropy_backward` computes dW whether or not the head is frozen.
METHODS = [
    Method(
        "triton", ("linear",), lambda inputs: torch_loss(logps(inputs), inputs), recomputes_always
    ),
    Method("triton", ("logps",), logps, recomputes_always),
]  # fmt: skip
