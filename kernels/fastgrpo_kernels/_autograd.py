"""What every autograd Function here has in common."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a backward pass that autograd cannot differentiate again, and say so when it is asked.

    torch's decorator of this name says it when the second derivative is taken, without saying what
    to do.
    """

    @functools.wraps(backward)
    def first_derivative(ctx: Any, *upstream: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the fused losses have no second derivative (create_graph=True): take it of "
                "fastgrpo_kernels.reference, which is plain PyTorch"
            )
        return backward(ctx, *upstream)

    return first_derivative
