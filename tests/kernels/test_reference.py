"""`policy_loss` and `reference` against FORMULAS.md, written out again token by token in fp64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from loss_cases import BACKENDS, Case, factors, linear_result, make_case
from torch import Tensor

from fastgrpo_kernels import GRPOLossConfig, grpo_loss, linear_grpo_loss, policy_loss, reference

LOSS_TYPES = ("dapo", "grpo", "bnpo", "dr_grpo")


def transcription(
    logits: Tensor,
    ids: Tensor,
    advantages: Tensor,
    *,
    config: GRPOLossConfig,
    completion_mask: Tensor | None = None,
    old_logps: Tensor | None = None,
    ref_logps: Tensor | None = None,
    importance_sampling_ratio: Tensor | None = None,
    policy_weight: Tensor | None = None,
    entropy_mask: Tensor | None = None,
    num_items_in_batch: float | None = None,
    num_sequences_in_batch: float | None = None,
) -> tuple[Tensor, dict[str, float], list[list[Any]], list[list[Any]]]:
    """FORMULAS.md for padded (B, T): loss, metrics, log-probs and entropies."""
    B, T = ids.shape
    low, high = 1 - config.epsilon_low, 1 + config.epsilon_high

    def at(value: Tensor | None, i: int, t: int) -> float:
        if value is None:
            return 1.0
        row = value[i]
        return float(row[t] if row.dim() == 1 and len(row) == T else row.reshape(()))

    logps: list[list[Any]] = [[0.0] * T for _ in range(B)]
    entropies: list[list[Any]] = [[0.0] * T for _ in range(B)]
    sums = dict.fromkeys(("policy_loss", "kl", "entropy", "low", "high"), 0.0)
    per_sequence: list[Tensor] = []
    lengths: list[int] = []
    for i in range(B):
        total, counted = logits.new_zeros(()), 0
        for t in range(T):
            if completion_mask is not None and not completion_mask[i, t]:
                continue
            counted += 1
            z = logits[i, t] / config.temperature
            p = z.exp() / z.exp().sum()
            lp = p[ids[i, t]].log()
            logps[i][t], entropies[i][t] = lp.item(), -(p * p.log()).sum().item()
            A = at(advantages, i, t)
            r = (lp - (lp.detach() if old_logps is None else float(old_logps[i, t]))).exp()
            unclipped = (r if config.delta is None or r <= config.delta else config.delta) * A
            clipped = (low if r < low else high if r > high else r) * A
            loss = -(unclipped if unclipped <= clipped else clipped)
            loss = loss * at(policy_weight, i, t) * at(entropy_mask, i, t)
            loss = loss * at(importance_sampling_ratio, i, t)
            sums["policy_loss"] += torch.as_tensor(loss, dtype=torch.float64).item()
            if config.beta:
                assert ref_logps is not None
                x = float(ref_logps[i, t]) - lp
                kl = x.exp() - x - 1
                sums["kl"] += kl.item()
                loss = loss + config.beta * kl
            sums["entropy"] += entropies[i][t]
            sums["low"] += float(r < low and A < 0)
            sums["high"] += float(r > high and A > 0)
            total = total + loss
        per_sequence.append(total)
        lengths.append(counted)
    N = sum(lengths)
    sequences = B if num_sequences_in_batch is None else num_sequences_in_batch
    if config.loss_type == "grpo":
        loss = sum(s / max(n, 1) for s, n in zip(per_sequence, lengths, strict=True)) / sequences
    elif config.loss_type == "dapo":
        loss = sum(per_sequence) / (N if num_items_in_batch is None else num_items_in_batch)
    elif config.loss_type == "bnpo":
        loss = sum(per_sequence) / N
    else:
        assert config.max_completion_length is not None
        loss = sum(per_sequence) / (sequences * config.max_completion_length)
    metrics = {
        "policy_loss": sums["policy_loss"] / N,
        "entropy": sums["entropy"] / N,
        "clip_ratio/low_mean": sums["low"] / N,
        "clip_ratio/high_mean": sums["high"] / N,
        "clip_ratio/region_mean": (sums["low"] + sums["high"]) / N,
        "num_tokens": N,
        "num_sequences": B,
    }
    if config.beta:
        metrics["kl"] = sums["kl"] / N
    assert isinstance(loss, Tensor)
    return loss, metrics, logps, entropies


def per_sequence_ratio(case: Case, shape: tuple[int, ...]) -> Case:
    return case.having(importance_sampling_ratio=torch.tensor([0.5, 1.5, 2.0]).view(shape))


CASES = {
    "on policy": lambda **c: make_case(off_policy=False, **c),
    "off policy": lambda **c: make_case(**c),
    "no mask, per-token advantages": lambda **c: make_case(masked=False, per_token=True, **c),
    "KL": lambda **c: make_case(beta=0.3, **c),
    "KL on policy": lambda **c: make_case(beta=0.3, off_policy=False, **c),
    "delta, asymmetric": lambda **c: make_case(
        epsilon_low=0.05, epsilon_high=0.3, delta=1.5, per_token=True, **c
    ),
    "ratio (B,)": lambda **c: per_sequence_ratio(make_case(**c), (3,)),
    "ratio (B, 1)": lambda **c: per_sequence_ratio(make_case(**c), (3, 1)),
    "denominators": lambda **c: make_case(**c).having(
        num_items_in_batch=41, num_sequences_in_batch=torch.tensor(9)
    ),
    "everything": lambda **c: factors(
        make_case(beta=0.2, temperature=0.7, delta=1.5, per_token=True, **c)
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_reference_is_the_page_of_formulas(loss_type: str, name: str) -> None:
    case = CASES[name](loss_type=loss_type)
    actual = linear_result(reference.linear_grpo_loss, case)

    leaves = {
        n: getattr(case, n).detach().clone().requires_grad_() for n in ("hidden", "weight", "bias")
    }
    logits = leaves["hidden"] @ leaves["weight"].T + leaves["bias"]
    loss, metrics, logps, entropies = transcription(
        logits, case.ids, case.advantages, **case.arguments
    )
    loss.backward()

    close = {"rtol": 1e-9, "atol": 1e-11}
    assert actual.output.loss.item() == pytest.approx(loss.item(), rel=1e-11)
    torch.testing.assert_close(
        actual.output.logps, torch.tensor(logps, dtype=torch.float64), **close
    )
    torch.testing.assert_close(
        actual.output.entropy, torch.tensor(entropies, dtype=torch.float64), **close
    )
    for leaf, value in leaves.items():
        torch.testing.assert_close(actual.gradients[leaf], value.grad, **close)
    found = {k: v.item() for k, v in actual.output.metrics.items()}
    assert found.pop("num_computed_rows") == case.ids.numel()
    assert found.pop("num_gradient_rows") <= metrics["num_tokens"]
    assert found == pytest.approx(metrics, rel=1e-9)


@pytest.mark.parametrize("name", ["KL", "everything"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_policy_loss_takes_log_probs_and_gives_their_gradient(loss_type: str, name: str) -> None:
    case = CASES[name](loss_type=loss_type)
    logps = (case.logits / case.arguments["config"].temperature).log_softmax(-1)
    logps = logps.gather(-1, case.ids[..., None])[..., 0].requires_grad_()
    out = policy_loss(logps, case.advantages, **case.arguments)
    out.loss.backward()
    # Logits (log p, log (1 - p)) of the one log-prob at hand: no softmax of ours in the way.
    leaf = logps.detach().clone().requires_grad_()
    two = torch.stack([leaf, torch.log(-torch.expm1(leaf))], -1)
    config = GRPOLossConfig(**{**vars(case.arguments["config"]), "temperature": 1.0})
    loss, metrics, _, _ = transcription(
        two,
        torch.zeros_like(case.ids),
        case.advantages,
        **{**case.arguments, "config": config},
    )
    loss.backward()
    assert out.loss.item() == pytest.approx(loss.item(), rel=1e-11)
    torch.testing.assert_close(logps.grad, leaf.grad, rtol=1e-9, atol=1e-11)
    assert "entropy" not in out.metrics
    assert out.metrics["kl"].item() == pytest.approx(metrics["kl"], rel=1e-9)
    torch.testing.assert_close(out.logps, logps.detach().masked_fill(~case.mask, 0))
    with_entropy = policy_loss(
        logps, case.advantages, entropy=torch.full_like(logps, 2.5), **case.arguments
    )
    assert with_entropy.metrics["entropy"].item() == 2.5
    assert with_entropy.loss.item() == out.loss.item()


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_reference_passes_gradcheck(loss_type: str) -> None:
    case = factors(
        make_case(sequences=2, length=3, hidden_size=2, vocabulary=5, beta=0.2, loss_type=loss_type)
    )
    inputs = [x.clone().requires_grad_() for x in (case.hidden, case.weight, case.bias)]

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return reference.linear_grpo_loss(
            hidden, weight, case.ids, case.advantages, bias=bias, **case.arguments
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
