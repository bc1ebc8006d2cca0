"""TRL's `GRPOTrainer` with our loss: the LM head and the loss in one pass, all else as it is there.

TRL puts an LM head of its own into the model's forward, takes log-probs from it and computes the
loss from them: 8NHV FLOPs. Here the head takes the loss along: 6NHV, the gradients are known when
the forward pass ends. What is called is the model's own forward still, as DDP, FSDP and PEFT have
wrapped it.

Written for the private names of TRL 1.15 and 1.16; tests hold loss, gradients and metrics to those
of its `_compute_loss`.

B sequences, P tokens of a prompt, T of a completion, H hidden, V vocabulary.
"""

from __future__ import annotations

import functools
from importlib import import_module
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from fastgrpo_kernels import GRPOLossConfig, linear_grpo_loss, linear_logps

from ..head import read_head
from .fused_head import FusedHead, FusedOutput, add_fused_head
from .trl_metrics import control_entropy, log_loss
from .trl_options import loss_config, options_of, warned_of

_NEEDED = "pip install 'trl>=1.15,<1.17'"
try:
    _trl: Any = import_module("trl")  # not `import`: this module has its name
except ModuleNotFoundError as error:
    if error.name != "trl":
        raise
    raise ImportError(f"fastgrpo.integrations.trl needs TRL: {_NEEDED}") from error
_version: str | None = getattr(_trl, "__version__", None)
if _version is None:
    raise ImportError(f"{_trl.__file__ or 'a folder trl'} hides the package trl: rename it")
if Version(_version).release[:2] not in ((1, 15), (1, 16)):
    raise ImportError(
        "FastGRPOTrainer takes the place of private methods of TRL 1.15 and 1.16, and could differ "
        f"from TRL {_version} without a word: {_NEEDED}"
    )

# TRL divides these by the tokens of all that was generated at once, the others within a call.
_TOKEN_MEANS = ("dapo", "cispo", "vespo")
# Logits that exist at a time, 256 MiB in bf16: a tile of TRL's has 4,096 tokens and 32,768 columns,
# and by that its users have chosen their batches.
_TILE = 4096 * 32768
# What TRL gives a model besides ids and mask, for images.
_MODEL_INPUTS = (
    "pixel_values", "image_grid_thw", "image_position_ids", "pixel_attention_mask",
    "spatial_shapes", "image_sizes", "token_type_ids", "mm_token_type_ids",
)  # fmt: skip


class _FusedLoss:
    """How a `GRPOTrainer` computes its loss, and the log-probs of old policy and reference."""

    _head_options: dict[str, Any]

    def _fuse(self: Any) -> None:
        """Put our head into the policy and the reference."""
        if is_deepspeed_zero3_enabled():
            raise ValueError(
                "deepspeed: ZeRO stage 3 takes the LM head's weight away between forward and "
                "backward: use stage 1 or 2, FSDP, or TRL's own GRPOTrainer"
            )
        policy: Any
        policy, reference = (
            None if x is None else self.accelerator.unwrap_model(x, keep_torch_compile=False)
            for x in (self.model, self.ref_model)
        )
        policy = getattr(policy, "get_base_model", lambda: policy)()
        scale, softcap = self._agree_on_head(policy)
        self._head_options = {
            "temperature": self.temperature,
            "logit_scale": scale,
            "logit_softcap": softcap,
        }
        for model in (policy, reference):
            if model is not None:
                # No method of the trainer, which would live as long as the model.
                head = functools.partial(_logps_head, **self._head_options)
                add_fused_head(model, head, in_fp32=self.args.cast_lm_head_to_fp32)

    def _agree_on_head(self: Any, model: Any) -> tuple[float, float | None]:
        """Read scale and softcap on the main process: FSDP may load the weights there alone."""
        found: list[Any] = [None]
        if self.accelerator.is_main_process:
            try:
                head = read_head(model)
                found = [(head.logit_scale, head.logit_softcap)]
            except ValueError as error:
                found = [str(error)]
        import_module("accelerate.utils").broadcast_object_list(found)
        if isinstance(found[0], str):
            raise ValueError(found[0])
        return found[0]

    def _compute_loss(self: Any, model: Any, inputs: dict[str, Any]) -> Tensor:
        """Return the loss of a micro-batch, and log, as the method of `GRPOTrainer` does."""
        training = self.model.training
        accumulation = self.current_gradient_accumulation_steps if training else 1
        factor, logged_factor = 1 / accumulation, 1.0
        if self.loss_type in _TOKEN_MEANS:
            # One step trains on a share of what was generated at once, and gradients of ranks are
            # averaged, not added.
            share = self.args.steps_per_generation if training else 1
            factor *= share * self.accelerator.num_processes
            logged_factor = factor
        config = self._config_of_now()
        completion_mask = inputs["completion_mask"]
        mask = completion_mask * inputs["tool_mask"] if "tool_mask" in inputs else completion_mask

        model_inputs = {name: inputs[name] for name in _MODEL_INPUTS if name in inputs}
        if self.aux_loss_enabled:
            model_inputs["output_router_logits"] = True
        with self.accelerator.autocast():
            output = model(
                input_ids=torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1),
                attention_mask=torch.cat([inputs["prompt_mask"], completion_mask], 1),
                fused_head=self._loss_head(inputs, mask, config, factor * accumulation),
                **model_inputs,
            )
        loss = output.loss * factor
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * output.aux_loss / accumulation
        output.metrics["policy_loss"] *= logged_factor
        log_loss(self, output, mask, config)
        if self._entropy_bonus_enabled and training:
            control_entropy(self, output, mask)
        return loss

    def _config_of_now(self: Any) -> GRPOLossConfig:
        """Return the mathematics, with what callbacks and the entropy controller may change."""
        gated = self.use_adaptive_entropy and self._last_world_entropy > self.args.entropy_target
        options = options_of(
            self.args,
            loss_type=self.loss_type,
            importance_sampling_level=self.importance_sampling_level,
            beta=self.beta,
            epsilon_low=self.epsilon_low,
            epsilon_high=self.epsilon_high,
            entropy_coef=0.0 if gated else self.entropy_coef,
            max_completion_length=self.max_completion_length,
        )
        return warned_of(**options | self._head_options)

    def _loss_head(
        self: Any, inputs: dict[str, Any], mask: Tensor, config: GRPOLossConfig, bonus_factor: float
    ) -> FusedHead:
        """Return a head that computes the loss of a micro-batch.

        The tensors are in its closure: FSDP casts what it finds among the arguments to 16 bits.

        Args:
            inputs: as TRL hands them to `_compute_loss`.
            mask: (B, T), the tokens that count.
            config: the mathematics.
            bonus_factor: what the loss is multiplied with later and the entropy bonus is not.
        """
        ids, advantages = inputs["completion_ids"], inputs["advantages"]
        old_logps = inputs.get("old_per_token_logps")
        corrects = self.use_vllm and self.vllm_importance_sampling_correction
        num_items = inputs["num_items_in_batch"] if self.loss_type in _TOKEN_MEANS else None
        threshold = self.off_policy_mask_threshold

        def head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> FusedOutput:
            hidden = hidden[:, -ids.shape[1] - 1 : -1]
            entropy_mask = policy_weight = None
            if self.top_entropy_quantile < 1 or threshold is not None:
                with torch.no_grad():
                    logps, entropy = _logps(hidden, weight, bias, ids, mask, **self._head_options)
                if self.top_entropy_quantile < 1:
                    quantile = 1 - self.top_entropy_quantile
                    entropy_mask = self.get_high_entropy_mask(entropy, mask, quantile)
                if threshold is not None:
                    then = logps if old_logps is None else old_logps
                    policy_weight = self.get_off_policy_mask(
                        advantages=advantages[:, None] if advantages.dim() == 1 else advantages,
                        per_token_logps=logps,
                        sampling_per_token_logps=inputs.get("sampling_per_token_logps", then),
                        mask=mask,
                        off_policy_threshold=threshold,
                    )
            seen = mask if entropy_mask is None else mask * entropy_mask
            denominator = seen.sum().clamp(min=1) * bonus_factor
            found = linear_grpo_loss(
                hidden,
                weight,
                ids,
                advantages,
                bias=bias,
                completion_mask=mask,
                old_logps=old_logps,
                ref_logps=inputs["ref_per_token_logps"] if config.beta else None,
                importance_sampling_ratio=inputs["importance_sampling_ratio"] if corrects else None,
                policy_weight=policy_weight,
                entropy_mask=entropy_mask,
                num_items_in_batch=num_items,
                entropy_denominator=denominator,
                chunk_rows=_chunk_rows(weight),
                config=config,
            )
            bonus = config.entropy_coef * (found.entropy * seen).sum() / denominator
            # TRL calls by this name all of the loss but the bonus.
            metrics = {**found.metrics, "policy_loss": found.loss.detach() + bonus}
            return FusedOutput(found.loss, found.logps, found.entropy, metrics, entropy_mask)

        return head


class FastGRPOTrainer(_FusedLoss, _trl.GRPOTrainer):
    """`trl.GRPOTrainer` that computes the loss with `linear_grpo_loss`, in one pass.

    It takes the arguments of `GRPOTrainer` and logs the same metrics under the same names.

    Raises:
        ValueError: an option of TRL that our loss does not have, named before the model is loaded;
            or a model whose LM head it cannot express.
    """

    @functools.wraps(_trl.GRPOTrainer.__init__)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        model_reward_args = dict(zip(("model", "reward_funcs", "args"), args, strict=False))
        options = {**model_reward_args, **kwargs}.get("args")
        if options is not None:  # TRL's defaults are fine
            loss_config(options)
        super().__init__(*args, **kwargs)
        self._fuse()


def accelerate_trl(trainer: Any) -> Any:
    """Give a `GRPOTrainer` that exists, or one of a subclass, the loss of `FastGRPOTrainer`.

    Args:
        trainer: before its `train` is called.

    Returns:
        The same object, of another class. Refused, it is as it was.

    Raises:
        TypeError: it is no `GRPOTrainer`, or of a subclass with a loss of its own.
        ValueError: as `FastGRPOTrainer`; or its model is wrapped already, as `train` does.
    """
    cls: Any = type(trainer)
    if not isinstance(trainer, _trl.GRPOTrainer):
        raise TypeError(f"accelerate_trl takes a trl.GRPOTrainer, got {cls.__name__}")
    if isinstance(trainer, _FusedLoss):
        return trainer
    for name in ("_compute_loss", "_get_per_token_logps_and_entropies", "get_gamma_weights"):
        own = name in vars(trainer) or getattr(cls, name) is not getattr(_trl.GRPOTrainer, name)
        if own:
            raise TypeError(
                f"{cls.__name__} has a {name} of its own, which would no longer make the loss: "
                "derive it from FastGRPOTrainer and say there what the loss should be"
            )
    if trainer.model_wrapped is not trainer.model:
        raise ValueError(
            "the trainer has wrapped its model already: call accelerate_trl before train"
        )
    loss_config(trainer.args)
    fast = FastGRPOTrainer
    if cls is not _trl.GRPOTrainer:
        fast = type(f"Fast{cls.__name__}", (_FusedLoss, cls), {})
    trainer.__class__ = fast
    try:
        trainer._fuse()  # pyright: ignore[reportPrivateUsage]
    except ValueError:
        trainer.__class__ = cls
        raise
    return trainer


def _logps_head(labels: Tensor, **options: Any) -> FusedHead:
    """Return a head for TRL's own passes: log-probs of labels (B, P + T), -100 left out."""
    ids = labels[:, 1:]

    def head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> FusedOutput:
        ids_here = ids.to(hidden.device)
        logps, entropy = _logps(hidden[:, :-1], weight, bias, ids_here, ids_here != -100, **options)
        return FusedOutput(log_probs=logps, entropy=entropy)

    return head


def _logps(
    hidden: Tensor,  # (B, L, H)
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,  # (B, L)
    mask: Tensor,  # (B, L)
    **options: Any,
) -> tuple[Tensor, Tensor]:
    rows = _chunk_rows(weight)
    return linear_logps(hidden, weight, ids, bias=bias, mask=mask, chunk_rows=rows, **options)


def _chunk_rows(weight: Tensor) -> int:
    return max(1, _TILE // weight.shape[0])
