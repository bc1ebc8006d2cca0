"""The bounds of PPO's clip, from other trainers' names and habits to ours."""

from __future__ import annotations

import math
from typing import Any


def clip_options(
    low: tuple[str, float], high: tuple[str, float], cap: tuple[str, float | None]
) -> dict[str, Any]:
    """Return `epsilon_low`, `epsilon_high` and `delta` of GRPOLossConfig.

    Args:
        low: what the trainer calls the lower bound, and its value; above 1 it bounds nothing.
        high: the same of the upper bound.
        cap: the same of the cap of the ratio where the advantage is negative; None for none.

    Raises:
        ValueError: a value that our loss is not defined for, by the trainer's name of it.
    """
    for name, bound in (low, high):
        if not 0 <= bound < math.inf:
            raise ValueError(f"{name} must be a finite number, 0 or more, got {bound}")
    least = 1 + high[1]
    if cap[1] is not None and not least < cap[1] < math.inf:
        raise ValueError(
            f"{cap[0]} must be a finite number above 1 + {high[0]} = {least}, got {cap[1]}: below "
            "it, the cap of negative advantages would undo their clip"
        )
    # Users write 10 for "no lower bound", which a ratio reaches at 0.
    return {"epsilon_low": min(low[1], 1), "epsilon_high": high[1], "delta": cap[1]}
