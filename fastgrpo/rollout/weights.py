"""A policy's weights as a checkpoint of it would hold them, for an engine that has its own copy.

Layer after layer, with adapters added to what they adapt: a copy of the model never exists.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

_LAYER = re.compile(r".*?\.\d+(?=\.)")


def check_weights(model: PreTrainedModel) -> None:
    """Refuse a model whose weights `checkpoint_weights` cannot give.

    Raises:
        ValueError: its weights are quantised, or it has adapters other than LoRA.
    """
    base: Any = _without_peft(model)
    if getattr(base.config, "quantization_config", None) is not None:
        raise ValueError(
            "use_vllm: the model's weights are quantised, and vLLM's copy of them would drift from "
            "those that are trained; leave out load_in_4bit, or use_vllm"
        )
    for name, module in base.named_modules():
        if _is_adapted(module):
            plain = hasattr(module, "get_delta_weight") and hasattr(module.base_layer, "weight")
            variants: dict[str, Any] = getattr(module, "lora_variant", {})
            biases: dict[str, bool] = getattr(module, "lora_bias", {})
            if plain and not variants and not any(biases.values()):
                continue
        elif not hasattr(module, "modules_to_save"):
            continue
        raise ValueError(
            f"use_vllm: the adapter on {name} is not plain LoRA, which is all that can be merged "
            "for vLLM; leave use_vllm out, or train LoRA without DoRA, bias and modules_to_save"
        )


@torch.no_grad()
def checkpoint_weights(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Yield every weight under its name in a checkpoint of the model.

    Args:
        model: also a `PeftModel`. The adapters that are active are merged in fp32; the model is
            read, and not changed.

    Yields:
        What `save_pretrained` of the merged model writes, tied weights once. Where nothing is
        merged or converted the memory is the model's own.
    """
    base = _without_peft(model)
    adapted: dict[str, Any] = {n: m for n, m in base.named_modules() if _is_adapted(m)}
    # Layer by layer: the format of a checkpoint may join or split the tensors of a layer.
    for _, group in groupby(_own_tensors(base, adapted), lambda item: _layer(item[0])):
        yield from revert_weight_conversion(base, dict(group)).items()


def _own_tensors(base: PreTrainedModel, adapted: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights under the names they had before there were adapters."""
    seen: set[int] = set()
    for name, tensor in base.state_dict(keep_vars=True).items():
        if id(tensor) in seen:  # tied
            continue
        seen.add(id(tensor))
        module = next((m for m in _parents(name) if m in adapted), None)
        if module is None:
            yield name, tensor.detach()
        elif name.startswith(f"{module}.base_layer."):
            kind = name.removeprefix(f"{module}.base_layer.")
            merged = _merged(adapted[module], tensor) if kind == "weight" else tensor.detach()
            yield f"{module}.{kind}", merged


def _merged(module: Any, weight: Tensor) -> Tensor:
    """Return the weight of a LoRA layer with its active adapters."""
    active = [name for name in module.active_adapters if name in module.scaling]
    if module.disable_adapters or module.merged or not active:
        return weight.detach()
    merged = weight.float()
    for name in active:
        merged = merged + module.get_delta_weight(name).float()
    return merged


def _without_peft(model: Any) -> PreTrainedModel:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _is_adapted(module: Any) -> bool:
    return hasattr(module, "base_layer")


def _layer(name: str) -> str:
    match = _LAYER.match(name)
    return match[0] if match else ""


def _parents(name: str) -> Iterator[str]:
    parts = name.split(".")
    return (".".join(parts[:i]) for i in range(1, len(parts)))
