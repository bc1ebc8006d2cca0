"""How completions are sampled, by which engine, and what is done about its differences."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from .checks import above_zero, at_least, share


@dataclass(frozen=True, kw_only=True)
class RolloutOptions:
    """The part of a `TrainConfig` that is about sampling."""

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
    min_p: float | None = None
    """Sample from the tokens at least this times as likely as the likeliest; None: all."""
    rollout_fn: str | None = None
    """`module:function` or `path.py:function` that samples in the engine's place: several turns,
    tools, environments (`fastgrpo.rollout_fn`)."""
    max_generation_batch_size: int | None = None
    """Completions decoded at once, which bounds the KV cache; None: as many as fit in half of the
    memory that is free."""
    cuda_graph: bool = True
    """On a GPU, replay a decoding step as one CUDA graph."""

    dynamic_sampling: bool = False
    """Sample further prompts in place of groups whose rewards are all equal (DAPO)."""
    max_resample_rounds: int = 3
    """How often at most; what is still missing then is filled with groups without signal."""

    use_vllm: bool = False
    """Sample with vLLM in this process (extra `vllm`); it gets the weights after every step."""
    vllm_gpu_memory_utilization: float = 0.3
    """Share of the GPU's memory that vLLM may take."""
    vllm_max_model_length: int | None = None
    """Tokens of prompt and completion that vLLM makes room for; None: what the model can."""
    vllm_enable_sleep_mode: bool = False
    """Give vLLM's memory back while training."""
    vllm_importance_sampling_correction: bool = True
    """Weigh what vLLM sampled by how likely the policy finds it."""
    vllm_importance_sampling_mode: Literal[
        "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"
    ] = "sequence_mask"
    """Ratios of tokens or of sequences; outside the bounds they are clipped, or count as 0."""
    vllm_importance_sampling_clip_max: float | None = 3.0
    """Upper bound of the ratio."""
    vllm_importance_sampling_clip_min: float | None = None
    """Lower bound of the ratio."""

    def rollout_problems(self) -> Iterator[str]:
        """Yield what is wrong with these values."""
        if self.num_generations < 2:
            yield (
                f"num_generations: must be at least 2, got {self.num_generations}: a completion "
                "is judged against the others of its group, and one alone has no signal"
            )
        yield from at_least(
            self,
            1,
            "max_completion_length",
            "max_generation_batch_size",
            "max_resample_rounds",
            "vllm_max_model_length",
        )
        yield from above_zero(self, "temperature")
        yield from share(self, "top_p", "vllm_gpu_memory_utilization")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            yield f"min_p: must be 0 or more and at most 1, got {self.min_p}"
        yield from at_least(self, 0, "top_k")
        low, high = self.vllm_importance_sampling_clip_min, self.vllm_importance_sampling_clip_max
        if not 0 <= (low or 0.0) < (math.inf if high is None else high):
            yield (
                "vllm_importance_sampling_clip_min: must be 0 or more and below "
                f"vllm_importance_sampling_clip_max, got {low} and {high}"
            )
        truncates = self.vllm_importance_sampling_mode.endswith("truncate")
        if truncates and low is None and high is None:
            yield (
                f"vllm_importance_sampling_mode: {self.vllm_importance_sampling_mode} needs "
                "vllm_importance_sampling_clip_max or vllm_importance_sampling_clip_min"
            )
