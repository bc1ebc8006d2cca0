"""GRPO on one GPU: a fused loss that never holds a tokens x vocabulary tensor, and a trainer."""

from typing import TYPE_CHECKING, Any

from fastgrpo_kernels import (
    GRPOLossConfig,
    GRPOLossOutput,
    LossArguments,
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
    "LossArguments",
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
    if name == "TrainConfig":
        from .config import TrainConfig

        return TrainConfig
    if name == "load_config":
        from .config import load_config

        return load_config
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
