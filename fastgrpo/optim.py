"""The optimizer and the schedule of its learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from .config import TrainConfig
from .low_precision import PIECE, MasterWeights, StochasticRoundingAdamW


def build_optimizer(
    model: nn.Module, config: TrainConfig, num_steps: int
) -> tuple[Optimizer, LRScheduler]:
    """Return AdamW and the learning-rate schedule over `num_steps` optimisation steps.

    Weight decay leaves out vectors, biases and the gains of norms; the last two by their names
    too, since those of some models are matrices (gpt-oss, Cohere).

    Raises:
        ValueError: no parameter is trainable, updates would be lost in the type of the parameters,
            the optimizer's package is missing, or a schedule without what it needs.
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trainable:
        raise ValueError("no parameter of the model requires a gradient: there is nothing to train")
    _check_types({p.dtype for p in trainable.values()}, config)
    decayed = [p for name, p in trainable.items() if _decays(name, p)]
    others = [p for name, p in trainable.items() if not _decays(name, p)]
    groups: list[dict[str, Any]] = [
        {"params": parameters, "weight_decay": decay}
        for parameters, decay in ((decayed, config.weight_decay), (others, 0.0))
        if parameters
    ]
    optimizer = _adamw(config, groups, next(iter(trainable.values())).device)
    try:
        scheduler = get_scheduler(
            config.lr_scheduler_type,
            optimizer,
            num_warmup_steps=warmup_steps(config, num_steps),
            num_training_steps=num_steps,
            scheduler_specific_kwargs=config.lr_scheduler_kwargs,
        )
    except ValueError as error:
        raise ValueError(f"lr_scheduler_type: {error}") from None
    except TypeError as error:
        name = config.lr_scheduler_type
        raise ValueError(f"lr_scheduler_kwargs: not those that {name} needs: {error}") from None
    return optimizer, scheduler


def _decays(name: str, parameter: nn.Parameter) -> bool:
    module_and_name = ".".join(name.lower().rsplit(".", 2)[-2:])
    return parameter.dim() >= 2 and not any(x in module_and_name for x in ("bias", "norm"))


def warmup_steps(config: TrainConfig, num_steps: int) -> int:
    """Return the steps over which the learning rate rises, of a run of `num_steps`.

    As transformers' `TrainingArguments.get_warmup_steps`: a share below 1 is rounded up.
    """
    steps = config.warmup_steps
    return math.ceil(steps * num_steps) if steps < 1 else int(steps)


def clip_gradients(model: nn.Module, max_norm: float) -> float:
    """Scale the gradients down to `max_norm` and return the norm they had, computed in fp32.

    With 0 they are left as they are, and so they are if the norm is infinite or NaN.
    """
    found = [p.grad for p in model.parameters() if p.requires_grad and p.grad is not None]
    if not found:
        return 0.0
    gradients = [g.to_local() if isinstance(g, DTensor) else g for g in found]
    # PyTorch's clip_grad_norm_ would round the norms, and the scale, to the type of the gradients.
    norms = [torch.linalg.vector_norm(g, dtype=torch.float32) for g in gradients]
    total = torch.linalg.vector_norm(torch.stack(norms))
    if isinstance(found[0], DTensor):  # copies of the model have the same gradients
        mesh = found[0].device_mesh
        dist.all_reduce(total.square_(), group=mesh.get_group(mesh.ndim - 1))
        total.sqrt_()
    total = total.cpu()  # the one wait for the device
    norm, scale = float(total), float((max_norm or math.inf) / (total + 1e-6))
    if scale < 1 and math.isfinite(norm):
        for gradient in gradients:
            gradient.mul_(scale)
    return norm


class OptimizerBytes(NamedTuple):
    """What an optimizer holds beside the parameters and their gradients."""

    device: int
    """Bytes on the training device, from the first step on."""
    host: int
    """Bytes in CPU memory, from the first step on."""
    step: int
    """Further bytes on the training device while it steps."""


def optimizer_bytes(num_params: int, config: TrainConfig) -> OptimizerBytes:
    """Return what the optimizer of `num_params` trainable parameters holds.

    Per parameter: 8 bytes of states in fp32, or 2 in 8 bits and 8 for every 256 of their scales (as
    if no tensor were below 4,096 elements, whose states stay in fp32); 4 for a copy in fp32. Paged
    states count as the device's: they leave it only when it is full.
    """
    eight_bit = config.optim != "adamw_torch_fused"
    copied = config.offload_optimizer or config.bf16_updates == "master_weights"
    kept = 2 * num_params + 8 * math.ceil(num_params / 256) if eight_bit else 8 * num_params
    kept += 4 * num_params if copied else 0
    if config.offload_optimizer:
        return OptimizerBytes(0, kept, 0)
    held = 4 * copied + 11 * (config.bf16_updates == "stochastic_rounding")
    return OptimizerBytes(kept, 0, held * min(num_params, PIECE))


def _check_types(types: set[torch.dtype], config: TrainConfig) -> None:
    """Refuse parameters whose updates would vanish, and options made for other parameters."""
    narrow = types - {torch.float32}
    if narrow - {torch.bfloat16}:
        names = ", ".join(sorted(str(t) for t in narrow))
        raise ValueError(f"trainable parameters are {names}: load the model in float32 or bfloat16")
    if narrow and config.bf16_updates is None and not config.offload_optimizer:
        raise ValueError(
            "trainable parameters are torch.bfloat16, in which updates at RL learning rates "
            "vanish: load the model in float32 (bf16: true computes in bf16 all the same), or add "
            "dtype: bfloat16 and bf16_updates: master_weights, or stochastic_rounding"
        )
    if config.bf16_updates is not None and not narrow:
        raise ValueError(
            f"bf16_updates: {config.bf16_updates} is for parameters in bfloat16, and all that are "
            "trained are torch.float32; leave it out, or load the model in bfloat16"
        )


def _adamw(config: TrainConfig, groups: list[dict[str, Any]], device: torch.device) -> Optimizer:
    options: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
        "weight_decay": config.weight_decay,
    }
    if config.bf16_updates == "stochastic_rounding":
        return StochasticRoundingAdamW(groups, seed=config.seed, **options)
    make = _adamw_class(config.optim, device)
    if config.offload_optimizer:
        return MasterWeights(groups, make, device=torch.device("cpu"), **options)
    if config.bf16_updates == "master_weights":
        return MasterWeights(groups, make, **options)
    return make(groups, **options)


def _adamw_class(name: str, device: torch.device) -> Callable[..., Optimizer]:
    """Return what makes an AdamW; imports the package that has it."""
    if name == "adamw_torch_fused":
        return partial(AdamW, fused=True)
    if name == "paged_adamw_8bit" and device.type == "cpu":
        raise ValueError(f"optim: {name} pages the memory of a GPU; on a CPU take adamw_8bit")
    package, extra = ("torchao", "torchao") if "torch" in name else ("bitsandbytes", "8bit")
    try:
        optimizers = import_module(f"{package}.optim")
    except ImportError as error:
        raise ValueError(
            f"optim: {name} needs {package}, which cannot be imported ({error}); "
            f"pip install 'fastgrpo[{extra}]'"
        ) from error
    return optimizers.PagedAdamW8bit if name == "paged_adamw_8bit" else optimizers.AdamW8bit
