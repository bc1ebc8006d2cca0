"""What the torch backend does for a CPU: slabs that stay in its cache, products it is quick at."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from counting import FlopCounter, LiveBytes, config_of
from loss_cases import assert_results_as_exact, linear_result, logits_result, make_case

from fastgrpo_kernels import (
    _head,
    _products,
    _row_torch,
    grpo_loss,
    linear_grpo_loss,
    linear_logps,
    reference,
)

METHODS = ("single_pass", "recompute")
# Everything that has a matrix of its own in the row step: softcap's slope, the entropy's gradient.
OPTIONS: dict[str, Any] = {"logit_softcap": 5.0, "entropy_coef": 0.1, "temperature": 0.7}
CONFIG = config_of("dapo", **OPTIONS)
ROW_BYTES = 37 * 4  # of make_case's vocabulary, in fp32


@pytest.fixture(params=(2, 3, 7))
def rows_of_a_slab(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(_row_torch, "_CPU_SLAB_BYTES", (request.param + 1) * ROW_BYTES + 8)
    return request.param


@pytest.mark.parametrize("skip_rows", (True, False))
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_slabs_change_no_bit(
    rows_of_a_slab: int, dtype: torch.dtype, method: Any, skip_rows: bool
) -> None:
    """A slab is a choice of when, not of what: 15 rows in slabs of 2, 3 and 7, or at once."""
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
    matrix = (rows_of_a_slab + 1) * ROW_BYTES  # a row that would be left alone goes along
    assert 2 * matrix < live.peak <= 4 * matrix + 64 * 4 + 100 * rows_of_a_slab


@pytest.mark.parametrize("fp32_logits", (False, True))
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_a_cpu_without_16_bit_products_is_as_exact(
    dtype: torch.dtype, method: Any, fp32_logits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Converted slices: rounded once, bias included."""
    monkeypatch.setattr(_products, "multiplies", lambda x: x.dtype.itemsize > 2)
    monkeypatch.setattr(_products, "MIB", 64)  # slices of a few rows
    case = make_case(sequences=4, length=6)
    assert case.bias is not None
    options: dict[str, Any] = {"method": method, "fp32_logits": fp32_logits, "backend": "torch"}
    options["chunk_rows"] = 7
    actual = linear_result(linear_grpo_loss, case.to(dtype), **options)
    naive = linear_result(reference.linear_grpo_loss, case.to(dtype))
    exact = linear_result(reference.linear_grpo_loss, case)
    assert_results_as_exact(actual, naive, exact, dtype, "torch")


def test_a_row_is_never_alone_in_a_slab(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch sums a single long row by threads, in another order: 7 rows must be 7 rows."""
    torch.manual_seed(0)
    logits = torch.randn(7, 50_000)
    found = []
    for rows in (2, 3, 6, 7):
        monkeypatch.setattr(_row_torch, "_CPU_SLAB_BYTES", (rows + 1) * 50_000 * 4)
        cuts = [rows.stop - rows.start for rows, _ in _row_torch._slabs(logits, 0)]
        assert sum(cuts) == 7 and min(cuts) > 1
        results = _row_torch.Statistics.beside(torch.zeros(7), torch.zeros(7))
        ids = torch.zeros(7, dtype=torch.long)
        _row_torch.statistics_rows(logits, 0, ids, None, CONFIG, results)
        found.append(torch.stack(results.tensors()))
    assert all(torch.equal(x, found[0]) for x in found)


@pytest.mark.parametrize(
    ("dtype", "chunk_rows", "wanted"),
    [
        (torch.bfloat16, None, torch.bfloat16),
        (torch.bfloat16, 64, torch.bfloat16),
        (torch.bfloat16, 32, torch.float32),
        (torch.float16, 64, torch.float32),
        (torch.float32, 64, torch.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize("function", ("loss", "logps"))
def test_the_head_of_one_chunk_needs_no_fp32_sum(
    function: str,
    dtype: torch.dtype,
    chunk_rows: int | None,
    wanted: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All of dW in one bf16 product is in its own type from the start; fp16 has not the range."""
    sums: list[torch.dtype] = []
    add = _head.HeadGradients.add

    def spy(self: _head.HeadGradients, chunk: _head.Chunk) -> None:
        assert self.dweight_VH is not None
        sums.append(self.dweight_VH.dtype)
        add(self, chunk)

    monkeypatch.setattr(_head.HeadGradients, "add", spy)
    hidden = torch.randn(64, 8).to(dtype).requires_grad_()
    weight = torch.randn(128, 8).to(dtype).requires_grad_()
    ids, advantages = torch.randint(128, (64,)), torch.ones(64, 1)
    if function == "loss":
        loss = linear_grpo_loss(hidden, weight, ids, advantages, chunk_rows=chunk_rows).loss
    else:
        loss = linear_logps(hidden, weight, ids, chunk_rows=chunk_rows)[0].sum()
    loss.backward()
    assert sums == [wanted] * (2 if chunk_rows == 32 else 1)


def test_scaling_a_converted_slice_takes_no_second_copy() -> None:
    gradient, scale = torch.randn(4096).bfloat16(), torch.tensor(3.0)
    with LiveBytes(gradient, scale) as live:
        found = _products.scaled(gradient, scale, torch.bfloat16)
    assert found is not None and torch.equal(found, (gradient.float() * 3).bfloat16())
    assert live.peak == 4096 * (2 + 4)
    kept = torch.randn(4096)
    before = kept.clone()
    found = _products.scaled(kept, scale, torch.float32)
    assert torch.equal(kept, before) and found is not None and torch.equal(found, kept * 3)


def test_products_with_an_fp32_result_are_counted() -> None:
    """As a GPU has them: PyTorch's own counter raises at the `out_dtype` of `addmm`."""
    total = torch.zeros(3, 5, device="meta")
    a, b = torch.zeros(3, 4, device="meta"), torch.zeros(4, 5, device="meta")
    with FlopCounter() as counter:
        torch.addmm(total, a.bfloat16(), b.bfloat16(), beta=0, out_dtype=torch.float32, out=total)
        torch.mm(a.bfloat16(), b.bfloat16(), out_dtype=torch.float32, out=total)
        total.addmm_(a, b)
    assert counter.get_total_flops() == 3 * 2 * 3 * 4 * 5
