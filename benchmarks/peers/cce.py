"""Apple's Cut Cross-Entropy, then a GRPO loss in torch.

Its filter leaves out gradients of small probabilities; both of its settings are measured.
"""

from __future__ import annotations

from torch import Tensor

from ..cells import Inputs
from . import Method, missing, recomputes, torch_loss


def unavailable(device: str) -> str | None:
    return missing("cut_cross_entropy") or (None if device == "cuda" else "failed: needs a GPU")


def logps(inputs: Inputs, filter_eps: str | None = "high") -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    nll = linear_cross_entropy(
        inputs.hidden, inputs.weight, inputs.ids, reduction="none", filter_eps=filter_eps
    )
    return -nll.float()


METHODS = [
    Method("filtered", ("linear",), lambda i: torch_loss(logps(i), i)),  # FLOPs: not known
    Method("exact", ("linear",), lambda i: torch_loss(logps(i, None), i), recomputes),
    Method("exact", ("logps",), lambda i: logps(i, None), recomputes),
]
