"""What TRL's `GRPOTrainer` logs of a loss, and its controller of the entropy bonus.

B sequences, T tokens of a completion.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastgrpo_kernels import GRPOLossConfig

from .fused_head import FusedOutput

_MEANS = (
    "kl", "entropy", "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean",
    "cispo_clip_ratio", "vespo/phi_seq_mean",
)  # fmt: skip
_LOWEST, _HIGHEST = "clip_ratio/low_min", "clip_ratio/high_max"


def log_loss(trainer: Any, output: FusedOutput, mask: Tensor, config: GRPOLossConfig) -> None:
    """Append the metrics of a micro-batch, over all processes, under TRL's names.

    One collective and one wait for the device, where TRL has one of each for a metric.

    Args:
        trainer: a `GRPOTrainer`.
        output: of its model.
        mask: (B, T), the tokens that count.
        config: the mathematics of the loss.
    """
    found = dict(output.metrics or {})
    tokens, sequences = mask.sum().float(), torch.full((), len(mask), device=mask.device).float()
    weights = dict.fromkeys(_MEANS, tokens) | {"vespo/phi_seq_mean": sequences}
    if config.importance_sampling_level == "sequence":
        weights |= {name: sequences for name in _MEANS if "clip_ratio" in name}
    elif _LOWEST in found:  # of tokens, of which a process may have none
        for name in (_LOWEST, _HIGHEST):
            found[name] = found[name].masked_fill(tokens == 0, math.nan)
    names = [name for name in (*_MEANS, _LOWEST, _HIGHEST) if name in found]
    if trainer._entropy_bonus_enabled:
        names.append("policy_loss")
    if trainer.aux_loss_enabled:
        assert output.aux_loss is not None
        found["aux_loss"] = output.aux_loss.detach()
        names.append("aux_loss")

    values_K = torch.stack([found[name].float() for name in names])
    weights_K = torch.stack([weights.get(name, torch.ones_like(tokens)) for name in names])
    values_PK, weights_PK = (  # of P processes
        trainer.accelerator.gather(torch.stack([values_K, weights_K])[None]).cpu().unbind(1)
    )
    means_K = (values_PK * weights_PK).sum(0) / weights_PK.sum(0).clamp(min=1)
    log = trainer._metrics["train" if trainer.model.training else "eval"]
    for k, name in enumerate(names):
        value = means_K[k].item()
        if name in (_LOWEST, _HIGHEST):
            known = [x for x in values_PK[:, k].tolist() if not math.isnan(x)]
            value = (min if name == _LOWEST else max)(known, default=math.nan)
        log[name].append(value)


def control_entropy(trainer: Any, output: FusedOutput, mask: Tensor) -> None:
    """Move the coefficient of the bonus after an optimisation step, and log it.

    Below the wanted entropy up, above it down (Skywork-OR1, arXiv 2505.22312). The state is TRL's,
    which saves it with its checkpoints.

    Args:
        trainer: a `GRPOTrainer` with an entropy bonus, in training.
        output: of its model.
        mask: (B, T), the tokens that count.
    """
    assert output.entropy is not None
    if trainer.use_adaptive_entropy:
        seen = mask if output.entropy_mask is None else mask * output.entropy_mask
        found = torch.stack([(output.entropy * seen).sum(), seen.sum()])
        before = trainer._entropy_window_stats
        trainer._entropy_window_stats = found if before is None else before + found
    if not trainer.accelerator.sync_gradients:
        return
    if trainer.use_adaptive_entropy:
        total, count = trainer.accelerator.reduce(trainer._entropy_window_stats, "sum").tolist()
        trainer._last_world_entropy = total / max(count, 1.0)
        trainer._entropy_window_stats = None
        delta = trainer.args.entropy_coef_delta
        if trainer._last_world_entropy > trainer.args.entropy_target:
            trainer.entropy_coef = max(trainer.entropy_coef - delta, trainer.args.entropy_coef_min)
        else:
            trainer.entropy_coef = min(trainer.entropy_coef + delta, trainer.args.entropy_coef_max)
    trainer._metrics["train"]["entropy_coef"].append(trainer.entropy_coef)
