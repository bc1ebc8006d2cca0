"""The policy: a Hugging Face causal LM cut into its body and its head.

For training the body runs to its last hidden state and the head's weight goes to the fused loss:
the logits of a batch never exist.

B sequences, L positions (prompt and completion), H hidden, V vocabulary.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

# Where model configurations keep what is applied to logits after the head's product.
_LOGIT_OPTIONS = (
    "final_logit_softcapping",
    "logits_scaling",
    "logit_scale",
    "lm_head_multiplier",
    "logits_scale",
)


def load_model(name: str, *, attn_implementation: str) -> PreTrainedModel:
    """Load a causal LM in fp32 from a directory or the Hub.

    Raises:
        ValueError: it cannot be loaded; says why.
    """
    return _load(
        AutoModelForCausalLM, name, dtype=torch.float32, attn_implementation=attn_implementation
    )


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model from a directory or the Hub.

    Raises:
        ValueError: it cannot be loaded; says why.
    """
    return _load(AutoTokenizer, name)


def _load(auto_class: Any, name: str, **options: Any) -> Any:
    local = name.startswith((".", "/", "~")) or Path(name).exists()
    path = Path(name).expanduser()
    if local and not (path / "config.json").is_file():
        raise ValueError(
            f"model_name_or_path: {name} is not a model directory: it has no config.json; "
            "save one with model.save_pretrained and tokenizer.save_pretrained"
        )
    if local and auto_class is AutoTokenizer and not any(path.glob("token*")):
        raise ValueError(
            f"model_name_or_path: {name} holds no tokenizer; save it there with "
            "tokenizer.save_pretrained"
        )
    try:
        return auto_class.from_pretrained(str(path) if local else name, **options)
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        hub = "" if local else " (there is no such directory, so it was taken for a Hub name)"
        raise ValueError(f"model_name_or_path: {name} cannot be loaded: {reason}{hub}") from error


class Policy:
    """A causal LM and the few things GRPO asks of it."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, bf16: bool):
        self.model = model
        self.tokenizer = tokenizer
        self.bf16 = bf16
        self.device = next(model.parameters()).device
        self.head: Any = model.get_output_embeddings()
        check_head(model)
        self.eos_token_ids = _eos_token_ids(model, tokenizer)
        # Padding is masked everywhere, so any id will do.
        pad: Any = tokenizer.pad_token_id
        self.pad_token_id: int = self.eos_token_ids[0] if pad is None else pad

    def autocast(self) -> torch.autocast:
        """Return the context of every forward pass: bf16 products, or nothing."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16)

    def hidden_states(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Run the body: (B, L) ids and mask to (B, L, H) last hidden states."""
        positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
        decoder = self.model.get_decoder()
        return decoder(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=positions,
            use_cache=False,
        ).last_hidden_state

    @property
    def head_weight(self) -> Tensor:
        """(V, H) weight of the LM head; the embedding's own when they are tied."""
        return self.head.weight

    @property
    def head_bias(self) -> Tensor | None:
        """(V,) bias of the LM head."""
        return getattr(self.head, "bias", None)

    def frozen_copy(self) -> Policy:
        """Return a copy that is never trained: the reference of the KL term."""
        frozen = copy.copy(self)
        frozen.model = copy.deepcopy(self.model).eval().requires_grad_(False)
        frozen.head = frozen.model.get_output_embeddings()
        return frozen

    @property
    def positions(self) -> int:
        """Tokens that prompt and completion may have together."""
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return sys.maxsize if limit is None else limit

    def enable_gradient_checkpointing(self) -> None:
        """Compute activations again in backward; transformers 5.23 renamed the switch."""
        model = self.model
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})


@contextmanager
def evaluating(model: PreTrainedModel, attentions: Sequence[str]) -> Generator[None]:
    """Switch to eval mode and to one of some attentions, the first unless it has one; then back."""
    training = [module for module in model.modules() if module.training]
    attention: Any = model.config._attn_implementation  # pyright: ignore[reportPrivateUsage]
    model.eval()
    try:
        if attention not in attentions:
            model.set_attn_implementation(attentions[0])
        yield
    finally:
        if attention not in attentions:
            model.set_attn_implementation(attention)
        for module in training:
            module.training = True


def check_head(model: PreTrainedModel) -> None:
    """Refuse a model whose logits are more than `hidden @ weight.T + bias`.

    Raises:
        ValueError: what the fused loss would compute is not what the model computes.
    """
    name = type(model).__name__
    head: Any = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"{name} has no LM head: a causal language model is needed")
    config = model.config.get_text_config()
    options = {option: getattr(config, option, None) for option in _LOGIT_OPTIONS}
    applied = [f"{key} = {value}" for key, value in options.items() if value not in (None, 1, 1.0)]
    if not applied and not torch.allclose(*_logits_both_ways(model, head), rtol=1e-3, atol=1e-3):
        applied = ["something else is applied"]
    if applied:
        raise ValueError(
            f"the logits of {name} are not hidden @ weight.T + bias ({', '.join(applied)}): such "
            "heads are not built yet"
        )


@torch.no_grad()
def _logits_both_ways(model: PreTrainedModel, head: Any) -> tuple[Tensor, Tensor]:
    """Return the logits of a few tokens from the model and from its hidden states, in fp32."""
    ids = torch.arange(4, device=head.weight.device)[None] % head.weight.shape[0]
    with evaluating(model, ("eager",)):  # flash attention would refuse fp32
        hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        logits = model(input_ids=ids, use_cache=False).logits
    return F.linear(hidden, head.weight, getattr(head, "bias", None)).float(), logits.float()


def _eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return all ids that end a completion: the generation config's and the tokenizer's."""
    configured: Any = model.generation_config.eos_token_id if model.generation_config else None
    ids: list[Any] = configured if isinstance(configured, list) else [configured]
    found = sorted({i for i in (*ids, tokenizer.eos_token_id) if isinstance(i, int)})
    if not found:
        raise ValueError(
            "neither the tokenizer nor the generation config has an end-of-sequence token: "
            "set tokenizer.eos_token"
        )
    return found
