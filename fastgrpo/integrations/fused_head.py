"""A model whose forward pass ends in a head of ours, where its LM head would make logits.

What is called is the model itself, as DDP, FSDP and PEFT have wrapped it: their hooks run, and the
head's weight is whole while it is used.

B sequences, L positions, H hidden, V vocabulary.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from transformers.utils.generic import ModelOutput


@dataclass
class FusedOutput(ModelOutput):
    """What a model returns if called with a fused head.

    A `ModelOutput`, so that DDP and FSDP find the tensors whose backward they wait for.
    """

    loss: Tensor | None = None  # 0-d
    log_probs: Tensor | None = None  # (B, T), or (B, L - 1) of all labels
    entropy: Tensor | None = None  # like log_probs
    metrics: dict[str, Tensor] | None = None  # 0-d each
    entropy_mask: Tensor | None = None  # (B, T)
    aux_loss: Tensor | None = None  # 0-d, of the router of a mixture of experts


FusedHead = Callable[[Tensor, Tensor, Tensor | None], FusedOutput]
"""Takes hidden states (B, L, H), the head's weight (V, H) and its bias (V,)."""


def add_fused_head(
    model: Any, logps_head: Callable[[Tensor], FusedHead], *, in_fp32: bool = False
) -> None:
    """Let `model(..., fused_head=head)` run the body and `head`, without logits.

    Args:
        model: a causal LM of transformers; called without a head it does what it did.
        logps_head: makes the head of calls as TRL's own, `fused_lm_head=True, labels=...`.
        in_fp32: give the head fp32 hidden states and no autocast.
    """
    without = model.forward

    @functools.wraps(type(model).forward)  # `generate` looks at its arguments
    def forward(
        self: Any,
        *args: Any,
        fused_head: FusedHead | None = None,
        fused_lm_head: bool = False,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if fused_lm_head:
            assert labels is not None
            fused_head = logps_head(labels)
        if fused_head is None:
            return without(*args, **kwargs, **({} if labels is None else {"labels": labels}))
        body = self.base_model(*args, use_cache=False, **kwargs)
        module = self.get_output_embeddings()  # read here: FSDP and PEFT replace it
        weight, bias = module.weight, getattr(module, "bias", None)
        hidden = body.last_hidden_state.to(weight.device)  # of a model on several devices
        if in_fp32:
            hidden = hidden.float()
        elif not torch.is_autocast_enabled(hidden.device.type):
            weight = weight.to(hidden.dtype)
            bias = None if bias is None else bias.to(hidden.dtype)
        with torch.autocast(hidden.device.type, enabled=False) if in_fp32 else nullcontext():
            output = fused_head(hidden, weight, bias)
        if kwargs.get("output_router_logits"):
            output.aux_loss = _balancing_loss(self, body, kwargs.get("attention_mask"))
        return output

    model.forward = types.MethodType(forward, model)


def _balancing_loss(model: Any, body: Any, mask: Tensor | None) -> Tensor:
    """Return the loss that keeps experts in use (arXiv 2101.03961), of transformers."""
    module: Any = import_module("transformers.models.mixtral.modeling_mixtral")
    config = model.config.get_text_config()
    experts, chosen = config.num_experts, config.num_experts_per_tok
    return module.load_balancing_loss_func(body.router_logits, experts, chosen, mask)
