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
    rounding_allowance,
)
from loss_matrix import SETTINGS, matrix_case

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


@pytest.mark.parametrize("method", ["single_pass", "recompute"])
def test_fp32_logits_are_more_exact_in_bf16(method: str, backend: str) -> None:
    """The products' fp32 results are not rounded: log-probs, and all that follows from them."""
    case = make_case(off_policy=False, per_token=True, entropy_coef=0.1)
    exact = linear_result(reference.linear_grpo_loss, case).everything()
    rounded, errors = case.to(torch.bfloat16), []
    for fp32_logits in (False, True):
        found = linear_result(
            linear_grpo_loss, rounded, method=method, chunk_rows=4, backend=backend,
            fp32_logits=fp32_logits,
        ).everything()  # fmt: skip
        errors.append(
            {
                name: (found[name].double() - exact[name]).square().mean().sqrt().item()
                for name in ("logps", "entropy", "dhidden", "dweight", "dbias")
            }
        )
    # The interpreter truncates when it stores bf16, and that costs gradients more than the logits.
    names = errors[1] if rounding_allowance(backend, torch.bfloat16) == 1 else ("logps", "entropy")
    for name in names:
        assert errors[1][name] < errors[0][name], name
    # Log-probs themselves are then those of fp32: measured 7e-7 to 2e-6, and 1e-2 without.
    assert errors[1]["logps"] < 1e-5 < 1e-3 < errors[0]["logps"]
    plain, wide = (
        linear_logps(
            rounded.hidden, rounded.weight, rounded.ids, bias=rounded.bias, mask=rounded.mask,
            fp32_logits=fp32_logits, backend=backend,
        )[0]
        for fp32_logits in (False, True)
    )  # fmt: skip
    assert (wide - exact["logps"]).abs().max() < 1e-5 < (plain - exact["logps"]).abs().max()


ON_POLICY = [
    ("torch", loss_type, dtype, fp32_logits)
    for loss_type in ("dapo", "cispo", "sapo", "vespo", "gmpo")
    for dtype in (torch.float32, torch.bfloat16)
    for fp32_logits in (False, True)
]
ON_POLICY += [
    ("triton", "dapo", torch.bfloat16, False),
    ("triton", "dapo", torch.bfloat16, True),
    ("triton", "vespo", torch.float32, False),
    ("triton", "gmpo", torch.float32, False),
]


@pytest.mark.parametrize(("backend", "loss_type", "dtype", "fp32_logits"), ON_POLICY)
def test_old_log_probs_of_the_same_weights_are_on_policy(
    loss_type: str, dtype: torch.dtype, fp32_logits: bool, backend: str, small_blocks: None
) -> None:
    """A ratio of exactly 1, also of whole sequences: loss and metrics are those without `old`.

    Bit for bit; gradients but for a rounding, since chunks then end where sequences do.
    """
    level = "token" if loss_type in ("vespo", "gmpo") else "sequence"
    case = matrix_case((loss_type, level), off_policy=False, cispo_bounds="verl").to(dtype)
    config = replace(
        case.arguments["config"], epsilon_low=0.0, epsilon_high=0.0, delta=None, gmpo_clip=1e-9
    )
    case = case.having(config=config)
    old, _ = linear_logps(
        case.hidden, case.weight, case.ids, bias=case.bias, mask=case.mask, chunk_rows=4,
        fp32_logits=fp32_logits, backend=backend,
    )  # fmt: skip
    ways = {"chunk_rows": 4, "backend": backend, "fp32_logits": fp32_logits}
    expected = linear_result(linear_grpo_loss, case, **ways)
    actual = linear_result(linear_grpo_loss, case.having(old_logps=old), **ways)
    assert torch.equal(actual.output.logps, old)
    assert torch.equal(actual.output.loss, expected.output.loss)
    for name, value in actual.output.metrics.items():
        assert torch.equal(value, expected.output.metrics[name]), name
        if "clip" in name:
            assert value == 0
    unit = torch.finfo(dtype).eps
    for name, gradient in actual.gradients.items():
        wanted = expected.gradients[name]
        scale = wanted.abs().max().item()
        torch.testing.assert_close(gradient, wanted, rtol=0, atol=2 * unit * scale, msg=name)


@pytest.mark.parametrize("method", ["single_pass", "recompute"])
@pytest.mark.parametrize("family", [("grpo", "sequence"), ("gmpo", "token")])
def test_coupled_runs_repeat_bit_for_bit(
    family: tuple[str, str], method: str, backend: str
) -> None:
    case = SETTINGS["everything"](family).to(torch.bfloat16)
    options = {"backend": backend, "chunk_rows": 2, "method": method}
    first = linear_result(linear_grpo_loss, case, **options)
    assert_same(linear_result(linear_grpo_loss, case, **options), first, rtol=0, atol=0)
