"""`policy_loss` and `reference` against FORMULAS.md, written out again token by token in fp64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from loss_cases import BACKENDS, DEVICE, Case, factors, linear_result, make_case
from loss_matrix import FAMILIES, IDS, SETTINGS, exact_logps, matrix_case, options, plain
from torch import Tensor
from transcription import log_probs, number, transcription

from fastgrpo_kernels import GRPOLossConfig, grpo_loss, linear_grpo_loss, policy_loss, reference


def per_sequence_ratio(case: Case, shape: tuple[int, ...]) -> Case:
    ratio = torch.tensor([0.5, 1.5, 2.0, 0.0, 3.0], device=DEVICE).view(shape)
    return case.having(importance_sampling_ratio=ratio)


CASES: dict[str, Callable[[tuple[str, str]], Case]] = {
    **SETTINGS,
    "no mask, per-token advantages": lambda family: matrix_case(family, per_token=True).having(
        completion_mask=None
    ),
    "ratio (B,)": lambda family: per_sequence_ratio(plain(family), (5,)),
    "ratio (B, 1)": lambda family: per_sequence_ratio(plain(family), (5, 1)),
    "denominators": lambda family: matrix_case(family, entropy_coef=0.3).having(
        num_items_in_batch=41,
        num_sequences_in_batch=torch.tensor(9, device=DEVICE),
        entropy_denominator=23,
    ),
    "entropy mask": lambda family: factors(matrix_case(family, entropy_coef=-0.2)),
    "far apart": lambda family: far_apart(matrix_case(family, beta=0.1)),
}


def far_apart(case: Case) -> Case:
    """Log-ratios beyond the bounds of a token and, with every sign, those of a sequence."""
    drift = torch.tensor([[-30.0], [4.0], [30.0], [0.0], [-2.0]], dtype=torch.float64).to(DEVICE)
    old = exact_logps(case) - drift
    return case.having(old_logps=old.float(), ref_logps=(exact_logps(case) + drift / 10).float())


def page(case: Case, leaves: dict[str, Tensor]) -> tuple[Tensor, dict[str, float], Any, Any]:
    config, mask = case.arguments["config"], case.arguments.get("completion_mask")
    logits = leaves["hidden"] @ leaves["weight"].T + leaves["bias"]
    logps, entropies = log_probs(logits, case.ids, mask, config)
    loss, metrics = transcription(logps, entropies, case.advantages, **case.arguments)
    return (
        loss,
        metrics,
        *(
            torch.tensor(
                [[number(x) for x in row] for row in grid], dtype=torch.float64, device=DEVICE
            )
            for grid in (logps, entropies)
        ),
    )


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("family", FAMILIES, ids=IDS)
def test_reference_is_the_page_of_formulas(family: tuple[str, str], name: str) -> None:
    case = CASES[name](family)
    actual = linear_result(reference.linear_grpo_loss, case)

    leaves = {
        n: getattr(case, n).detach().clone().requires_grad_() for n in ("hidden", "weight", "bias")
    }
    loss, metrics, logps, entropies = page(case, leaves)
    loss.backward()

    close = {"rtol": 1e-9, "atol": 1e-11}
    assert actual.output.loss.item() == pytest.approx(loss.item(), rel=1e-11)
    torch.testing.assert_close(actual.output.logps, logps, **close)
    torch.testing.assert_close(actual.output.entropy, entropies, **close)
    for leaf, value in leaves.items():
        scale = max(1.0, value.grad.abs().max().item())
        torch.testing.assert_close(
            actual.gradients[leaf] / scale, value.grad / scale, msg=leaf, **close
        )
    found = {k: v.item() for k, v in actual.output.metrics.items()}
    assert found.pop("num_computed_rows") == case.ids.numel()
    assert found.pop("num_gradient_rows") <= metrics["num_tokens"]
    assert found == pytest.approx(metrics, rel=1e-6)  # entropy_coef is fp32


@pytest.mark.parametrize("name", ["everything", "on policy"])
@pytest.mark.parametrize("family", FAMILIES, ids=IDS)
def test_policy_loss_takes_log_probs_and_gives_their_gradient(
    family: tuple[str, str], name: str
) -> None:
    case = CASES[name](family)
    arguments = case.arguments
    mask, coefficient = arguments["completion_mask"], arguments["config"].entropy_coef

    def leaves() -> tuple[Tensor, Tensor]:
        entropy = torch.linspace(0.5, 2, case.ids.numel(), dtype=torch.float64, device=DEVICE)
        return exact_logps(case).requires_grad_(), entropy.view(case.ids.shape).requires_grad_()

    logps, entropy = leaves()
    out = policy_loss(logps, case.advantages, entropy=entropy, **arguments)
    out.loss.backward()
    own_logps, own_entropy = leaves()
    grids = ([list(row) for row in x] for x in (own_logps, own_entropy))
    loss, metrics = transcription(*grids, case.advantages, **arguments)
    loss.backward()
    assert out.loss.item() == pytest.approx(loss.item(), rel=1e-11)
    torch.testing.assert_close(logps.grad, own_logps.grad, rtol=1e-9, atol=1e-11)
    if coefficient:
        torch.testing.assert_close(entropy.grad, own_entropy.grad, rtol=1e-6, atol=1e-9)
    else:
        assert entropy.grad is None or (entropy.grad == 0).all()
        without = policy_loss(logps, case.advantages, **arguments)
        assert "entropy" not in without.metrics
        assert without.loss.item() == out.loss.item()
    found = {k: v.item() for k, v in out.metrics.items() if k in metrics}
    assert found == pytest.approx(metrics, rel=1e-6)
    assert torch.equal(out.logps, logps.detach().masked_fill(~mask, 0))
    assert torch.equal(out.entropy, entropy.detach().masked_fill(~mask, 0))


@pytest.mark.parametrize("family", FAMILIES, ids=IDS)
def test_reference_passes_gradcheck(family: tuple[str, str]) -> None:
    # The page takes the ratio of cispo and of vespo for a constant: so do finite differences when
    # the old policy moves along. The ratio that multiplies the KL is none.
    constant = family[0] in ("cispo", "vespo")
    changes: dict[str, Any] = {"use_bias_correction_kl": False} if constant else {}
    sizes = {"sequences": 2, "length": 3, "hidden_size": 2, "vocabulary": 5}
    config = options(family, beta=0.2, entropy_coef=0.1, **changes)
    case = factors(make_case(masked=False, **sizes, **config))
    drift = exact_logps(case) - case.arguments["old_logps"]
    inputs = [x.clone().requires_grad_() for x in (case.hidden, case.weight, case.bias)]

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        arguments = case.arguments
        if constant:
            moved = replace(case, hidden=hidden, weight=weight, bias=bias)
            arguments = arguments | {"old_logps": exact_logps(moved).detach() - drift}
        return reference.linear_grpo_loss(
            hidden, weight, case.ids, case.advantages, bias=bias, **arguments
        ).loss

    assert torch.autograd.gradcheck(loss, inputs)


def test_worked_example_of_the_seeds_is_0_69() -> None:
    logps = torch.tensor([[-2.1, -1.8, -0.5, -1.2]], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([[-2.3, -1.9, -0.6, -1.4]], dtype=torch.float64)
    out = policy_loss(logps, torch.tensor([0.6], dtype=torch.float64), old_logps=old)
    e = math.exp(0.1)
    assert -out.loss.item() == pytest.approx(0.6 * (1.2 + e + e + 1.2) / 4, rel=1e-14)
    assert -out.loss.item() == pytest.approx(0.69, abs=0.002)
    assert out.metrics["clip_ratio/high_mean"].item() == 0.5
    out.loss.backward()
    expected = torch.tensor([[0.0, e, e, 0.0]], dtype=torch.float64) * -0.6 / 4
    torch.testing.assert_close(logps.grad, expected)


def test_gradient_coefficient_of_the_seeds() -> None:
    """On-policy, the coefficient of grad log pi is A + beta (pi_ref / pi - 1)."""
    logps = torch.tensor([-1.0, -2.0, -0.3], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([-1.5, -0.7, -0.3], dtype=torch.float64)
    A = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    policy_loss(logps, A, ref_logps=ref, config=GRPOLossConfig(beta=0.1)).loss.backward()
    coefficient = A + 0.1 * ((ref - logps.detach()).exp() - 1)
    torch.testing.assert_close(logps.grad, -coefficient / 3)


# One token whose log-prob is log(1/4): two logits that differ by log 3.
def one_token(
    backend: str, *, old: float | None = None, ref: float | None = None, A: float = -1.0, **config
) -> tuple[float, float]:
    """Return the loss and its derivative by the log-prob, of one token, on any path."""
    options = GRPOLossConfig(beta=0.0 if ref is None else 1.0, **config)
    arguments: dict[str, Any] = {"config": options}
    if old is not None:
        arguments["old_logps"] = torch.tensor([old], dtype=torch.float64)
    if ref is not None:
        arguments["ref_logps"] = torch.tensor([ref], dtype=torch.float64)
    advantages = torch.tensor([A], dtype=torch.float64)
    if backend == "policy":
        logp = torch.tensor([math.log(0.25)], dtype=torch.float64, requires_grad=True)
        out = policy_loss(logp, advantages, **arguments)
        out.loss.backward()
        return out.loss.item(), logp.grad.item()
    logits = torch.tensor([[0.0, math.log(3.0)]], dtype=torch.float64, requires_grad=True)
    ids = torch.zeros(1, dtype=torch.int64)
    if backend == "reference":
        out = reference.grpo_loss(logits, ids, advantages, **arguments)
    else:
        arguments = {k: v.float() if isinstance(v, Tensor) else v for k, v in arguments.items()}
        out = grpo_loss(logits.float(), ids, advantages.float(), backend=backend, **arguments)
    out.loss.backward()
    return out.loss.item(), logits.grad[0, 0].item() / 0.75  # d lp / d z = 1 - p


PATHS = ("policy", "reference", *BACKENDS)
LP = math.log(0.25)


@pytest.mark.parametrize("path", PATHS)
class TestOneToken:
    @pytest.mark.parametrize("x", [-30.0, -1.0, -1e-3, 0.0, 1e-3, 0.4, 0.6, 5.0])
    def test_k3(self, path: str, x: float) -> None:
        loss, derivative = one_token(path, ref=LP + x, A=0.0)
        exact = path in ("policy", "reference")
        # x itself is only known to a rounding of the log-probs in fp32.
        rel, slack = (1e-9, 1e-15) if exact else (1e-5, 1e-6 * abs(x) + 1e-7 * 1e-6)
        assert loss == pytest.approx(math.expm1(x) - x, rel=rel, abs=slack)
        assert derivative == pytest.approx(-math.expm1(x), rel=rel, abs=1e-15 if exact else 5e-7)
        assert loss >= 0

    def test_exponents_are_capped_at_60_in_value_and_derivative(self, path: str) -> None:
        loss, derivative = one_token(path, old=LP - 500, A=-2.0)
        assert loss == pytest.approx(2 * math.exp(60), rel=1e-5)
        assert derivative == pytest.approx(2 * math.exp(60), rel=1e-5)
        loss, derivative = one_token(path, ref=LP + 500, A=0.0)
        assert loss == pytest.approx(math.exp(60), rel=1e-5)
        assert derivative == pytest.approx(-math.exp(60), rel=1e-5)

    def test_zero_advantage_times_a_huge_ratio_is_exactly_0(self, path: str) -> None:
        assert one_token(path, old=LP - 500, A=0.0) == (0.0, 0.0)

    def test_on_a_tie_the_unclipped_branch_is_active(self, path: str) -> None:
        assert one_token(path, A=3.0, epsilon_low=0.0, epsilon_high=0.0) == pytest.approx(
            (-3.0, -3.0)
        )
        assert one_token(path, A=-3.0, epsilon_low=0.0, epsilon_high=0.0) == pytest.approx(
            (3.0, 3.0)
        )

    @pytest.mark.parametrize(
        ("ratio", "A", "loss", "derivative"),
        [
            (0.5, 1.0, -0.5, -0.5),
            (0.5, -1.0, 0.8, 0.0),
            (1.1, 1.0, -1.1, -1.1),
            (1.5, 1.0, -1.3, 0.0),
            (1.5, -1.0, 1.5, 1.5),
            (3.0, -1.0, 2.0, 0.0),
        ],
    )
    def test_clipping(
        self, path: str, ratio: float, A: float, loss: float, derivative: float
    ) -> None:
        found = one_token(path, old=LP - math.log(ratio), A=A, epsilon_high=0.3, delta=2.0)
        assert found == pytest.approx((loss, derivative), rel=1e-5)


NAN_WHERE = ("logits", "advantages", "old_logps", "ref_logps", "policy_weight")


@pytest.mark.parametrize("where", NAN_WHERE)
@pytest.mark.parametrize("path", ["reference", *BACKENDS])
@pytest.mark.parametrize("advantage", [0.0, 1.0])
def test_a_nan_in_a_counted_row_makes_the_loss_nan(path: str, where: str, advantage: float) -> None:
    values = {
        "hidden": torch.ones(3, 2),
        "advantages": torch.full((3,), advantage),
        "old_logps": torch.full((3,), -1.0),
        "ref_logps": torch.full((3,), -1.0),
        "policy_weight": torch.ones(3),
    }
    values["hidden" if where == "logits" else where][1] = torch.nan
    hidden, advantages = values.pop("hidden").requires_grad_(), values.pop("advantages")
    weight, ids = torch.randn(5, 2), torch.tensor([0, 1, 2])
    config = GRPOLossConfig(beta=0.1, delta=2.0)
    if where != "ref_logps":
        config = GRPOLossConfig(delta=2.0)
        del values["ref_logps"]
    function = reference.linear_grpo_loss if path == "reference" else linear_grpo_loss
    options = {} if path == "reference" else {"backend": path}
    out = function(hidden, weight, ids, advantages, config=config, **values, **options)
    assert out.loss.isnan()
    logits = (hidden @ weight.T).detach()
    function = reference.grpo_loss if path == "reference" else grpo_loss
    out = function(logits, ids, advantages, config=config, **values, **options)
    assert out.loss.isnan()
