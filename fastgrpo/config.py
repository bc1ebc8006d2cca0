"""The configuration of a run, with the names TRL and transformers use."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from fastgrpo_kernels import GRPOLossConfig

from .config_model import ModelOptions
from .config_rollout import RolloutOptions


class ConfigError(ValueError):
    """Something in the configuration is wrong; the message says what and what to do."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(ModelOptions, RolloutOptions):
    """A GRPO run. In YAML, every field of `GRPOLossConfig` is a key beside these.

    Raises:
        ConfigError: a value out of range or a combination that cannot run.
    """

    dataset_name: str | None = None
    """A Hub name, a .jsonl, .json, .csv or .parquet file, or a `save_to_disk` folder."""
    dataset_config: str | None = None
    """Configuration of a Hub dataset (`main` of GSM8K)."""
    dataset_train_split: str = "train"
    """Split to train on."""
    dataset_test_split: str | None = None
    """Split measured before and after training, never trained on. None: not measured."""
    prompt_column: str = "prompt"
    """Column that holds the prompts: strings or chat messages."""
    system_prompt: str | None = None
    """Put before every prompt, which then goes through the tokenizer's chat template."""
    task: Literal["arithmetic"] | None = None
    """A task made on the spot instead of a model and a dataset: no download."""
    warm_start_accuracy: float = 0.28
    """With `task`: supervised training goes on until sampled answers are right this often."""

    reward_funcs: list[str] = field(default_factory=lambda: ["accuracy"])
    """Built-in names, `module:function` or `path.py:function`."""
    reward_weights: list[float] | None = None
    """Weight of each reward function; None: 1 each."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """What advantages are divided by: the standard deviation of the group, of the batch, or 1."""
    advantage_std: Literal["sample", "population"] = "sample"
    """Divisor of the variance: n - 1 or n."""
    advantage_eps: float = 1e-4
    """Added to the standard deviation."""

    per_device_train_batch_size: int = 8
    """Completions in one forward and backward pass, unless max_tokens_per_microbatch is set."""
    gradient_accumulation_steps: int = 1
    """Passes per optimisation step; the step has the product of both in completions."""
    max_tokens_per_microbatch: int | None = None
    """Tokens, prompts included, in one forward and backward pass: the step's completions are packed
    into as few passes as that allows. None: per_device_train_batch_size completions in each."""
    filter_zero_advantages: bool = True
    """Do not run the model on completions that cannot contribute to the gradient: it is the same
    without them. Metrics such as entropy are then means over the others."""
    steps_per_generation: int | None = None
    """Passes that a batch of completions is sampled for, a multiple of gradient_accumulation_steps;
    None: that many, so that every optimisation step has completions of its own."""
    num_iterations: int = 1
    """Optimisation steps on each batch of completions (mu in the GRPO paper)."""

    max_steps: int = -1
    """Optimisation steps; -1: as many as `num_train_epochs` has."""
    num_train_epochs: float = 1.0
    """Passes over the prompts, when max_steps is -1."""
    learning_rate: float = 1e-6
    """Peak learning rate of AdamW."""
    optim: Literal[
        "adamw_torch_fused", "adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit", "adamw_torch_8bit"
    ] = "adamw_torch_fused"
    """AdamW of PyTorch, of bitsandbytes with 8-bit states (two names; extra `8bit`), the same with
    states that can be paged out to CPU memory, of torchao with 8-bit states."""
    bf16_updates: Literal["master_weights", "stochastic_rounding"] | None = None
    """How updates of bfloat16 parameters (`dtype`) keep what is below their last place: in fp32
    copies, or on average."""
    offload_optimizer: bool = False
    """Keep the optimizer's states, and its fp32 copies of the parameters, in CPU memory and step
    there."""
    lr_scheduler_type: Literal[
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "constant",
        "constant_with_warmup",
        "inverse_sqrt",
    ] = "linear"
    """A schedule of transformers."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises from 0."""
    weight_decay: float = 0.0
    """Of AdamW; not applied to biases and norms."""
    adam_beta1: float = 0.9
    """Of AdamW."""
    adam_beta2: float = 0.999
    """Of AdamW."""
    adam_epsilon: float = 1e-8
    """Of AdamW."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""

    cpu_threads: int | None = None
    """Threads of PyTorch on the CPU; None: its default. Small models are faster on 1."""
    seed: int = 42
    """Of everything that is random."""

    output_dir: str | None = None
    """Run directory, which must not exist or be empty. None: a new one under `runs/`."""
    save_steps: int = 500
    """Steps between checkpoints; 0: only the final one."""
    logging_steps: int = 1
    """Steps between the plain log lines; metrics.jsonl has every step."""
    num_completions_to_log: int = 4
    """Completions written to completions.jsonl at each logging step."""
    max_eval_samples: int | None = None
    """Prompts of the test split that are measured; None: all."""

    loss: GRPOLossConfig = field(default_factory=GRPOLossConfig)
    """The loss; its temperature and max_completion_length are those above."""

    def __post_init__(self) -> None:
        problems: list[str] = []
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if isinstance(value, float) and not math.isfinite(value):
                problems.append(f"{f.name}: must be finite, got {value}")
            elif self.task is not None and f.name in _NOT_WITH_TASK and value != f.default:
                problems.append(f"{f.name}: task makes its own model and dataset; leave it out")
        problems += self.model_problems(beta=self.loss.beta)
        problems += self.rollout_problems()
        problems += self._batch_problems()
        problems += self._optimizer_problems()
        problems += self._vllm_problems()
        problems += self._ignored()
        for name in self.reward_funcs:
            if not isinstance(name, str):
                problems.append(
                    f"reward_funcs: must be names such as 'my_rewards.py:brevity', got {name!r}"
                )
        if not self.reward_funcs:
            problems.append("reward_funcs: at least one is required, for example [accuracy]")
        if self.max_steps < 1 and self.max_steps != -1:
            problems.append(f"max_steps: must be 1 or more, or -1, got {self.max_steps}")
        for name in _AT_LEAST_ONE:
            value = getattr(self, name)
            if value is not None and value < 1:
                problems.append(f"{name}: must be at least 1, got {value}")
        for name in _AT_LEAST_ZERO:
            if not getattr(self, name) >= 0:
                problems.append(f"{name}: must be 0 or more, got {getattr(self, name)}")
        for name in _ABOVE_ZERO:
            if not getattr(self, name) > 0:
                problems.append(f"{name}: must be above 0, got {getattr(self, name)}")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                problems.append(f"{name}: must be 0 or more and below 1, got {getattr(self, name)}")
        if not all(map(math.isfinite, self.reward_weights or [])):
            problems.append(f"reward_weights: must be finite, got {self.reward_weights}")
        if not 0 < self.warm_start_accuracy < 1:
            problems.append(
                f"warm_start_accuracy: must be above 0 and below 1, got {self.warm_start_accuracy}"
            )
        if problems:
            raise ConfigError("\n".join(problems))
        object.__setattr__(
            self,
            "loss",
            dataclasses.replace(
                self.loss,
                temperature=self.temperature,
                max_completion_length=self.max_completion_length,
            ),
        )

    def _batch_problems(self) -> Iterator[str]:
        if self.num_generations > 1 and self.completions_per_step % self.num_generations:
            yield (
                f"per_device_train_batch_size: times gradient_accumulation_steps is "
                f"{self.completions_per_step} completions, which num_generations = "
                f"{self.num_generations} does not divide: groups would be torn"
            )
        passes = self.steps_per_generation
        if passes is not None and (passes < 1 or passes % self.gradient_accumulation_steps):
            yield (
                f"steps_per_generation: must be a multiple of gradient_accumulation_steps = "
                f"{self.gradient_accumulation_steps}, got {passes}"
            )
        budget = self.max_tokens_per_microbatch
        if budget is not None and budget <= self.max_completion_length:
            yield (
                f"max_tokens_per_microbatch: must be above max_completion_length = "
                f"{self.max_completion_length}, got {budget}: a prompt and its completion would "
                "not fit"
            )
        if budget is not None and self.loss.loss_type == "bnpo":
            yield (
                "max_tokens_per_microbatch: the loss bnpo is a mean over micro-batches and would "
                "depend on how they are packed; use loss_type: dapo"
            )

    def _optimizer_problems(self) -> Iterator[str]:
        if self.dtype == "bfloat16" and self.bf16_updates is None and not self.use_peft:
            yield (
                "dtype: in bfloat16 updates at RL learning rates are below one unit in the last "
                "place and vanish; add bf16_updates: master_weights, or stochastic_rounding"
            )
        if self.bf16_updates is not None and (self.dtype != "bfloat16" or self.use_peft):
            yield (
                "bf16_updates: is for parameters trained in bfloat16; leave it out with "
                + ("use_peft" if self.use_peft else f"dtype: {self.dtype}")
            )
        plain = self.optim == "adamw_torch_fused"
        if self.bf16_updates == "stochastic_rounding" and (not plain or self.offload_optimizer):
            yield (
                "bf16_updates: stochastic_rounding is an optimizer of its own; leave out optim and "
                "offload_optimizer, or take master_weights"
            )
        if self.offload_optimizer and not plain:
            yield f"offload_optimizer: steps on the CPU with adamw_torch_fused, not {self.optim}"

    def _ignored(self) -> Iterator[str]:
        """Yield the options that say something about what is switched off."""
        fields = {f.name: f.default for f in dataclasses.fields(self)}
        for switch, names in _OPTIONS_OF.items():
            for name in names:
                if not getattr(self, switch) and getattr(self, name) != fields[name]:
                    yield f"{name}: has no effect without {switch}: true"

    def _vllm_problems(self) -> Iterator[str]:
        if self.use_vllm and self.load_in_4bit:
            yield "use_vllm: vLLM cannot take 4-bit weights from training; leave load_in_4bit out"
        if (
            self.use_vllm
            and self.vllm_importance_sampling_correction
            and self.vllm_importance_sampling_mode.startswith("sequence")
            and self.loss.loss_type == "vespo"
        ):
            yield (
                "vllm_importance_sampling_mode: vespo weighs whole sequences by itself; take "
                "token_truncate or token_mask"
            )

    @property
    def limits(self) -> dict[str, int]:
        """Tokens that prompt and completion may have together, by the key that says so."""
        limits = {"max_tokens_per_microbatch": self.max_tokens_per_microbatch}
        if self.use_vllm:
            limits["vllm_max_model_length"] = self.vllm_max_model_length
        return {name: limit for name, limit in limits.items() if limit is not None}

    @property
    def optimizer_steps_per_generation(self) -> int:
        """Optimisation steps, repeats aside, that a batch of completions is sampled for."""
        return (self.steps_per_generation or self.gradient_accumulation_steps) // (
            self.gradient_accumulation_steps
        )

    @property
    def completions_per_step(self) -> int:
        """Completions of one optimisation step."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    @property
    def prompts_per_step(self) -> int:
        """Prompts of one optimisation step."""
        return self.completions_per_step // self.num_generations

    def num_steps(self, num_prompts: int) -> int:
        """Optimisation steps of a run over a dataset of `num_prompts` prompts."""
        if self.max_steps > 0:
            return self.max_steps
        prompts = self.prompts_per_step * self.optimizer_steps_per_generation
        generations = math.ceil(self.num_train_epochs * num_prompts / prompts)
        return generations * self.optimizer_steps_per_generation * self.num_iterations

    def flat(self) -> dict[str, Any]:
        """Return all keys and values as they stand in YAML."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        del values["loss"]
        return values | {name: getattr(self.loss, name) for name in LOSS_KEYS}


_NOT_WITH_TASK = (
    "model_name_or_path",
    "attn_implementation",
    "dtype",
    "load_in_4bit",
    "dataset_name",
    "dataset_config",
    "dataset_train_split",
    "dataset_test_split",
    "prompt_column",
    "system_prompt",
)
_OPTIONS_OF = {
    "use_peft": ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules"),
    "load_in_4bit": ("bnb_4bit_quant_type", "use_bnb_nested_quant"),
    "sync_ref_model": ("ref_model_mixup_alpha", "ref_model_sync_steps"),
    "dynamic_sampling": ("max_resample_rounds",),
    "use_vllm": (
        "vllm_gpu_memory_utilization",
        "vllm_max_model_length",
        "vllm_enable_sleep_mode",
    ),
}
_AT_LEAST_ONE = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_iterations",
    "cpu_threads",
    "logging_steps",
    "max_eval_samples",
)
_AT_LEAST_ZERO = (
    "advantage_eps",
    "learning_rate",
    "warmup_steps",
    "weight_decay",
    "save_steps",
    "num_completions_to_log",
)
_ABOVE_ZERO = ("max_grad_norm", "num_train_epochs", "adam_epsilon")
LOSS_KEYS = tuple(
    f.name
    for f in dataclasses.fields(GRPOLossConfig)
    # The first two are keys of their own; the others are the model's business.
    if f.name not in ("temperature", "max_completion_length", "logit_scale", "logit_softcap")
)
