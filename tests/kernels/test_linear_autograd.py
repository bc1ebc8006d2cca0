"""What autograd, autocast, checkpointing and torch.compile ask of the loss."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from loss_cases import (
    DEVICE,
    Result,
    assert_same,
    linear_result,
    make_case,
)
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastgrpo_kernels import (
    linear_grpo_loss,
    linear_logps,
)


@pytest.mark.parametrize("frozen", [("weight", "bias"), ("hidden",), ("hidden", "weight")])
def test_only_what_is_trained_gets_a_gradient(frozen: tuple[str, ...], backend: str) -> None:
    case = make_case().to(torch.float32)
    expected = linear_result(linear_grpo_loss, case, backend=backend)
    actual = linear_result(linear_grpo_loss, case, backend=backend, frozen=frozen)
    for name, gradient in actual.gradients.items():
        if name in frozen:
            assert gradient is None
        else:
            torch.testing.assert_close(gradient, expected.gradients[name], rtol=0, atol=0)


def test_without_grad_the_loss_is_a_number(backend: str) -> None:
    case = make_case().to(torch.float32)
    expected = linear_result(linear_grpo_loss, case, backend=backend)
    case.hidden.requires_grad_()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            out = linear_grpo_loss(
                case.hidden,
                case.weight,
                case.ids,
                case.advantages,
                bias=case.bias,
                backend=backend,
                **case.arguments,
            )
        assert not out.loss.requires_grad
        assert out.metrics["num_gradient_rows"] == 0
        # Rows come in another order: the sum may round differently, the log-probs may not.
        torch.testing.assert_close(out.loss, expected.output.loss.detach())
        assert torch.equal(out.logps, expected.output.logps)


def test_upstream_gradient_is_honoured(backend: str) -> None:
    case = make_case(loss_type="grpo").to(torch.float32)
    expected = linear_result(linear_grpo_loss, case, backend=backend)
    actual = linear_result(linear_grpo_loss, case, backend=backend, upstream=1 / 3)
    for name, gradient in actual.gradients.items():
        torch.testing.assert_close(gradient * 3, expected.gradients[name])


def test_backward_twice_adds_up(backend: str) -> None:
    case = make_case().to(torch.float32)
    expected = linear_result(linear_grpo_loss, case, backend=backend)
    hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_()
    out = linear_grpo_loss(
        hidden,
        weight,
        case.ids,
        case.advantages,
        bias=case.bias,
        backend=backend,
        **case.arguments,
    )
    out.loss.backward(retain_graph=True)
    (out.loss * 2).backward()
    torch.testing.assert_close(hidden.grad, expected.gradients["hidden"] * 3)
    torch.testing.assert_close(weight.grad, expected.gradients["weight"] * 3)


def test_hidden_states_used_twice_in_one_graph(backend: str) -> None:
    case = make_case().to(torch.float32)
    expected = linear_result(linear_grpo_loss, case, backend=backend)
    leaf = case.hidden.requires_grad_()
    hidden = leaf * 1
    arguments = {"bias": case.bias, "backend": backend, **case.arguments}
    once = linear_grpo_loss(hidden, case.weight, case.ids, case.advantages, **arguments)
    twice = linear_grpo_loss(hidden, case.weight, case.ids, case.advantages * -2, **arguments)
    (once.loss + twice.loss + hidden.square().sum()).backward()
    other = replace(case, advantages=case.advantages * -2)
    other_gradient = linear_result(linear_grpo_loss, other, backend=backend).gradients["hidden"]
    torch.testing.assert_close(
        leaf.grad, expected.gradients["hidden"] + other_gradient + 2 * leaf.detach()
    )


def test_under_autocast_it_is_what_linear_is(backend: str) -> None:
    case = make_case().to(torch.float32)
    expected = linear_result(linear_grpo_loss, case.to(torch.bfloat16), backend=backend)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        actual = linear_result(linear_grpo_loss, case, backend=backend)
        logps, _ = linear_logps(
            case.hidden, case.weight, case.ids, bias=case.bias, backend=backend, mask=case.mask
        )
    assert actual.output.loss.dtype == torch.float32
    assert torch.equal(logps, actual.output.logps)
    for gradient in actual.gradients.values():
        assert gradient.dtype == torch.float32
    rounded = {k: v.bfloat16() for k, v in actual.gradients.items()}
    assert_same(Result(actual.output, rounded), expected, rtol=0, atol=0)
    # Unlike linear's, the fp32 sum of the weight's gradient reaches the fp32 weight unrounded.
    assert not torch.equal(actual.gradients["weight"], rounded["weight"].float())


def test_under_gradient_checkpointing(backend: str) -> None:
    case = make_case().to(torch.float32)
    expected = linear_result(linear_grpo_loss, case, backend=backend)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_grpo_loss(
            hidden.sin(),
            weight,
            case.ids,
            case.advantages,
            bias=case.bias,
            backend=backend,
            **case.arguments,
        ).loss

    hidden, weight = case.hidden.clamp(-1, 1).asin().requires_grad_(), case.weight.requires_grad_()
    plain = torch.autograd.grad(loss(hidden, weight), [hidden, weight])
    value = checkpoint(loss, hidden, weight, use_reentrant=False)
    kept = torch.autograd.grad(value, [hidden, weight])
    assert expected.output.loss.item() != value.item()  # hidden states were clamped
    assert torch.equal(plain[0], kept[0]) and torch.equal(plain[1], kept[1])


def test_under_torch_compile() -> None:
    case = make_case().to(torch.float32)
    expected = linear_result(linear_grpo_loss, case, backend="torch")

    @torch.compile(backend="eager")
    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        out = linear_grpo_loss(
            hidden * 1,
            weight,
            case.ids,
            case.advantages,
            bias=case.bias,
            backend="torch",
            **case.arguments,
        )
        return out.loss * 2

    hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.compile about torch's own modules
        loss(hidden, weight).backward()
    torch.testing.assert_close(hidden.grad, 2 * expected.gradients["hidden"])
    torch.testing.assert_close(weight.grad, 2 * expected.gradients["weight"])
