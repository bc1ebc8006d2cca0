"""The optimizer and the schedule of its learning rate."""

from __future__ import annotations

import math

from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from .config import TrainConfig


def build_optimizer(
    model: nn.Module, config: TrainConfig, num_steps: int
) -> tuple[AdamW, LRScheduler]:
    """Return AdamW and the learning-rate schedule over `num_steps` optimisation steps.

    Weight decay leaves out vectors: biases and the gains of norms.

    Raises:
        ValueError: no parameter is trainable, or an unknown schedule.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise ValueError("no parameter of the model requires a gradient: there is nothing to train")
    narrow = {str(p.dtype) for p in trainable} - {"torch.float32"}
    if narrow:
        raise ValueError(
            f"trainable parameters are {', '.join(narrow)}: load the model in float32: in 16 "
            "bits updates at RL learning rates vanish (bf16: true computes in bf16 all the same)"
        )
    matrices = {
        "params": [p for p in trainable if p.dim() >= 2],
        "weight_decay": config.weight_decay,
    }
    vectors = {"params": [p for p in trainable if p.dim() < 2], "weight_decay": 0.0}
    optimizer = AdamW(
        [group for group in (matrices, vectors) if group["params"]],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=True,
    )
    try:
        scheduler = get_scheduler(
            config.lr_scheduler_type,
            optimizer,
            num_warmup_steps=config.warmup_steps,
            num_training_steps=num_steps,
        )
    except ValueError as error:
        raise ValueError(f"lr_scheduler_type: {error}") from None
    return optimizer, scheduler


def clip_gradients(model: nn.Module, max_norm: float) -> float:
    """Scale the gradients down to `max_norm` and return the norm they had.

    Raises:
        FloatingPointError: the norm is infinite or NaN; the weights have not been touched.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    norm = float(nn.utils.clip_grad_norm_(trainable, max_norm))
    if not math.isfinite(norm):
        raise FloatingPointError(
            f"the norm of the gradient is {norm}; the weights are still those of the step before. "
            "Lower learning_rate, or look at the last rewards in completions.jsonl"
        )
    return norm
