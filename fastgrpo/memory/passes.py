"""What a forward and backward pass keeps, found by running the model's code on fake tensors.

Fake tensors (`FakeTensorMode`) have shapes and types, cost nothing, and go through the layers,
autocast, adapters and gradient checkpointing of the real model. At one and the same operation the
bytes alive are affine in the tokens of the pass and in the number of equal layers, so two small
numbers of each give them for all; only then is the peak looked for.

E operations, K kinds of tensors, B sequences, L positions, N tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from fastgrpo.config import TrainConfig

from .fake_model import (
    VARLEN_ELSEWHERE,
    VARLEN_GPU,
    build_fake,
    checkpoint_fake,
    layers_of,
    move_to_cpu,
)
from .live import KINDS, LiveBytes, without_values

_UNIT = 64  # tokens of a sequence: more than one, so that nothing is special


class LossKind(NamedTuple):
    """What the fused loss keeps of the size of hidden states and head between its two passes."""

    dtype: torch.dtype
    """Of its products."""
    sum_dtype: torch.dtype = torch.float32
    """In which the gradient of the head is added up."""
    recompute: bool = False
    """Keep the operands of its products, and no gradients."""


@dataclass(frozen=True)
class Pass:
    """All that decides what a pass keeps, but for the number of its tokens."""

    config: TrainConfig
    bf16: bool
    """Products are computed under autocast."""
    on_gpu: bool
    loss: LossKind
    with_backward: bool = True
    padded_length: int | None = None
    """Tokens of every sequence; None: sequences are packed."""
    frozen: bool = False
    """As the reference is: autocast keeps no copies, adapters are off."""
    gradients_exist: bool = False
    """Of an earlier pass of the same optimisation step."""


class Footprint:
    """The bytes alive after each operation of a pass, for any number of tokens."""

    def __init__(self, architecture: PreTrainedConfig, this: Pass, *, equal_layers: bool) -> None:
        """Run passes of few tokens, and of few layers if these are all equal.

        Raises:
            ValueError: the model cannot run without values, or not twice in the same way.
        """
        depth: int = architecture.get_text_config().num_hidden_layers
        depths = (2, 3) if depth > 2 and equal_layers else (None,)
        runs = [[_run(architecture, this, layers, units) for units in (2, 3)] for layers in depths]
        self.marks = runs[0][0].marks
        if len({len(run.events_EK) for pair in runs for run in pair}) != 1:
            raise ValueError(
                f"model_name_or_path: passes of a {architecture.model_type} differ in more than "
                "the size of tensors, so its memory cannot be planned"
            )
        found = torch.tensor([[r.events_EK for r in pair] for pair in runs], dtype=torch.float64)
        # Beyond two layers each adds the same at every operation.
        two_EK, three_EK = found[0] + (depth - 2) * (found[-1] - found[0])
        self.slope_EK = (three_EK - two_EK) / (this.padded_length or _UNIT)
        self.base_EK = 3 * two_EK - 2 * three_EK

    def peak(self, tokens: int, forward: int = 0, backward: int = 0) -> dict[str, int]:
        """Return the bytes of each kind at the peak.

        Args:
            tokens: of the pass, padding included.
            forward: bytes that the loss needs in its forward pass beyond what the runs knew of.
            backward: the same of its backward pass.
        """
        bytes_EK = self.base_EK + self.slope_EK * tokens
        for name, size in (("forward", forward), ("backward", backward)):
            if name in self.marks:
                bytes_EK[self.marks[name], KINDS.index("loss")] += size
        peak_K = bytes_EK[bytes_EK.sum(1).argmax()]
        return dict(zip(KINDS, map(round, peak_K.tolist()), strict=True))


def _run(architecture: PreTrainedConfig, this: Pass, layers: int | None, units: int) -> LiveBytes:
    """Run a pass of some layers, or of all, on some units of tokens, and count."""
    config, packed = this.config, this.padded_length is None
    attention = config.attn_implementation
    if packed:
        flash = this.on_gpu and this.loss.dtype == torch.bfloat16
        attention = VARLEN_GPU if flash else VARLEN_ELSEWHERE
    model: Any = build_fake(
        architecture, config, bf16=this.bf16, attention=attention, layers=layers
    )
    model.train(this.with_backward)
    if this.frozen:
        model.requires_grad_(False)
    if config.gradient_checkpointing:
        checkpoint_fake(model, offload=config.activation_offloading and this.on_gpu)
    with without_values(architecture.model_type), torch.set_grad_enabled(this.with_backward):
        move_to_cpu(model)
        ids_BL = torch.zeros(units, this.padded_length or _UNIT, dtype=torch.long)
        ids_BL = ids_BL.view(1, -1) if packed else ids_BL
        mask = {} if packed else {"attention_mask": torch.ones_like(ids_BL)}
        parameters = list(model.parameters())
        if this.gradients_exist:
            for parameter in parameters:
                parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        gradients = [x.grad for x in parameters if x.grad is not None]
        live = LiveBytes([ids_BL, *mask.values(), *parameters, *model.buffers(), *gradients])
        for parameter in parameters:
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(live.is_gradient_of)
        if layers is not None:
            _leave_out_inner(layers_of(model), live)
        without = model.disable_adapter if this.frozen and config.use_peft else nullcontext
        with live, without():
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=this.bf16):
                body = model.get_decoder()
                found = body(input_ids=ids_BL, position_ids=ids_BL, use_cache=False, **mask)
                hidden_NH = found.last_hidden_state.flatten(0, 1)
                del found
                if not packed:  # they are taken out of the padding
                    hidden_NH = hidden_NH.index_select(0, ids_BL.flatten())
            weight_VH = model.get_output_embeddings().weight
            if not this.with_backward:  # no gradient of it is kept
                weight_VH = weight_VH.detach()
            loss: Any = _Loss.apply(hidden_NH, weight_VH, live, this.loss)
            del hidden_NH
            if this.with_backward:
                loss.backward()
    return live


def _leave_out_inner(layers: nn.ModuleList, live: LiveBytes) -> None:
    """Record the last layer's forward and backward pass and the first layer's backward pass.

    In the layers between these the bytes lie between, and there may be any number of them.
    """
    live.recording = False

    def when_reached(layer: nn.Module, then: Callable[[Tensor], None]) -> None:
        def reached(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            once.remove()  # checkpointing comes here again
            then(next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)))

        once = layer.register_forward_pre_hook(reached, with_kwargs=True)

    def record(_: Tensor) -> None:
        live.recording = True

    def pause(_: Tensor) -> None:
        live.recording = False

    def in_last(input_BLH: Tensor) -> None:
        live.recording = True
        if input_BLH.requires_grad and len(layers) > 2:
            input_BLH.register_hook(pause)

    def in_second(input_BLH: Tensor) -> None:
        if input_BLH.requires_grad:
            input_BLH.register_hook(record)

    when_reached(layers[1], in_second)
    when_reached(layers[-1], in_last)


class _Loss(torch.autograd.Function):
    """Keeps what the fused loss keeps of the size of hidden states and head; computes nothing."""

    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, live: LiveBytes, kind: LossKind
    ) -> Tensor:
        live.kind, ctx.live = "loss", live
        ctx.likes = [
            (x.shape, x.dtype) if needed else None
            for x, needed in zip((hidden_NH, weight_VH), ctx.needs_input_grad, strict=False)
        ]
        operands = [x.to(kind.dtype) for x in (hidden_NH, weight_VH)]
        sums = [
            torch.empty(like[0], dtype=dtype)
            for like, dtype in zip(ctx.likes, (kind.dtype, kind.sum_dtype), strict=True)
            if like is not None and not kind.recompute
        ]
        ctx.save_for_backward(*(operands if kind.recompute else sums))
        live.mark("forward")
        loss = torch.empty(())
        live.kind = "activations"
        return loss

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        live: LiveBytes = ctx.live
        live.kind = "loss"
        found = [like and torch.empty(like[0], dtype=like[1]) for like in ctx.likes]
        live.mark("backward")
        torch.empty(())
        live.kind = "activations"
        return *found, None, None
