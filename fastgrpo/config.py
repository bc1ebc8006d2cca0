"""The configuration of a run, with the names TRL and transformers use."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from fastgrpo_kernels import GRPOLossConfig


class ConfigError(ValueError):
    """Something in the configuration is wrong; the message says what and what to do."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A GRPO run. In YAML, every field of `GRPOLossConfig` is a key beside these.

    Raises:
        ConfigError: a value out of range or a combination that cannot run.
    """

    model_name_or_path: str | None = None
    """A Hugging Face causal LM: a directory or a Hub name. Left out with `task`."""
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

    num_generations: int = 8
    """Completions sampled for each prompt."""
    max_completion_length: int = 512
    """Tokens a completion may have at most."""
    temperature: float = 1.0
    """Divides the logits, when sampling and in the loss."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens whose probability reaches this."""
    top_k: int = 0
    """Sample from this many most likely tokens; 0: all."""
    max_generation_batch_size: int | None = None
    """Completions decoded at once, which bounds the KV cache; None: all of an optimisation step."""
    per_device_train_batch_size: int = 8
    """Completions in one forward and backward pass."""
    gradient_accumulation_steps: int = 1
    """Passes per optimisation step; the step has the product of both in completions."""
    num_iterations: int = 1
    """Optimisation steps on each batch of completions (mu in the GRPO paper)."""

    max_steps: int = -1
    """Optimisation steps; -1: as many as `num_train_epochs` has."""
    num_train_epochs: float = 1.0
    """Passes over the prompts, when max_steps is -1."""
    learning_rate: float = 1e-6
    """Peak learning rate of AdamW."""
    lr_scheduler_type: str = "linear"
    """A schedule of transformers: linear, cosine, constant, constant_with_warmup, ..."""
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

    bf16: bool | None = None
    """Compute under bf16 autocast, parameters in fp32. None: on a GPU that has it."""
    gradient_checkpointing: bool = True
    """Compute activations again in backward instead of keeping them."""
    attn_implementation: str = "sdpa"
    """Attention of transformers: sdpa, eager, flash_attention_2 (extra `flash-attn`), ..."""
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
        if self.num_generations < 2:
            problems.append(
                f"num_generations: must be at least 2, got {self.num_generations}: a completion "
                "is judged against the others of its group, and one alone has no signal"
            )
        elif self.completions_per_step % self.num_generations:
            problems.append(
                f"per_device_train_batch_size: times gradient_accumulation_steps is "
                f"{self.completions_per_step} completions, which num_generations = "
                f"{self.num_generations} does not divide: groups would be torn"
            )
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
        if not 0 < self.top_p <= 1:
            problems.append(f"top_p: must be above 0 and at most 1, got {self.top_p}")
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
        batches = math.ceil(self.num_train_epochs * num_prompts / self.prompts_per_step)
        return batches * self.num_iterations

    def flat(self) -> dict[str, Any]:
        """Return all keys and values as they stand in YAML."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        del values["loss"]
        return values | {name: getattr(self.loss, name) for name in LOSS_KEYS}


_NOT_WITH_TASK = (
    "model_name_or_path",
    "attn_implementation",
    "dataset_name",
    "dataset_config",
    "dataset_train_split",
    "dataset_test_split",
    "prompt_column",
    "system_prompt",
)
_AT_LEAST_ONE = (
    "max_generation_batch_size",
    "max_completion_length",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_iterations",
    "cpu_threads",
    "logging_steps",
    "max_eval_samples",
)
_AT_LEAST_ZERO = (
    "advantage_eps",
    "top_k",
    "learning_rate",
    "warmup_steps",
    "weight_decay",
    "save_steps",
    "num_completions_to_log",
)
_ABOVE_ZERO = ("temperature", "max_grad_norm", "num_train_epochs", "adam_epsilon")
LOSS_KEYS = tuple(
    f.name
    for f in dataclasses.fields(GRPOLossConfig)
    # The first two are keys of their own; the others are the model's business.
    if f.name not in ("temperature", "max_completion_length", "logit_scale", "logit_softcap")
)
