"""What callers do to their tensors around a call, and who keeps them alive."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from loss_cases import DEVICE, linear_result, make_case
from torch import Tensor

import fastgrpo_kernels
from fastgrpo_kernels import GRPOLossConfig, grpo_loss, linear_grpo_loss, linear_logps, reference


@pytest.mark.parametrize("loss_type", ["grpo", "gmpo"])
@pytest.mark.parametrize("method", ["single_pass", "recompute"])
def test_strided_cu_seqlens(loss_type: str, method: str, backend: str) -> None:
    case = make_case(loss_type=loss_type, masked=False).to(torch.float32)
    hidden = case.hidden.view(15, -1)
    ids, old = case.ids.view(-1), case.arguments["old_logps"].view(-1)
    bounds = torch.tensor([[0, 7], [5, 99], [10, -4], [15, 3]], device=DEVICE)
    losses = [
        linear_grpo_loss(
            hidden, case.weight, ids, case.advantages, bias=case.bias, old_logps=old,
            cu_seqlens=cu, config=case.arguments["config"], method=method, backend=backend,  # pyright: ignore[reportArgumentType]
        ).loss
        for cu in (bounds[:, 0], bounds[:, 0].contiguous())
    ]  # fmt: skip
    assert torch.equal(*losses)


def result(function: str, change: Any, backend: str) -> tuple[Tensor, Any]:
    """Return the gradient of a call around which something was changed before backward."""
    case = make_case().to(torch.float32)
    hidden, weight = (x.clone().requires_grad_() for x in (case.hidden, case.weight))
    ids = case.ids.clone()
    if function == "grpo_loss":
        out = grpo_loss(
            hidden @ weight.t(), ids, case.advantages, backend=backend, **case.arguments
        )
    else:
        out = linear_grpo_loss(
            hidden, weight, ids, case.advantages, method=function, backend=backend,  # pyright: ignore[reportArgumentType]
            **case.arguments,
        )  # fmt: skip
    change(out, ids)
    out.loss.backward()
    return hidden.grad, out


@pytest.mark.parametrize("function", ["grpo_loss", "recompute", "single_pass"])
def test_what_is_returned_is_the_callers(function: str, backend: str) -> None:
    def overwrite(out: Any, ids: Tensor) -> None:
        out.logps.zero_()
        out.entropy.zero_()

    untouched, _ = result(function, lambda *_: None, backend)
    touched, _ = result(function, overwrite, backend)
    assert torch.equal(untouched, touched)


@pytest.mark.parametrize("function", ["grpo_loss", "recompute"])
def test_ids_that_backward_needs_may_not_be_changed(function: str, backend: str) -> None:
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result(function, lambda out, ids: ids.zero_(), backend)


@pytest.mark.parametrize("call", ["single_pass", "recompute", "linear_logps"])
def test_hidden_states_are_not_kept_after_backward(call: str) -> None:
    case = make_case().to(torch.float32)
    hidden = (case.hidden.clone().requires_grad_() * 1).requires_grad_()
    weight = case.weight.clone().requires_grad_()
    if call == "linear_logps":
        found = linear_logps(hidden, weight, case.ids)[0].sum()
    else:
        found = linear_grpo_loss(
            hidden, weight, case.ids, case.advantages, method=call, **case.arguments  # pyright: ignore[reportArgumentType]
        ).loss  # fmt: skip
    found.backward()
    alive = weakref.ref(hidden)
    del hidden
    assert alive() is None and found.requires_grad


def test_in_place_refuses_views_of_leaves_and_shared_rows() -> None:
    leaf = torch.randn(2, 3, 7, device=DEVICE, requires_grad=True)
    ids, advantages = torch.zeros(2, 3, dtype=torch.long, device=DEVICE), torch.ones(2)
    with pytest.raises(ValueError, match="overwrite a leaf"):
        grpo_loss(leaf[:, :], ids, advantages.to(DEVICE), inplace=True)
    shared = (leaf * 1)[:, :1].expand(2, 3, 7)
    with pytest.raises(ValueError, match="rows that share memory"):
        grpo_loss(shared, ids, advantages.to(DEVICE), inplace=True)


@pytest.mark.parametrize("method", ["single_pass", "recompute"])
def test_a_ratio_of_e_to_the_12_does_not_overflow_fp16(method: str, backend: str) -> None:
    case = make_case(sequences=4, length=16, masked=False, off_policy=False).to(torch.float16)
    exact = case.to(torch.float64)
    logps, _ = reference.linear_logps(exact.hidden, exact.weight, exact.ids, bias=exact.bias)
    old = logps.float()
    old[0, 0] -= 12
    case.advantages[:] = -1.0
    options = {"old_logps": old, "num_items_in_batch": 8192}
    found = linear_result(linear_grpo_loss, case.having(**options), method=method, backend=backend)
    naive = linear_result(reference.linear_grpo_loss, case.having(**options))
    for name, gradient in found.gradients.items():
        wanted = naive.gradients[name]
        assert gradient is not None and wanted is not None
        assert wanted.isfinite().all() and gradient.isfinite().all(), name
        torch.testing.assert_close(gradient, wanted, rtol=0.02, atol=0.02 * wanted.abs().max())


def test_a_compiled_call_drops_no_argument_that_it_does_not_know() -> None:
    case = make_case().to(torch.float32)

    def loss(items: Any) -> Tensor:
        return linear_grpo_loss(
            case.hidden, case.weight, case.ids, case.advantages, num_items_in_batch=items
        ).loss

    class Number:
        pass

    torch.compiler.reset()
    with pytest.raises(Exception, match="num_items_in_batch must be a tensor, a number or a word"):
        torch.compile(loss, backend="eager", fullgraph=True)(Number())


def test_two_copies_of_the_package_in_one_process() -> None:
    """The kernel Hub loads a copy beside the package that is installed."""
    package = Path(fastgrpo_kernels.__file__).parent
    code = f"""
import importlib.util, sys, torch
import fastgrpo_kernels as first
spec = importlib.util.spec_from_file_location(
    "hub_copy", r"{package / "__init__.py"}", submodule_search_locations=[r"{package}"])
second = importlib.util.module_from_spec(spec)
sys.modules["hub_copy"] = second
spec.loader.exec_module(second)
x, w = torch.randn(2, 3, 4), torch.randn(7, 4)
ids, a = torch.zeros(2, 3, dtype=torch.long), torch.ones(2)
losses = [
    torch.compile(m.linear_grpo_loss, backend="eager", fullgraph=True)(x, w, ids, a).loss
    for m in (first, second)]
assert first.linear_grpo_loss is not second.linear_grpo_loss
assert torch.equal(*losses), losses
"""
    root = str(package.parent)
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": root, "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert importlib.util.find_spec("hub_copy") is None


def test_a_field_of_the_config_is_sent_there() -> None:
    case = make_case()
    with pytest.raises(TypeError, match=r"config=GRPOLossConfig\(loss_type=\.\.\.\)"):
        linear_grpo_loss(case.hidden, case.weight, case.ids, case.advantages, loss_type="grpo")  # pyright: ignore[reportCallIssue]
    with pytest.raises(ValueError, match="GSPO: importance_sampling_level='sequence'"):
        GRPOLossConfig(loss_type="gspo")  # pyright: ignore[reportArgumentType]
