"""How parameters are updated."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from .checks import above_zero, at_least, below_one


@dataclass(frozen=True, kw_only=True)
class OptimOptions:
    """The part of a `TrainConfig` that is about the optimizer and its schedule."""

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
        "cosine_with_min_lr",
        "polynomial",
        "constant",
        "constant_with_warmup",
        "inverse_sqrt",
        "warmup_stable_decay",
    ] = "linear"
    """A schedule of transformers."""
    lr_scheduler_kwargs: dict[str, Any] | None = None
    """Arguments of the schedule, for example {min_lr_rate: 0.1} of cosine_with_min_lr."""
    warmup_steps: float = 0
    """Steps over which the learning rate rises from 0; below 1, a share of all steps."""
    weight_decay: float = 0.0
    """Of AdamW; not applied to biases and norms."""
    adam_beta1: float = 0.9
    """Of AdamW."""
    adam_beta2: float = 0.999
    """Of AdamW."""
    adam_epsilon: float = 1e-8
    """Of AdamW."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0: they are not."""
    max_grad_norm_ratio: float | None = None
    """A step whose gradient has a norm above so many times the median of those of the steps before
    is not taken; None: it is."""
    grad_norm_window: int = 20
    """Steps whose norms make that median: the last that were taken and had a signal. Until there
    are as many, every step is taken."""
    max_bad_steps: int = 5
    """Steps in a row that may be passed over, for a loss or gradient that is infinite or NaN, or by
    max_grad_norm_ratio; the next ends the run. 0: the first does."""

    def optim_problems(self, *, dtype: str, use_peft: bool) -> Iterator[str]:
        """Yield what is wrong with these values."""
        yield from at_least(
            self, 0, "learning_rate", "warmup_steps", "weight_decay", "max_grad_norm",
            "max_bad_steps",
        )  # fmt: skip
        yield from at_least(self, 1, "grad_norm_window", "max_grad_norm_ratio")
        yield from above_zero(self, "adam_epsilon")
        yield from below_one(self, "adam_beta1", "adam_beta2")
        if self.warmup_steps > 1 and self.warmup_steps != int(self.warmup_steps):
            yield f"warmup_steps: must be whole, or a share below 1, got {self.warmup_steps}"
        if dtype == "bfloat16" and self.bf16_updates is None and not use_peft:
            yield (
                "dtype: in bfloat16 updates at RL learning rates are below one unit in the last "
                "place and vanish; add bf16_updates: master_weights, or stochastic_rounding"
            )
        if self.bf16_updates is not None and (dtype != "bfloat16" or use_peft):
            yield (
                "bf16_updates: is for parameters trained in bfloat16; leave it out with "
                + ("use_peft" if use_peft else f"dtype: {dtype}")
            )
        plain = self.optim == "adamw_torch_fused"
        if self.bf16_updates == "stochastic_rounding" and (not plain or self.offload_optimizer):
            yield (
                "bf16_updates: stochastic_rounding is an optimizer of its own; leave out optim and "
                "offload_optimizer, or take master_weights"
            )
        if self.offload_optimizer and not plain:
            yield f"offload_optimizer: steps on the CPU with adamw_torch_fused, not {self.optim}"
