"""`linear_logps` and `selective_logps`: both results, and the gradients of both."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from loss_cases import (
    DEVICE,
    DTYPES,
    Case,
    assert_as_exact,
    make_case,
    rounding_allowance,
)
from torch import Tensor

from fastgrpo_kernels import (
    linear_logps,
    reference,
    selective_logps,
)


def logps_gradients(function: Any, case: Case, **options: Any) -> list[Tensor]:
    """Log-probs, entropies, and the gradient of a sum of both with different weights."""
    leaves = [x.detach().clone().requires_grad_() for x in (case.hidden, case.weight, case.bias)]
    temperature = case.arguments["config"].temperature
    logps, entropy = function(
        *leaves[:2],
        case.ids,
        bias=leaves[2],
        mask=case.arguments.get("completion_mask"),
        temperature=temperature,
        **options,
    )
    upstream = torch.linspace(-1, 2, case.ids.numel(), device=DEVICE).view(case.ids.shape)
    ((logps * upstream).sum() + (entropy * upstream.flip(0)).sum()).backward(retain_graph=True)
    first = [leaf.grad.clone() for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    ((logps * upstream).sum() + (entropy * upstream.flip(0)).sum()).backward()
    assert all(torch.equal(g, leaf.grad) for g, leaf in zip(first, leaves, strict=True))
    return [logps.detach(), entropy.detach(), *first]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_log_probs_and_entropies_and_both_gradients(dtype: torch.dtype, backend: str) -> None:
    case = make_case(temperature=0.7)
    exact = logps_gradients(reference.linear_logps, case)
    naive = logps_gradients(reference.linear_logps, case.to(dtype))
    actual = logps_gradients(linear_logps, case.to(dtype), backend=backend, chunk_rows=4)
    factor = 1.5 * rounding_allowance(backend, dtype)
    names = ("logps", "entropy", "dhidden", "dweight", "dbias")
    for name, *values in zip(names, actual, naive, exact, strict=True):
        assert_as_exact(*values, factor=factor, what=name)
    assert actual[0].dtype == torch.float32 and actual[3].dtype == dtype


def test_log_probs_alone_have_the_right_gradient(backend: str) -> None:
    case = make_case(masked=False).to(torch.float32)
    found = []
    for function, options in ((linear_logps, {"backend": backend}), (reference.linear_logps, {})):
        leaf = case.hidden.detach().clone().requires_grad_()
        logps, _ = function(leaf, case.weight, case.ids, bias=case.bias, **options)
        (gradient,) = torch.autograd.grad(logps.sum(), leaf)
        found.append(gradient)
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_log_probs_do_not_read_behind_the_mask(backend: str) -> None:
    clean = make_case().to(torch.float32)
    masked = ~clean.mask
    dirty = replace(
        clean,
        hidden=clean.hidden.masked_fill(masked[..., None], torch.nan),
        ids=clean.ids.masked_fill(masked, -100),
    )
    expected = logps_gradients(linear_logps, clean, backend=backend)
    actual = logps_gradients(linear_logps, dirty, backend=backend)
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)
    assert (actual[2][masked] == 0).all()
    nothing = dirty.having(completion_mask=torch.zeros_like(clean.mask))
    assert all((x == 0).all() for x in logps_gradients(linear_logps, nothing, backend=backend))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_log_probs_of_logits_and_both_gradients(dtype: torch.dtype, backend: str) -> None:
    case = make_case()
    logits = case.logits.bfloat16().half().double()
    logits[..., 5] = -torch.inf
    case = replace(case, ids=case.ids.masked_fill(case.ids == 5, 6))
    torch.manual_seed(1)
    upstream = torch.randn(2, 3, 5, device=DEVICE)

    def results(function: Any, dtype: torch.dtype, **options: Any) -> list[Tensor]:
        leaf = logits.detach().to(dtype, copy=True).requires_grad_()
        logps, entropy = function(leaf, case.ids, mask=case.mask, temperature=0.7, **options)
        (logps * upstream[0] + entropy * upstream[1]).sum().backward()
        return [logps.detach(), entropy.detach(), leaf.grad]

    exact = results(reference.selective_logps, torch.float64)
    naive = results(reference.selective_logps, dtype)
    actual = results(selective_logps, dtype, backend=backend)
    factor = 1.5 * rounding_allowance(backend, dtype)
    for name, *values in zip(("logps", "entropy", "dlogits"), actual, naive, exact, strict=True):
        assert_as_exact(*values, factor=factor, what=name)


CAPPED = {"logit_softcap": 3.0, "logit_scale": 0.5, "temperature": 0.7}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("what", ["logps", "entropy"])
def test_scale_and_softcap(what: str, dtype: torch.dtype, backend: str) -> None:
    """Each result alone: a gradient of one must not hide that of the other."""
    case = make_case(vocabulary=21)
    torch.manual_seed(1)
    upstream = torch.randn(case.ids.shape, device=DEVICE)

    def of_hidden(function: Any, case: Case, **options: Any) -> list[Tensor]:
        names = ("hidden", "weight", "bias")
        leaves = [getattr(case, n).detach().clone().requires_grad_() for n in names]
        found = function(*leaves[:2], case.ids, bias=leaves[2], mask=case.mask, **CAPPED, **options)
        value = found[what == "entropy"]
        (value * upstream).sum().backward()
        return [value.detach(), *(leaf.grad for leaf in leaves)]

    def of_logits(function: Any, logits: Tensor, **options: Any) -> list[Tensor]:
        leaf = logits.detach().clone().requires_grad_()
        value = function(leaf, case.ids, mask=case.mask, **CAPPED, **options)[what == "entropy"]
        (value * upstream).sum().backward()
        return [value.detach(), leaf.grad]

    logits = case.logits.bfloat16().double()
    results = [
        of_hidden(reference.linear_logps, case) + of_logits(reference.selective_logps, logits),
        of_hidden(reference.linear_logps, case.to(dtype))
        + of_logits(reference.selective_logps, logits.to(dtype)),
        of_hidden(linear_logps, case.to(dtype), backend=backend, chunk_rows=4)
        + of_logits(selective_logps, logits.to(dtype), backend=backend),
    ]
    names = (what, "dhidden", "dweight", "dbias", what, "dlogits")
    allowance = rounding_allowance(backend, dtype)
    limits = {"factor": 1.5 * allowance, "units": 8.0}
    for name, exact, naive, actual in zip(names, *results, strict=True):
        stored = torch.finfo(dtype).eps if allowance > 1 and name[0] == "d" else 0.0
        assert_as_exact(actual, naive, exact, what=name, stored=stored, **limits)
    # And the reference is what the page says.
    z = 3 * (0.5 * logits / 3).tanh() / 0.7
    log_p = z.log_softmax(-1)
    if what == "logps":
        wanted = log_p.gather(-1, case.ids[..., None])[..., 0]
    else:
        wanted = -(log_p.exp() * log_p).sum(-1)
    torch.testing.assert_close(results[0][4], wanted.masked_fill(~case.mask, 0))
