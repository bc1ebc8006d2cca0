"""`grad_buffer` and `grad_scale`: the gradient of the head adds up in one place."""

from __future__ import annotations

import logging
import re
from typing import Any

import pytest
import torch
from counting import config_of
from loss_cases import DEVICE
from torch import Tensor

from fastgrpo_kernels import GRPOLossOutput, linear_grpo_loss, reference

methods = pytest.mark.parametrize("method", ("single_pass", "recompute"))
both_types = pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)


class Head:
    """A head of 11 tokens, and 3 micro-batches of 2 sequences with 5 tokens each."""

    def __init__(self, dtype: torch.dtype = torch.float32, frozen: bool = False) -> None:
        torch.manual_seed(0)
        self.weight = torch.randn(11, 4, device=DEVICE).to(dtype).requires_grad_(not frozen)
        self.buffer = torch.zeros(11, 4, device=DEVICE, dtype=dtype)
        self.batches: list[dict[str, Tensor]] = [
            {
                "hidden": torch.randn(2, 5, 4, device=DEVICE).to(dtype).requires_grad_(),
                "completion_ids": torch.randint(11, (2, 5), device=DEVICE),
                "advantages": torch.randn(2, device=DEVICE).to(dtype),
                "old_logps": torch.randn(2, 5, device=DEVICE).to(dtype) - 3,
            }
            for _ in range(3)
        ]

    def loss(self, i: int, function: Any = linear_grpo_loss, **options: Any) -> GRPOLossOutput:
        given = {"num_items_in_batch": 30, "num_sequences_in_batch": 6, "weight": self.weight}
        return function(**self.batches[i], **(given | options))

    def expected(self, dtype: torch.dtype = torch.float64, **options: Any) -> Tensor:
        """Return the gradient of all micro-batches, by autograd of the reference."""
        self.weight.grad = None
        for i in range(3):
            self.loss(i, reference.linear_grpo_loss, **options).loss.backward()
        assert self.weight.grad is not None
        expected, self.weight.grad = self.weight.grad, None
        for batch in self.batches:
            batch["hidden"].grad = None
        return expected


def close(actual: Tensor, expected: Tensor, rtol: float | None = None) -> None:
    rtol = rtol or (1e-5 if actual.dtype == torch.float32 else 1e-12)
    scale = expected.abs().max().item()
    torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=0, atol=rtol * scale)
    assert scale > 1e-3


@methods
@both_types
@pytest.mark.parametrize("loss", ("dapo", "gspo", "vespo"))
def test_micro_batches_add_up_in_the_buffer(loss: str, method: str, dtype: torch.dtype) -> None:
    head = Head(dtype)
    expected = head.expected(config=config_of(loss))
    options: dict[str, Any] = {"method": method, "config": config_of(loss), "backend": "torch"}
    for i in range(3):
        head.loss(i, **options, grad_buffer=head.buffer, chunk_rows=3).loss.backward()
        hidden = head.batches[i]["hidden"]
        assert hidden.grad is not None and hidden.grad.abs().sum() > 0
    assert head.weight.grad is None
    close(head.buffer, expected)


@methods
def test_micro_batches_add_up_in_triton(method: str, small_blocks: None) -> None:
    head = Head()
    expected = head.expected()
    for i in range(3):
        head.loss(i, method=method, grad_buffer=head.buffer, backend="triton").loss.backward()
    close(head.buffer, expected)


@methods
def test_the_scale_multiplies_what_is_added_and_nothing_else(method: str) -> None:
    head, plain = Head(), Head()
    head.buffer.fill_(1.0)
    scaled = head.loss(0, method=method, grad_buffer=head.buffer, grad_scale=-0.25)
    alone = plain.loss(0, method=method)
    scaled.loss.backward()
    alone.loss.backward()
    assert torch.equal(scaled.loss, alone.loss)
    assert torch.equal(head.batches[0]["hidden"].grad, plain.batches[0]["hidden"].grad)
    assert plain.weight.grad is not None
    close(head.buffer - 1, -0.25 * plain.weight.grad, rtol=1e-4)


def test_the_single_pass_adds_in_the_forward_pass_whatever_comes_upstream() -> None:
    head = Head()
    (expected,) = torch.autograd.grad(head.loss(0).loss, [head.weight])
    loss = head.loss(0, method="single_pass", grad_buffer=head.buffer).loss
    close(head.buffer, expected)
    before = head.buffer.clone()
    (3 * loss).backward(retain_graph=True)
    (3 * loss).backward()
    assert torch.equal(head.buffer, before)


def test_recompute_adds_in_backward_times_the_upstream() -> None:
    head = Head()
    (expected,) = torch.autograd.grad(head.loss(0).loss, [head.weight])
    loss = head.loss(0, method="recompute", grad_buffer=head.buffer, grad_scale=2.0).loss
    assert (head.buffer == 0).all()
    (3 * loss).backward(retain_graph=True)
    close(head.buffer, 6 * expected)
    (3 * loss).backward()
    close(head.buffer, 12 * expected)


@methods
@both_types
def test_a_frozen_weight_may_have_a_buffer_too(method: str, dtype: torch.dtype) -> None:
    """The gradient is asked for by the buffer: a trainer that owns the weight by other means."""
    head, trainable = Head(dtype, frozen=True), Head(dtype)
    head.loss(0, method=method, grad_buffer=head.buffer).loss.backward()
    trainable.loss(0).loss.backward()
    assert head.weight.grad is None and trainable.weight.grad is not None
    close(head.buffer, trainable.weight.grad)
    close(head.batches[0]["hidden"].grad, trainable.batches[0]["hidden"].grad)


@methods
def test_the_head_alone_may_learn(method: str) -> None:
    head = Head()
    expected = head.expected()
    for i, batch in enumerate(head.batches):
        batch["hidden"] = batch["hidden"].detach()
        head.loss(i, method=method, grad_buffer=head.buffer).loss.backward()
    close(head.buffer, expected)


@methods
def test_without_gradients_the_buffer_is_left_alone(method: str) -> None:
    head = Head()
    head.buffer.fill_(torch.nan)
    with torch.no_grad():
        output = head.loss(0, method=method, grad_buffer=head.buffer)
    assert not output.loss.requires_grad and head.buffer.isnan().all()


@methods
@pytest.mark.parametrize("micro_batches", (1, 3))
def test_a_tied_embedding_gets_both_gradients(method: str, micro_batches: int) -> None:
    """`grad_buffer=weight.grad`: autograd adds the embedding's part to the same tensor."""

    def backward(head: Head, function: Any, **options: Any) -> None:
        for i in range(micro_batches):
            batch = head.batches[i]
            hidden = torch.tanh(torch.nn.functional.embedding(batch["completion_ids"], head.weight))
            options = options | {"grad_buffer": head.weight.grad} if options else {}
            given = {k: v for k, v in batch.items() if k != "hidden"}
            function(hidden, head.weight, **given, num_items_in_batch=30, **options).loss.backward()

    tied, expected = Head(), Head(torch.float64)
    for batch, exact in zip(tied.batches, expected.batches, strict=True):
        exact.update({k: v.double() if v.is_floating_point() else v for k, v in batch.items()})
    expected.weight = tied.weight.detach().double().requires_grad_()
    tied.weight.grad = torch.zeros_like(tied.weight)
    place = tied.weight.grad.data_ptr()
    backward(tied, linear_grpo_loss, method=method)
    backward(expected, reference.linear_grpo_loss)
    assert expected.weight.grad is not None
    assert tied.weight.grad.data_ptr() == place
    close(tied.weight.grad, expected.weight.grad)


# ---------------------------------------------------------------- types


def test_a_buffer_that_rounds_each_chunk_is_refused_with_the_remedy() -> None:
    head = Head(torch.bfloat16)
    message = (
        "grad_buffer is torch.bfloat16 and would be rounded after every chunk: make it "
        "torch.float32, or use method='recompute'"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        head.loss(0, method="single_pass", grad_buffer=head.buffer)
    double = Head(torch.float64)
    with pytest.raises(ValueError, match=r"is torch\.float32 and .* make it torch.float64"):
        double.loss(0, method="single_pass", grad_buffer=double.buffer.float())


@methods
def test_a_16_bit_head_adds_up_in_fp32(method: str) -> None:
    """The buffer has the error of the 16-bit factors, not that of rounding sums to 16 bits."""
    head = Head(torch.bfloat16)
    buffer = torch.zeros(11, 4, device=DEVICE)
    expected = torch.zeros(11, 4, device=DEVICE, dtype=torch.float64)
    for i in range(3):
        loss = head.loss(i, method=method, grad_buffer=buffer, chunk_rows=3, fp32_logits=True).loss
        loss.backward()
        exact = {k: v.double() if v.is_floating_point() else v for k, v in head.batches[i].items()}
        weight = head.weight.detach().double().requires_grad_()
        total = {"num_items_in_batch": 30}
        reference.linear_grpo_loss(weight=weight, **exact, **total).loss.backward()
        assert weight.grad is not None
        expected += weight.grad
    close(buffer, expected, rtol=4e-3)
    assert not torch.equal(buffer, buffer.bfloat16().float())


def test_recompute_and_auto_take_a_16_bit_buffer(caplog: pytest.LogCaptureFixture) -> None:
    named, automatic = Head(torch.bfloat16), Head(torch.bfloat16)
    named.loss(0, method="recompute", grad_buffer=named.buffer).loss.backward()
    with caplog.at_level(logging.DEBUG, "fastgrpo_kernels"):
        automatic.loss(0, grad_buffer=automatic.buffer).loss.backward()
    assert [record.getMessage() for record in caplog.records] == [
        "linear_grpo_loss: method recompute (grad_buffer is torch.bfloat16)"
    ]
    assert torch.equal(named.buffer, automatic.buffer) and named.buffer.abs().sum() > 0
    returned = Head(torch.bfloat16)
    returned.loss(0, method="recompute").loss.backward()
    assert returned.weight.grad is not None
    close(named.buffer, returned.weight.grad, rtol=8e-3)


@methods
def test_under_autocast_the_buffer_is_of_the_weight_itself(method: str) -> None:
    head, plain = Head(), Head()
    with torch.autocast(DEVICE, torch.bfloat16):
        head.loss(0, method=method, grad_buffer=head.buffer).loss.backward()
        plain.loss(0, method=method).loss.backward()
    assert head.weight.grad is None and plain.weight.grad is not None
    assert plain.weight.grad.dtype == torch.float32
    close(head.buffer, plain.weight.grad, rtol=1e-5)
