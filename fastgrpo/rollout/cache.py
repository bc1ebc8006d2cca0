"""The static KV cache: its layers, its bytes, and how many completions fit.

P prompts, G completions a prompt, B completions decoded together, L cache positions.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from transformers import PreTrainedConfig, StaticCache
from transformers.cache_utils import StaticLayer


class FullLayer(StaticLayer):
    """All positions of a layer, whatever its window, in the type of the values.

    A window is left to the mask: the static sliding layer would roll its whole cache at every step
    and count positions on the host. Under autocast the rotary embedding returns fp32 keys.

    A layer that grows returns the positions in use alone: less to attend to, in other shapes at
    every step, so not for a CUDA graph.
    """

    def __init__(self, max_cache_len: int, *, grows: bool):
        super().__init__(max_cache_len=max_cache_len)
        self.grows = grows
        self.filled = 0  # if it grows; `cumulative_length` counts on the device

    def read(self, count: int) -> int:
        """Return how many positions are attended to after `count` more were written.

        A multiple of 16, for a softmax and products of any other number are slower on a CPU.
        """
        used = -(-(self.filled + count) // 16) * 16 if self.grows else self.max_cache_len
        return min(used, self.max_cache_len)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write keys and values behind those that are there; return what is to be read."""
        static: Any = super()
        key_states = key_states.to(value_states.dtype)
        if not self.grows:
            return static.update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            static.lazy_initialization(key_states, value_states)
        keys, values = self.keys, self.values
        assert keys is not None and values is not None
        count = key_states.shape[-2]
        read = self.read(count)
        new = slice(self.filled, self.filled + count)
        keys[:, :, new], values[:, :, new] = key_states, value_states
        self.filled += count
        self.cumulative_length.add_(count)
        return keys[:, :, :read], values[:, :, :read]


def new_cache(config: PreTrainedConfig, length: int, *, grows: bool = False) -> StaticCache:
    """Make an empty cache; its layers allocate at their first update, and grow if asked to."""
    cache: Any = StaticCache(config=config, max_cache_len=length)
    for i, layer in enumerate(cache.layers):
        if isinstance(layer, StaticLayer):  # else it shares the cache of another layer
            cache.layers[i] = FullLayer(max_cache_len=length, grows=grows)
    return cache


def filled_layers(cache: StaticCache) -> list[tuple[int, FullLayer]]:
    """Return the layers that hold keys and values, with their numbers."""
    return [
        (i, layer)
        for i, layer in enumerate(cache.layers)
        if isinstance(layer, FullLayer) and layer.is_initialized
    ]


def keep_rows(cache: StaticCache, rows_N: torch.Tensor) -> None:
    """Keep some rows of a cache; a layer at a time, so that little is held twice."""
    for _, layer in filled_layers(cache):
        static: Any = layer
        static.keys, static.values = static.keys[rows_N], static.values[rows_N]
        static.batch_size = len(rows_N)


def cache_bytes(config: PreTrainedConfig, rows: int, length: int, dtype: torch.dtype) -> int:
    """Return the bytes of the KV cache while completions are sampled.

    Args:
        config: of a model whose layers are alike and cache heads (DeepSeek's latents are smaller);
            of a multimodal one, its text model counts.
        rows: completions decoded together.
        length: tokens of prompt and completion; layers with a window hold all of them too.
        dtype: of keys and values: the model's, or autocast's.
    """
    text: Any = config.get_text_config(decoder=True)
    heads: int = text.num_attention_heads
    kv_heads: int = getattr(text, "num_key_value_heads", None) or heads
    head: int = getattr(text, "head_dim", None) or text.hidden_size // heads
    layers: int = text.num_hidden_layers - (getattr(text, "num_kv_shared_layers", None) or 0)
    return layers * rows * length * 2 * kv_heads * head * dtype.itemsize


def row_bytes(
    config: PreTrainedConfig, length: int, dtype: torch.dtype, *, truncated: bool = False
) -> int:
    """Return the bytes that one more completion takes: its cache, its logits and their copies.

    Args:
        config: see `cache_bytes`.
        length: tokens of prompt and completion.
        dtype: of keys and values.
        truncated: whether top-k or top-p sort the vocabulary.
    """
    vocabulary: int = config.get_text_config(decoder=True).vocab_size
    # Logits, their fp32 copy, logits over temperature, probabilities; values and ids sorted twice.
    logits = vocabulary * (4 * 4 + (4 + 8) * 2 * truncated)
    state = length * (8 + 8 + 4 + 2)  # uniform numbers, ids, log-probs, masks
    return cache_bytes(config, 1, length, dtype) + logits + state


def fitting_rows(budget: int, bytes_per_row: int, num_generations: int) -> int:
    """Return how many completions to decode at once: as many groups as fit, a power of two.

    A little more or less free memory then changes nothing.

    Args:
        budget: bytes that may be taken.
        bytes_per_row: see `row_bytes`.
        num_generations: completions of a group; of less than one group a power of two.
    """
    fit = max(1, budget // bytes_per_row)
    unit = num_generations if fit >= num_generations else 1
    return unit << ((fit // unit).bit_length() - 1)


def budget_bytes(device: torch.device) -> int:
    """Return half of a GPU's free memory, or a quarter of all that the host has."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return (free + idle) // 2
    if not hasattr(os, "sysconf"):  # Windows
        return 4 << 30
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4
