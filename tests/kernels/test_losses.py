"""Every loss, through every public function, on both backends, against `reference` in fp64.

Triton's interpreter is slow: it gets a covering set, the torch backend every third combination.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from typing import Any

import pytest
import torch
from loss_cases import (
    DTYPES,
    Case,
    Result,
    assert_results_as_exact,
    assert_same,
    linear_result,
    logits_result,
)
from loss_matrix import FAMILIES, IDS, LENGTHS, SETTINGS, as_packed, exact_logps

from fastgrpo_kernels import _recompute, grpo_loss, linear_grpo_loss, policy_loss, reference

Family = tuple[str, str]
FP32, BF16, FP16 = DTYPES
each_family = pytest.mark.parametrize("family", FAMILIES, ids=IDS)

# Method, rows of a chunk, type. Sequences have up to 3 tokens: longer than a chunk, or several in
# one, or all but the longest.
SINGLE_LONGER = ("single_pass", 2, FP32)
SINGLE_WHOLE = ("single_pass", 4, BF16)
RECOMPUTE = ("recompute", 4, BF16)
RECOMPUTE_SMALL = ("recompute", 2, FP32)


def cover(covered: Iterable[tuple[Any, ...]]) -> pytest.MarkDecorator:
    """Parametrise a test with (backend, family, setting, way)."""
    found = []
    for backend, family, setting, way in covered:
        name = "-".join((backend, *family, setting, way[0], str(way[1]), str(way[2])[6:]))
        found.append(pytest.param(backend, family, setting, way, id=name))
    return pytest.mark.parametrize(("backend", "family", "setting", "way"), found)


@pytest.fixture(autouse=True)
def small_tiles(small_blocks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 16 columns, and slices of 16, the fewest there are."""
    monkeypatch.setattr(_recompute, "TILE_BYTES", 1)


def compare(actual: Result, naive: Result, exact: Result, dtype: torch.dtype, backend: str) -> None:
    assert_results_as_exact(actual, naive, exact, dtype, backend)
    for name, gradient in actual.gradients.items():
        assert gradient is not None and gradient.dtype == dtype
        assert gradient.abs().max() > 0, name


def compare_linear(case: Case, backend: str, way: tuple[str, int, torch.dtype]) -> None:
    method, chunk_rows, dtype = way
    rounded = case.to(dtype)
    exact = linear_result(reference.linear_grpo_loss, case)
    naive = linear_result(reference.linear_grpo_loss, rounded)
    actual = linear_result(
        linear_grpo_loss, rounded, backend=backend, method=method, chunk_rows=chunk_rows
    )
    compare(actual, naive, exact, dtype, backend)


# Every third of all combinations still meets each family and setting, and each of both with a way.
ON_TORCH = list(
    product(
        ["torch"], FAMILIES, SETTINGS, [SINGLE_LONGER, SINGLE_WHOLE, RECOMPUTE, RECOMPUTE_SMALL]
    )
)[::3]
# Every family with everything, by the way that has most to get wrong, and one more setting each.
ON_TRITON = [("triton", f, "everything", SINGLE_LONGER) for f in FAMILIES]
ON_TRITON += [
    ("triton", f, list(SETTINGS)[1 + i % 4], (RECOMPUTE, SINGLE_WHOLE, RECOMPUTE_SMALL)[i % 3])
    for i, f in enumerate(FAMILIES)
]


@cover([*ON_TORCH, *ON_TRITON])
def test_linear(
    backend: str, family: Family, setting: str, way: tuple[str, int, torch.dtype]
) -> None:
    compare_linear(SETTINGS[setting](family), backend, way)


ON_TORCH = list(product(["torch"], FAMILIES, SETTINGS, [SINGLE_LONGER, RECOMPUTE]))[::3]
ON_TRITON = [
    (
        "triton",
        f,
        ("everything", "plain", "mixed signs")[i % 3],
        (SINGLE_WHOLE, SINGLE_LONGER)[i % 2],
    )
    for i, f in enumerate(FAMILIES)
]


@cover([*ON_TORCH, *ON_TRITON])
def test_linear_packed(
    backend: str, family: Family, setting: str, way: tuple[str, int, torch.dtype]
) -> None:
    case = SETTINGS[setting](family)
    flat = as_packed(case)
    compare_linear(flat, backend, way)
    # The same loss as that of the padded layout, in the exact arithmetic.
    exact = [linear_result(reference.linear_grpo_loss, x) for x in (flat, case)]
    assert exact[0].output.loss.item() == pytest.approx(exact[1].output.loss.item(), rel=1e-12)
    torch.testing.assert_close(exact[0].gradients["weight"], exact[1].gradients["weight"])


SOME = [("gmpo", "token"), ("vespo", "token"), ("dapo", "sequence")]


@cover(
    product(
        ["torch", "triton"],
        SOME,
        ["everything"],
        [("single_pass", 2, FP16), ("recompute", 4, FP16)],
    )
)
def test_linear_in_fp16(
    backend: str, family: Family, setting: str, way: tuple[str, int, torch.dtype]
) -> None:
    compare_linear(SETTINGS[setting](family), backend, way)


NOT, INPLACE = "", "inplace"
ON_TORCH = list(
    product(
        ["torch"], FAMILIES, SETTINGS, product([NOT, INPLACE], ["padded", "packed"], [FP32, BF16])
    )
)[::3]
ON_TRITON = [
    ("triton", f, "everything", ((NOT, INPLACE)[i % 2], "padded", (FP32, BF16, FP16)[i % 3]))
    for i, f in enumerate(FAMILIES)
]
ON_TRITON += [
    ("triton", f, ("on policy", "peaked", "plain")[i % 3], ((INPLACE, NOT)[i % 2], "packed", FP32))
    for i, f in enumerate(FAMILIES)
]


@cover([*ON_TORCH, *ON_TRITON])
def test_logits(
    backend: str, family: Family, setting: str, way: tuple[str, str, torch.dtype]
) -> None:
    inplace, layout, dtype = way
    case = SETTINGS[setting](family)
    case = as_packed(case) if layout == "packed" else case
    logits = case.logits.bfloat16().half().double()
    exact = logits_result(reference.grpo_loss, case, logits=logits)
    rounded = logits.to(dtype)
    naive = logits_result(reference.grpo_loss, case, logits=rounded)
    actual = logits_result(grpo_loss, case, logits=rounded, inplace=bool(inplace), backend=backend)
    compare(actual, naive, exact, dtype, backend)


@pytest.mark.parametrize("setting", SETTINGS)
@each_family
def test_policy_loss_is_the_loss_from_its_log_probs_on(family: Family, setting: str) -> None:
    case = SETTINGS[setting](family)
    expected = linear_result(reference.linear_grpo_loss, case).output
    tokens = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    gradients = []
    for each in (case, as_packed(case)):
        logps, entropy = exact_logps(each).float().requires_grad_(), expected.entropy.float()
        if each is not case:
            entropy = entropy[tokens]
        out = policy_loss(logps, each.advantages, entropy=entropy, **each.arguments)
        out.loss.backward()
        assert out.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5, abs=1e-6)
        for name, value in out.metrics.items():
            if name not in ("num_computed_rows", "num_gradient_rows"):
                wanted = expected.metrics[name].item()
                assert value.item() == pytest.approx(wanted, rel=1e-5, abs=1e-6), name
        assert logps.grad is not None and logps.grad.abs().max() > 0
        gradients.append(logps.grad)
    torch.testing.assert_close(gradients[1], gradients[0][tokens])


@pytest.mark.parametrize("method", ["single_pass", "recompute"])
@pytest.mark.parametrize("setting", ["everything", "on policy"])
@each_family
def test_chunks_may_have_any_size(family: Family, setting: str, method: str) -> None:
    case = SETTINGS[setting](family)
    expected = linear_result(reference.linear_grpo_loss, case)
    for chunk_rows in (1, 3, 5, 100):
        actual = linear_result(
            linear_grpo_loss,
            case,
            backend="torch",
            method=method,
            chunk_rows=chunk_rows,
            skip_rows=chunk_rows != 5,
        )
        assert_same(actual, expected, rtol=1e-9, atol=1e-11)
