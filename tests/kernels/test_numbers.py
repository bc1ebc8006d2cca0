"""Numbers that need care: repeatability, ratios of exactly 1, 16-bit sums, infinities."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from loss_cases import (
    DEVICE,
    assert_as_exact,
    assert_same,
    factors,
    linear_result,
    make_case,
)

from fastgrpo_kernels import (
    GRPOLossConfig,
    linear_grpo_loss,
    linear_logps,
    reference,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_runs_repeat_bit_for_bit(dtype: torch.dtype, backend: str) -> None:
    case = factors(make_case(loss_type="grpo", beta=0.1)).to(dtype)
    options = {"backend": backend, "chunk_rows": 4}
    first = linear_result(linear_grpo_loss, case, **options)
    assert_same(linear_result(linear_grpo_loss, case, **options), first, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_policy_the_ratio_is_exactly_1(dtype: torch.dtype, backend: str) -> None:
    # The smallest interval: any other ratio would clip.
    config = GRPOLossConfig(epsilon_low=0.0, epsilon_high=0.0)
    case = make_case(per_token=True, masked=False).to(dtype).having(config=config)
    old, entropy = linear_logps(
        case.hidden, case.weight, case.ids, bias=case.bias, chunk_rows=4, backend=backend
    )
    out = linear_result(
        linear_grpo_loss, case.having(old_logps=old), chunk_rows=4, backend=backend
    ).output
    assert torch.equal(out.logps, old) and torch.equal(out.entropy, entropy)
    assert out.metrics["clip_ratio/region_mean"] == 0
    values = (case.advantages.reshape(-1), out.metrics["policy_loss"])
    assert torch.equal(-values[0].sum() / 15, values[1])


@pytest.mark.parametrize("kind", ["peaked", "very negative", "padded vocabulary"])
def test_extreme_logits(kind: str, backend: str) -> None:
    case = make_case(per_token=True, beta=0.1, off_policy=False)
    assert case.bias is not None
    if kind == "peaked":
        case = replace(case, weight=case.weight * 16)
    elif kind == "very negative":
        case.bias[:] = -1e4
    else:
        # Two padded columns, one of them in a block of its own kind: 32 to 37 is the last.
        case.bias[[3, 33]] = -torch.inf
        case = replace(case, ids=case.ids.masked_fill((case.ids == 3) | (case.ids == 33), 4))
    exact = linear_result(reference.linear_grpo_loss, case)
    naive = linear_result(reference.linear_grpo_loss, case.to(torch.float32))
    actual = linear_result(linear_grpo_loss, case.to(torch.float32), backend=backend)
    for value in actual.everything().values():
        assert value.isfinite().all()
    for name in ("logps", "entropy"):
        values = (getattr(r.output, name) for r in (actual, naive, exact))
        assert_as_exact(*values, factor=1.5, what=name)
    for name, gradient in actual.gradients.items():
        assert_as_exact(
            gradient, naive.gradients[name], exact.gradients[name], factor=1.5, what=name
        )
    if kind == "padded vocabulary":
        assert (actual.gradients["bias"][[3, 33]] == 0).all()
        assert (actual.gradients["weight"][[3, 33]] == 0).all()


def test_fp16_gradients_survive_a_large_denominator_and_a_scaled_loss(backend: str) -> None:
    """1e6 tokens a step put the gradient below fp16's smallest number; a loss scale undoes that."""
    case = make_case().to(torch.float16)
    arguments: dict[str, Any] = {"num_items_in_batch": 10**6, "upstream": 2.0**16}
    exact = linear_result(reference.linear_grpo_loss, case.to(torch.float64), **arguments)
    naive = linear_result(reference.linear_grpo_loss, case, **arguments)
    actual = linear_result(linear_grpo_loss, case, backend=backend, **arguments)
    for name in ("hidden", "weight"):
        values = (result.gradients[name] for result in (actual, naive, exact))
        assert_as_exact(*values, factor=1.5, what=name)


def test_an_advantage_of_0_makes_an_infinite_ratio_harmless(backend: str) -> None:
    case = make_case(masked=False).to(torch.float32)
    first = torch.arange(len(case.advantages), device=DEVICE) == 0
    case = replace(case, advantages=torch.where(first, 0, case.advantages))
    ratio = torch.ones(case.ids.shape, device=DEVICE)
    results = []
    for value in (1.0, torch.inf):
        ratio[0, 0] = value
        results.append(
            linear_result(
                linear_grpo_loss, case, backend=backend, importance_sampling_ratio=ratio.clone()
            )
        )
    assert_same(*results, rtol=0, atol=0)
