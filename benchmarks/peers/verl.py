"""verl's Triton linear cross-entropy, then a GRPO loss in torch."""

from __future__ import annotations

from torch import Tensor

from ..cells import Inputs
from . import Method, missing, torch_loss


def unavailable(device: str) -> str | None:
    return missing("verl") or (None if device == "cuda" else "failed: needs a GPU")


def logps(inputs: Inputs) -> Tensor:
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    hidden = inputs.hidden.view(-1, inputs.hidden.shape[-1])
    found, _entropy = linear_cross_entropy(hidden, inputs.weight, inputs.ids.view(-1), 1.0, "none")
    return found.view(inputs.ids.shape)


# It computes the gradient of the head whether or not the head is frozen.
METHODS = [
    Method("triton", ("linear",), lambda i: torch_loss(logps(i), i), lambda cell: 4),
    Method("triton", ("logps",), logps, lambda cell: 1),
]
