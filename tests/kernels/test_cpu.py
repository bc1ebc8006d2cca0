"""What the torch backend does for a CPU: slabs that stay in its cache, products it is quick at."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from counting import LiveBytes, config_of
from loss_cases import assert_results_as_exact, linear_result, logits_result, make_case

from fastgrpo_kernels import _head, _row_torch, grpo_loss, linear_grpo_loss, linear_logps, reference

METHODS = ("single_pass", "recompute")
# Everything that has a matrix of its own in the row step: softcap's slope, the entropy's gradient.
OPTIONS: dict[str, Any] = {"logit_softcap": 5.0, "entropy_coef": 0.1, "temperature": 0.7}
CONFIG = config_of("dapo", **OPTIONS)
ROW_BYTES = 37 * 4  # of make_case's vocabulary, in fp32


@pytest.fixture(params=(1, 2, 7))
def rows_of_a_slab(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(_row_torch, "_CPU_SLAB_BYTES", request.param * ROW_BYTES + 8)
    return request.param


@pytest.mark.parametrize("skip_rows", (True, False))
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_slabs_change_no_bit(
    rows_of_a_slab: int, dtype: torch.dtype, method: Any, skip_rows: bool
) -> None:
    """A slab is a choice of when, not of what: 15 rows in slabs of 1, 2 and 7, or at once."""
    case = make_case(**OPTIONS).to(dtype)
    options: dict[str, Any] = {"method": method, "backend": "torch"}
    found = linear_result(linear_grpo_loss, case, skip_rows=skip_rows, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_row_torch, "_CPU_SLAB_BYTES", 2**20)
        whole = linear_result(linear_grpo_loss, case, skip_rows=skip_rows, **options)
    for name, value in whole.everything().items():
        assert value is not None and torch.equal(found.everything()[name], value), name  # pyright: ignore[reportArgumentType]


def test_slabs_of_logits_change_no_bit(rows_of_a_slab: int) -> None:
    case = make_case(**OPTIONS).to(torch.bfloat16)
    options: dict[str, Any] = {"backend": "torch", "upstream": 3.0}
    found = logits_result(grpo_loss, case, inplace=True, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_row_torch, "_CPU_SLAB_BYTES", 2**20)
        whole = logits_result(grpo_loss, case, inplace=True, **options)
    for name, value in whole.everything().items():
        assert value is not None and torch.equal(found.everything()[name], value), name  # pyright: ignore[reportArgumentType]


def test_temporaries_are_those_of_a_slab(rows_of_a_slab: int) -> None:
    """At most four matrices of the rows of a slab, the logits apart, whatever the chunk is."""
    logits = torch.randn(64, 37)
    ids, logps = torch.zeros(64, dtype=torch.long), torch.zeros(64)
    found = _row_torch.Statistics.beside(logps, torch.zeros(64))
    vectors = vars(found).values()
    with LiveBytes(logits, ids, *vectors) as live:
        _row_torch.statistics_rows(logits, 0, ids, None, CONFIG, found)
        ones = torch.ones(64)
        _row_torch.dlogits_rows(logits, logits, 0, ids, None, CONFIG, found, ones, ones)
    matrix = rows_of_a_slab * ROW_BYTES
    assert 3 * matrix < live.peak <= 4 * matrix + 64 * 4 + 100 * rows_of_a_slab


@pytest.mark.parametrize("fp32_logits", (False, True))
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_a_cpu_without_16_bit_products_is_as_exact(
    dtype: torch.dtype, method: Any, fp32_logits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Converted slices: rounded once, bias included."""
    monkeypatch.setattr(_head, "multiplies", lambda x: x.dtype.itemsize > 2)
    monkeypatch.setattr(_head, "MIB", 64)  # slices of a few rows
    case = make_case(sequences=4, length=6)
    assert case.bias is not None
    options: dict[str, Any] = {"method": method, "fp32_logits": fp32_logits, "backend": "torch"}
    options["chunk_rows"] = 7
    actual = linear_result(linear_grpo_loss, case.to(dtype), **options)
    naive = linear_result(reference.linear_grpo_loss, case.to(dtype))
    exact = linear_result(reference.linear_grpo_loss, case)
    assert_results_as_exact(actual, naive, exact, dtype, "torch")


def test_which_products_a_cpu_multiplies() -> None:
    assert _head.multiplies(torch.ones(1)) and _head.multiplies(torch.ones(1).double())
    bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert _head.multiplies(torch.ones(1, dtype=torch.bfloat16)) == bf16


@pytest.mark.parametrize("chunk_rows", (64, 32, None))
@pytest.mark.parametrize("function", ("loss", "logps"))
def test_the_head_of_one_chunk_needs_no_fp32_sum(function: str, chunk_rows: int | None) -> None:
    """All of dW in one bf16 product: it is in its own type from the start."""
    hidden = torch.randn(64, 8).bfloat16().requires_grad_()
    weight = torch.randn(4096, 8).bfloat16().requires_grad_()
    ids, advantages = torch.randint(4096, (64,)), torch.ones(64, 1)
    if not _head.multiplies(hidden):
        pytest.skip("this CPU converts bf16 operands")
    with LiveBytes(hidden, weight, ids, advantages) as live:
        if function == "loss":
            loss = linear_grpo_loss(hidden, weight, ids, advantages, chunk_rows=chunk_rows).loss
        else:
            logps, _ = linear_logps(hidden, weight, ids, chunk_rows=chunk_rows)
            loss = logps.sum()
        live.peak = 0
        loss.backward()
    assert weight.grad is not None
    head = 4096 * 8
    # Of the loss the sum lives on for a second backward; log-probs add up in backward itself.
    sum_bytes = head * (4 if chunk_rows == 32 else 2)
    returned = head * 2 if function == "loss" else 0
    chunk = 0 if function == "loss" else (chunk_rows or 64) * 4096 * 2
    least = sum_bytes + returned + chunk
    # A slice as it is scaled, in fp32 and converted to it; or the slabs of the row step.
    temporaries = (4 if chunk_rows == 32 else 8) * head if function == "loss" else 16 * 2**20
    assert least <= live.peak <= least + temporaries + 4096
