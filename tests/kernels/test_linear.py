"""The fused loss from hidden states against `reference` in fp64; layouts and strides."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from loss_cases import (
    BACKENDS,
    DEVICE,
    DTYPES,
    Result,
    assert_as_exact,
    assert_results_as_exact,
    assert_same,
    factors,
    linear_result,
    make_case,
    packed,
)
from torch import Tensor

from fastgrpo_kernels import (
    linear_grpo_loss,
    linear_logps,
    reference,
)

CASES = {
    # what the numbers cover: a peaked head, factors, clipping, KL, temperature, skipped rows
    "dapo, everything": lambda: factors(make_case(beta=0.2, temperature=0.7, delta=1.5, seed=1)),
    "grpo, per-token, on policy": lambda: make_case(
        loss_type="grpo", per_token=True, off_policy=False, seed=2
    ),
    "bnpo, no mask": lambda: make_case(
        loss_type="bnpo", epsilon_low=0.05, epsilon_high=0.3, masked=False, seed=3
    ),
    "dr_grpo, denominators": lambda: make_case(loss_type="dr_grpo", seed=4).having(
        num_items_in_batch=50, num_sequences_in_batch=8
    ),
    "dapo, denominator a tensor": lambda: make_case(seed=5, off_policy=False).having(
        num_items_in_batch=torch.tensor(50)
    ),
}


def close_to(actual: Result, expected: Result) -> None:
    assert_same(actual, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_is_as_exact_as_the_reference(name: str, dtype: torch.dtype, backend: str) -> None:
    case = CASES[name]()
    exact = linear_result(reference.linear_grpo_loss, case)
    naive = linear_result(reference.linear_grpo_loss, case.to(dtype))
    # Four rows a chunk: 15 tokens are not a multiple of it, and dW adds up over chunks.
    actual = linear_result(linear_grpo_loss, case.to(dtype), backend=backend, chunk_rows=4)
    assert_results_as_exact(actual, naive, exact, dtype, backend)
    assert actual.output.loss.dtype == actual.output.logps.dtype == torch.float32
    for name, gradient in actual.gradients.items():
        assert gradient.dtype == dtype, name
        assert gradient.abs().max() > 0, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_weight_gradient_is_rounded_once_however_many_chunks(dtype: torch.dtype) -> None:
    case = make_case(sequences=2, length=40, masked=False, off_policy=False, per_token=True)
    exact = linear_result(reference.linear_grpo_loss, case)
    naive = linear_result(reference.linear_grpo_loss, case.to(dtype))
    actual = linear_result(linear_grpo_loss, case.to(dtype), backend="torch", chunk_rows=1)
    # Measured 0.9 to 1.2 times the naive error; 1.9 if chunks are added in the weight's type.
    values = (result.gradients["weight"] for result in (actual, naive, exact))
    assert_as_exact(*values, factor=1.25, what="dweight")


def test_real_block_size_takes_a_vocabulary_of_two_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(sequences=1, length=2, hidden_size=2, vocabulary=8200, masked=False)
    exact = linear_result(reference.linear_grpo_loss, case)
    naive = linear_result(reference.linear_grpo_loss, case.to(torch.float32))
    actual = linear_result(linear_grpo_loss, case.to(torch.float32), backend="triton")
    assert_results_as_exact(actual, naive, exact, torch.float32, "triton")


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_token_without_a_bias(backend: str) -> None:
    case = replace(make_case(sequences=1, length=1, masked=False, seed=3), bias=None)
    exact = linear_result(reference.linear_grpo_loss, case)
    close_to(linear_result(linear_grpo_loss, case.to(torch.float32), backend=backend), exact)


@pytest.mark.parametrize("lead", [(), (1,)], ids=["(N,)", "(1, N)"])
@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "bnpo", "dr_grpo"])
def test_packed_sequences_are_the_padded_ones(loss_type: str, lead: Any, backend: str) -> None:
    lengths = [3, 0, 5, 1]
    case = factors(make_case(sequences=4, loss_type=loss_type, beta=0.1, masked=False))
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    padded = case.having(completion_mask=mask.to(DEVICE)).to(torch.float32)
    cu_seqlens = torch.tensor([0, 3, 3, 8, 9], dtype=torch.int32, device=DEVICE)
    short = packed(case, lead, lengths, cu_seqlens=cu_seqlens).to(torch.float32)

    expected = linear_result(reference.linear_grpo_loss, padded)
    actual = linear_result(linear_grpo_loss, short, backend=backend)
    keep = mask.to(DEVICE)
    hidden_gradient = expected.gradients["hidden"]
    expected.gradients["hidden"] = hidden_gradient[keep].view(short.hidden.shape)
    out = expected.output
    flattened = {n: getattr(out, n)[keep].view(short.ids.shape) for n in ("logps", "entropy")}
    close_to(actual, Result(replace(out, **flattened), expected.gradients))


@pytest.mark.parametrize("loss_type", ["dapo", "bnpo"])
def test_token_means_need_no_cu_seqlens(loss_type: str, backend: str) -> None:
    case = make_case(loss_type=loss_type, per_token=True).to(torch.float32)
    flat = packed(case, (), [5, 5, 5])
    expected = linear_result(reference.linear_grpo_loss, case)
    actual = linear_result(linear_grpo_loss, flat, backend=backend)
    assert "num_sequences" not in actual.output.metrics
    assert actual.output.loss.item() == pytest.approx(expected.output.loss.item(), rel=1e-5)
    torch.testing.assert_close(
        actual.gradients["hidden"].view(3, 5, -1), expected.gradients["hidden"]
    )


def test_a_column_forces_per_token_when_there_are_as_many_sequences(backend: str) -> None:
    # Sequences of 0, 1 and 2 tokens: 3 of each.
    torch.manual_seed(0)
    hidden, weight = torch.randn(3, 4, device=DEVICE), torch.randn(7, 4, device=DEVICE)
    ids = torch.tensor([1, 2, 3], device=DEVICE)
    cu_seqlens = torch.tensor([0, 0, 1, 3], dtype=torch.int32, device=DEVICE)
    A = torch.tensor([1.0, 10.0, 100.0], device=DEVICE)

    def loss(advantages: Tensor, **arguments: Any) -> float:
        return linear_grpo_loss(
            hidden, weight, ids, advantages, cu_seqlens=cu_seqlens, backend=backend, **arguments
        ).loss.item()

    assert loss(A) == pytest.approx(-(10 + 100 + 100) / 3)
    assert loss(A[:, None]) == pytest.approx(-(1 + 10 + 100) / 3)
    ones = torch.ones_like(A)
    assert loss(ones, policy_weight=A) == pytest.approx(-(10 + 100 + 100) / 3)
    assert loss(ones, policy_weight=A[:, None]) == pytest.approx(-(1 + 10 + 100) / 3)


@pytest.mark.parametrize("kind", ["slice", "transposed", "packed slice"])
def test_strided_hidden_states_and_weights(kind: str, backend: str) -> None:
    case = make_case().to(torch.float32)
    if kind == "packed slice":
        case = packed(make_case(per_token=True).to(torch.float32), (), [5, 5, 5])
    wide = torch.full((*case.hidden.shape[:-2], case.hidden.shape[-2] + 3, 8), torch.nan)
    wide = wide.to(DEVICE)
    wide[..., 2:-1, :] = case.hidden
    view = wide[..., 2:-1, :]
    if kind == "transposed":
        view = case.hidden.transpose(0, 1).contiguous().transpose(0, 1)
        assert not view.is_contiguous()
    expected = linear_result(linear_grpo_loss, case, backend=backend, chunk_rows=4)
    leaves = [view.requires_grad_(), case.weight.t().contiguous().t().requires_grad_()]
    for skip_rows in (True, False):
        out = linear_grpo_loss(
            *leaves,
            case.ids,
            case.advantages,
            bias=case.bias,
            chunk_rows=4,
            skip_rows=skip_rows,
            backend=backend,
            **case.arguments,
        )
        actual = torch.autograd.grad(out.loss, leaves)
        torch.testing.assert_close(out.loss, expected.output.loss.detach())
        torch.testing.assert_close(actual[0], expected.gradients["hidden"])
        torch.testing.assert_close(actual[1], expected.gradients["weight"])


def test_one_advantage_for_one_sequence_of_many_tokens(backend: str) -> None:
    # A value per sequence is spread over its tokens as a view of stride 0.
    case = factors(make_case(sequences=1, masked=False, loss_type="grpo")).to(torch.float32)
    expected = linear_result(reference.linear_grpo_loss, case)
    close_to(linear_result(linear_grpo_loss, case, backend=backend), expected)
    plain = make_case(sequences=1, masked=False).to(torch.float32)
    expected = linear_result(reference.linear_grpo_loss, plain)
    close_to(linear_result(linear_grpo_loss, plain, backend=backend), expected)


@pytest.mark.parametrize(
    "name", ["ids", "advantages", "completion_mask", "old_logps", "ref_logps", "policy_weight"]
)
def test_strided_vectors(name: str, backend: str) -> None:
    case = factors(make_case(beta=0.1, per_token=True)).to(torch.float32)
    # `having` a weight per token, since it is the only factor left to stand for the others.
    case = case.having(
        importance_sampling_ratio=None, entropy_mask=None, policy_weight=torch.rand(3, 5) + 0.5
    )
    case = packed(case, (), [5, 5, 5])
    expected = linear_result(reference.linear_grpo_loss, case)

    def every_other(x: Tensor) -> Tensor:
        return torch.stack([x, torch.full_like(x, 1)], -1).flatten()[::2]

    if name in case.arguments:
        case = case.having(**{name: every_other(case.arguments[name])})
    else:
        case = replace(case, **{name: every_other(getattr(case, name))})
    for skip_rows in (True, False):
        actual = linear_result(linear_grpo_loss, case, backend=backend, skip_rows=skip_rows)
        close_to(actual, expected)
    logps, entropy = linear_logps(
        case.hidden, case.weight, case.ids, bias=case.bias, backend=backend
    )
    wanted = reference.linear_logps(case.hidden, case.weight, case.ids, bias=case.bias)
    torch.testing.assert_close(logps, wanted[0])
    torch.testing.assert_close(entropy, wanted[1])
