"""Apple's Cut Cross-Entropy, then a GRPO loss in torch.

Its filter leaves out gradients of small probabilities; with it, which is its default, and without.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..cells import Inputs
from . import Method, broken, missing, needs_gpu, recomputes, torch_loss


def absent(device: str) -> str | None:
    return missing("cut_cross_entropy") or needs_gpu(device)


def unavailable(device: str) -> str | None:
    return absent(device) or broken(_imports)


def _imports() -> Callable[..., Tensor]:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy


@functools.cache
def _options(exact: bool) -> dict[str, Any]:
    """Name the options: 25.1 accumulates in the inputs' type, later ones can in fp32."""
    accumulate = {"accum_e_fp32", "accum_c_fp32"} & inspect.signature(_imports()).parameters.keys()
    return {"filter_eps": None} | dict.fromkeys(accumulate, True) if exact else {}


def logps(inputs: Inputs, *, exact: bool = True) -> Tensor:
    nll = _imports()(inputs.hidden, inputs.weight, inputs.ids, reduction="none", **_options(exact))
    return -nll.float()


# `tl_lock_add` rounds dX to the inputs' type at each of its V / 128 additions. Done the same way in
# PyTorch, at V = 151,936, that has 9 times the error of naive bf16.
METHODS = [
    # FLOPs at most: what the filter leaves out is not known.
    Method(
        "filtered",
        ("linear",),
        lambda inputs: torch_loss(logps(inputs, exact=False), inputs),
        recomputes,
        tolerance=16.0,
    ),
    Method(
        "exact", ("linear",), lambda inputs: torch_loss(logps(inputs), inputs), recomputes,
        tolerance=16.0,
    ),
    Method("exact", ("logps",), logps, recomputes),
]  # fmt: skip
