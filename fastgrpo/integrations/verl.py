"""The loss and the fused head in verl (0.9.1), turned on from its configuration.

    actor_rollout_ref.model.external_lib=fastgrpo.integrations.verl
    actor_rollout_ref.actor.policy_loss.loss_mode=fastgrpo
    actor_rollout_ref.model.use_fused_kernels=True
    actor_rollout_ref.model.fused_kernel_options.impl_backend=fastgrpo

The first line makes every worker import this module, which registers what the others name; the
last two belong together, and either they or the second may be left out. verl hands the policy loss
log-probs, so that the memory is saved in the head: its loss and ours have the same values.
`loss_mode=fastgrpo_sapo` needs actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean as well,
which verl's own sapo takes whatever that option says.

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

from .clip_options import clip_options
from .verl_head import use_fused_head

_AGGREGATIONS = (
    "token-mean",
    "token-sum",
    "seq-mean-token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
)
# verl cuts log-ratios, those of tokens both ways and of sequences above, in value and gradient.
_CUT, _CUT_OF_SEQUENCE = 20, 10


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
                `token-sum`. `sapo` is defined by `seq-mean-token-mean`, and takes no other.
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
        if loss_agg_mode not in _AGGREGATIONS:
            choices = ", ".join(_AGGREGATIONS)
            raise ValueError(f"loss_agg_mode must be one of {choices}, got {loss_agg_mode!r}")
        by_length = loss_agg_mode == "seq-mean-token-mean"
        if self.objective == "sapo" and not by_length:
            raise ValueError(
                f"sapo is averaged by sequence and would ignore loss_agg_mode={loss_agg_mode!r}: "
                "set actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean"
            )
        options = self._options(config)
        mask_BT = response_mask != 0
        length_B1 = mask_BT.sum(-1, keepdim=True).clamp(min=1)
        # In 16 bits lengths, and differences of log-probs, would be rounded.
        log_prob = log_prob.to(torch.promote_types(log_prob.dtype, torch.float32))
        log_ratio_BT = torch.where(mask_BT, log_prob - old_log_prob, 0)
        kl_BT = -log_ratio_BT.detach()
        if self.objective == "gspo":
            # The ratio of the sequence, with the gradient of the token's own log-prob (GSPO-token):
            # weights and advantages may differ within a sequence.
            mean_B1 = log_ratio_BT.detach().sum(-1, keepdim=True) / length_B1
            log_ratio_BT = (log_prob - log_prob.detach() + mean_B1).clamp(max=_CUT_OF_SEQUENCE)
        else:
            log_ratio_BT = log_ratio_BT.clamp(-_CUT, _CUT)
            kl_BT = -log_ratio_BT.detach()
        # sapo divides by lengths of itself.
        weight_B1 = None
        if by_length and self.objective != "sapo":
            weight_B1 = 1 / length_B1.to(log_ratio_BT.dtype)
        # A loss reads nothing of log-probs but their ratio, which may so stand for them; only cispo
        # has a log-prob as a factor.
        logps_BT, old_BT = log_ratio_BT, torch.zeros_like(log_ratio_BT)
        if self.objective == "cispo":
            logps_BT, old_BT = log_prob, log_prob - log_ratio_BT
        output = policy_loss(
            logps_BT,
            advantages,
            config=options,
            completion_mask=mask_BT,
            old_logps=old_BT,
            importance_sampling_ratio=rollout_is_weights,
            policy_weight=weight_B1,
            # A sum over tokens, of sapo over sequences: what divides it is verl's.
            num_items_in_batch=1,
            num_sequences_in_batch=1,
        )
        loss = _averaged(output.loss, loss_agg_mode, mask_BT, **config.global_batch_info)
        clipped_BT, capped_BT = self._clipped(log_ratio_BT.detach(), advantages, options)
        reports_3BT = torch.stack((clipped_BT.to(kl_BT), kl_BT, capped_BT.to(kl_BT))) * mask_BT
        # One wait for the device, not one for each number.
        means: list[float] = (reports_3BT.sum((1, 2)) / mask_BT.sum().clamp(min=1)).tolist()
        names: tuple[str, ...] = ("actor/pg_clipfrac", "actor/ppo_kl", "actor/pg_clipfrac_lower")
        return loss, dict(zip(names, means, strict=True))

    def _options(self, config: Any) -> GRPOLossConfig:
        """Return our options for verl's."""
        if self.objective == "sapo":
            for name in ("tau_pos", "tau_neg"):
                if not getattr(config, name) > 0:
                    raise ValueError(f"{name} must be above 0, got {getattr(config, name)}")
            return GRPOLossConfig(
                loss_type="sapo",
                sapo_temperature_pos=config.tau_pos,
                sapo_temperature_neg=config.tau_neg,
            )
        low, high = (
            (name if getattr(config, name) is not None else "clip_ratio")
            for name in ("clip_ratio_low", "clip_ratio_high")
        )
        return GRPOLossConfig(
            loss_type="cispo" if self.objective == "cispo" else "dapo",
            cispo_bounds="verl",
            **clip_options(
                (low, getattr(config, low)),
                (high, getattr(config, high)),
                ("clip_ratio_c", config.clip_ratio_c if self.objective == "vanilla" else None),
            ),
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
    if patch_as_verl.__module__ == __name__:
        return  # registered before

    def patch_forward_with_backends(
        model: Any, use_fused_kernels: bool = False, fused_kernels_backend: str | None = None
    ) -> None:
        if use_fused_kernels and fused_kernels_backend == "fastgrpo":
            use_fused_head(model)
        else:
            patch_as_verl(model, use_fused_kernels, fused_kernels_backend)

    monkey_patch.patch_forward_with_backends = patch_forward_with_backends


def _averaged(
    total: Tensor,
    loss_agg_mode: str,
    mask_BT: Tensor,
    *,
    dp_size: int = 1,
    batch_num_tokens: float | Tensor | None = None,
    global_batch_size: float | Tensor | None = None,
    loss_scale_factor: float | None = None,
) -> Tensor:
    """Divide the sum of a call, of tokens or of sequences, by those of the step.

    A padded response's length is the factor of `seq-mean-token-sum-norm` where none is given.
    """
    total = total * dp_size
    if loss_agg_mode == "seq-mean-token-sum-norm":
        factor = mask_BT.shape[-1] if loss_scale_factor is None else loss_scale_factor
        if not factor > 0:
            raise ValueError(f"loss_scale_factor must be above 0, got {factor}")
        total = total / factor
    elif loss_scale_factor is not None:
        raise ValueError(
            f"loss_scale_factor={loss_scale_factor} belongs to seq-mean-token-sum-norm and would "
            f"be ignored by loss_agg_mode={loss_agg_mode!r}: leave it out"
        )
    if loss_agg_mode == "token-sum":
        return total
    name, count, counted = "global_batch_size", global_batch_size, mask_BT.any(-1)
    if loss_agg_mode == "token-mean":
        name, count, counted = "batch_num_tokens", batch_num_tokens, mask_BT
    if count is None and dp_size > 1:
        raise ValueError(f"{name} of the whole step is needed with dp_size={dp_size}, got None")
    return total / torch.as_tensor(counted.sum() if count is None else count).clamp(min=1)


# Looked for, not tried: an installed verl that does not import should say why. A folder of that
# name has no origin.
if (_found := find_spec("verl")) is not None and _found.origin is not None:
    register()
