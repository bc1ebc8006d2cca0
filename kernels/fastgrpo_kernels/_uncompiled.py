"""The way out of graphs of `torch.compile`, which import this when they meet it.

Nobody else does: `torch.compiler.disable` imports the compiler, which takes as long as
torch itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


@torch.compiler.disable(
    reason="linear_grpo_loss with grad_buffer writes into an argument: compile without "
    "fullgraph=True, or call it outside of what is compiled",
)
def outside(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function outside of the graph that is being traced."""
    return function(*args, **kwargs)
