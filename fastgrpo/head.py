"""The head of a causal LM: all that happens between its last hidden state and its logits.

The fused loss takes hidden states and a weight, and computes
`softcap(logit_scale * (hidden @ weight.T + bias))` by itself. What a model does there is not told
by its configuration alone: Granite divides by `logits_scaling` and HyperCLOVA X multiplies by it,
MPT has a `logit_scale` and never uses it. So the configuration proposes and the model's own forward
pass decides.

L tokens of the trial, H hidden, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from .attention import evaluating, relative_error

# Where the configurations of transformers keep a factor or a divisor of the logits (of Cohere;
# Falcon-H1; MuseSpark; Granite, HyperCLOVA X, MiniCPM; Inkling) and their cap (of Gemma, NanoChat;
# RecurrentGemma; xLSTM).
_SCALES = (
    "logit_scale",
    "lm_head_multiplier",
    "output_multiplier",
    "logits_scaling",
    "logits_mup_width_multiplier",
)
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")

# Root mean squares of the logits in the trial: caps show in large ones, a bias where they are 0.
_TRIAL_RMS = (0.0, 0.1, 1.0, 10.0, 100.0, 1000.0)


@dataclass(frozen=True)
class Head:
    """The LM head of a model: `softcap(logit_scale * (hidden @ weight.T + bias))`."""

    module: nn.Module
    """The output embedding."""
    logit_scale: float = 1.0
    """Factor of the logits."""
    logit_softcap: float | None = None
    """c of `c * tanh(logits / c)`, which comes after the factor; None: no cap."""

    # Read when they are asked for: tying, adapters and sharding replace parameters.
    @property
    def weight(self) -> Tensor:
        """(V, H) weight; the input embedding's own when they are tied."""
        return self.module.weight  # pyright: ignore[reportReturnType]

    @property
    def bias(self) -> Tensor | None:
        """(V,) bias, if there is one."""
        return getattr(self.module, "bias", None)

    def finish(self, logits: Tensor) -> Tensor:
        """Scale and cap `hidden @ weight.T + bias`, of any shape, in fp32."""
        logits = logits.float() * self.logit_scale
        cap = self.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)


def read_head(model: PreTrainedModel) -> Head:
    """Return the head of a causal LM, after its own forward pass agreed on a few hidden states.

    Args:
        model: a causal LM, or the PEFT model around one; read again after wrapping it.

    Raises:
        ValueError: it has no LM head, or one the fused loss cannot express; names the model's class
            and what its configuration says.
    """
    model = getattr(model, "get_base_model", lambda: model)()
    name = type(model).__name__
    module: Any = model.get_output_embeddings()
    if module is None or model.config.is_encoder_decoder or model.get_decoder() is model:
        raise ValueError(f"{name} has no LM head on a decoder: a causal language model is needed")
    if any(hasattr(part, "base_layer") for part in module.modules()):
        raise ValueError(
            f"the LM head of {name} has an adapter, which the fused loss would not see: leave it "
            "out of lora_target_modules, and of what ties it to the embedding"
        )
    if not module.weight.is_floating_point():
        raise ValueError(
            f"the LM head of {name} is quantised to {module.weight.dtype}: the fused loss needs "
            "its weight; leave it out of the quantisation"
        )
    found = logit_options(model)
    heads = _candidates(module, found)
    says = ", ".join(f"{key} = {value}" for key, value in found.items()) or "nothing"
    refusal = f"the fused loss cannot express the LM head of {name}, whose config says {says}: "

    logits_LV, expected_LV = _logits_both_ways(model, module)
    if logits_LV.shape != expected_LV.shape:
        rows, columns = logits_LV.shape[-1], expected_LV.shape[-1]
        raise ValueError(f"{refusal}{columns} logits come from {rows} rows of weight")
    errors = [relative_error(head.finish(logits_LV), expected_LV) for head in heads]
    best = min(range(len(heads)), key=errors.__getitem__)
    if errors[best] > _tolerance(module.weight.dtype):
        raise ValueError(
            f"{refusal}its logits are not softcap(scale * (hidden @ weight.T + bias)), they differ "
            f"by {errors[best]:.1%}; train another model"
        )
    return heads[best]


def logit_options(model: PreTrainedModel) -> dict[str, float]:
    """Return what the configuration of a model says about its logits."""
    config = model.config.get_text_config()
    options = {name: getattr(config, name, None) for name in (*_SCALES, *_SOFTCAPS)}
    return {
        name: float(value)
        for name, value in options.items()
        if isinstance(value, int | float) and value != 0
    }


def _candidates(module: nn.Module, found: dict[str, float]) -> list[Head]:
    """Return all heads that a configuration may mean, the likeliest first."""
    scales = [found[name] for name in _SCALES if name in found]
    softcaps = [found[name] for name in _SOFTCAPS if name in found]
    ways: Sequence[Sequence[float]] = [(value, 1 / value, 1.0) for value in scales]
    return [
        Head(module, logit_scale=math.prod(factors), logit_softcap=softcap)
        for factors in product(*ways)
        for softcap in (*softcaps, None)
    ]


@torch.no_grad()
def _logits_both_ways(model: PreTrainedModel, module: Any) -> tuple[Tensor, Tensor]:
    """Return (L, V) `hidden @ weight.T + bias` and a model's own logits of the same hidden states.

    They are not the model's own hidden states, whose logits may be too small for a cap to show: a
    hook puts chosen ones in their place.

    Raises:
        ValueError: the hidden states of the forward pass are not those of the decoder alone.
    """
    weight, bias = module.weight, getattr(module, "bias", None)
    decoder: Any = model.get_decoder()
    rms_L = torch.tensor(_TRIAL_RMS, device=weight.device)
    generator = torch.Generator().manual_seed(0)
    hidden_LH = torch.randn(len(rms_L), weight.shape[1], generator=generator).to(weight)
    unscaled_L = F.linear(hidden_LH, weight).float().square().mean(-1).sqrt()
    factor_L = torch.where(unscaled_L > 0, rms_L / unscaled_L, rms_L)
    hidden_LH = (hidden_LH.float() * factor_L[:, None]).to(weight.dtype)
    own: list[Tensor] = []

    def swap(_module: nn.Module, _args: object, output: Any) -> Any:
        own.append(output[0])
        if isinstance(output, tuple):
            return (hidden_LH[None], *output[1:])
        output.last_hidden_state = hidden_LH[None]
        return output

    ids = torch.arange(len(rms_L), device=weight.device)[None] % weight.shape[0]
    with evaluating(model, ("eager",)):  # flash attention would refuse fp32
        alone = decoder(input_ids=ids, use_cache=False)[0]
        hook = decoder.register_forward_hook(swap)
        try:
            logits = model(input_ids=ids, use_cache=False).logits[0]
        finally:
            hook.remove()
    if len(own) != 1 or not relative_error(own[0], alone) <= _tolerance(alone.dtype):
        raise ValueError(
            f"{type(model).__name__} does more in its forward pass than run its decoder once: the "
            "hidden states of the decoder alone would not be those it was trained with"
        )
    return F.linear(hidden_LH, weight, bias).float(), logits.float()


def _tolerance(dtype: torch.dtype) -> float:
    """Return the error allowed: of a few roundings, the product's are the same both ways."""
    return max(1e-4, torch.finfo(dtype).eps)
