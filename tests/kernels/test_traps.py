"""What others fell into (FORMULAS.md, traps): each is made impossible for every loss here."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from loss_cases import (
    BACKENDS,
    DEVICE,
    Case,
    Result,
    assert_results_as_exact,
    assert_same,
    linear_result,
    logits_result,
    make_case,
)
from loss_matrix import FAMILIES, IDS, SETTINGS, matrix_case, options
from torch import Tensor

from fastgrpo_kernels import (
    GRPOLossConfig,
    _recompute,
    grpo_loss,
    linear_grpo_loss,
    linear_logps,
    reference,
)

Family = tuple[str, str]
each_family = pytest.mark.parametrize("family", FAMILIES, ids=IDS)
# One family of each kind: by the token, by the sequence, with an exponent of its own.
KINDS = (("dapo", "token"), ("grpo", "sequence"), ("vespo", "token"), ("gmpo", "token"))
each_kind = pytest.mark.parametrize("family", KINDS, ids=["-".join(k) for k in KINDS])

# Every way to a gradient.
PATHS = ("single_pass", "recompute", "logits", "inplace")
each_path = pytest.mark.parametrize("path", PATHS)
# The torch backend every kind each way; the interpreter, which is slow, each of both once.
every_way = pytest.mark.parametrize(
    ("backend", "family", "path"),
    [("torch", family, path) for family in KINDS for path in PATHS]
    + [("triton", family, path) for family, path in zip(KINDS, PATHS, strict=True)],
)


@pytest.fixture(autouse=True)
def small_tiles(small_blocks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_recompute, "TILE_BYTES", 1)


def result(case: Case, path: str, backend: str, **arguments: Any) -> Result:
    if path in ("logits", "inplace"):
        return logits_result(
            grpo_loss, case, inplace=path == "inplace", backend=backend, **arguments
        )
    return linear_result(
        linear_grpo_loss, case, method=path, chunk_rows=2, backend=backend, **arguments
    )


def wanted(case: Case, path: str, **arguments: Any) -> Result:
    if path in ("logits", "inplace"):
        return logits_result(reference.grpo_loss, case, **arguments)
    return linear_result(reference.linear_grpo_loss, case, **arguments)


def assert_exact(case: Case, path: str, backend: str) -> Result:
    rounded = case.to(torch.float32)
    actual = result(rounded, path, backend)
    for name, value in actual.everything().items():
        assert value is not None and value.isfinite().all(), name
    exact, naive = wanted(case, path), wanted(rounded, path)
    assert_results_as_exact(actual, naive, exact, torch.float32, backend)
    return actual


@every_way
def test_very_negative_logits(family: Family, path: str, backend: str) -> None:
    case = matrix_case(family, off_policy=False, beta=0.1, entropy_coef=0.1)
    assert case.bias is not None
    # Multiples of 1 / 64, as far down as fp32 still holds them: the sums are exact.
    coarse = {n: (getattr(case, n) * 8).round() / 8 for n in ("hidden", "weight", "bias")}
    case = replace(case, **{**coarse, "bias": coarse["bias"] - 1e5})
    assert_exact(case, path, backend)


@every_way
def test_columns_of_minus_infinity(family: Family, path: str, backend: str) -> None:
    case = matrix_case(family, entropy_coef=0.1)
    assert case.bias is not None
    case.bias[[3, 17, 20]] = -torch.inf
    case = replace(case, ids=case.ids.masked_fill((case.ids == 3) | (case.ids >= 17), 4))
    case = case.having(old_logps=None)
    found = assert_exact(case, path, backend)
    for name in ("bias", "weight"):
        if name in found.gradients:
            assert (found.gradients[name][[3, 17, 20]] == 0).all()
    if "logits" in found.gradients:
        assert (found.gradients["logits"][..., [3, 17, 20]] == 0).all()


@each_path
def test_a_whole_block_of_minus_infinity(path: str, backend: str) -> None:
    case = make_case(off_policy=False, entropy_coef=0.1)
    assert case.bias is not None
    case.bias[:17] = -torch.inf  # the first block, or slice, and a column
    assert_exact(replace(case, ids=case.ids.clamp(min=20)), path, backend)


@each_path
def test_minus_infinity_under_a_softcap_is_minus_the_cap(path: str, backend: str) -> None:
    case = make_case(off_policy=False, entropy_coef=0.1, logit_softcap=2.0, vocabulary=21)
    assert case.bias is not None
    case.bias[[3, 17]] = -torch.inf
    case = replace(case, ids=case.ids.masked_fill((case.ids == 3) | (case.ids == 17), 4))
    found = assert_exact(case, path, backend)
    low = replace(case, bias=case.bias.masked_fill(case.bias.isinf(), -1e4))
    assert_same(found, wanted(low, path), rtol=2e-5, atol=2e-6)


@each_family
def test_an_advantage_of_0_times_an_infinite_ratio_is_0(family: Family, backend: str) -> None:
    case = matrix_case(family).to(torch.float32)
    case.advantages[0] = 0
    results = []
    for value in (1.0, torch.inf):
        ratio = torch.ones(case.ids.shape, device=DEVICE)
        ratio[0, 0] = value
        results.append(result(case.having(importance_sampling_ratio=ratio), "single_pass", backend))
        if family[0] == "vespo":  # part of phi there: reported, and bounded
            results[-1].output.metrics.pop("vespo/phi_seq_mean")
    assert_same(*results, rtol=0, atol=0)


NAN_WHERE = (
    "logits", "one logit", "advantages", "old_logps", "ref_logps", "policy_weight",
    "importance_sampling_ratio",
)  # fmt: skip


@pytest.mark.parametrize(
    ("path", "family", "where"),
    [
        (path, family, where)
        for path in ("reference", *BACKENDS)
        for family in FAMILIES
        for where in (NAN_WHERE if path != "triton" or family in KINDS else NAN_WHERE[:2])
    ],
)
def test_a_nan_in_a_counted_row_makes_the_loss_nan(family: Family, path: str, where: str) -> None:
    values = {
        name: torch.full((2, 2), -1.0, device=DEVICE)
        for name in ("old_logps", "ref_logps", "policy_weight", "importance_sampling_ratio")
    }
    values = {k: v.abs() if "logps" not in k else v for k, v in values.items()}
    logits = torch.zeros(2, 2, 5, device=DEVICE)
    advantages = torch.tensor([[1.0, -1.0], [0.0, 0.0]], device=DEVICE)
    at = (slice(1, 2), 1) if path == "triton" else (slice(0, 2), 1)  # dead rows count too
    if where in values:
        values[where][at] = torch.nan
    elif where == "advantages":
        advantages[at] = torch.nan
    else:
        logits[at] = torch.nan if where == "logits" else torch.tensor([0, 0, torch.nan, 0, 0])
    config = GRPOLossConfig(**options(family, beta=0.1, max_completion_length=2))
    function = reference.grpo_loss if path == "reference" else grpo_loss
    backend = {} if path == "reference" else {"backend": path}
    ids = torch.zeros(2, 2, dtype=torch.int64, device=DEVICE)
    leaf = logits.requires_grad_()
    out = function(leaf, ids, advantages, config=config, **values, **backend)
    assert out.loss.isnan()
    if path != "reference":
        weight = logits.detach().view(4, 5).t().contiguous().requires_grad_()
        hidden = torch.eye(4, device=DEVICE).view(2, 2, 4)
        method = "recompute" if family[1] == "token" else "single_pass"
        if "logit" not in where:  # a NaN in the head is one of every row
            out = linear_grpo_loss(
                hidden, weight, ids, advantages, config=config, method=method, **values, **backend
            )
            assert out.loss.isnan()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_real_vocabulary(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """151,936 columns, in blocks of the size the backend takes for them."""
    monkeypatch.undo()
    case = make_case(
        sequences=1,
        length=2,
        hidden_size=2,
        vocabulary=151_936,
        masked=False,
        entropy_coef=0.1,
        importance_sampling_level="sequence",
    )
    exact = linear_result(reference.linear_grpo_loss, case)
    rounded = case.to(torch.float32)
    naive = linear_result(reference.linear_grpo_loss, rounded)
    for method in ("single_pass", "recompute"):
        actual = linear_result(linear_grpo_loss, rounded, backend=backend, method=method)
        assert_results_as_exact(actual, naive, exact, torch.float32, backend)


@pytest.mark.parametrize("margin", [20.0, 25.0, 28.0])
@pytest.mark.parametrize("path", [*PATHS, "logps"])
@each_kind
def test_gradient_of_a_confident_token(
    family: Family, path: str, margin: float, backend: str
) -> None:
    """1 - p would be rounding error alone here."""
    hidden = torch.ones(1, 1, 1, device=DEVICE)
    weight, bias = torch.zeros(21, 1, device=DEVICE), torch.zeros(21, device=DEVICE)
    bias[17] = margin
    ids, A = torch.tensor([[17]], device=DEVICE), torch.ones(1, device=DEVICE)
    rest = 20 * math.exp(-margin)
    old = torch.tensor([[-math.log1p(rest)]], device=DEVICE)
    config = GRPOLossConfig(**options(family, max_completion_length=1))
    case = Case(hidden, weight, bias, ids, A, {"config": config, "old_logps": old})
    if path == "logps":
        leaf = bias.clone().requires_grad_()
        logps, _ = linear_logps(hidden, weight, ids, bias=leaf, backend=backend)
        (-logps.sum()).backward()
        gradient = leaf.grad
    else:
        found = result(case, path, backend)
        gradient = found.gradients["logits" if "logits" in found.gradients else "bias"]
    assert gradient is not None
    assert -gradient.reshape(-1)[17].item() == pytest.approx(rest / (1 + rest), rel=1e-5)
    others = gradient.reshape(-1)[torch.arange(21) != 17]
    assert others.sum().item() == pytest.approx(rest / (1 + rest), rel=1e-5)


@each_path
@each_family
def test_the_upstream_gradient_is_honoured(family: Family, path: str) -> None:
    upstream = -1 / 3
    case = SETTINGS["everything"](family)
    expected = result(case, path, "torch")
    actual = result(case, path, "torch", upstream=upstream)
    for name, gradient in actual.gradients.items():
        wanted_gradient = expected.gradients[name]
        assert gradient is not None and wanted_gradient is not None
        torch.testing.assert_close(gradient, upstream * wanted_gradient)


@pytest.mark.parametrize(("family", "path"), list(zip(KINDS, PATHS, strict=True)))
def test_the_upstream_gradient_is_honoured_by_triton(
    family: Family, path: str, small_blocks: None
) -> None:
    case = matrix_case(family).to(torch.float32)
    expected = result(case, path, "triton")
    actual = result(case, path, "triton", upstream=0.25)
    for name, gradient in actual.gradients.items():
        assert torch.equal(gradient, 0.25 * expected.gradients[name])


@pytest.mark.parametrize("backend", BACKENDS)
@each_path
@each_kind
def test_an_all_masked_call_is_a_differentiable_0(family: Family, path: str, backend: str) -> None:
    case = matrix_case(family, beta=0.1, entropy_coef=0.1).to(torch.float32)
    case = case.having(completion_mask=torch.zeros_like(case.mask))
    case.hidden[:] = torch.nan
    out = result(case, path, backend)
    assert out.output.loss.item() == 0
    for gradient in out.gradients.values():
        assert gradient is not None and (gradient == 0).all()
    for name, value in out.output.metrics.items():
        if name == "vespo/phi_seq_mean":
            assert value == 1
        elif not name.startswith("num") and name != "entropy_coef":
            assert value == 0, name


@pytest.mark.parametrize("skip_empty_sequences", [False, True])
@each_family
def test_an_empty_completion_adds_0_and_counts_unless_left_out(
    family: Family, skip_empty_sequences: bool
) -> None:
    backend = "torch"  # what is counted is decided before a backend is called
    with_empty = matrix_case(family, skip_empty_sequences=skip_empty_sequences).to(torch.float32)
    keep: Tensor = with_empty.mask.any(1)
    arguments = {
        k: v[keep] if isinstance(v, Tensor) else v for k, v in with_empty.arguments.items()
    }
    without = replace(
        with_empty,
        hidden=with_empty.hidden[keep],
        ids=with_empty.ids[keep],
        advantages=with_empty.advantages[keep],
        arguments=arguments,
    )
    method = "single_pass" if family[1] == "sequence" else "recompute"
    actual = result(with_empty, method, backend)
    expected = result(without, method, backend)
    by_sequences = family[0] in ("grpo", "dr_grpo", "luspo", "sapo", "gmpo")
    factor = 4 / 5 if by_sequences and not skip_empty_sequences else 1.0
    close = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(actual.output.loss, factor * expected.output.loss, **close)
    for name in ("weight", "bias"):
        wanted_gradient = factor * expected.gradients[name]
        torch.testing.assert_close(actual.gradients[name], wanted_gradient, **close)
    assert (actual.gradients["hidden"][~keep] == 0).all()
    assert actual.output.metrics["num_sequences"] == (4 if skip_empty_sequences else 5)


@pytest.mark.parametrize(
    ("path", "family"),
    [(path, family) for path in ("reference", "torch") for family in FAMILIES]
    + [("triton", family) for family in KINDS],
)
def test_a_nan_behind_the_mask_is_not_read(family: Family, path: str) -> None:
    """Nor is one in a vector, an entropy mask for example, that only sums are made of."""
    clean = SETTINGS["everything"](family).to(torch.float32)
    masked = ~clean.mask
    shape = clean.ids.shape
    dirty = {
        k: v.masked_fill(masked, torch.nan)
        for k, v in clean.arguments.items()
        if isinstance(v, Tensor) and v.shape == shape and v.is_floating_point()
    }
    assert "entropy_mask" in dirty and "old_logps" in dirty
    clean.arguments.pop("entropy_denominator", None)
    function = reference.linear_grpo_loss if path == "reference" else linear_grpo_loss
    ways = {} if path == "reference" else {"backend": path, "chunk_rows": 4}
    expected = linear_result(function, clean, **ways)
    assert expected.output.loss.isfinite()
    assert_same(linear_result(function, clean.having(**dirty), **ways), expected, rtol=0, atol=0)
