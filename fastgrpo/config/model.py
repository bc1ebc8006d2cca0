"""What is trained: the model, how it is held in memory, its adapters, its reference."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from .checks import above_zero, at_least, below_one, share


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The part of a `TrainConfig` that is about the model."""

    model_name_or_path: str | None = None
    """A Hugging Face causal LM: a directory or a Hub name. Left out with `task`."""
    model_revision: str = "main"
    """Branch, tag or commit of a model on the Hub."""
    trust_remote_code: bool = False
    """Run the Python files that a model or tokenizer brings along."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type the parameters are held in. bfloat16 needs `bf16_updates`, or frozen parameters with
    trained adapters on them (`use_peft`)."""
    bf16: bool | None = None
    """Compute under bf16 autocast. None: on a GPU that has it."""
    attn_implementation: (
        Literal["flash_attention_2", "flash_attention_3", "sdpa", "eager"] | None
    ) = None
    """Attention of transformers: flash_attention_2, flash_attention_3, sdpa, eager. None: the
    fastest there is that takes packed sequences, sdpa for padded ones."""
    padding_free: bool | None = None
    """Concatenate the sequences of a micro-batch instead of padding them. None: where the model
    can; otherwise that is said once."""
    torch_compile: bool = False
    """Compile the layers of the model with `torch.compile` for training."""
    disable_dropout: bool = False
    """Set every dropout of the model to 0."""
    gradient_checkpointing: bool = True
    """Compute activations again in backward instead of keeping them."""
    activation_offloading: bool = False
    """Keep what gradient checkpointing does keep in CPU memory until backward."""

    use_peft: bool = False
    """Train LoRA adapters (extra `lora`) and leave the model's own parameters as they are."""
    lora_r: int = 16
    """Rank of the adapters."""
    lora_alpha: float = 32
    """The adapters' output is multiplied by lora_alpha / lora_r."""
    lora_dropout: float = 0.0
    """Dropout before the adapters. 0 here, 0.05 in TRL: dropout makes the policy that is trained
    another one than the policy that was sampled."""
    lora_target_modules: list[str] | None = None
    """Names of the modules that get adapters; None: all linear layers but the LM head."""
    load_in_4bit: bool = False
    """Hold the frozen parameters in 4 bits (QLoRA; extra `8bit`). Needs `use_peft`."""
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    """Which 4 bits."""
    use_bnb_nested_quant: bool = False
    """Quantise the constants of the quantisation too."""

    offload_ref_model: bool = False
    """Keep the reference (beta > 0) in CPU memory while it is not asked."""
    sync_ref_model: bool = False
    """Move the reference towards the policy (TR-DPO) every `ref_model_sync_steps` steps."""
    ref_model_mixup_alpha: float = 0.6
    """The new reference is alpha * policy + (1 - alpha) * old reference."""
    ref_model_sync_steps: int = 512
    """Optimisation steps between two such moves."""

    def model_problems(self) -> Iterator[str]:
        """Yield what is wrong with these values."""
        yield from at_least(self, 1, "lora_r", "ref_model_sync_steps")
        yield from above_zero(self, "lora_alpha")
        if self.disable_dropout and self.lora_dropout:
            yield "disable_dropout: lora_dropout would be 0 as well; leave one of them out"
        yield from below_one(self, "lora_dropout")
        yield from share(self, "ref_model_mixup_alpha")
        if self.load_in_4bit and not self.use_peft:
            yield "load_in_4bit: 4-bit parameters cannot be trained; add use_peft: true"
        if self.lora_target_modules == []:
            yield "lora_target_modules: is empty; leave it out for all linear layers"
        if self.activation_offloading and not self.gradient_checkpointing:
            yield "activation_offloading: offloads checkpoints; needs gradient_checkpointing: true"
        if self.padding_free and self.attn_implementation in ("sdpa", "eager"):
            yield (
                f"padding_free: {self.attn_implementation} attention would mask a matrix of all "
                "tokens squared; leave attn_implementation out, or take flash_attention_2"
            )
        if self.sync_ref_model and self.dtype == "bfloat16" and self.ref_model_mixup_alpha < 0.5:
            yield (
                f"ref_model_mixup_alpha: below 0.5 steps of one unit in the last place are rounded "
                f"away, got {self.ref_model_mixup_alpha}; use 0.5 or more, or dtype: float32"
            )
