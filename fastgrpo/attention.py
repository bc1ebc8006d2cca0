"""Attention among packed sequences: one row of tokens, where each token sees its own sequence.

`VARLEN` is an attention of transformers' AttentionInterface. On CUDA in bf16 or fp16 it is the
flash attention inside torch, which needs no package; elsewhere one `scaled_dot_product_attention`
for each run of neighbours of one length. Padding sequences of like length together was tried
instead: on a CPU no faster for 256 sequences of 40 tokens, slower for 16 of 20 to 600, and it keeps
padded copies for backward.

No mask function is registered: without one transformers makes no mask and so does not wait for the
device to find the sequences in the positions. What a mask would say is lost: never give one.

B sequences, N tokens of all sequences, L of one, A attention heads, D their size.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, PreTrainedModel
from transformers.utils.import_utils import is_flash_attn_2_available, is_flash_attn_3_available

VARLEN = "fastgrpo_varlen"
"""Name of the attention of this module, for `model.set_attn_implementation`."""

_HALF = (torch.bfloat16, torch.float16)
# torch 2.11 does not promise fewer key than query heads; later versions want to be told.
_GROUPED: dict[str, Any] = (
    {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
)
_ALONE = ("full_attention", "sliding_attention")  # layers that see nothing but their sequence
_TRIAL_LENGTHS = (5, 1, 19, 8)


def packed_attention(device: torch.device, dtype: torch.dtype) -> str:
    """Return the name of the fastest attention installed that takes packed sequences.

    Args:
        device: where the model is.
        dtype: type it computes in: that of autocast under autocast.
    """
    if device.type == "cuda" and dtype in _HALF:
        major, _ = torch.cuda.get_device_capability(device)
        if major == 9 and is_flash_attn_3_available():  # made for Hopper
            return "flash_attention_3"
        if major >= 8 and is_flash_attn_2_available():
            return "flash_attention_2"
    return VARLEN


def packed_arguments(lengths: Sequence[int], device: torch.device) -> dict[str, Any]:
    """Return what a decoder takes beside (1, N) ids that are sequences one after another.

    Args:
        lengths: tokens of each sequence, N together.
        device: where the model is.

    Returns:
        Keyword arguments: `position_ids` (1, N), transformers' FlashAttentionKwargs, and for
        `VARLEN` the lengths on the CPU, so that it need not wait for a GPU to learn them.

    Raises:
        ValueError: there is no sequence, or an empty one.
    """
    if not lengths or min(lengths) < 1:
        raise ValueError(f"packed sequences must have tokens, got lengths {list(lengths)}")
    lengths_B = torch.tensor(lengths)
    ends_B = lengths_B.cumsum(0)
    positions_N = torch.arange(sum(lengths)) - (ends_B - lengths_B).repeat_interleave(lengths_B)
    cu_seq_lens = F.pad(ends_B, (1, 0)).to(device, torch.int32, non_blocking=True)
    return {
        "position_ids": positions_N[None].to(device, non_blocking=True),
        "use_cache": False,
        "cu_seq_lens_q": cu_seq_lens,
        "cu_seq_lens_k": cu_seq_lens,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
        "sequence_lengths": lengths_B,  # a tensor: Dynamo would compile for every list
    }


def varlen_attention(
    module: nn.Module,
    query: Tensor,  # (1, A, N, D)
    key: Tensor,  # (1, A or a divisor of it, N, D)
    value: Tensor,  # as key
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,  # (B + 1,) int32
    max_length_q: int | None = None,
    sequence_lengths: Tensor | None = None,  # (B,) on the CPU
    **others: Any,
) -> tuple[Tensor, None]:
    """Attend, causally, within packed sequences; the interface is that of transformers.

    Args:
        module: the attention layer.
        query: of all sequences; products are made in the type of the value, or of autocast.
        key: of all sequences.
        value: of all sequences.
        attention_mask: must be None.
        dropout: probability of dropping an attention weight.
        scaling: factor of the products; None for D ** -0.5.
        sliding_window: tokens that one sees, itself included; None for all before it.
        softcap: c of `c * tanh(products / c)`, as Gemma 2 has it.
        is_causal: None for what the layer says.
        cu_seq_lens_q: where sequences start and end.
        max_length_q: tokens of the longest sequence.
        sequence_lengths: of each; None reads `cu_seq_lens_q`, which waits for a GPU.
        others: what other attentions understand.

    Returns:
        (1, N, A, D) and, for attention weights that are not kept, None.

    Raises:
        ValueError: the layer asks for more than causal attention, or the packing is not told.
    """
    if cu_seq_lens_q is None or max_length_q is None:
        raise ValueError(
            f"no cu_seq_lens_q reached {VARLEN} attention: the decoder must be given "
            "packed_arguments(lengths, device), and hand them on to its layers"
        )
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    asked = {"attention_mask": attention_mask, **others}
    more = [k for k in ("attention_mask", "s_aux", "position_bias") if asked.get(k) is not None]
    if more or not is_causal:
        raise ValueError(
            f"{VARLEN} attention is causal and nothing else, {type(module).__name__} asks for "
            f"{', '.join(more) or 'attention in both directions'}: set padding_free to false"
        )
    kind = query.device.type
    autocast = torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if autocast else value.dtype
    query, key, value = (x.to(dtype) for x in (query, key, value))
    flash = dropout == 0 and softcap is None and _flash_takes(query, value)
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and not (_GROUPED if flash else kind == "cpu" and softcap is None):
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    if flash:
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        limits = (cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q)
        window = (-1 if sliding_window is None else sliding_window - 1, 0)
        out: Any = varlen_attn(q, k, v, *limits, scale=scaling, window_size=window, **_GROUPED)
        return out[None], None
    lengths_B = cu_seq_lens_q.diff() if sequence_lengths is None else sequence_lengths
    out = _run_by_run(query, key, value, lengths_B, sliding_window, softcap, dropout, scaling)
    return out.transpose(1, 2), None


AttentionInterface.register(VARLEN, varlen_attention)


def _flash_takes(query: Tensor, value: Tensor) -> bool:
    """Tell whether torch's flash attention can be used for heads like these."""
    size = query.shape[-1]
    return (
        query.is_cuda
        and query.dtype in _HALF
        and size == value.shape[-1]
        and size % 8 == 0
        and size <= 256
        and torch.cuda.get_device_capability(query.device)[0] >= 8
    )


# Compiled it would be anew for every list of lengths.
@torch.compiler.disable()  # pyright: ignore[reportUntypedFunctionDecorator]
def _run_by_run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths_B: Tensor,
    sliding_window: int | None,
    softcap: float | None,
    dropout: float,
    scaling: float | None,
) -> Tensor:
    """Attend to one run of equally long sequences after another: (1, A, N, D) to the same."""
    runs = [(length, len(list(run))) for length, run in groupby(lengths_B.tolist())]
    longest = max(length for length, _ in runs)
    mask_LL = None
    if softcap is not None or (sliding_window is not None and sliding_window < longest):
        mask_LL = torch.ones(longest, longest, dtype=torch.bool, device=query.device).tril()
        if sliding_window is not None:
            mask_LL = mask_LL.triu(1 - sliding_window)
    tokens = [length * count for length, count in runs]
    outputs: list[Tensor] = []
    for run, *parts in zip(
        runs, *(x[0].split(tokens, 1) for x in (query, key, value)), strict=True
    ):
        length, count = run
        q, k, v = (x.unflatten(1, (count, length)).transpose(0, 1) for x in parts)
        mask = None if mask_LL is None else mask_LL[:length, :length]
        if softcap is not None and mask is not None:
            out = _capped(q, k, v, mask, softcap, dropout, scaling)
        else:
            out = F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=mask is None,
                scale=scaling,
                enable_gqa=q.shape[1] != k.shape[1],
            )
        outputs.append(out.transpose(0, 1).flatten(1, 2))
    return torch.cat(outputs, 1)[None]


def _capped(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    softcap: float,
    dropout: float,
    scaling: float | None,
) -> Tensor:
    """Attend with capped products, which no fused attention of torch has."""
    if scaling is None:
        scaling = 1 / math.sqrt(query.shape[-1])
    products = softcap * torch.tanh(query @ key.mT * (scaling / softcap))
    products = products.masked_fill(~mask, -torch.inf)
    weights = products.softmax(-1, dtype=torch.float32).to(value.dtype)
    return F.dropout(weights, dropout) @ value


@torch.no_grad()
def why_not_packed(model: PreTrainedModel, attention: str = VARLEN) -> str | None:
    """Say in a sentence why a model cannot be trained on packed sequences; None if it can.

    A few short sequences are run packed and each alone under eager attention; call it under the
    autocast of training when `attention` is a flash attention and the parameters are in fp32.

    Args:
        model: a causal LM, or the PEFT model around one.
        attention: what the packed sequences attend with.
    """
    model = getattr(model, "get_base_model", lambda: model)()
    refusal = f"{type(model).__name__} cannot be trained on packed sequences: "
    config = model.config.get_text_config()
    kinds: Any = getattr(config, "layer_types", None) or ()
    mixing = sorted(set(kinds).difference(_ALONE))
    if mixing or model._is_stateful:  # pyright: ignore[reportPrivateUsage]
        return f"{refusal}{', '.join(mixing) or 'a state'} would carry one sequence into the next"
    device = next(model.parameters()).device
    decoder: Any = model.get_decoder()
    ids = torch.arange(sum(_TRIAL_LENGTHS), device=device)[None] % config.vocab_size
    alone: list[Tensor] = []
    with evaluating(model, ("eager",)):
        for part in ids.split(_TRIAL_LENGTHS, 1):
            alone.append(decoder(input_ids=part, use_cache=False)[0][0])
    try:
        with evaluating(model, (attention,)):
            if decoder.config._attn_implementation != attention:
                return f"{refusal}it does not take the attention functions of transformers"
            together = decoder(input_ids=ids, **packed_arguments(_TRIAL_LENGTHS, device))[0][0]
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a model may fail in any way on arguments it was not made for
        reason = str(error).strip() or type(error).__name__
        return f"{refusal}{reason.splitlines()[0]}"
    autocast = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if autocast else together.dtype
    parts = together.split(_TRIAL_LENGTHS)
    error = max(relative_error(a.flatten(), b.flatten()) for a, b in zip(parts, alone, strict=True))
    # Rounding makes less, and another sequence or another kind of attention more.
    if error > max(1e-4, 16 * torch.finfo(dtype).eps):
        return f"{refusal}its hidden states are then {error:.1%} off"
    return None


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return the largest relative error of a row, in norm; infinite where one is not finite."""
    difference = torch.linalg.vector_norm(actual.float() - expected.float(), dim=-1)
    size = torch.linalg.vector_norm(expected.float(), dim=-1)
    error = difference / size.clamp(min=torch.finfo(torch.float32).tiny)
    return float(error.nan_to_num(nan=torch.inf).max())


@contextmanager
def evaluating(model: PreTrainedModel, attentions: Sequence[str]) -> Generator[None]:
    """Switch to eval mode and to one of some attentions, the first unless it has one; then back.

    Raises:
        ValueError: as `keep_differentiable`.
    """
    keep_differentiable(model)
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


def keep_differentiable(model: PreTrainedModel) -> None:
    """Keep bitsandbytes (0.50) from packing 4-bit weights on a CPU with AVX512-BF16, for good.

    It does so in a forward pass in eval mode, for a product that is faster and has no gradient, and
    adapters are then trained with none. Unpacked they would not be quite what they were.

    Raises:
        ValueError: they are packed already.
    """
    module: Any
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
            state = getattr(module.weight, "quant_state", None)
            if getattr(state, "packing_format_for_cpu", False):
                raise ValueError(
                    f"{type(model).__name__} was evaluated on this CPU, for which bitsandbytes "
                    "packed its 4-bit weights in a way that has no gradient: load it again"
                )
