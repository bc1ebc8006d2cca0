"""The policy: a Hugging Face causal LM cut into its body and its head.

For training the body runs to its last hidden state and the head's weight goes to the fused loss:
the logits of a batch never exist.

B sequences, N tokens of all of them, L tokens of the longest, H hidden.
"""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention import packed_arguments, packed_attention, why_not_packed
from .batch import Batch
from .head import read_head

if TYPE_CHECKING:
    from .sharding import Sharding


class Policy:
    """A causal LM and the few things GRPO asks of it."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        bf16: bool,
        padding_free: bool | None = None,
        sharding: Sharding | None = None,
    ):
        """Cut a model into its body and its head.

        Args:
            model: a causal LM, also with adapters of PEFT.
            tokenizer: its tokenizer.
            bf16: compute under bf16 autocast.
            padding_free: pack sequences instead of padding them; None: if the model can.
            sharding: of the model, whose parameters are whole now; None: it is in one piece.

        Raises:
            ValueError: the head is one the loss cannot express, the model cannot be packed and
                `padding_free` is True, or nothing ends a completion.
        """
        self.model = model
        self.tokenizer = tokenizer
        self.bf16 = bf16
        self.sharding = sharding
        self.device = next(model.parameters()).device
        self.head = read_head(model)
        own: Any = model.config._attn_implementation  # pyright: ignore[reportPrivateUsage]
        self.attention: str = own
        self._own_attention: str = own
        self.why_padded = "padding_free is false"
        if padding_free is not False:
            self.why_padded = self._pack()
            if padding_free and self.why_padded:
                raise ValueError(f"padding_free: {self.why_padded}; leave padding_free out")
        self.compiled = False
        self.eos_token_ids = eos_token_ids(model, tokenizer)
        # Padding is masked everywhere, so any id that can be embedded will do.
        pad: Any = tokenizer.pad_token_id
        embedded = isinstance(pad, int) and 0 <= pad < self.vocabulary
        self.pad_token_id: int = int(pad) if embedded else self.eos_token_ids[0]

    @property
    def packed(self) -> bool:
        """Whether sequences are concatenated instead of padded."""
        return not self.why_padded

    @property
    def vocabulary(self) -> int:
        """Tokens that the model has embeddings of; a tokenizer may have fewer, or more."""
        embedding: Any = self.model.get_input_embeddings()
        return len(embedding.weight)

    @property
    def product_dtype(self) -> torch.dtype:
        """Type that matrix products are computed in."""
        return torch.bfloat16 if self.bf16 else self.model.dtype

    def autocast(self) -> torch.autocast:
        """Return the context of every forward pass: bf16 products, or nothing."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16)

    @contextmanager
    def sampling(self) -> Generator[None]:
        """Return the context of sampling: one-token steps run as they are, not compiled."""
        eager = torch.compiler.set_stance("force_eager") if self.compiled else nullcontext()
        with self.autocast(), eager:
            yield

    @contextmanager
    def packing(self) -> Generator[None]:
        """Return the context of training: packed sequences attend to themselves.

        It holds until backward is done, where gradient checkpointing attends again.
        """
        model, own = self.model, self._own_attention
        if self.packed:
            model.set_attn_implementation(self.attention)
        try:
            yield
        finally:
            model.set_attn_implementation(own)

    @contextmanager
    def whole(self) -> Generator[None]:
        """Return the context of many forward passes without a gradient: no collectives inside."""
        with nullcontext() if self.sharding is None else self.sharding.whole():
            yield

    def begin_pass(self, *, last: bool) -> None:
        """Get ready for a forward and backward pass of a step, the last one or another."""
        if self.sharding is not None:
            self.sharding.begin_pass(last=last)

    def reshard(self) -> None:
        """Let go of gathered parameters; they may change afterwards."""
        if self.sharding is not None:
            self.sharding.reshard()

    def state_dict(self, module: nn.Module) -> dict[str, Tensor]:
        """Return all parameters of the model, or of what adapters are on, to the first rank."""
        return module.state_dict() if self.sharding is None else self.sharding.state_dict(module)

    def compile(self) -> None:
        """Compile each layer of the body for training, for sequences of any length.

        Raises:
            ValueError: the model has no layers that transformers marks as such.
        """
        layers = [m for m in self.model.modules() if isinstance(m, GradientCheckpointingLayer)]
        if not layers:
            name = type(self.model).__name__
            raise ValueError(f"torch_compile: {name} has no layers to compile; leave it out")
        for layer in layers:
            layer.compile(dynamic=True)
        self.compiled = True

    def hidden_states(self, batch: Batch) -> Tensor:
        """Run the body on a batch: (N, H) last hidden states, one for each of its tokens."""
        decoder = self.model.get_decoder() if self.sharding is None else self.sharding.decode
        if self.packed:
            now: Any = self.model.config._attn_implementation  # pyright: ignore[reportPrivateUsage]
            assert now == self.attention, "packed sequences need the context policy.packing()"
            arguments = packed_arguments(batch.lengths, self.device)
            return decoder(input_ids=batch.input_ids[None], **arguments).last_hidden_state[0]
        index_BL, real_BL = batch.padded_index()
        hidden_BLH = decoder(
            input_ids=batch.input_ids[index_BL],
            attention_mask=real_BL.long(),
            position_ids=batch.position_ids[index_BL],
            use_cache=False,
        ).last_hidden_state
        return hidden_BLH[real_BL]

    def _pack(self) -> str:
        """Find an attention for packed sequences, or say why there is none."""
        best = packed_attention(self.device, self.product_dtype)
        self.attention = self._own_attention if "flash" in self._own_attention else best
        with self.autocast():
            return why_not_packed(self.model, self.attention) or ""

    @property
    def positions(self) -> int:
        """Tokens that prompt and completion may have together."""
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return sys.maxsize if limit is None else limit


def eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return all ids that end a completion: the generation config's and the tokenizer's.

    Raises:
        ValueError: there is none.
    """
    configured: Any = model.generation_config.eos_token_id if model.generation_config else None
    ids: list[Any] = configured if isinstance(configured, list) else [configured]
    found = sorted({i for i in (*ids, tokenizer.eos_token_id) if isinstance(i, int)})
    if not found:
        raise ValueError(
            "neither the tokenizer nor the generation config has an end-of-sequence token: "
            "set tokenizer.eos_token"
        )
    return found
