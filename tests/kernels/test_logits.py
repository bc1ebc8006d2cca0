"""The loss from logits, fused, against `reference` in fp64; in place or not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from loss_cases import (
    DEVICE,
    DTYPES,
    Case,
    assert_results_as_exact,
    assert_same,
    factors,
    logits_result,
    make_case,
)
from torch import Tensor

from fastgrpo_kernels import GRPOLossConfig, grpo_loss, reference, selective_logps

INPLACE = pytest.mark.parametrize("inplace", [False, True], ids=["", "inplace"])


def rounded_logits(case: Case) -> Tensor:
    return case.logits.bfloat16().half().double()


@INPLACE
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "bnpo", "dr_grpo"])
def test_is_as_exact_as_the_reference(
    loss_type: str, dtype: torch.dtype, inplace: bool, backend: str
) -> None:
    case = factors(make_case(loss_type=loss_type, beta=0.2, temperature=0.7, delta=1.5))
    logits = rounded_logits(case)
    exact = logits_result(reference.grpo_loss, case, logits=logits)
    naive = logits_result(reference.grpo_loss, case, logits=logits.to(dtype))
    actual = logits_result(
        grpo_loss, case, logits=logits.to(dtype), inplace=inplace, backend=backend
    )
    assert_results_as_exact(actual, naive, exact, dtype, backend)
    assert actual.gradients["logits"].dtype == dtype


@INPLACE
@pytest.mark.parametrize("margin", [20.0, 25.0, 28.0])
def test_gradient_of_a_confident_token(margin: float, inplace: bool, backend: str) -> None:
    # 1 - p would be rounding error alone here; R / (R + e) is not.
    logits = torch.zeros(1, 37, device=DEVICE)
    logits[0, 20] = margin
    rest = 36 * torch.tensor(-margin, dtype=torch.float64).exp()
    exact = (rest / (rest + 1)).item()
    ids = torch.tensor([20], device=DEVICE)

    leaf = logits.requires_grad_()
    out = grpo_loss(leaf * 1, ids, torch.ones(1, device=DEVICE), inplace=inplace, backend=backend)
    out.loss.backward()
    assert -leaf.grad[0, 20].item() == pytest.approx(exact, rel=1e-5)
    assert out.logps.item() == pytest.approx(-torch.log1p(rest).item(), rel=1e-5)
    leaf.grad = None
    selective_logps(leaf, ids, backend=backend)[0].sum().backward()
    assert leaf.grad[0, 20].item() == pytest.approx(exact, rel=1e-5)


@INPLACE
def test_a_slice_of_the_logits_gets_the_gradient_of_the_slice(inplace: bool, backend: str) -> None:
    case = make_case().to(torch.float32)
    expected = logits_result(reference.grpo_loss, case)
    wide = torch.full((3, 8, 37), torch.nan, device=DEVICE)
    wide[:, 2:-1] = case.logits
    leaf = wide.requires_grad_()
    out = grpo_loss(
        (leaf * 1)[:, 2:-1],
        case.ids,
        case.advantages,
        inplace=inplace,
        backend=backend,
        **case.arguments,
    )
    out.loss.backward()
    gradient = leaf.grad[:, 2:-1]
    torch.testing.assert_close(gradient, expected.gradients["logits"], rtol=2e-5, atol=1e-7)
    assert (leaf.grad[:, :2] == 0).all() and (leaf.grad[:, -1] == 0).all()
    torch.testing.assert_close(out.loss, expected.output.loss)
    rows = (leaf * 1).detach()[1, 2:-1]  # (N, V) with rows further apart than V
    logps, _ = selective_logps(rows.expand(1, 5, 37), case.ids[1:2], backend=backend)
    wanted = reference.selective_logps(case.logits[1:2], case.ids[1:2])[0]
    torch.testing.assert_close(logps, wanted)


@INPLACE
@pytest.mark.parametrize("lead", [(), (1,)], ids=["(N,)", "(1, N)"])
def test_packed_is_padded(lead: tuple[int, ...], inplace: bool, backend: str) -> None:
    case = make_case(loss_type="grpo", masked=False, beta=0.1).to(torch.float32)
    expected = logits_result(reference.grpo_loss, case)
    flat: dict[str, Any] = {
        k: v.view(*lead, -1) if isinstance(v, Tensor) else v for k, v in case.arguments.items()
    }
    flat["cu_seqlens"] = torch.tensor([0, 5, 10, 15], dtype=torch.int32, device=DEVICE)
    leaf = case.logits.detach().view(*lead, 15, 37).requires_grad_()
    out = grpo_loss(
        leaf * 1,
        case.ids.view(*lead, -1),
        case.advantages,
        inplace=inplace,
        backend=backend,
        **flat,
    )
    out.loss.backward()
    torch.testing.assert_close(out.loss, expected.output.loss)
    gradient = leaf.grad.view(3, 5, 37)
    torch.testing.assert_close(gradient, expected.gradients["logits"], rtol=2e-5, atol=1e-7)
    assert out.logps.shape == (*lead, 15)


@INPLACE
def test_what_stands_behind_the_mask_is_not_read(inplace: bool, backend: str) -> None:
    clean = make_case(beta=0.1, loss_type="grpo").to(torch.float32)
    masked = ~clean.mask
    nan = {
        name: clean.arguments[name].masked_fill(masked, torch.nan)
        for name in ("old_logps", "ref_logps")
    }
    dirty = replace(clean.having(**nan), ids=clean.ids.masked_fill(masked, 10**6))
    garbage = clean.logits.masked_fill(masked[..., None], torch.nan)
    options = {"inplace": inplace, "backend": backend}
    expected = logits_result(grpo_loss, clean, **options)
    actual = logits_result(grpo_loss, dirty, logits=garbage, **options)
    assert_same(actual, expected, rtol=0, atol=0)
    assert (actual.gradients["logits"][masked] == 0).all()

    leaf = garbage.detach().requires_grad_()
    logps, entropy = selective_logps(leaf, dirty.ids, mask=clean.mask, backend=backend)
    (logps.sum() + entropy.sum()).backward()
    assert (leaf.grad[masked] == 0).all() and (logps[masked] == 0).all()
    assert torch.equal(logps, actual.output.logps) and torch.equal(entropy, actual.output.entropy)


@INPLACE
def test_an_all_masked_call_is_a_differentiable_0(inplace: bool, backend: str) -> None:
    case = make_case().to(torch.float32)
    case = case.having(completion_mask=torch.zeros_like(case.mask))
    out = logits_result(
        grpo_loss,
        case,
        logits=torch.full_like(case.logits, torch.nan),
        inplace=inplace,
        backend=backend,
    )
    assert out.output.loss.item() == 0
    assert (out.gradients["logits"] == 0).all()


@INPLACE
@pytest.mark.parametrize("upstream", [1 / 3, -2.0])
def test_upstream_gradient_is_honoured(inplace: bool, upstream: float, backend: str) -> None:
    case = make_case().to(torch.float32)
    options = {"inplace": inplace, "backend": backend}
    expected = logits_result(grpo_loss, case, **options)
    actual = logits_result(grpo_loss, case, upstream=upstream, **options)
    torch.testing.assert_close(actual.gradients["logits"], upstream * expected.gradients["logits"])


@INPLACE
def test_one_advantage_for_one_sequence_of_many_tokens(inplace: bool, backend: str) -> None:
    # A value per sequence is spread over its tokens as a view of stride 0.
    case = make_case(sequences=1, masked=False).to(torch.float32)
    expected = logits_result(reference.grpo_loss, case)
    actual = logits_result(grpo_loss, case, inplace=inplace, backend=backend)
    assert_same(actual, expected, rtol=2e-5, atol=1e-6)
    strided = torch.stack([case.ids[0]] * 2, -1).flatten()[::2]
    logps, _ = selective_logps(case.logits[0], strided, backend=backend)
    torch.testing.assert_close(logps, actual.output.logps[0])


def test_backward_twice_without_inplace_adds_up(backend: str) -> None:
    case = make_case().to(torch.float32)
    expected = logits_result(grpo_loss, case, backend=backend).gradients["logits"]
    leaf = case.logits.detach().requires_grad_()
    out = grpo_loss(leaf, case.ids, case.advantages, backend=backend, **case.arguments)
    out.loss.backward(retain_graph=True)
    out.loss.backward()
    torch.testing.assert_close(leaf.grad, 2 * expected)


def test_inplace_overwrites_the_logits_with_their_gradient(backend: str) -> None:
    case = make_case().to(torch.float32)
    leaf = case.logits.detach().requires_grad_()
    logits = leaf * 1
    memory = logits.data_ptr()
    out = grpo_loss(
        logits, case.ids, case.advantages, inplace=True, backend=backend, **case.arguments
    )
    (gradient,) = torch.autograd.grad(out.loss, logits, retain_graph=True)
    assert gradient.data_ptr() == memory
    with pytest.raises(RuntimeError, match="inplace=False to run backward twice"):
        out.loss.backward()


def test_autograd_notices_that_somebody_else_needed_the_logits(backend: str) -> None:
    case = make_case().to(torch.float32)
    logits = case.logits.detach().requires_grad_() * 1
    other = logits.square().sum()
    out = grpo_loss(
        logits, case.ids, case.advantages, inplace=True, backend=backend, **case.arguments
    )
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (out.loss + other).backward()


def test_inplace_refuses_a_leaf_and_leaves_logits_alone_without_grad(backend: str) -> None:
    case = make_case().to(torch.float32)
    logits = case.logits.detach()
    before = logits.clone()
    arguments = {"inplace": True, "backend": backend, **case.arguments}
    with pytest.raises(ValueError, match="overwrite a leaf"):
        grpo_loss(logits.requires_grad_(), case.ids, case.advantages, **arguments)
    with torch.no_grad():
        out = grpo_loss(logits, case.ids, case.advantages, **arguments)
    assert torch.equal(logits, before) and not out.loss.requires_grad
    assert out.metrics["num_gradient_rows"] == 0


@INPLACE
@pytest.mark.parametrize("kind", ["peaked", "very negative", "padded vocabulary"])
def test_extreme_logits(kind: str, inplace: bool, backend: str) -> None:
    case = make_case(masked=False, beta=0.1, off_policy=False)
    logits = rounded_logits(case)
    if kind == "peaked":
        logits = logits * 16
    elif kind == "very negative":
        logits = logits - 1e4
    else:
        logits[..., :17] = -torch.inf  # all of the first block of 16
        case = replace(case, ids=case.ids.clamp(min=20))
    exact = logits_result(reference.grpo_loss, case, logits=logits)
    naive = logits_result(reference.grpo_loss, case, logits=logits.float())
    actual = logits_result(grpo_loss, case, logits=logits.float(), inplace=inplace, backend=backend)
    assert_results_as_exact(actual, naive, exact, torch.float32, backend)
    if kind == "padded vocabulary":
        assert (actual.gradients["logits"][..., :17] == 0).all()


@INPLACE
def test_on_policy_the_ratio_is_exactly_1(inplace: bool, backend: str) -> None:
    config = GRPOLossConfig(epsilon_low=0.0, epsilon_high=0.0)
    case = make_case(per_token=True, masked=False).to(torch.float32).having(config=config)
    old, _ = selective_logps(case.logits, case.ids, backend=backend)
    out = logits_result(
        grpo_loss, case.having(old_logps=old), inplace=inplace, backend=backend
    ).output
    assert torch.equal(out.logps, old)
    assert out.metrics["clip_ratio/region_mean"] == 0
    assert torch.equal(-case.advantages.reshape(-1).sum() / 15, out.loss.detach())


@INPLACE
@pytest.mark.parametrize("loss_type", ["dapo", "gmpo"])
def test_rows_without_a_gradient_may_be_left_unread(
    loss_type: str, inplace: bool, backend: str
) -> None:
    case = make_case(sequences=4, loss_type=loss_type)
    case.advantages[0] = 0
    poisoned = case.logits.float()
    poisoned[0] = torch.nan  # not read
    options: dict[str, Any] = {"backend": backend, "inplace": inplace}
    wanted = logits_result(grpo_loss, case, logits=case.logits.float(), **options)
    found = logits_result(grpo_loss, case, logits=poisoned, statistics="active", **options)
    torch.testing.assert_close(found.output.loss, wanted.output.loss, rtol=0, atol=0)
    torch.testing.assert_close(
        found.gradients["logits"], wanted.gradients["logits"], rtol=0, atol=0
    )
    skipped = case.mask & (case.advantages == 0)[:, None]
    assert skipped.any()
    assert torch.equal(found.output.logps.isnan(), skipped)
    assert torch.equal(found.output.entropy.isnan(), skipped)
    read = case.mask & ~skipped
    for name in ("num_computed_rows", "num_gradient_rows"):
        assert found.output.metrics[name] == read.sum()
    mean = wanted.output.entropy[read].mean()
    torch.testing.assert_close(found.output.metrics["entropy"], mean)
    with pytest.raises(ValueError, match="needs skip_rows=True"):
        logits_result(grpo_loss, case, statistics="active", skip_rows=False, **options)
