"""Weights and masks for a sampler that is not the policy, and the top-entropy mask, by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from loss_cases import DEVICE
from torch import Tensor

from fastgrpo_kernels import importance_weights, off_policy_mask, top_entropy_mask

nan = math.nan


def ones(*shape: int) -> Tensor:
    return torch.ones(shape, device=DEVICE)


def cu(*bounds: int) -> Tensor:
    return torch.tensor(bounds, dtype=torch.int32, device=DEVICE)


LOGPS = torch.tensor([[-1.0, -1.0, -1.0], [-2.0, -2.0, -2.0]], device=DEVICE)
# differences: log 2, log 0.5, NaN = not known; log 4, log 4, masked
SAMPLED = LOGPS - torch.tensor([[2.0, 0.5, nan], [4.0, 4.0, 1e9]], device=DEVICE).log()
MASK = torch.tensor([[1, 1, 1], [1, 1, 0]], device=DEVICE)


@pytest.mark.parametrize(
    ("mode", "clip_min", "clip_max", "expected"),
    [
        ("token_truncate", 0.0, 3.0, [[2.0, 0.5, 1.0], [3.0, 3.0, 1.0]]),
        ("token_truncate", 0.8, 1.5, [[1.5, 0.8, 1.0], [1.5, 1.5, 1.0]]),
        ("token_mask", 0.8, 3.0, [[2.0, 0.0, 1.0], [0.0, 0.0, 1.0]]),
        ("sequence_truncate", 0.0, 3.0, [[1.0], [3.0]]),
        ("sequence_mask", 0.5, 20.0, [[1.0], [16.0]]),
        ("sequence_mask", 0.5, 3.0, [[1.0], [0.0]]),
    ],
)
def test_importance_weights(
    mode: Any, clip_min: float, clip_max: float, expected: list[list[float]]
) -> None:
    options: Any = {"mode": mode, "clip_min": clip_min, "clip_max": clip_max}
    logps = LOGPS.clone().requires_grad_()
    weights = importance_weights(logps, SAMPLED, completion_mask=MASK, **options)
    torch.testing.assert_close(weights, torch.tensor(expected, device=DEVICE))
    assert not weights.requires_grad and weights.dtype == torch.float32
    if DEVICE == "cpu":  # a running sum in fp64 is not deterministic on a GPU, torch says
        packed = importance_weights(
            logps.view(-1),
            SAMPLED.view(-1),
            completion_mask=MASK.view(-1),
            cu_seqlens=cu(0, 3, 6),
            **options,
        )
        torch.testing.assert_close(packed, weights.view(-1))


def test_importance_weights_of_policies_far_apart_stay_finite() -> None:
    weights = importance_weights(ones(1) * 0, ones(1) * -1000, mode="token_mask", clip_max=1e30)
    torch.testing.assert_close(weights.item(), math.exp(60), rtol=1e-6, atol=0)


def test_off_policy_mask() -> None:
    # Mean of sampled - lp over counted tokens: (-log 2 + log 2 + 0) / 3 = 0, and -log 4.
    sampled = LOGPS + (LOGPS - SAMPLED)  # the other way round: 0, and +log 4 = 1.386
    for advantages, threshold, expected in [
        ([-1.0, -1.0], 1.3, [1.0, 0.0]),
        ([-1.0, -1.0], 1.4, [1.0, 1.0]),
        ([-1.0, 1.0], 1.3, [1.0, 1.0]),
        ([-1.0, 0.0], 1.3, [1.0, 1.0]),
        ([-1.0, -1.0], -0.1, [0.0, 0.0]),
    ]:
        keep = off_policy_mask(
            LOGPS,
            sampled,
            torch.tensor(advantages, device=DEVICE),
            threshold=threshold,
            completion_mask=MASK,
        )
        assert keep.tolist() == expected
    assert off_policy_mask(LOGPS, SAMPLED, -ones(2), threshold=0.1).tolist() == [1.0, 1.0]


def test_top_entropy_mask() -> None:
    entropy = torch.tensor([[0.1, 0.4, 9.0], [0.2, 0.3, 0.5]], device=DEVICE)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]], device=DEVICE)
    keep = top_entropy_mask(entropy, quantile=0.4, completion_mask=mask)
    assert keep.tolist() == [[0, 1, 0], [0, 0, 1]]  # 0.34 is the 0.6 quantile of 0.1 ... 0.5
    assert top_entropy_mask(entropy, quantile=1.0).sum() == 6
    assert top_entropy_mask(entropy, quantile=0.01).tolist() == [[0, 0, 1], [0, 0, 0]]
    assert top_entropy_mask(entropy, quantile=0.5, completion_mask=mask * 0).sum() == 0
