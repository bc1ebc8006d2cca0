"""All options of a run together, and what they demand of each other."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, field
from fractions import Fraction
from typing import Any, ClassVar, Self

from fastgrpo_kernels import GRPOLossConfig

from .checks import ConfigError, above_zero, at_least, secrets
from .data import DataOptions
from .effects import without_effect
from .loss import LossOptions
from .model import ModelOptions
from .optim import OptimOptions
from .output import OutputOptions
from .parallel import ParallelOptions
from .rewards import RewardOptions
from .rollout import RolloutOptions


@dataclass(frozen=True, kw_only=True)
class TrainConfig(  # the fields of the last come first in config.yaml
    OutputOptions,
    ParallelOptions,
    OptimOptions,
    LossOptions,
    RewardOptions,
    RolloutOptions,
    DataOptions,
    ModelOptions,
):
    """A GRPO run. In YAML, every field of `GRPOLossConfig` is a key beside these.

    Raises:
        ConfigError: a value out of range or a combination that cannot run.
    """

    per_device_train_batch_size: int = 8
    """Completions in one forward and backward pass, unless max_tokens_per_microbatch is set."""
    gradient_accumulation_steps: int = 1
    """Passes per optimisation step; the step has the product of both, times the processes, in
    completions."""
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
    num_train_epochs: float = 3.0
    """Passes over the prompts, when max_steps is -1."""
    cpu_threads: int | None = None
    """Threads of PyTorch on the CPU; None: its default. Small models are faster on 1."""
    seed: int = 42
    """Of everything that is random."""

    loss: GRPOLossConfig = field(default_factory=GRPOLossConfig)
    """The loss; its temperature and max_completion_length are those above."""

    EFFECTIVE: ClassVar[frozenset[str]] = frozenset()
    """Keys that are read whatever the others say."""

    def __new__(cls, **values: Any) -> Self:
        """Say of an argument that is none where the keys of YAML are taken.

        Raises:
            TypeError: names it.
        """
        for name in values.keys() - cls.__dataclass_fields__.keys():
            raise TypeError(
                f"TrainConfig has no argument {name!r}; config_from({{{name!r}: ...}}) takes every "
                "key of YAML, those of the loss too, and names the nearest of one that is none"
            )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        problems = [*secrets(vars(self))]
        if problems:
            raise ConfigError("\n".join(problems))  # alone: others would say the values
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if isinstance(value, float) and not math.isfinite(value):
                problems.append(f"{f.name}: must be finite, got {value}")
        problems += self.model_problems()
        problems += self.data_problems()
        problems += self.rollout_problems()
        problems += self.reward_problems()
        problems += self.loss_problems(entropy_coef=self.loss.entropy_coef)
        problems += self.optim_problems(dtype=self.dtype, use_peft=self.use_peft)
        problems += self.output_problems()
        problems += self.parallel_problems()
        problems += self._batch_problems()
        problems += self._vllm_problems()
        problems += self._sharding_problems()
        values = self.flat()
        for key, need in without_effect(values, DEFAULTS, self.EFFECTIVE):
            if not need.refused_later:
                problems.append(need.problem(key, values))
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
        yield from at_least(
            self,
            1,
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "num_iterations",
            "cpu_threads",
        )
        yield from above_zero(self, "num_train_epochs")
        if not 0 <= self.seed < 2**32:
            yield f"seed: must be from 0 to {2**32 - 1}, which numpy takes, got {self.seed}"
        if self.max_steps < 1 and self.max_steps != -1:
            yield f"max_steps: must be 1 or more, or -1, got {self.max_steps}"
        if self.num_generations > 1 and self.completions_per_step % self.num_generations:
            yield (
                f"per_device_train_batch_size: times gradient_accumulation_steps "
                f"{f'and {self.num_processes} processes ' if self.num_processes > 1 else ''}is "
                f"{self.completions_per_step} completions, which num_generations = "
                f"{self.num_generations} does not divide: groups would be torn; change one of "
                "them"
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
        for needed, what, remedy in (
            (self.loss.loss_type == "bnpo", "the loss bnpo is a mean over", "use loss_type: dapo"),
            (
                self.top_entropy_quantile < 1,
                "top_entropy_quantile takes quantiles of",
                "leave one of them out",
            ),
        ):
            if budget is not None and needed:
                yield (
                    f"max_tokens_per_microbatch: {what} micro-batches and would depend on how they "
                    f"are packed; {remedy}"
                )

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

    def _sharding_problems(self) -> Iterator[str]:
        if self.parallel is None:
            return
        bitsandbytes = self.optim not in ("adamw_torch_fused", "adamw_torch_8bit")
        for key, used, remedy in (
            ("use_vllm", self.use_vllm, "leave it out: every process samples with the own engine"),
            ("load_in_4bit", self.load_in_4bit, "write dtype: bfloat16, which is sharded"),
            ("optim", bitsandbytes, "write adamw_torch_8bit, whose states are sharded"),
            (
                "bf16_updates",
                self.bf16_updates is not None,
                "write dtype: float32, with bf16: true",
            ),
            ("offload_optimizer", self.offload_optimizer, "leave it out: its states are sharded"),
            ("torch_compile", self.torch_compile, "leave it out"),
            # FSDP2 takes what is trained for given once it has gathered it.
            ("use_peft", self.use_peft and self.task is not None, "leave it out beside task"),
        ):
            if used:
                yield f"{key}: is for one process, and not with parallel; {remedy}"

    @property
    def test_split(self) -> str | None:
        """Split of the dataset that is measured, if any."""
        return self.dataset_test_split or (None if self.eval_strategy == "no" else "test")

    def limits(self, positions: int) -> dict[str, int]:
        """Return the tokens that prompt and completion may have together, by what has that room.

        Args:
            positions: of the model.
        """
        limits = {
            "the model": positions,
            "max_tokens_per_microbatch": self.max_tokens_per_microbatch,
        }
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
    def completions_per_process(self) -> int:
        """Completions of one optimisation step, for each process."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    @property
    def completions_per_step(self) -> int:
        """Completions of one optimisation step, of all processes together."""
        return self.completions_per_process * self.num_processes

    @property
    def prompts_per_step(self) -> int:
        """Prompts of one optimisation step."""
        return self.completions_per_step // self.num_generations

    def steps_per_epoch(self, num_prompts: int) -> Fraction:
        """Optimisation steps that one visit of all prompts takes."""
        return Fraction(num_prompts * self.num_iterations, self.prompts_per_step)

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


class EvalConfig(TrainConfig):
    """What `fastgrpo eval` reads: of training it may lack what only an evaluation has use for."""

    EFFECTIVE = frozenset({"max_eval_samples", "num_generations_eval"})


LOSS_KEYS = tuple(
    f.name
    for f in dataclasses.fields(GRPOLossConfig)
    # The first two are keys of their own; the others are the model's business.
    if f.name not in ("temperature", "max_completion_length", "logit_scale", "logit_softcap")
)
DEFAULTS: dict[str, Any] = {
    f.name: f.default if f.default_factory is MISSING else f.default_factory()
    for f in (*dataclasses.fields(GRPOLossConfig), *dataclasses.fields(TrainConfig))
    if f.name in {*LOSS_KEYS, *TrainConfig.__dataclass_fields__} - {"loss"}
}
"""What each key of YAML has that is left out."""
