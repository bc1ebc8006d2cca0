"""What is masked is not read, what is inactive is not computed, and neither changes a result."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from loss_cases import (
    DEVICE,
    Result,
    assert_same,
    linear_result,
    make_case,
    packed,
)

from fastgrpo_kernels import (
    linear_grpo_loss,
    reference,
)


def close_to(actual: Result, expected: Result) -> None:
    assert_same(actual, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("skip_rows", [True, False])
@pytest.mark.parametrize("beta", [0.0, 0.2])
def test_what_stands_behind_the_mask_is_not_read(
    beta: float, skip_rows: bool, backend: str
) -> None:
    clean = make_case(beta=beta, per_token=True).to(torch.float32)
    masked = ~clean.mask
    garbage = {
        "old_logps": clean.arguments["old_logps"].masked_fill(masked, torch.nan),
        "policy_weight": torch.ones_like(clean.advantages).masked_fill(masked, torch.nan),
    }
    if beta:
        garbage["ref_logps"] = clean.arguments["ref_logps"].masked_fill(masked, torch.inf)
    dirty = replace(
        clean.having(**garbage),
        hidden=clean.hidden.masked_fill(masked[..., None], torch.nan),
        ids=clean.ids.masked_fill(masked, -100),
        advantages=clean.advantages.masked_fill(masked, torch.nan),
    )
    options = {"backend": backend, "skip_rows": skip_rows, "chunk_rows": 4}
    expected = linear_result(linear_grpo_loss, clean, **options)
    for mask in (clean.mask, clean.mask.long(), clean.mask.float()):
        actual = linear_result(linear_grpo_loss, dirty.having(completion_mask=mask), **options)
        assert_same(actual, expected, rtol=0, atol=0)
    for result in (actual, linear_result(reference.linear_grpo_loss, dirty)):
        assert (result.gradients["hidden"][masked] == 0).all()
        assert (result.output.logps[masked] == 0).all()
        assert (result.output.entropy[masked] == 0).all()
        assert_same(result, expected, rtol=2e-5, atol=2e-6)


def test_skipping_rows_changes_nothing_but_what_is_computed(backend: str) -> None:
    case = make_case(sequences=4, loss_type="grpo", seed=6).to(torch.float32)
    case.advantages[1] = 0
    counted, total = int(case.mask.sum()), case.ids.numel()
    active = int(case.mask[0].sum())
    options = {"backend": backend, "chunk_rows": 3}
    dense = linear_result(linear_grpo_loss, case, skip_rows=False, **options)
    assert dense.output.metrics["num_computed_rows"] == total
    assert dense.output.metrics["num_gradient_rows"] == total
    skipped = linear_result(linear_grpo_loss, case, **options)
    assert skipped.output.metrics["num_computed_rows"] == counted
    assert skipped.output.metrics["num_gradient_rows"] == active < counted
    close_to(skipped, dense)
    close_to(skipped, linear_result(reference.linear_grpo_loss, case))

    few = linear_result(linear_grpo_loss, case, statistics="active", **options)
    assert few.output.metrics["num_computed_rows"] == active
    unknown = case.mask & (case.advantages[:, None] == 0)
    for name in ("logps", "entropy"):
        value, wanted = getattr(few.output, name), getattr(dense.output, name)
        assert value[unknown].isnan().all()
        torch.testing.assert_close(value[~unknown], wanted[~unknown])
    mean = dense.output.entropy[case.mask & ~unknown].mean()
    torch.testing.assert_close(few.output.metrics["entropy"], mean)
    torch.testing.assert_close(few.output.loss, dense.output.loss)
    for name, gradient in few.gradients.items():
        torch.testing.assert_close(gradient, dense.gradients[name])


def test_a_policy_weight_of_0_makes_a_row_inactive(backend: str) -> None:
    case = make_case(masked=False).to(torch.float32)
    case = case.having(policy_weight=torch.tensor([1.0, 0.0, 1.0], device=DEVICE))
    out = linear_result(linear_grpo_loss, case, backend=backend)
    assert out.output.metrics["num_gradient_rows"] == 10
    assert (out.gradients["hidden"][1] == 0).all()
    close_to(out, linear_result(reference.linear_grpo_loss, case))


def test_mask_and_advantages_may_be_on_the_cpu(backend: str) -> None:
    case = make_case().to(torch.float32)
    there = replace(case.having(completion_mask=case.mask.cpu()), advantages=case.advantages.cpu())
    expected = linear_result(linear_grpo_loss, case, backend=backend)
    assert_same(linear_result(linear_grpo_loss, there, backend=backend), expected, rtol=0, atol=0)


@pytest.mark.parametrize("skip_rows", [True, False])
@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "bnpo", "dr_grpo"])
def test_an_all_masked_call_is_a_differentiable_0(
    loss_type: str, skip_rows: bool, backend: str
) -> None:
    case = make_case(loss_type=loss_type, beta=0.1).to(torch.float32)
    case = case.having(completion_mask=torch.zeros_like(case.mask))
    case.hidden[:] = torch.nan
    out = linear_result(linear_grpo_loss, case, backend=backend, skip_rows=skip_rows)
    assert out.output.loss.item() == 0
    for gradient in out.gradients.values():
        assert (gradient == 0).all()
    assert all(v == 0 for k, v in out.output.metrics.items() if k[:3] != "num")


def test_no_tokens_at_all(backend: str) -> None:
    case = packed(make_case(per_token=True, masked=False).to(torch.float32), (), [0, 0, 0])
    out = linear_result(linear_grpo_loss, case, backend=backend)
    assert out.output.loss.item() == 0 and out.output.logps.shape == (0,)
    assert (out.gradients["weight"] == 0).all()
