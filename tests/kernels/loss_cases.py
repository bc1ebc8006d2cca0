"""Inputs of the loss tests and the bar their results are held to.

Every value of a case is representable in bf16 and in fp16, so that one case in fp64 is the exact
result for all types.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fastgrpo_kernels import GRPOLossConfig, GRPOLossOutput, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ("torch", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# log(ratio) of the tokens: clipped below, inside, inside, clipped above, far from every bound, so
# that rounding the logits to 16 bits clips no other token.
DRIFT = (-0.6, -0.1, 0.1, 0.6)


@dataclass
class Case:
    hidden: Tensor  # (B, T, H)
    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    ids: Tensor  # (B, T)
    advantages: Tensor  # (B,) or (B, T)
    arguments: dict[str, Any] = field(default_factory=dict)

    def to(self, dtype: torch.dtype) -> Case:
        bias = None if self.bias is None else self.bias.to(dtype)
        return replace(self, hidden=self.hidden.to(dtype), weight=self.weight.to(dtype), bias=bias)

    def having(self, **arguments: Any) -> Case:
        return replace(self, arguments={**self.arguments, **arguments})

    @property
    def logits(self) -> Tensor:
        return torch.nn.functional.linear(self.hidden, self.weight, self.bias)

    @property
    def mask(self) -> Tensor:
        return self.arguments["completion_mask"]


@dataclass
class Result:
    output: GRPOLossOutput
    gradients: dict[str, Tensor | None]

    def everything(self) -> dict[str, Tensor | None]:
        out = self.output
        found = {"loss": out.loss.detach(), "logps": out.logps, "entropy": out.entropy}
        return {**found, **out.metrics, **{f"d{k}": v for k, v in self.gradients.items()}}


def representable(*shape: int, scale: float = 1.0) -> Tensor:
    """Random fp64 values that bf16 and fp16 hold exactly."""
    return (torch.randn(*shape) * scale).bfloat16().half().double()


def make_case(
    *,
    sequences: int = 3,
    length: int = 5,
    hidden_size: int = 8,
    vocabulary: int = 37,
    seed: int = 0,
    off_policy: bool = True,
    per_token: bool = False,
    masked: bool = True,
    **config: Any,
) -> Case:
    """Make a case; its last sequence has no counted token if there are at least 3."""
    torch.manual_seed(seed)
    shape = (sequences, length)
    hidden, weight = representable(*shape, hidden_size), representable(vocabulary, hidden_size)
    bias = representable(vocabulary)
    ids = torch.randint(vocabulary, shape)
    advantages = representable(*(shape if per_token else shape[:1])).float()
    options = GRPOLossConfig(max_completion_length=length, **config)
    arguments: dict[str, Any] = {"config": options}
    if masked:
        mask = torch.rand(shape) < 0.7
        mask[0, 0] = True
        mask[2:] = False
        arguments["completion_mask"] = mask.to(DEVICE)
    logps, _ = reference.linear_logps(
        hidden,
        weight,
        ids,
        bias=bias,
        temperature=options.temperature,
        logit_scale=options.logit_scale,
        logit_softcap=options.logit_softcap,
    )
    if off_policy:
        drift = torch.tensor(DRIFT, dtype=torch.float64)[torch.arange(ids.numel()) % 4]
        arguments["old_logps"] = (logps - drift.view(shape)).float().to(DEVICE)
    if options.beta:
        arguments["ref_logps"] = (logps + torch.randn(shape) * 0.5).float().to(DEVICE)
    tensors = (x.to(DEVICE) for x in (hidden, weight, bias, ids, advantages))
    return Case(*tensors, arguments)


def factors(case: Case) -> Case:
    """Give a case a ratio, a weight and an entropy mask, one value per token or per sequence."""
    shape = tuple(case.ids.shape)
    torch.manual_seed(7)
    return case.having(
        importance_sampling_ratio=(torch.rand(shape) * 2).to(DEVICE),
        policy_weight=(torch.rand(shape[0], 1) + 0.5).to(DEVICE),
        entropy_mask=(torch.rand(shape) < 0.8).float().to(DEVICE),
    )


def packed(case: Case, lead: tuple[int, ...], lengths: list[int], **arguments: Any) -> Case:
    """The first `lengths[i]` tokens of each sequence, one after the other, as (N,) or (1, N)."""
    keep = torch.arange(case.ids.shape[1]) < torch.tensor(lengths)[:, None]
    keep = keep.to(DEVICE)

    def flat(x: Tensor) -> Tensor:
        return x[keep].view(*lead, -1, *x.shape[2:]) if x[keep].numel() else x[keep]

    per_token = {
        k: flat(v) if isinstance(v, Tensor) and v.shape == case.ids.shape else v
        for k, v in case.arguments.items()
    }
    advantages = case.advantages
    if advantages.shape == case.ids.shape:
        advantages = flat(advantages)
    return replace(
        case,
        hidden=flat(case.hidden),
        ids=flat(case.ids),
        advantages=advantages,
        arguments={**per_token, **arguments},
    )


def linear_result(
    function: Callable[..., GRPOLossOutput],
    case: Case,
    *,
    upstream: float = 1.0,
    frozen: tuple[str, ...] = (),
    **options: Any,
) -> Result:
    """Call a function of hidden states on fresh leaves and run backward."""
    names = ("hidden", "weight") + (() if case.bias is None else ("bias",))
    leaves = {n: getattr(case, n).detach().clone().requires_grad_(n not in frozen) for n in names}
    out = function(
        leaves["hidden"],
        leaves["weight"],
        case.ids,
        case.advantages,
        bias=leaves.get("bias"),
        **case.arguments,
        **options,
    )
    (out.loss * upstream).backward()
    return Result(out, {name: leaf.grad for name, leaf in leaves.items()})


def logits_result(
    function: Callable[..., GRPOLossOutput],
    case: Case,
    *,
    logits: Tensor | None = None,
    upstream: float = 1.0,
    **options: Any,
) -> Result:
    """Call a function of logits on a fresh leaf (through a copy, which may be overwritten)."""
    leaf = (case.logits if logits is None else logits).detach().clone().requires_grad_()
    out = function(leaf * 1, case.ids, case.advantages, **case.arguments, **options)
    (out.loss * upstream).backward()
    return Result(out, {"logits": leaf.grad})


def rounding_allowance(backend: str, dtype: torch.dtype) -> float:
    """How much worse than correct rounding the backend rounds.

    Triton's interpreter truncates when it stores fp32 as bf16: twice the error of rounding to
    nearest in every value, and all of it towards zero, so that sums do not average it out.
    Measured 2 to 3 times in all; allowed there and nowhere else.
    """
    truncates = backend == "triton" and dtype == torch.bfloat16 and DEVICE == "cpu"
    return 3.0 if truncates else 1.0


def assert_as_exact(
    actual: Tensor,
    naive: Tensor,
    exact: Tensor,
    *,
    factor: float,
    what: str = "",
    units: float = 4.0,
    stored: float = 0.0,
) -> None:
    """Error against fp64 at most `factor` times that of PyTorch in the same type, or next to none.

    The floor is four units of fp32 at the largest value: below it the naive error is luck. `stored`
    is the relative error of storing a value once.
    """
    assert actual.shape == exact.shape, what
    exact = exact.double()
    error, naive_error = (actual.double() - exact).abs(), (naive.double() - exact).abs()
    if not exact.numel():
        return
    largest = exact.abs().max().clamp(min=1e-3)
    floor = units * torch.finfo(torch.float32).eps * largest
    assert error.max() <= factor * naive_error.max() + floor + stored * largest, (
        f"{what}: maximum error {error.max():.2e}, naive {naive_error.max():.2e}, floor {floor:.2e}"
    )
    rms, naive_rms = error.square().mean().sqrt(), naive_error.square().mean().sqrt()
    typical = exact.square().mean().sqrt()
    assert rms <= factor * naive_rms + floor + stored * typical, (
        f"{what}: RMS {rms:.2e}, naive {naive_rms:.2e}"
    )


def log_prob_units(logps: Tensor) -> float:
    """How many units of fp32 a ratio, or its gradient, may be off.

    A log-prob of -14 is known to 14 units, its exponential to as many relative ones. Measured in
    fp32: at most 6.5 in any loss, sums over sequences included.
    """
    return 4.0 + logps.abs().max().item() if logps.numel() else 4.0


def assert_results_as_exact(
    actual: Result,
    naive: Result,
    exact: Result,
    dtype: torch.dtype,
    backend: str,
) -> None:
    """Hold losses, gradients, log-probs, entropies and metrics to the bar."""
    allowance = rounding_allowance(backend, dtype)
    factor = 1.5 * allowance
    # Truncation costs a whole unit where it is rounding once, luck or no luck of the naive.
    stored = torch.finfo(dtype).eps if allowance > 1 else 0.0
    units = log_prob_units(exact.output.logps)
    naive_values, exact_values = naive.everything(), exact.everything()
    for name, value in actual.everything().items():
        if name in ("num_computed_rows", "num_gradient_rows"):
            continue  # how the result was computed, not what it is
        wanted = exact_values[name]
        assert value is not None and wanted is not None, name
        naive_value = naive_values[name]
        assert naive_value is not None, name
        if name.startswith(("num_", "clip_ratio", "cispo_")):
            torch.testing.assert_close(value, wanted.to(value.dtype), msg=name)
        elif value.dim() == 0:
            unit = max(
                2 * torch.finfo(dtype).eps, 2e-6, units * 2e-7
            )  # one sample: luck has no bound
            allowed = unit * (1 + abs(wanted.item()))
            if name in ("loss", "policy_loss", "vespo/phi_seq_mean", "kl"):
                # Sums of log-ratios over a sequence: rounded logits can cost more than a unit.
                allowed += factor * abs(naive_value.item() - wanted.item())
            error = abs(value.item() - wanted.item())
            assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"
        else:
            limits = {} if name in ("logps", "entropy") else {"units": units, "stored": stored}
            assert_as_exact(value, naive_value, wanted, factor=factor, what=name, **limits)


def assert_same(actual: Result, expected: Result, *, rtol: float, atol: float) -> None:
    """Compare loss, gradients, log-probs and entropies, not how they were computed."""
    for name, value in actual.everything().items():
        if name not in ("num_computed_rows", "num_gradient_rows"):
            wanted = expected.everything()[name]
            if value is None or wanted is None:
                assert value is wanted, name
            else:
                torch.testing.assert_close(
                    value, wanted.to(value.dtype), rtol=rtol, atol=atol, msg=lambda m, n=name: n + m
                )
