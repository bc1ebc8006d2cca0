"""From a configuration to the parts of a trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from .activations import enable_gradient_checkpointing
from .adapters import add_adapters
from .assets import Assets
from .config import TrainConfig
from .loading import computes_in_bf16
from .model import Policy
from .rollout import Rollout
from .rollout.static import StaticCacheRollout


def load_policy(config: TrainConfig, assets: Assets) -> Policy:
    """Put the model on the device, with its adapters and switches.

    Raises:
        ValueError: the model cannot do what the configuration asks for; says what and what to do.
    """
    model: Any = assets.model  # PEFT's wrapper is none to a type checker
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if next(model.parameters()).device.type != device.type:
        model.to(device)
    if config.use_peft:
        model = add_adapters(model, config)
    # These build masks of all tokens squared; who names them wants them all the same.
    unpacked = config.attn_implementation in ("sdpa", "eager")
    policy = Policy(
        model,
        assets.tokenizer,
        bf16=computes_in_bf16(config, device),
        padding_free=False if unpacked else config.padding_free,
    )
    if config.gradient_checkpointing:
        enable_gradient_checkpointing(model, offload=config.activation_offloading)
    if config.torch_compile:
        policy.compile()
    return policy


def build_rollout(config: TrainConfig, policy: Policy, say: Callable[[str], None]) -> Rollout:
    """Make the engine that samples.

    Args:
        config: which one, and its bounds.
        policy: what it samples from.
        say: told, once, when a fast path is not taken.

    Raises:
        ValueError: the model or the machine cannot do it.
    """
    if config.use_vllm:
        from .rollout.vllm import VLLMRollout

        return VLLMRollout(
            policy.model,
            eos_token_ids=policy.eos_token_ids,
            pad_token_id=policy.pad_token_id,
            dtype=policy.product_dtype,
            gpu_memory_utilization=config.vllm_gpu_memory_utilization,
            max_model_length=config.vllm_max_model_length,
            max_batch=config.max_generation_batch_size,
            enable_sleep_mode=config.vllm_enable_sleep_mode,
            seed=config.seed,
        )
    return StaticCacheRollout(
        policy.model,
        eos_token_ids=policy.eos_token_ids,
        pad_token_id=policy.pad_token_id,
        max_batch=config.max_generation_batch_size,
        cuda_graph=config.cuda_graph,
        on_message=say,
    )


def notes(config: TrainConfig, policy: Policy) -> Iterator[str]:
    """Yield what of a run is not as one would expect."""
    if config.top_p < 1 or config.top_k > 0:
        yield (
            f"note: top_p={config.top_p} and top_k={config.top_k} truncate what is sampled; "
            "log-probs, ratios and KL are those of the whole distribution"
        )
    if config.padding_free is None and policy.why_padded:
        yield f"note: sequences are padded: {policy.why_padded}"
