"""Sizes beyond 16 and 32 bits: long sequences, and offsets that an int32 does not hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from counting import config_of
from loss_cases import DEVICE
from torch import Tensor

from fastgrpo_kernels import grpo_loss, linear_grpo_loss, reference, selective_logps
from fastgrpo_kernels._inputs import flatten
from fastgrpo_kernels._reduce import RowResults

LONG = 70_000  # more than 65,536


def long_inputs(vocabulary: int = 5, hidden_size: int = 2) -> dict[str, Any]:
    """One sequence of 69,990 tokens and one of 10, packed."""
    torch.manual_seed(0)
    return {
        "hidden": torch.randn(LONG, hidden_size, device=DEVICE, requires_grad=True),
        "weight": torch.randn(vocabulary, hidden_size, device=DEVICE, requires_grad=True),
        "completion_ids": torch.randint(vocabulary, (LONG,), device=DEVICE),
        "advantages": torch.tensor([1.0, -0.5], device=DEVICE),
        "old_logps": torch.randn(LONG, device=DEVICE) * 0.1 - 1.6,
        "cu_seqlens": torch.tensor([0, LONG - 10, LONG], dtype=torch.int32, device=DEVICE),
    }


def double(inputs: dict[str, Any]) -> dict[str, Any]:
    found = {k: v.detach().double() if v.is_floating_point() else v for k, v in inputs.items()}
    return found | {k: found[k].requires_grad_() for k in ("hidden", "weight")}


def assert_close(actual: Tensor | None, expected: Tensor | None, rtol: float) -> None:
    assert actual is not None and expected is not None
    atol = rtol * expected.abs().max().item()
    assert atol > 0
    torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=0, atol=atol)


def check_long_sequences(loss: str, method: str, backend: str) -> None:
    inputs = long_inputs()
    exact = double(inputs)
    output = linear_grpo_loss(
        **inputs, config=config_of(loss), method=method, chunk_rows=30_000, backend=backend
    )  # pyright: ignore[reportArgumentType]
    expected = reference.linear_grpo_loss(**exact, config=config_of(loss))
    output.loss.backward()
    expected.loss.backward()
    torch.testing.assert_close(output.loss.double(), expected.loss, rtol=1e-4, atol=1e-6)
    assert_close(output.logps, expected.logps, 1e-6)
    # The ratio of a sequence is the mean of 70,000 fp32 log-ratios, or their sum.
    rtol = 1e-3 if loss == "vespo" else 1e-5
    assert_close(inputs["hidden"].grad, exact["hidden"].grad, rtol)
    assert_close(inputs["weight"].grad, exact["weight"].grad, rtol)


@pytest.mark.parametrize("loss", ("dapo", "gspo", "gmpo"))
@pytest.mark.parametrize("method", ("single_pass", "recompute"))
def test_sequences_of_more_than_65536_tokens(loss: str, method: str) -> None:
    check_long_sequences(loss, method, "torch")


@pytest.mark.gpu
@pytest.mark.parametrize("loss", ("dapo", "gspo", "gmpo", "vespo"))
@pytest.mark.parametrize("method", ("single_pass", "recompute"))
def test_sequences_of_more_than_65536_tokens_in_triton(loss: str, method: str) -> None:
    check_long_sequences(loss, method, "triton")


STRIDE = 2**30 + 16  # the third row begins beyond 2^31, though the stride fits an int32


@pytest.fixture
def far_apart(monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Return 3 rows of logits in 4 GiB of memory of which almost nothing is touched."""
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    memory = torch.empty(2 * STRIDE + 37, dtype=torch.bfloat16, device=DEVICE)
    return memory.as_strided((3, 37), (STRIDE, 1))


def test_rows_beyond_2_to_the_31_elements(far_apart: Tensor, small_blocks: None) -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 37, device=DEVICE).bfloat16()
    ids, advantages = torch.tensor([0, 17, 36], device=DEVICE), torch.tensor([1.0, -1.0, 0.5])
    advantages = advantages.to(DEVICE)
    far_apart.copy_(logits)
    far, near = far_apart.detach().requires_grad_(), logits.clone().requires_grad_()
    for name, call in (
        ("loss", lambda x: grpo_loss(x, ids, advantages, backend="triton").loss),
        ("logps", lambda x: selective_logps(x, ids, backend="triton")[0].sum()),
    ):
        (found,) = torch.autograd.grad(call(far), [far])
        (expected,) = torch.autograd.grad(call(near), [near])
        assert torch.equal(found, expected) and expected.abs().sum() > 0, name

    # In place: the gradients are written there, too. (Autograd would touch all of the memory.)
    from fastgrpo_kernels import _row_triton

    config = config_of("dapo")
    batch = flatten(ids, advantages, logits.device, config=config)
    for values in (far_apart, logits):
        rows = RowResults.zeros(batch, torch.float32)
        _row_triton.loss_rows(values, values, 0, batch, rows, config)
        _row_triton.scale_rows(values, torch.tensor(0.5, device=DEVICE))
    assert torch.equal(far_apart, logits)
    assert 0 < logits.abs().max() < 1


@pytest.mark.gpu
@pytest.mark.parametrize("method", ("single_pass", "recompute"))
def test_chunks_of_more_than_2_to_the_31_logits(method: str) -> None:
    """70,000 rows of a vocabulary of 32,768 at once; the last are what they are alone."""
    torch.manual_seed(0)
    hidden = torch.randn(LONG, 64, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(32_768, 64, device="cuda", dtype=torch.bfloat16)
    ids = torch.randint(32_768, (LONG,), device="cuda")
    advantages = torch.ones(LONG, 1, device="cuda")
    found: list[tuple[Tensor, Tensor]] = []
    for rows in (slice(None), slice(LONG - 100, LONG)):
        part = hidden[rows].detach().requires_grad_()
        output = linear_grpo_loss(
            part, weight, ids[rows], advantages[rows], num_items_in_batch=LONG, method=method,
            chunk_rows=LONG,
        )  # pyright: ignore[reportArgumentType]  # fmt: skip
        output.loss.backward()
        assert part.grad is not None
        found.append((output.logps[-100:], part.grad[-100:]))
    (logps, gradient), (expected_logps, expected_gradient) = found
    torch.testing.assert_close(logps, expected_logps, rtol=0, atol=2e-2)
    assert_close(gradient, expected_gradient, 2e-2)
