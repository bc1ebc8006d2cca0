"""Whatever does not fit is refused with a sentence that holds the name and the value or shape."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from loss_cases import DEVICE
from torch import Tensor

from fastgrpo_kernels import (
    GRPOLossConfig,
    grpo_loss,
    importance_weights,
    linear_grpo_loss,
    linear_logps,
    off_policy_mask,
    policy_loss,
    reference,
    selective_logps,
    top_entropy_mask,
)

nan, inf = math.nan, math.inf


def inputs() -> dict[str, Any]:
    return {
        "hidden": torch.ones(2, 3, 4, device=DEVICE),
        "weight": torch.ones(7, 4, device=DEVICE),
        "completion_ids": torch.zeros(2, 3, dtype=torch.int64, device=DEVICE),
        "advantages": torch.ones(2, device=DEVICE),
        "backend": "torch",
    }


def call(**changes: Any) -> None:
    linear_grpo_loss(**{**inputs(), **changes})


def ones(*shape: int, **options: Any) -> Tensor:
    return torch.ones(shape, device=DEVICE, **options)


def ids(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int64, device=DEVICE)


def cu(*bounds: int) -> Tensor:
    return torch.tensor(bounds, dtype=torch.int32, device=DEVICE)


PACKED = {"hidden": ones(6, 4), "completion_ids": ids(6)}
ELSEWHERE = "meta"
# Averaged over tokens, but their ratio is one of whole sequences.
SEQUENCE_RATIOS: tuple[dict[str, Any], ...] = (
    {"loss_type": "vespo"},
    *(
        {"loss_type": t, "importance_sampling_level": "sequence", "epsilon_high": 2.0}
        for t in ("dapo", "bnpo", "cispo")
    ),
)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # the head
        ({"weight": ones(7, 5)}, "weight must be (V, 4) for hidden states (2, 3, 4), got (7, 5)"),
        ({"weight": ones(7)}, "weight must be (V, 4) for hidden states (2, 3, 4), got (7,)"),
        ({"hidden": ones(2, 4, 4)}, "hidden must be (2, 3, 'H') for ids (2, 3), got (2, 4, 4)"),
        ({"hidden": ones(6, 4)}, "hidden must be (2, 3, 'H') for ids (2, 3), got (6, 4)"),
        ({"bias": ones(6)}, "bias must be (7,), got (6,)"),
        ({"bias": ones(7).half()}, "bias must be torch.float32 as hidden is, got torch.float16"),
        ({"weight": ones(7, 4).half()}, "got torch.float32 and torch.float16"),
        (
            {"hidden": ids(2, 3, 4), "weight": ids(7, 4)},
            "one floating-point type, got torch.int64 and torch.int64",
        ),
        ({"weight": torch.ones(7, 4, device=ELSEWHERE)}, "weight is on meta, the rest is on"),
        # options of the call
        ({"method": "fast"}, "method must be one of auto, single_pass, recompute, got 'fast'"),
        ({"statistics": "none"}, "statistics must be one of all, active, got 'none'"),
        (
            {"statistics": "active", "skip_rows": False},
            "statistics='active' skips rows: it needs skip_rows=True",
        ),
        ({"chunk_rows": 0}, "chunk_rows must be at least 1, got 0"),
        ({"chunk_rows": 0, "method": "recompute"}, "chunk_rows must be at least 1, got 0"),
        ({"chunk_rows": -3, "method": "recompute"}, "chunk_rows must be at least 1, got -3"),
        # the gradient buffer
        (
            {"grad_scale": 0.5},
            "grad_scale=0.5 belongs to grad_buffer, which was not given",
        ),
        ({"grad_scale": nan}, "grad_scale=nan belongs to grad_buffer"),
        *(
            (
                {"grad_buffer": ones(7, 4), "grad_scale": value},
                f"grad_scale must be a finite number, got {value}",
            )
            for value in (nan, inf)
        ),
        (
            {"grad_buffer": ones(7, 5)},
            "grad_buffer must be floating-point (7, 4) as weight is, got (7, 5) torch.float32",
        ),
        (
            {"grad_buffer": ids(7, 4)},
            "grad_buffer must be floating-point (7, 4) as weight is, got (7, 4) torch.int64",
        ),
        (
            {"grad_buffer": torch.ones(7, 4, device=ELSEWHERE)},
            "grad_buffer is on meta, the rest is on",
        ),
        ({"backend": "cuda"}, "backend must be 'auto', 'triton' or 'torch', got 'cuda'"),
        # tokens
        ({"completion_ids": ids(2, 3) - 1}, "holds -1 at token 0, outside [0, 7)"),
        (
            {"completion_ids": torch.tensor([[0, 1, 2], [3, 7, 9]], device=DEVICE)},
            "holds 7 at token 4, outside [0, 7)",
        ),
        ({"completion_ids": ids(2, 3).float()}, "completion_ids must be int64, got torch.float32"),
        (
            {"hidden": ones(1, 2, 3, 4), "completion_ids": ids(1, 2, 3)},
            "hidden must be (1, 2, 3, 'H') for ids (1, 2, 3)",
        ),
        (
            {"completion_mask": ones(2, 3) * 0.5},
            "completion_mask must hold 0 and 1 only, got [0.5]",
        ),
        ({"completion_mask": ones(3, 2)}, "completion_mask must have shape (2, 3), got (3, 2)"),
        # one value per token or per sequence
        (
            {"advantages": ones(3)},
            "advantages must have shape (2,) or (2, 1) or (2, 3), got (3,)",
        ),
        (
            {**PACKED, "advantages": ones(2)},
            "advantages must have shape (6,) or (6, 1), got (2,)",
        ),
        (
            {**PACKED, "cu_seqlens": cu(0, 2, 6), "advantages": ones(3)},
            "advantages must have shape (2,) or (2, 1) or (6,) or (6, 1), got (3,)",
        ),
        ({"old_logps": ones(2)}, "old_logps must have shape (2, 3), got (2,)"),
        (
            {"ref_logps": ones(6), "config": GRPOLossConfig(beta=0.1)},
            "ref_logps must have shape (2, 3), got (6,)",
        ),
        ({"importance_sampling_ratio": ones(3)}, "importance_sampling_ratio must have shape"),
        ({"policy_weight": ones(1)}, "policy_weight must have shape"),
        ({"entropy_mask": ones(3, 2)}, "entropy_mask must have shape"),
        *(
            ({name: torch.ones(2, 3, device=ELSEWHERE)}, f"{name} is on meta, the rest is on")
            for name in ("old_logps", "importance_sampling_ratio", "policy_weight", "entropy_mask")
        ),
        # the reference
        ({"config": GRPOLossConfig(beta=0.1)}, "beta=0.1 needs ref_logps"),
        # sequences
        ({"cu_seqlens": cu(0, 3, 6)}, "cu_seqlens belongs to the packed layout"),
        (
            {**PACKED, "cu_seqlens": cu(0, 3, 5)},
            "from 0 to the number of tokens 6, got [0, 3, 5] ... 5",
        ),
        ({**PACKED, "cu_seqlens": cu(1, 3, 6)}, "got [1, 3, 6] ... 6"),
        ({**PACKED, "cu_seqlens": cu(0, 4, 3, 6)}, "got [0, 4, 3, 6] ... 6"),
        ({**PACKED, "cu_seqlens": cu(0)}, "cu_seqlens must be (B + 1,) integers, got (1,)"),
        (
            {**PACKED, "cu_seqlens": cu(0, 6).float()},
            "cu_seqlens must be (B + 1,) integers, got (2,) torch.float32",
        ),
        *(
            (
                {
                    **PACKED,
                    "advantages": ones(6),
                    "config": GRPOLossConfig(loss_type=t, max_completion_length=3),
                },
                f"loss_type={t!r} averages over sequences: give cu_seqlens",
            )
            for t in ("grpo", "dr_grpo", "luspo", "sapo", "gmpo")
        ),
        *(
            (
                {**PACKED, "advantages": ones(6), "config": GRPOLossConfig(**options)},
                "the ratio is one of whole sequences: give cu_seqlens, or completion_ids as (B, T)",
            )
            for options in SEQUENCE_RATIOS
        ),
        # denominators
        *(
            ({name: value}, f"{name} must be a finite number, 0 or more, got {value}")
            for name in ("num_items_in_batch", "num_sequences_in_batch", "entropy_denominator")
            for value in (-1, nan, inf)
        ),
        ({"num_items_in_batch": ones(2)}, "num_items_in_batch must be a number, got shape (2,)"),
    ],
)
def test_what_does_not_fit_is_a_value_error(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call(**changes)


def test_triton_computes_in_fp32() -> None:
    with pytest.raises(ValueError, match="use 'torch' for float64"):
        call(hidden=ones(2, 3, 4).double(), weight=ones(7, 4).double(), backend="triton")


LOGITS = ones(2, 3, 7)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            lambda: grpo_loss(ones(2, 2, 7), ids(2, 3), ones(2)),
            "logits must be (2, 3, 'V') for ids (2, 3), got (2, 2, 7)",
        ),
        (
            lambda: selective_logps(LOGITS.view(6, 7), ids(2, 3)),
            "logits must be (2, 3, 'V') for ids (2, 3), got (6, 7)",
        ),
        (lambda: selective_logps(LOGITS.long(), ids(2, 3)), "floating-point, got torch.int64"),
        (
            lambda: selective_logps(ones(2, 7, 3).transpose(1, 2), ids(2, 3)),
            "stride 1 along the vocabulary, got strides (21, 1, 3)",
        ),
        (lambda: grpo_loss(LOGITS, ids(2, 3) + 7, ones(2)), "holds 7 at token 0, outside [0, 7)"),
        (lambda: selective_logps(LOGITS, ids(2, 3) + 8), "holds 8 at token 0, outside [0, 7)"),
        (
            lambda: reference.selective_logps(LOGITS, ids(2, 3) + 8),
            "holds 8 at token 0, outside [0, 7)",
        ),
        (
            lambda: selective_logps(LOGITS, torch.zeros(2, 3, device=ELSEWHERE)),
            "ids is on meta, the rest is on",
        ),
        (
            lambda: linear_logps(ones(2, 3, 4), ones(7, 4), ids(2, 3), mask=ones(6)),
            "mask must have shape (2, 3), got (6,)",
        ),
        (
            lambda: linear_logps(ones(2, 3, 4), ones(7, 4), ids(2, 3), temperature=0.0),
            "temperature must be a finite number above 0, got 0.0",
        ),
        (
            lambda: linear_logps(ones(2, 3, 4), ones(7, 4), ids(2, 3), chunk_rows=-1),
            "chunk_rows must be at least 1, got -1",
        ),
        (lambda: policy_loss(ones(2, 3, 4), ones(2)), "(B, T) or packed (N,), got (2, 3, 4)"),
        (
            lambda: policy_loss(ones(2, 3), ones(2), config=GRPOLossConfig(entropy_coef=0.1)),
            "entropy_coef=0.1 needs the entropies of the tokens",
        ),
        (
            lambda: policy_loss(ones(2, 3), ones(2), entropy=torch.ones(2, 3, device=ELSEWHERE)),
            "entropy is on meta, the rest is on",
        ),
        (
            lambda: policy_loss(ones(6), ones(6), config=GRPOLossConfig(loss_type="vespo")),
            "the ratio is one of whole sequences: give cu_seqlens",
        ),
        (
            lambda: linear_logps(ones(2, 3, 4), ones(7, 4), ids(2, 3), logit_softcap=-1.0),
            "logit_softcap must be a finite number above 0, or None for no cap, got -1.0",
        ),
        (
            lambda: grpo_loss(LOGITS.clone().requires_grad_(), ids(2, 3), ones(2), inplace=True),
            "inplace=True would overwrite a leaf that requires its gradient: use inplace=False",
        ),
        (
            lambda: policy_loss(ones(2, 3), ones(2), entropy=ones(2)),
            "entropy must have shape (2, 3), got (2,)",
        ),
        (
            lambda: importance_weights(ones(2), ones(2), mode="word"),  # pyright: ignore
            "mode must be one of token_truncate, token_mask, sequence_truncate, sequence_mask, "
            "got 'word'",
        ),
        (
            lambda: importance_weights(ones(2), ones(2), clip_min=3.0, clip_max=2.0),
            "0 <= clip_min < clip_max must hold, got 3.0 and 2.0",
        ),
        (
            lambda: importance_weights(ones(2), ones(3)),
            "sampling_logps must have shape (2,) or (1, 2), got (3,)",
        ),
        (
            lambda: off_policy_mask(ones(2, 3), ones(2, 3), ones(3), threshold=0.1),
            "advantages must be one per sequence (2,), got (3,)",
        ),
        (
            lambda: off_policy_mask(ones(3), ones(3), ones(3), threshold=0.1),
            "one weight per sequence needs cu_seqlens, or logps as (B, T)",
        ),
        (
            lambda: importance_weights(ones(3), ones(3), mode="sequence_mask"),
            "one weight per sequence needs cu_seqlens, or logps as (B, T)",
        ),
        (lambda: top_entropy_mask(ones(3), quantile=0.0), "quantile must be in (0, 1], got 0.0"),
        (lambda: top_entropy_mask(ones(3), quantile=1.1), "quantile must be in (0, 1], got 1.1"),
    ],
)
def test_the_other_doors_refuse_as_well(function: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        function()


IDS = torch.zeros(2, 3, dtype=torch.int64, device=DEVICE)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: linear_grpo_loss(ones(2, 3, 4), ones(5, 4), IDS, ones(2), mask=ones(2, 3)),
            "unexpected keyword argument 'mask': did you mean completion_mask?",
        ),
        (
            lambda: linear_grpo_loss(ones(2, 3, 4), ones(5, 4), IDS, [1.0, 2.0]),
            "advantages must be a tensor, got list",
        ),
        (
            lambda: linear_grpo_loss(ones(2, 3, 4), torch.nn.Linear(4, 5), IDS, ones(2)),
            "weight must be a tensor, got Linear: pass its .weight",
        ),
        (
            lambda: grpo_loss([1.0, 2.0], IDS, ones(2)),  # pyright: ignore[reportArgumentType]
            "logits must be a tensor, got list",
        ),
        (
            lambda: policy_loss([[1.0]], ones(1)),  # pyright: ignore[reportArgumentType]
            "logps must be a tensor, got list",
        ),
        (
            lambda: selective_logps(ones(2, 3, 5), [0, 1]),  # pyright: ignore[reportArgumentType]
            "ids must be a tensor, got list",
        ),
        (
            lambda: linear_grpo_loss(
                ones(2, 3, 4), ones(5, 4), IDS, ones(2), grad_buffer=torch.nn.Linear(4, 5)
            ),
            "grad_buffer must be a tensor, got Linear: pass its .weight",
        ),
        (
            lambda: linear_grpo_loss(
                ones(2, 3, 4), ones(5, 4), IDS, ones(2), config={"loss_type": "dapo"}
            ),
            "config must be a GRPOLossConfig, got dict",
        ),
    ],
)
def test_what_is_no_tensor_or_no_argument_is_a_type_error(call: Any, message: str) -> None:
    with pytest.raises(TypeError, match=re.escape(message)):
        call()


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo"])
def test_the_tokens_of_a_step_do_not_stand_in_for_its_sequences(loss_type: str) -> None:
    config = GRPOLossConfig(loss_type=loss_type, max_completion_length=3)
    with pytest.raises(ValueError, match="give num_sequences_in_batch"):
        linear_grpo_loss(
            ones(2, 3, 4), ones(5, 4), IDS, ones(2), num_items_in_batch=12, config=config
        )
