"""How the losses behave in autograd: backward twice, changed inputs, checkpoints, autocast."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from counting import LOSSES, config_of
from loss_cases import DEVICE
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastgrpo_kernels import (
    GRPOLossConfig,
    grpo_loss,
    linear_grpo_loss,
    linear_logps,
    reference,
    selective_logps,
)

methods = pytest.mark.parametrize("method", ("single_pass", "recompute"))
B, T, H, V = 2, 5, 4, 11


class Inputs:
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        self.hidden = torch.randn(B, T, H, device=DEVICE).to(dtype).requires_grad_()
        self.weight = torch.randn(V, H, device=DEVICE).to(dtype).requires_grad_()
        self.bias = torch.randn(V, device=DEVICE).to(dtype).requires_grad_()
        self.ids = torch.randint(V, (B, T), device=DEVICE)
        self.advantages = torch.tensor([1.0, -0.5], device=DEVICE)
        self.old_logps = torch.randn(B, T, device=DEVICE) * 0.1 - 3
        self.ref_logps = torch.randn(B, T, device=DEVICE) * 0.1 - 3

    @property
    def leaves(self) -> list[Tensor]:
        return [self.hidden, self.weight, self.bias]

    def loss(self, function: Any = linear_grpo_loss, **options: Any) -> Tensor:
        given = {"bias": self.bias, "hidden": self.hidden, "weight": self.weight}
        return function(
            completion_ids=self.ids, advantages=self.advantages, **(given | options)
        ).loss

    def everything(self) -> dict[str, Any]:
        """Return options that take every part of the loss."""
        config = GRPOLossConfig(
            beta=0.1, entropy_coef=0.1, temperature=0.7, logit_scale=0.5, logit_softcap=4.0
        )
        return {"old_logps": self.old_logps, "ref_logps": self.ref_logps, "config": config}


def exact(inputs: Inputs, **options: Any) -> tuple[Tensor, ...]:
    double = Inputs()
    for name in ("hidden", "weight", "bias"):
        setattr(double, name, getattr(inputs, name).detach().double().requires_grad_())
    return torch.autograd.grad(double.loss(reference.linear_grpo_loss, **options), double.leaves)


def close(found: Any, expected: Any, rtol: float = 1e-5) -> None:
    for value, wanted in zip(found, expected, strict=True):
        atol = rtol * wanted.abs().max().item()
        torch.testing.assert_close(value, wanted.to(value.dtype), rtol=0, atol=atol)
        assert atol > 0


# ---------------------------------------------------------------- recompute


@pytest.mark.parametrize("chunk_rows", (None, 3, 1))
@pytest.mark.parametrize("columns", (11, 4, 3))
def test_tiles_of_any_shape_give_the_same(
    chunk_rows: int | None, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The target's column is in one slice, the largest logit in another, the sum over all."""
    from fastgrpo_kernels import _recompute

    shape = (chunk_rows or B * T, columns)
    monkeypatch.setattr(_recompute, "tile_shape", lambda *_: shape)
    inputs = Inputs()
    options = inputs.everything()
    loss = inputs.loss(method="recompute", chunk_rows=chunk_rows, **options)
    close(torch.autograd.grad(loss, inputs.leaves), exact(inputs, **options))


@methods
def test_backward_twice_and_with_another_upstream(method: str) -> None:
    inputs = Inputs()
    options = inputs.everything()
    loss, expected = inputs.loss(method=method, **options), exact(inputs, **options)
    close(torch.autograd.grad(loss, inputs.leaves, retain_graph=True), expected)
    upstream = torch.tensor(-2.5, device=DEVICE)
    found = torch.autograd.grad(loss, inputs.leaves, upstream)
    close(found, [-2.5 * x for x in expected])


@methods
@pytest.mark.parametrize("upstream", (1e-30, 3e30))
def test_tiny_and_huge_upstream_gradients_of_16_bit_heads(method: str, upstream: float) -> None:
    """The power of two comes last, in fp32: logits' gradients neither vanish nor overflow."""
    inputs = Inputs(torch.float16)
    inputs.hidden = inputs.hidden.detach().bfloat16().requires_grad_()
    inputs.weight = inputs.weight.detach().bfloat16().requires_grad_()
    inputs.bias = inputs.bias.detach().bfloat16().requires_grad_()
    loss = inputs.loss(method=method, fp32_logits=True)
    found = torch.autograd.grad(loss * upstream, inputs.leaves)
    close(found, [upstream * x for x in exact(inputs)], rtol=2e-2)


@pytest.mark.parametrize("method", ("single_pass", "recompute", "logps"))
@pytest.mark.parametrize("name", ("hidden", "weight", "bias"))
def test_inputs_that_change_before_backward_are_noticed(method: str, name: str) -> None:
    """Except by the single pass, which has its gradients already, those of the old values."""
    inputs = Inputs()
    expected = exact(inputs)
    if method == "logps":
        logps, _ = linear_logps(inputs.hidden, inputs.weight, inputs.ids, bias=inputs.bias)
        loss = logps.sum()
    else:
        loss = inputs.loss(method=method)
    with torch.no_grad():
        getattr(inputs, name).mul_(2)
    if method == "single_pass":
        close(torch.autograd.grad(loss, inputs.leaves), expected)
    else:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@methods
def test_hidden_states_used_twice(method: str) -> None:
    inputs = Inputs()
    loss = inputs.loss(method=method) + inputs.hidden.square().sum() + inputs.loss(method=method)
    dhidden, dweight, _ = torch.autograd.grad(loss, inputs.leaves)
    expected = exact(inputs)
    wanted = (2 * expected[0] + 2 * inputs.hidden.detach(), 2 * expected[1])
    close((dhidden, dweight), wanted)


@methods
@pytest.mark.parametrize("use_reentrant", (False, True))
def test_checkpointing_around_loss_and_body(method: str, use_reentrant: bool) -> None:
    inputs = Inputs()

    def run(hidden: Tensor) -> Tensor:
        return inputs.loss(method=method, hidden=torch.tanh(hidden))

    found: list[tuple[Tensor, ...]] = []
    for wrapped in (False, True):
        for leaf in inputs.leaves:
            leaf.grad = None
        loss = run(inputs.hidden)
        if wrapped:
            loss = checkpoint(run, inputs.hidden, use_reentrant=use_reentrant)
        assert isinstance(loss, Tensor)
        loss.backward()
        grads = [leaf.grad for leaf in inputs.leaves]
        found.append(tuple(grad for grad in grads if grad is not None))
    assert len(found[0]) == 3
    for plain, checkpointed in zip(*found, strict=True):
        assert torch.equal(plain, checkpointed)


@methods
def test_autocast_returns_gradients_in_the_types_of_the_leaves(method: str) -> None:
    """Weights in fp32, products in bf16: dW must not be rounded to bf16 on its way back."""
    inputs, rounded = Inputs(), Inputs()
    for name in ("hidden", "weight", "bias"):
        value = getattr(inputs, name).detach().bfloat16().float().requires_grad_()
        setattr(rounded, name, value)
    with torch.autocast(DEVICE, torch.bfloat16):
        loss = inputs.loss(method=method, fp32_logits=True)
    found = torch.autograd.grad(loss, inputs.leaves)
    assert [x.dtype for x in found] == [torch.float32] * 3
    close(found, exact(rounded), rtol=1e-2)
    assert not torch.equal(found[1], found[1].bfloat16().float())


@methods
def test_no_grad_and_frozen_inputs(method: str) -> None:
    inputs = Inputs()
    with torch.no_grad():
        quiet = inputs.loss(method=method)
    assert not quiet.requires_grad
    torch.testing.assert_close(quiet, inputs.loss(method=method).detach(), rtol=0, atol=0)
    expected = exact(inputs)
    for i, name in enumerate(("hidden", "weight", "bias")):
        only = Inputs()
        for other in {"hidden", "weight", "bias"} - {name}:
            setattr(only, other, getattr(only, other).detach())
        close(torch.autograd.grad(only.loss(method=method), [getattr(only, name)]), [expected[i]])


@pytest.mark.parametrize("loss", LOSSES)
@methods
def test_on_policy_is_old_log_probs_of_the_same_path(loss: str, method: str) -> None:
    """Ratios of exactly 1; and as nothing is read of `old_logps`, nothing of it can matter."""
    found: list[tuple[Tensor, ...]] = []
    inputs = Inputs()
    with torch.no_grad():
        old_logps = linear_grpo_loss(
            inputs.hidden, inputs.weight, inputs.ids, inputs.advantages, bias=inputs.bias,
            method=method, chunk_rows=3, config=config_of(loss),
        ).logps  # fmt: skip
    for given in (None, old_logps):
        value = inputs.loss(method=method, chunk_rows=3, config=config_of(loss), old_logps=given)
        found.append((value.detach(), *torch.autograd.grad(value, inputs.leaves)))
    close(found[0], found[1], rtol=1e-6)


# ---------------------------------------------------------------- second derivatives


def _linear(inputs: Inputs, **options: Any) -> Tensor:
    return inputs.loss(**options)


def _logps(inputs: Inputs) -> Tensor:
    return linear_logps(inputs.hidden, inputs.weight, inputs.ids)[0].sum()


def _logits(inputs: Inputs, **options: Any) -> Tensor:
    logits = inputs.hidden @ inputs.weight.t()
    return grpo_loss(logits, inputs.ids, inputs.advantages, **options).loss


def _selective(inputs: Inputs) -> Tensor:
    return selective_logps(inputs.hidden @ inputs.weight.t(), inputs.ids)[1].sum()


@pytest.mark.parametrize(
    "function",
    [
        lambda x: _linear(x, method="single_pass"),
        lambda x: _linear(x, method="recompute"),
        _logps,
        _logits,
        lambda x: _logits(x, inplace=True),
        _selective,
    ],
    ids=("single_pass", "recompute", "linear_logps", "grpo_loss", "inplace", "selective_logps"),
)
def test_a_second_derivative_is_refused_with_the_way_out(
    function: Callable[[Inputs], Tensor],
) -> None:
    inputs = Inputs()
    message = (
        "the fused losses have no second derivative (create_graph=True): take it of "
        "fastgrpo_kernels.reference, which is plain PyTorch"
    )
    with pytest.raises(RuntimeError, match=re.escape(message)):
        torch.autograd.grad(function(inputs), [inputs.hidden], create_graph=True)


@pytest.mark.parametrize("loss", sorted(set(LOSSES) - {"cispo", "vespo"}))  # detached factors
def test_the_reference_has_a_second_derivative(loss: str) -> None:
    """It is the way out; held to the difference of first derivatives."""
    inputs = Inputs(torch.float64)
    inputs.old_logps = inputs.old_logps.double()
    config = config_of(loss, beta=0.1)
    options = {"old_logps": inputs.old_logps, "ref_logps": inputs.ref_logps, "config": config}

    def slope(hidden: Tensor, create_graph: bool = False) -> Tensor:
        value = inputs.loss(reference.linear_grpo_loss, hidden=hidden, **options)
        return torch.autograd.grad(value, [hidden], create_graph=create_graph)[0]

    direction = torch.randn_like(inputs.hidden)
    along = (slope(inputs.hidden, create_graph=True) * direction).sum()
    (found,) = torch.autograd.grad(along, [inputs.hidden])
    step = 1e-6 * direction
    ahead, behind = inputs.hidden.detach() + step, inputs.hidden.detach() - step
    difference = slope(ahead.requires_grad_()) - slope(behind.requires_grad_())
    close([found], [difference / 2e-6], rtol=1e-5)
