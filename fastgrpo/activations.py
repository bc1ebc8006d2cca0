"""Which activations are kept between forward and backward, and where."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel


def enable_gradient_checkpointing(model: PreTrainedModel, *, offload: bool = False) -> None:
    """Keep only the input of each layer and compute the rest again in backward, in train mode.

    It is the switch behind transformers' `activation_checkpointing_enable`, whose name and options
    differ between versions and which would also compute a gradient for frozen embeddings.

    Args:
        model: a causal LM, also with adapters of PEFT.
        offload: keep those inputs, H values a token and layer, in CPU memory (pinned, so that the
            CPU need not wait for the copies); without a GPU they are there already.

    Raises:
        ValueError: the model cannot do it.
    """
    if not model.supports_gradient_checkpointing:
        raise ValueError(
            f"gradient_checkpointing: {type(model).__name__} does not support it; set "
            "gradient_checkpointing: false"
        )
    enable: Any = model._set_gradient_checkpointing  # pyright: ignore[reportPrivateUsage]
    keep = partial(checkpoint, use_reentrant=False)
    enable(enable=True, gradient_checkpointing_func=_offloaded(keep) if offload else keep)


def _offloaded(keep: Callable[..., Any]) -> Callable[..., Any]:
    def checkpoint_on_cpu(function: Callable[..., Any], *inputs: Any) -> Any:
        with saved_tensors_hooks(_to_cpu, _back):
            return keep(function, *inputs)

    return checkpoint_on_cpu


# As torch.autograd.graph.save_on_cpu, which before torch 2.13 waits for every copy. The stream that
# computed a tensor copies it, so what comes later on it, also in its memory, finds the copy done.
def _to_cpu(x: Tensor) -> tuple[torch.device, Tensor]:
    on_cpu = torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda)
    return x.device, on_cpu.copy_(x, non_blocking=True)


def _back(kept: tuple[torch.device, Tensor]) -> Tensor:
    device, on_cpu = kept
    return on_cpu.to(device, non_blocking=True)
