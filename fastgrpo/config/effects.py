"""Which options do something only beside others: one that is set and would be ignored is refused.

A key at its default is never refused, so that a configuration written out in full can be read.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from ..readable import shown

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Need:
    """What some options need to have an effect."""

    keys: tuple[str, ...]
    switches: tuple[str, ...]
    """The keys that decide; the first is told."""
    met: Callable[[Any], bool]
    """Whether they have an effect, of all keys as attributes."""
    remedy: str
    """What to write for an effect."""
    refused_later: bool = False
    """Objects that the configuration does not know may meet it: who gets them refuses."""

    def problem(self, key: str, values: Values) -> str:
        """Say what is set, why it has no effect, and what to write."""
        switch, current = self.switches[0], values[self.switches[0]]
        why = f"with {switch}: {shown(current, quoted=False)}"
        if current is None or current is False:
            why = f"without {switch}{'' if current is None else ': true'}"
        value = shown(values[key], quoted=False)
        return f"{key}: has no effect {why}, got {value}; {self.remedy}, or leave {key} out"


def without_effect(
    values: Values, defaults: Values, effective: Collection[str] = ()
) -> Iterator[tuple[str, Need]]:
    """Yield the keys that are not at their defaults and do nothing, with what they need.

    Args:
        values: all keys.
        defaults: of all keys.
        effective: keys that have an effect whatever the others say.
    """
    options, found = SimpleNamespace(**values), set(effective)
    for need in NEEDS:
        if not need.met(options):
            for key in need.keys:
                if key not in found and values[key] != defaults[key]:
                    found.add(key)
                    yield key, need


def switched_off(
    values: Values, defaults: Values, overrides: Collection[str], effective: Collection[str] = ()
) -> set[str]:
    """Return the keys that would have an effect but for the overrides, which say otherwise."""
    off: set[str] = set()
    while True:
        left = {**values, **{key: defaults[key] for key in off}}
        more = {
            key
            for key, need in without_effect(left, defaults, effective)
            if key not in overrides and not {*overrides, *off}.isdisjoint(need.switches)
        }
        if not more:
            return off
        off |= more


def _keys(names: str) -> tuple[str, ...]:
    return tuple(names.split())


def _need(
    keys: str,
    switches: str,
    met: Callable[[Any], bool],
    remedy: str,
    *,
    refused_later: bool = False,
) -> Need:
    return Need(_keys(keys), _keys(switches), met, remedy, refused_later)


def _with(switch: str, keys: str) -> Need:
    """Return the need of options that a switch turns on."""
    return _need(keys, switch, lambda o: getattr(o, switch), f"write {switch}: true")


def _with_loss(loss_type: str, keys: str) -> Need:
    """Return the need of options that one loss reads."""
    return _need(
        keys, "loss_type", lambda o: o.loss_type == loss_type, f"write loss_type: {loss_type}"
    )


_CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
_TRACKERS_WITH_PROJECTS = {"wandb", "trackio", "all"}

NEEDS = (
    # The model.
    _need(
        "model_name_or_path model_revision attn_implementation dtype load_in_4bit dataset_name "
        "dataset_config dataset_train_split dataset_test_split prompt_column system_prompt "
        "chat_template_kwargs",
        "task",
        lambda o: o.task is None,
        "a task makes its own model and dataset: leave task out",
    ),
    _need(
        "warm_start_accuracy",
        "task",
        lambda o: o.task is not None,
        "write task: arithmetic, whose model is warmed up",
    ),
    _with("use_peft", "lora_r lora_alpha lora_dropout lora_target_modules"),
    _with("load_in_4bit", "bnb_4bit_quant_type use_bnb_nested_quant"),
    _need(
        "kl_estimator use_bias_correction_kl offload_ref_model sync_ref_model",
        "beta",
        lambda o: o.beta != 0,
        "there is no reference: write a beta above 0",
    ),
    _need(
        "offload_ref_model sync_ref_model",
        "use_peft",
        lambda o: not o.use_peft,
        "the reference is the model without its adapters: write use_peft: false",
    ),
    _with("sync_ref_model", "ref_model_mixup_alpha ref_model_sync_steps"),
    # Sampling.
    _with("dynamic_sampling", "max_resample_rounds"),
    _with(
        "use_vllm",
        "vllm_gpu_memory_utilization vllm_max_model_length vllm_enable_sleep_mode "
        "vllm_importance_sampling_correction vllm_importance_sampling_mode "
        "vllm_importance_sampling_clip_max vllm_importance_sampling_clip_min",
    ),
    _with(
        "vllm_importance_sampling_correction",
        "vllm_importance_sampling_mode vllm_importance_sampling_clip_max "
        "vllm_importance_sampling_clip_min",
    ),
    # Rewards and advantages.
    _need(
        "soft_punish_cache",
        "reward_funcs",
        lambda o: "soft_overlong_punishment" in o.reward_funcs,
        "add soft_overlong_punishment, which reads it",
        refused_later=True,
    ),
    _need(
        "scale_rewards advantage_baseline",
        "multi_objective_aggregation",
        lambda o: o.multi_objective_aggregation != "normalize_then_sum",
        "each reward is compared with the mean of its group and scaled: write sum_then_normalize",
    ),
    _need(
        "advantage_std advantage_eps",
        "scale_rewards",
        lambda o: o.scale_rewards != "none",
        "advantages are divided by 1: write scale_rewards: group, or batch",
    ),
    # The loss.
    _need(
        "epsilon_low epsilon_high",
        "loss_type",
        lambda o: o.loss_type in (*_CLIPPED, "cispo"),
        f"write one that clips by it, {', '.join(_CLIPPED)} or cispo",
    ),
    _need(
        "epsilon_low",
        "cispo_bounds loss_type",
        lambda o: o.loss_type != "cispo" or o.cispo_bounds == "verl",
        "write cispo_bounds: verl",
    ),
    _need(
        "delta",
        "loss_type",
        lambda o: o.loss_type in _CLIPPED,
        f"write one with that bound, {', '.join(_CLIPPED)}",
    ),
    _with_loss("cispo", "cispo_bounds"),
    _with_loss("sapo", "sapo_temperature_pos sapo_temperature_neg"),
    _with_loss("vespo", "vespo_k_pos vespo_lambda_pos vespo_k_neg vespo_lambda_neg"),
    _with_loss("gmpo", "gmpo_clip"),
    _need(
        "skip_empty_sequences",
        "loss_type importance_sampling_level",
        # Of these vespo, and ratios of sequences, have metrics that are means over sequences.
        lambda o: (
            o.loss_type not in ("dapo", "bnpo", "cispo") or o.importance_sampling_level != "token"
        ),
        "write one that counts sequences, grpo for example",
    ),
    _with(
        "use_adaptive_entropy",
        "entropy_coef_min entropy_coef_max entropy_coef_delta entropy_target",
    ),
    # The optimizer and its schedule.
    _need(
        "warmup_steps",
        "lr_scheduler_type",
        lambda o: o.lr_scheduler_type != "constant",
        "write lr_scheduler_type: constant_with_warmup",
    ),
    _need(
        "lr_scheduler_kwargs",
        "lr_scheduler_type",
        lambda o: not o.lr_scheduler_type.startswith("constant"),
        "write a schedule that takes arguments, cosine_with_min_lr for example",
    ),
    _need(
        "grad_norm_window",
        "max_grad_norm_ratio",
        lambda o: o.max_grad_norm_ratio is not None,
        "write max_grad_norm_ratio: 10, or another number",
    ),
    _need("num_train_epochs", "max_steps", lambda o: o.max_steps < 1, "write max_steps: -1"),
    # Evaluations, logs, checkpoints.
    _need(
        "eval_on_start num_generations_eval",
        "eval_strategy",
        lambda o: o.eval_strategy != "no",
        "write eval_strategy: steps, or epoch",
    ),
    _need(
        "eval_steps",
        "eval_strategy",
        lambda o: o.eval_strategy == "steps",
        "write eval_strategy: steps",
    ),
    _need(
        "max_eval_samples",
        "dataset_test_split eval_strategy dataset_name",
        # Without a name prompts are given as objects, or by the task.
        lambda o: o.dataset_test_split or o.eval_strategy != "no" or o.dataset_name is None,
        "name the split to measure",
    ),
    _need(
        "save_steps",
        "save_strategy",
        lambda o: o.save_strategy == "steps",
        "write save_strategy: steps",
    ),
    _need(
        "save_total_limit save_only_model",
        "save_strategy",
        lambda o: o.save_strategy != "no",
        "write save_strategy: steps, or epoch",
    ),
    _need(
        "save_errors",
        "save_strategy metric_for_best_model",
        lambda o: o.save_strategy != "no" or o.metric_for_best_model is not None,
        "the final checkpoint must be written: write save_strategy: steps, or epoch",
    ),
    _need(
        "metric_for_best_model",
        "eval_strategy",
        lambda o: o.eval_strategy != "no",
        "write eval_strategy: steps, or epoch",
    ),
    _need(
        "greater_is_better",
        "metric_for_best_model",
        lambda o: o.metric_for_best_model is not None,
        "write what it is about",
    ),
    _need(
        "project",
        "report_to",
        lambda o: not _TRACKERS_WITH_PROJECTS.isdisjoint(o.report_to),
        "write report_to: [wandb], or [trackio]",
    ),
)
"""The first that is not met is told of a key that has several."""

OF_TRAINING = _keys(
    """learning_rate optim offload_optimizer lr_scheduler_type lr_scheduler_kwargs warmup_steps
    weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm
    max_grad_norm_ratio grad_norm_window max_bad_steps

    mask_truncated_completions top_entropy_quantile off_policy_mask_threshold use_adaptive_entropy
    entropy_coef_min entropy_coef_max entropy_coef_delta entropy_target
    loss_type importance_sampling_level epsilon_low epsilon_high delta beta kl_estimator
    use_bias_correction_kl entropy_coef cispo_bounds sapo_temperature_pos sapo_temperature_neg
    vespo_k_pos vespo_lambda_pos vespo_k_neg vespo_lambda_neg gmpo_clip skip_empty_sequences
    scale_rewards multi_objective_aggregation advantage_baseline advantage_std advantage_eps

    lora_r lora_alpha lora_dropout lora_target_modules disable_dropout torch_compile padding_free
    gradient_checkpointing activation_offloading offload_ref_model sync_ref_model
    ref_model_mixup_alpha ref_model_sync_steps

    parallel filter_zero_advantages steps_per_generation num_iterations max_steps num_train_epochs
    shuffle_dataset
    warm_start_accuracy dynamic_sampling max_resample_rounds vllm_importance_sampling_correction
    vllm_importance_sampling_mode vllm_importance_sampling_clip_max
    vllm_importance_sampling_clip_min

    run_name report_to project num_completions_to_log eval_steps eval_on_start save_strategy
    save_steps save_only_model save_total_limit save_errors metric_for_best_model greater_is_better
    output_dir"""
)
"""What `fastgrpo eval` has no use for. Not among these is what others are checked against, such as
bf16_updates, which dtype needs, and max_tokens_per_microbatch, which bounds completions."""
