"""Counts what Triton would compile when lengths, offsets, chunks and hyperparameters change.

Run as a script, like `aot.py`; prints JSON. Nothing is compiled: a variant is what the launcher's
arguments make Triton look up, and a look-up that finds nothing is recorded.

B sequences, T positions, N tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
import triton.compiler
from aot import Launch, compile_only
from aot_cases import FAMILIES

from fastgrpo_kernels import (
    GRPOLossConfig,
    _recompute,
    _row_triton,
    grpo_loss,
    linear,
    linear_grpo_loss,
    linear_logps,
    logits,
    selective_logps,
)

# Divisible by 16, and not; with tiles this small either takes several slices to recompute.
VOCABULARIES = (1024, 1009)
TILE_BYTES = 32 * 1024
HIDDEN_SIZE = 16
# Tokens of a sequence, sequences, where they start in longer tensors, rows of a chunk.
SETTINGS = (
    (1, 1, 0, 1), (16, 1, 0, None), (16, 3, 16, 16),
    (17, 3, 1, 7), (17, 1, 33, 16), (5, 2, 33, None),
)  # fmt: skip
STRUCTURE = ("OBJECTIVE", "TERM", "MEAN", "KL", "BIAS_CORRECTION", "BLOCK_V", "BLOCK_T")


def count_variants(vocabulary: int) -> dict[str, dict[str, Any]]:
    """Call the public functions in many ways; per kernel and structure, what would be compiled.

    Returns:
        For each kernel, set of pointers with their types, and structure: the number of launches,
        and of each variant the arguments that it takes for multiples of 16, or for constants.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, arguments, kernel in _launches(vocabulary):
        words = [f"{key}={_name(arguments[key])}" for key in STRUCTURE if key in arguments]
        words += [] if arguments.get("softcap") is None else ["softcap"]
        words += [f"{k}: {v.dtype}" for k, v in arguments.items() if isinstance(v, torch.Tensor)]
        entry = found.setdefault(f"{name}({', '.join(words)})", {"launches": 0, "variants": {}})
        entry["launches"] += 1
        names = list(kernel.src.signature)
        special = [names[path[0]] for path, attributes in kernel.src.attrs.items() if attributes]
        special += [
            f"{names[path[0]]}={_name(x)}"
            for path, x in kernel.src.constants.items()
            if x is not None
        ]
        entry["variants"][id(kernel)] = sorted(special)
    for entry in found.values():
        entry["variants"] = list(entry["variants"].values())
    return found


def _name(value: Any) -> str:
    return getattr(value, "__name__", str(value))


def _launches(vocabulary: int) -> list[Launch]:
    torch.set_num_threads(1)
    linear.row_backend = logits.row_backend = lambda *_: _row_triton  # refused on a CPU otherwise
    _recompute.TILE_BYTES = TILE_BYTES
    triton.compiler.compile = lambda src, **_: SimpleNamespace(src=src)
    with compile_only(90) as launches:
        for setting in SETTINGS:
            _call_every_function(vocabulary, *setting)
    return launches


def _call_every_function(
    vocabulary: int, length: int, sequences: int, start: int, chunk_rows: int | None
) -> None:
    """Call each public function on the tokens of longer tensors from `start` on."""
    part = slice(start, start + length * sequences)

    def zeros(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.zeros(*shape, dtype=dtype, requires_grad=True)

    weight, hidden = zeros(vocabulary, HIDDEN_SIZE), zeros(part.stop, HIDDEN_SIZE)[part]
    logits_NV, ids = zeros(part.stop, vocabulary)[part], torch.zeros(part.stop).long()[part]
    mask = torch.ones(part.stop, dtype=torch.bool)
    mask[start + 1 :: 3] = False
    for arguments in _arguments(length, sequences, start, mask[part]):
        advantages = arguments.pop("advantages")
        for method in ("single_pass", "recompute"):
            linear_grpo_loss(
                hidden, weight, ids, advantages, chunk_rows=chunk_rows, method=method, **arguments
            ).loss.backward()
        for inplace in (False, True):
            given = (logits_NV * 1, ids, advantages)
            grpo_loss(*given, inplace=inplace, **arguments).loss.backward()
        grpo_loss(logits_NV.detach(), ids, advantages, **arguments)
    for part_mask in (None, mask[part]):
        for logps, entropy in (
            linear_logps(hidden, weight, ids, mask=part_mask, chunk_rows=chunk_rows),
            selective_logps(logits_NV, ids, mask=part_mask, temperature=1 + length / 16),
        ):
            (logps.sum() + entropy.sum()).backward()


def _arguments(
    length: int, sequences: int, start: int, mask: torch.Tensor
) -> Iterator[dict[str, Any]]:
    """Yield losses whose hyperparameters change with the shapes; all pack their sequences."""
    step, total = length + start, length * sequences
    values = torch.ones(total + start)[start:]
    some_inactive = values.clone()
    some_inactive[::2] = 0
    cu_seqlens = torch.arange(0, total + 1, length, dtype=torch.int32)
    packed: dict[str, Any] = {"cu_seqlens": cu_seqlens}
    plain = GRPOLossConfig(temperature=1 + step / 16, epsilon_low=0.1, epsilon_high=step / 10)
    yield {"advantages": values, "config": plain}
    yield {"advantages": some_inactive, "config": plain}
    everything = {
        "completion_mask": mask, "old_logps": values, "ref_logps": values, "policy_weight": values
    } | packed  # fmt: skip
    full: dict[str, Any] = {
        "beta": step / 8, "temperature": step, "logit_softcap": 10.0 + step,
        "logit_scale": 1 / step, "entropy_coef": step / 100, "gmpo_clip": step / 10,
        "sapo_temperature_pos": 1 / step, "vespo_k_pos": 2 / step, "use_bias_correction_kl": True,
    }  # fmt: skip
    for family in FAMILIES.values():
        config = GRPOLossConfig(**(full | family))
        yield {"advantages": values, "config": config} | everything
        yield {"advantages": some_inactive, "config": GRPOLossConfig(**family)} | packed
        yield {
            "advantages": values,
            "config": GRPOLossConfig(**family),
            "old_logps": values,
        } | packed
    yield {
        "advantages": values,
        "config": GRPOLossConfig(loss_type="grpo", delta=2 + step, epsilon_high=0.28),
        "old_logps": values,
    } | packed


def main() -> None:
    print(json.dumps([count_variants(vocabulary) for vocabulary in VOCABULARIES], indent=1))


if __name__ == "__main__":
    main()
