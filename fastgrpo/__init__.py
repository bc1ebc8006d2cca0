"""GRPO on one GPU: a fused loss that never holds a tokens x vocabulary tensor, and a trainer."""

from typing import TYPE_CHECKING, Any

from fastgrpo_kernels import (
    GRPOLossConfig,
    GRPOLossOutput,
    grpo_loss,
    importance_weights,
    linear_grpo_loss,
    linear_logps,
    off_policy_mask,
    policy_loss,
    reference,
    selective_logps,
    top_entropy_mask,
)

if TYPE_CHECKING:
    from .config import TrainConfig, load_config
    from .trainer import Trainer

__all__ = [
    "GRPOLossConfig",
    "GRPOLossOutput",
    "TrainConfig",
    "Trainer",
    "grpo_loss",
    "importance_weights",
    "linear_grpo_loss",
    "linear_logps",
    "load_config",
    "off_policy_mask",
    "policy_loss",
    "reference",
    "selective_logps",
    "top_entropy_mask",
]


def __getattr__(name: str) -> Any:
    # The trainer needs transformers; whoever wants the loss alone does not pay for importing it.
    if name == "Trainer":
        from .trainer import Trainer

        return Trainer
    if name in ("TrainConfig", "load_config"):
        from . import config

        return getattr(config, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
