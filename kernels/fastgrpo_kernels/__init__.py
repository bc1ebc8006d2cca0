"""The fused GRPO loss: log-probs, ratios, clipping, KL and aggregation without all the logits.

Everything public is here. `linear_grpo_loss` starts from hidden states, `grpo_loss` from logits,
`policy_loss` from log-probs; `reference` holds their specification in plain PyTorch.
"""

from . import reference
from .config import GRPOLossConfig, GRPOLossOutput, LossArguments
from .linear import linear_grpo_loss, linear_logps
from .logits import grpo_loss, selective_logps
from .policy import policy_loss
from .sampler import importance_weights, off_policy_mask, top_entropy_mask

__all__ = [
    "GRPOLossConfig",
    "GRPOLossOutput",
    "LossArguments",
    "grpo_loss",
    "importance_weights",
    "linear_grpo_loss",
    "linear_logps",
    "off_policy_mask",
    "policy_loss",
    "reference",
    "selective_logps",
    "top_entropy_mask",
]
