"""A model without values, made as the trainer makes the real one, for the planner to run.

A GPU is planned on tensors that say they are on the CPU, since PyTorch without CUDA has no backward
pass for others: what differs there, attention and offloading, is written here in terms of what it
keeps.

B sequences, N tokens, A attention heads, D their size, H inputs, O outputs.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from fastgrpo.activations import enable_gradient_checkpointing
from fastgrpo.adapters import add_adapters
from fastgrpo.config import TrainConfig

VARLEN_GPU, VARLEN_ELSEWHERE = "fastgrpo_planned_on_gpu", "fastgrpo_planned_elsewhere"
"""Attentions among packed sequences: on a GPU in 16 bits, and elsewhere."""
_FLASH_TAKES_GROUPS = "enable_gqa" in inspect.signature(varlen_attn).parameters


def build_fake(
    architecture: PreTrainedConfig,
    config: TrainConfig,
    *,
    bf16: bool,
    attention: str | None = None,
    layers: int | None = None,
) -> PreTrainedModel:
    """Make the model of a run, on the device `meta`.

    Args:
        architecture: what `config.json` says.
        config: the run.
        bf16: whether products are computed in bf16.
        attention: the name of one; None: what transformers chooses.
        layers: how many, from the first; None: all.

    Raises:
        ValueError: the run asks for what the model cannot do.
    """
    architecture = copy.deepcopy(architecture)
    if layers is not None:
        text: Any = architecture.get_text_config()
        text.num_hidden_layers = layers
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:layers]
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(
            architecture, dtype=getattr(torch, config.dtype), attn_implementation=attention
        )
        if config.load_in_4bit:
            _quantise(model, torch.bfloat16 if bf16 else torch.float32, config.use_bnb_nested_quant)
        adapted: Any = add_adapters(model, config) if config.use_peft else model
    return adapted


def move_to_cpu(model: nn.Module) -> None:
    """Make tensors of a model fake ones of the CPU; call it under `FakeTensorMode`.

    PyTorch's `to_empty` cannot, and PEFT cannot add adapters to fake tensors.
    """
    moved: dict[int, Tensor] = {}  # tied parameters stay tied
    for module in model.modules():
        places: Any = (module._parameters, module._buffers)  # pyright: ignore[reportPrivateUsage]
        for place in places:
            for name, x in place.items():
                if x is None:
                    continue
                if id(x) not in moved:
                    empty = torch.empty(x.shape, dtype=x.dtype)
                    is_parameter = isinstance(x, nn.Parameter)
                    moved[id(x)] = nn.Parameter(empty, x.requires_grad) if is_parameter else empty
                place[name] = moved[id(x)]


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    """Return the layers of the body.

    Raises:
        ValueError: there is no list of them.
    """
    for module in model.get_decoder().modules():
        if isinstance(module, nn.ModuleList):
            return module
    raise ValueError(f"{type(model).__name__} has no list of layers, so it cannot be planned")


def checkpoint_fake(model: PreTrainedModel, *, offload: bool) -> None:
    """Enable gradient checkpointing; with `offload` the checkpoints leave the device."""
    enable_gradient_checkpointing(model)
    if offload:
        enable: Any = model._set_gradient_checkpointing  # pyright: ignore[reportPrivateUsage]
        enable(enable=True, gradient_checkpointing_func=_checkpoint_elsewhere)


def _checkpoint_elsewhere(function: Callable[..., Any], *inputs: Any) -> Any:
    def forget(x: Tensor) -> Callable[[], Tensor]:
        return partial(torch.empty_strided, x.shape, x.stride(), dtype=x.dtype)

    with saved_tensors_hooks(forget, lambda make: make()):
        return checkpoint(function, *inputs, use_reentrant=False)


class _Flash(torch.autograd.Function):
    """What flash attention keeps: queries, keys, values, outputs and the sums of exponentials."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        _, heads, tokens, _ = query.shape  # (1, A, N, D)
        output = value.new_empty(1, tokens, heads, value.shape[-1])
        ctx.save_for_backward(query, key, value, output, torch.empty(heads, tokens))
        return output

    @staticmethod
    def backward(ctx: Any, *doutputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: None,
    scaling: float | None = None,
    *,
    flash: bool,
    **_: Any,
) -> tuple[Tensor, None]:
    """Keep what `varlen_attention` keeps; masks of windows and caps are left out."""
    dtype = torch.bfloat16 if torch.is_autocast_enabled("cpu") else value.dtype
    query, key, value = (x.to(dtype) for x in (query, key, value))
    groups = query.shape[1] // key.shape[1]
    if flash and groups > 1 and not _FLASH_TAKES_GROUPS:
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    if flash:
        output: Any = _Flash.apply(query, key, value)
        return output, None
    one = F.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scaling, enable_gqa=groups > 1
    )
    return torch.cat([one], 2).transpose(1, 2), None


for _name, _flash in ((VARLEN_GPU, True), (VARLEN_ELSEWHERE, False)):
    AttentionInterface.register(_name, partial(_attend, flash=_flash))


class _FourBitLinear(nn.Linear):
    """A linear layer of bitsandbytes: its weight exists in full only while it is multiplied."""

    compute_dtype: Any = torch.float32
    bias: nn.Parameter | None

    def forward(self, input: Tensor) -> Tensor:
        shape = self.out_features, self.in_features
        output: Any = _FourBitProduct.apply(input.to(self.compute_dtype), shape)
        output = output if self.bias is None else output + self.bias.to(self.compute_dtype)
        return output.to(input.dtype)


class _FourBitProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shape_OH: tuple[int, int]) -> Tensor:
        ctx.shape_OH = shape_OH
        return F.linear(x, x.new_empty(shape_OH))

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor, None]:
        return dys[0] @ dys[0].new_empty(ctx.shape_OH), None


def _quantise(model: PreTrainedModel, compute_dtype: torch.dtype, nested: bool) -> None:
    """Put all linear layers but the head into 4 bits, with a scale for every 64 weights."""
    module: Any
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    for module in linear:
        if module is not model.get_output_embeddings():
            count = module.weight.numel()
            packed = torch.empty(math.ceil(count / 2), 1, dtype=torch.uint8)
            module.weight = nn.Parameter(packed, requires_grad=False)
            blocks = math.ceil(count / 64)
            # The scales themselves in 8 bits have a scale for every 256.
            scales = blocks + 4 * math.ceil(blocks / 256) if nested else 4 * blocks
            module.register_buffer("scales", torch.empty(scales, dtype=torch.uint8))
            module.__class__ = _FourBitLinear
            module.compute_dtype = compute_dtype
    model.requires_grad_(False)
