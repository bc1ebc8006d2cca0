"""Policies far apart: exponents stop at 60, in value and derivative, and 0 times them is 0."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from loss_cases import BACKENDS, DEVICE
from loss_matrix import FAMILIES, IDS, options

from fastgrpo_kernels import GRPOLossConfig, grpo_loss, reference

Family = tuple[str, str]
each_family = pytest.mark.parametrize("family", FAMILIES, ids=IDS)


def one_token(
    path: str, family: Family, A: float, *, old: float = 0.0, ref: float | None = None, **config
) -> tuple[float, float]:
    """Loss, and derivative by the log-prob, of one token of log-prob log(1/4), old and ref off."""
    found = options(family, beta=0.0 if ref is None else 1.0, max_completion_length=1)
    settings = GRPOLossConfig(**found | config)
    lp = math.log(0.25)
    arguments: dict[str, Any] = {
        "config": settings,
        "old_logps": torch.tensor([[lp + old]], device=DEVICE),
    }
    if ref is not None:
        arguments["ref_logps"] = torch.tensor([[lp + ref]], device=DEVICE)
    logits = torch.tensor([[[0.0, math.log(3.0)]]], device=DEVICE, requires_grad=True)
    ids, advantages = torch.zeros(1, 1, dtype=torch.int64, device=DEVICE), torch.tensor([A])
    function = reference.grpo_loss if path == "reference" else grpo_loss
    options_of_path = {} if path == "reference" else {"backend": path}
    out = function(logits, ids, advantages.to(DEVICE), **arguments, **options_of_path)
    out.loss.backward()
    assert logits.grad is not None
    return out.loss.item(), logits.grad[0, 0, 0].item() / 0.75


LP, E60 = math.log(0.25), math.exp(60)
HUGE: dict[str, Callable[[float], tuple[float, float]]] = {
    # A ratio of exp(500), for an advantage A: value and derivative.
    **dict.fromkeys(
        ("grpo", "bnpo", "dr_grpo", "dapo", "luspo"),
        lambda A: (-A * E60, -A * E60) if A < 0 else (-1.35 * A, 0.0),
    ),
    "cispo": lambda A: (-1.35 * A * LP, -1.35 * A),
    "sapo": lambda A: (-4 * A / (1.0 if A > 0 else 1.05), 0.0),
    "vespo": lambda A: (0.0, 0.0),
    "gmpo": lambda A: (-A * E60, -A * E60) if A < 0 else (-A * math.exp(0.4), 0.0),
}
NONE: dict[str, Callable[[float], tuple[float, float]]] = {
    # A ratio of exp(-500).
    **dict.fromkeys(
        ("grpo", "bnpo", "dr_grpo", "dapo", "luspo"),
        lambda A: (-0.75 * A, 0.0) if A < 0 else (0.0, 0.0),
    ),
    "cispo": lambda A: (-0.75 * A * LP, -0.75 * A),
    "sapo": lambda A: (-4 * A / tau(A) / (1 + math.exp(tau(A))), 0.0),
    "vespo": lambda A: (-phi(A) * A * LP, -phi(A) * A),
    "gmpo": lambda A: (-A * math.exp(-0.4), 0.0) if A < 0 else (0.0, 0.0),
}


def tau(A: float) -> float:
    return 1.0 if A > 0 else 1.05


def phi(A: float) -> float:
    k, rate = (2, 3) if A >= 0 else (3, 2)
    return math.exp(rate + k * math.log(1e-8) - rate * 1e-8)


@pytest.mark.parametrize("path", ["reference", *BACKENDS])
@pytest.mark.parametrize("A", [-2.0, 2.0])
@each_family
def test_policies_far_apart(family: Family, A: float, path: str) -> None:
    config = {"delta": None, "epsilon_low": 0.25, "epsilon_high": 0.35, "cispo_bounds": "verl"}
    for old, expected in ((-500.0, HUGE), (500.0, NONE)):
        found = one_token(path, family, A, old=old, **config)
        assert found == pytest.approx(expected[family[0]](A), rel=1e-5), old


@pytest.mark.parametrize("path", ["reference", *BACKENDS])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_kl_far_apart(level: str, path: str) -> None:
    family = ("dapo", level)
    for estimator, value, derivative in (
        ("k1", -500.0, 1.0),
        ("k2", 125000.0, -500.0),
        ("k3", E60 - 501, 1 - E60),
    ):
        kl = {"kl_estimator": estimator}
        found = one_token(path, family, 0.0, ref=500.0, use_bias_correction_kl=False, **kl)
        assert found == pytest.approx((value, derivative), rel=1e-5)
        # Times a ratio of exp(70), of which exp(60) is left, and with its derivative.
        found = one_token(path, family, 0.0, ref=2.0, old=-70.0, use_bias_correction_kl=True, **kl)
        kl_2 = {"k1": -2.0, "k2": 2.0, "k3": math.exp(2) - 3}[estimator]
        slope = {"k1": 1.0, "k2": -2.0, "k3": 1 - math.exp(2)}[estimator]
        assert found == pytest.approx((E60 * kl_2, E60 * (kl_2 + slope)), rel=1e-5, abs=E60 * 1e-5)


@pytest.mark.parametrize("path", ["reference", *BACKENDS])
@each_family
def test_an_advantage_of_0_times_a_huge_ratio_is_0(family: Family, path: str) -> None:
    for old in (-500.0, -70.0, 500.0):
        assert one_token(path, family, 0.0, old=old) == (0.0, 0.0)
