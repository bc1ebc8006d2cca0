"""The loss and the fused head in verl (0.9.1), turned on from its configuration.

    actor_rollout_ref.model.external_lib=fastgrpo.integrations.verl
    actor_rollout_ref.actor.policy_loss.loss_mode=fastgrpo
    actor_rollout_ref.model.use_fused_kernels=True
    actor_rollout_ref.model.fused_kernel_options.impl_backend=fastgrpo

The first line makes every worker import this module, which registers what the others name; the
last two belong together, and either they or the second may be left out. verl hands the policy loss
log-probs, so that the memory is saved in the head: its loss and ours have the same values.

Without verl the module can be imported, and its losses called; then nothing is registered.

B sequences, T positions of a response.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor

from fastgrpo_kernels import GRPOLossConfig, policy_loss

from .verl_head import use_fused_head

_TOKEN_MEANS = ("token-mean", "token-sum")
_PPO = {
    "token-mean": "dapo",
    "token-sum": "dapo",
    "seq-mean-token-mean": "grpo",
    "seq-mean-token-sum": "luspo",
    "seq-mean-token-sum-norm": "luspo",  # and divided by the factor: dr_grpo
}
# The loss type that is an objective of verl's, averaged as verl's loss_agg_mode says.
_LOSS_TYPES: dict[str, dict[str, Any]] = {
    "vanilla": _PPO,
    "gspo": _PPO,
    "cispo": dict.fromkeys(_TOKEN_MEANS, "cispo"),
    "sapo": {"seq-mean-token-mean": "sapo"},
}


@dataclass(frozen=True)
class PolicyLoss:
    """A policy loss that is called as verl calls those of its registry."""

    objective: Literal["vanilla", "gspo", "cispo", "sapo"]
    """The loss of verl's that it is, by verl's name for it."""

    def __call__(
        self,
        old_log_prob: Tensor,  # (B, T)
        log_prob: Tensor,  # (B, T), with the graph
        advantages: Tensor,  # (B, T)
        response_mask: Tensor,  # (B, T) bool or 0/1
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,  # (B, T)
    ) -> tuple[Tensor, dict[str, float]]:
        """Compute a rank's share of the loss, times the ranks that its gradient is averaged over.

        Args:
            old_log_prob: at the start of the optimisation step.
            log_prob: under the policy.
            advantages: of each token.
            response_mask: tokens that count; what stands behind a 0 may be anything.
            loss_agg_mode: how tokens are averaged: `token-mean` as `dapo`, `seq-mean-token-mean` as
                `grpo`, `seq-mean-token-sum` as `luspo`, `seq-mean-token-sum-norm` as `dr_grpo`, or
                `token-sum`. `cispo` takes those of tokens, `sapo` takes `seq-mean-token-mean`.
            config: verl's ActorConfig. Read are clip_ratio, clip_ratio_low, clip_ratio_high, for
                `vanilla` clip_ratio_c (our delta), for `sapo` tau_pos and tau_neg, and
                global_batch_info, verl's denominators of the whole optimisation step.
            rollout_is_weights: corrections for the sampler; multiply the losses of tokens.

        Returns:
            The loss, 0-d and differentiable to `log_prob`, and verl's metrics: `actor/pg_clipfrac`,
            share of tokens whose clip holds (`cispo`: whose ratio is outside of the bounds),
            `actor/pg_clipfrac_lower`, share of tokens that clip_ratio_c caps, `actor/ppo_kl`, mean
            of old minus new log-probs.

        Raises:
            ValueError: no config, or one that asks for what this objective is not; names verl's
                option.
        """
        if config is None:
            raise ValueError("config must be verl's ActorConfig of the actor, got None")
        if loss_agg_mode not in _LOSS_TYPES[self.objective]:
            choices = ", ".join(_LOSS_TYPES[self.objective])
            raise ValueError(
                f"loss_agg_mode must be one of {choices} for this loss, got {loss_agg_mode!r}"
            )
        mask_BT = response_mask != 0
        options = self._options(loss_agg_mode, config)
        scale, num_tokens, num_sequences = _share(
            loss_agg_mode, log_prob.shape[-1], **config.global_batch_info
        )
        log_ratio_BT = torch.where(mask_BT, log_prob.detach() - old_log_prob, 0)
        kl_BT = -log_ratio_BT if self.objective == "gspo" else -log_ratio_BT.clamp(-20, 20)
        if self.objective == "gspo":
            # The ratio of the sequence, with the gradient of the token's own log-prob (GSPO-token):
            # weights and advantages may differ within a sequence.
            length_B1 = mask_BT.sum(-1, keepdim=True).clamp(min=1)
            log_ratio_B1 = (log_ratio_BT.sum(-1, keepdim=True) / length_B1).clamp(max=10)
            log_ratio_BT = log_ratio_B1.expand_as(log_ratio_BT)
            old_log_prob = log_prob.detach() - log_ratio_BT
        output = policy_loss(
            log_prob,
            advantages,
            config=options,
            completion_mask=mask_BT,
            old_logps=old_log_prob,
            importance_sampling_ratio=rollout_is_weights,
            num_items_in_batch=num_tokens,
            num_sequences_in_batch=num_sequences,
        )
        advantages_BT = torch.where(mask_BT, advantages, 0)
        clipped_BT, capped_BT = self._clipped(log_ratio_BT, advantages_BT, options)
        reports_3BT = torch.stack((clipped_BT.to(kl_BT), kl_BT, capped_BT.to(kl_BT))) * mask_BT
        # One wait for the device, not one for each number.
        means: list[float] = (reports_3BT.sum((1, 2)) / mask_BT.sum().clamp(min=1)).tolist()
        names: tuple[str, ...] = ("actor/pg_clipfrac", "actor/ppo_kl", "actor/pg_clipfrac_lower")
        return output.loss * scale, dict(zip(names, means, strict=True))

    def _options(self, loss_agg_mode: str, config: Any) -> GRPOLossConfig:
        """Return our options for verl's."""
        low, high = (
            config.clip_ratio if bound is None else bound
            for bound in (config.clip_ratio_low, config.clip_ratio_high)
        )
        delta = config.clip_ratio_c if self.objective == "vanilla" else None
        if delta is not None and not delta > 1 + high:
            raise ValueError(
                f"clip_ratio_c={delta} must be above 1 + clip_ratio_high = {1 + high}: below it, "
                "the cap of negative advantages would undo their clip"
            )
        taus = {"sapo_temperature_pos": config.tau_pos, "sapo_temperature_neg": config.tau_neg}
        return GRPOLossConfig(
            loss_type=_LOSS_TYPES[self.objective][loss_agg_mode],
            # verl's users write 10 for "no lower bound", which a ratio reaches at 0.
            epsilon_low=min(low, 1),
            epsilon_high=high,
            delta=delta,
            cispo_bounds="verl",
            skip_empty_sequences=True,
            **taus if self.objective == "sapo" else {},
        )

    def _clipped(
        self, log_ratio_BT: Tensor, advantages_BT: Tensor, options: GRPOLossConfig
    ) -> tuple[Tensor, Tensor]:
        """Return (B, T) where the clip holds, and where the cap of negative advantages does."""
        nowhere_BT = torch.zeros_like(log_ratio_BT, dtype=torch.bool)
        if self.objective == "sapo":
            return nowhere_BT, nowhere_BT
        ratio_BT = log_ratio_BT.exp()
        clipped_BT = ratio_BT.clamp(1 - options.epsilon_low, 1 + options.epsilon_high)
        if self.objective == "cispo":
            return ratio_BT != clipped_BT, nowhere_BT
        capped_BT = nowhere_BT
        if options.delta is not None:
            capped_BT = (ratio_BT > options.delta) & (advantages_BT < 0)
        return clipped_BT * advantages_BT < ratio_BT * advantages_BT, capped_BT


LOSSES = {
    "fastgrpo": PolicyLoss("vanilla"),
    "fastgrpo_gspo": PolicyLoss("gspo"),
    "fastgrpo_cispo": PolicyLoss("cispo"),
    "fastgrpo_sapo": PolicyLoss("sapo"),
}
"""What `register` adds to verl's registry of policy losses: the names for `loss_mode`."""


def register() -> None:
    """Tell verl of the losses, and of `impl_backend=fastgrpo` of its fused kernels.

    verl's FSDP engine patches a model by `patch_forward_with_backends`, which passes over backends
    that it does not know: it is replaced by one that knows ours and hands the others to verl's.

    Raises:
        ImportError: verl is not there, or something it needs.
    """
    for name, loss in LOSSES.items():
        import_module("verl.trainer.ppo.core_algos").register_policy_loss(name)(loss)
    monkey_patch: Any = import_module("verl.models.transformers.monkey_patch")
    patch_as_verl = monkey_patch.patch_forward_with_backends

    def patch_forward_with_backends(
        model: Any, use_fused_kernels: bool = False, fused_kernels_backend: str | None = None
    ) -> None:
        if use_fused_kernels and fused_kernels_backend == "fastgrpo":
            use_fused_head(model)
        else:
            patch_as_verl(model, use_fused_kernels, fused_kernels_backend)

    monkey_patch.patch_forward_with_backends = patch_forward_with_backends


def _share(
    loss_agg_mode: str,
    length: int,
    *,
    dp_size: int = 1,
    batch_num_tokens: int | None = None,
    global_batch_size: int | None = None,
    loss_scale_factor: float | None = None,
) -> tuple[float, float | None, float | None]:
    """Return what multiplies the loss of a call, and its tokens or sequences, those of the step.

    A padded response's `length` is the factor of `seq-mean-token-sum-norm` where none is given.
    """
    if loss_scale_factor is not None and loss_agg_mode != "seq-mean-token-sum-norm":
        raise ValueError(
            f"loss_scale_factor={loss_scale_factor} belongs to seq-mean-token-sum-norm and would "
            f"be ignored by loss_agg_mode={loss_agg_mode!r}: leave it out"
        )
    if loss_agg_mode == "token-sum":
        return dp_size, 1, None
    by_token = loss_agg_mode == "token-mean"
    if dp_size > 1 and (batch_num_tokens if by_token else global_batch_size) is None:
        name = "batch_num_tokens" if by_token else "global_batch_size"
        raise ValueError(f"{name} of the whole step is needed with dp_size={dp_size}, got None")
    if by_token:
        return dp_size, batch_num_tokens, None
    factor = 1
    if loss_agg_mode == "seq-mean-token-sum-norm":
        factor = length if loss_scale_factor is None else loss_scale_factor
        if not factor > 0:
            raise ValueError(f"loss_scale_factor must be above 0, got {factor}")
    return dp_size / factor, None, global_batch_size


# Looked for, not tried: an installed verl that does not import should say why.
if find_spec("verl") is not None:
    register()
