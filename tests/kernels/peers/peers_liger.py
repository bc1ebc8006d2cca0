"""The same hidden states through Liger's fused losses and through ours, in fp32."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgrpo_kernels import GRPOLossConfig, grpo_loss, linear_grpo_loss

fused: Any = pytest.importorskip("liger_kernel.chunked_loss")
triton_loss: Any = pytest.importorskip("liger_kernel.transformers.grpo_loss")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# fp32 on both sides, relative to the largest value. Measured: 6e-7.
TOLERANCE = 3e-6


@dataclass
class Case:
    """One batch; the ratios of tokens and of sequences are on both sides of every bound."""

    hidden: Tensor  # (B, T, H)
    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    ids: Tensor  # (B, T)
    advantages: Tensor  # (B,)
    mask: Tensor  # (B, T) int64
    old: Tensor | None
    ref: Tensor
    config: dict[str, Any]  # in our words
    arguments: dict[str, Any] = field(default_factory=dict)  # of ours

    def options(self) -> GRPOLossConfig:
        return GRPOLossConfig(**self.config)


class AsIf(Case):
    """A case with options for Liger that our configuration refuses."""

    def __init__(self, case: Case, **changes: Any) -> None:
        super().__init__(**vars(case))
        self.changes = changes


@dataclass
class Result:
    """What both sides are compared by."""

    loss: Tensor
    gradients: dict[str, Tensor]
    metrics: dict[str, Tensor]


def make_case(
    *, with_bias: bool = True, off_policy: bool = True, masked: bool = True, **config: Any
) -> Case:
    """Make a case; `config` is ours."""
    g = torch.Generator().manual_seed(0)
    B, T, H, V = 6, 5, 8, 37

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    hidden, weight, bias = normal(B, T, H), normal(V, H) / 2, normal(V)
    ids = torch.randint(V, (B, T), generator=g)
    logits = hidden @ weight.T + (bias if with_bias else 0)
    logps = _logps(logits / config.get("temperature", 1.0), ids)
    drift = torch.tensor([[-0.7], [-0.5], [0.0], [0.6], [0.8], [0.1]])
    mask = (torch.rand(B, T, generator=g) < 0.7).long()
    mask[:, 0] = 1
    mask[-1] = 0
    tensors = (
        hidden,
        weight,
        bias if with_bias else None,
        ids,
        torch.tensor([-1.03, 0.84, -0.51, 1.77, -0.66, 0.9]),
        mask if masked else torch.ones_like(mask),
        logps - drift - 0.3 * normal(B, T) if off_policy else None,
        logps + 0.5 * normal(B, T),
    )
    moved = [None if x is None else x.to(DEVICE) for x in tensors]
    return Case(*moved, config=config)  # pyright: ignore[reportArgumentType]


def _result(loss: Tensor, leaves: dict[str, Tensor], metrics: dict[str, Tensor]) -> Result:
    gradients = torch.autograd.grad(loss, list(leaves.values())) if leaves else ()
    return Result(loss.detach(), dict(zip(leaves, gradients, strict=True)), metrics)


def _leaves(case: Case) -> dict[str, Tensor]:
    tensors = {"hidden": case.hidden, "weight": case.weight, "bias": case.bias}
    return {n: x.detach().clone().requires_grad_() for n, x in tensors.items() if x is not None}


def ours(case: Case, backend: Any = "torch") -> Result:
    """Run `linear_grpo_loss`."""
    leaves = _leaves(case)
    out = linear_grpo_loss(
        leaves["hidden"],
        leaves["weight"],
        case.ids,
        case.advantages,
        bias=leaves.get("bias"),
        completion_mask=case.mask,
        old_logps=case.old,
        ref_logps=case.ref,
        config=case.options(),
        chunk_rows=8,
        backend=backend,
        **case.arguments,
    )
    return _result(out.loss, leaves, out.metrics)


def ours_from_logits(case: Case, backend: Any = "torch") -> Result:
    """Run `grpo_loss`."""
    leaf = logits_of(case).requires_grad_()
    out = grpo_loss(
        leaf * 1,
        case.ids,
        case.advantages,
        completion_mask=case.mask,
        old_logps=case.old,
        ref_logps=case.ref,
        config=case.options(),
        backend=backend,
        **case.arguments,
    )
    return _result(out.loss, {"logits": leaf}, out.metrics)


def logits_of(case: Case) -> Tensor:
    """Return the logits of a case."""
    return torch.nn.functional.linear(case.hidden, case.weight, case.bias).detach()


def logps_of(case: Case) -> Tensor:
    """Return the log-probs of a case's tokens."""
    return _logps(logits_of(case) / case.config.get("temperature", 1.0), case.ids)


def _logps(logits: Tensor, ids: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]


def _options(case: Case, names: tuple[str, str]) -> dict[str, Any]:
    mine = case.options()
    found = {
        name: getattr(mine, name)
        for name in (
            "beta",
            "loss_type",
            "max_completion_length",
            "importance_sampling_level",
            "sapo_temperature_pos",
            "sapo_temperature_neg",
            "temperature",
            "delta",
            "use_bias_correction_kl",
            "vespo_k_pos",
            "vespo_lambda_pos",
            "vespo_k_neg",
            "vespo_lambda_neg",
        )
    }
    changes = case.changes if isinstance(case, AsIf) else {}
    return {**found, names[0]: mine.epsilon_low, names[1]: mine.epsilon_high, **changes}


def _named(case: Case, metrics: Any) -> dict[str, Tensor]:
    """Name Liger's list of metrics."""
    names = ["kl", "clip"] if case.options().beta else ["clip"]
    return dict(zip(names, metrics, strict=True))


def theirs(case: Case, chunk_size: int = 1) -> Result:
    """Run Liger's LigerFusedLinearGRPOLoss, uncompiled."""
    leaves, options = _leaves(case), _options(case, ("epsilon_low", "epsilon_high"))
    function = fused.LigerFusedLinearGRPOLoss(
        compiled=False, use_ref_model=bool(options["beta"]), chunk_size=chunk_size, **options
    )
    loss, metrics = function(
        leaves["hidden"],
        leaves["weight"],
        case.ids,
        case.mask,
        case.advantages,
        bias=leaves.get("bias"),
        ref_per_token_logps=case.ref if options["beta"] else None,
        old_per_token_logps=case.old,
        vllm_is_ratio=case.arguments.get("importance_sampling_ratio"),
        num_items_in_batch=case.arguments.get("num_items_in_batch"),
    )
    return _result(loss, leaves, _named(case, metrics))


def theirs_in_triton(case: Case, *, backward: bool = True) -> Result:
    """Run Liger's triton_grpo_loss; it wants the logits of one position more."""
    leaf = logits_of(case).requires_grad_()
    loss, metrics = triton_loss.triton_grpo_loss(
        torch.nn.functional.pad(leaf, (0, 0, 0, 1)),
        case.old,
        case.ref if case.options().beta else None,
        case.ids,
        case.advantages,
        completion_mask=case.mask,
        inplace=False,
        reduce=True,
        vllm_is_ratio=case.arguments.get("importance_sampling_ratio"),
        num_items_in_batch=case.arguments.get("num_items_in_batch"),
        **_options(case, ("eps_low", "eps_high")),
    )
    leaves = {"logits": leaf} if backward else {}
    return _result(loss, leaves, _named(case, metrics))


def clip_metric(case: Case, result: Result) -> Tensor:
    """Return our metric that is Liger's clip fraction."""
    if case.config["loss_type"] in ("sapo", "vespo"):
        return torch.zeros_like(result.loss)
    name = "cispo_clip_ratio" if case.config["loss_type"] == "cispo" else "clip_ratio/region_mean"
    return result.metrics[name]


def assert_close(actual: Tensor, wanted: Tensor, what: str = "", tolerance: float = TOLERANCE):
    """Compare relative to the largest value; a mean over tokens also to 1, since they cancel."""
    size = max(wanted.abs().max().item(), float(wanted.dim() == 0))
    torch.testing.assert_close(
        actual.float(), wanted.float(), rtol=0, atol=tolerance * size, msg=lambda m: f"{what}: {m}"
    )


def assert_same_gradients(mine: Result, its: Result) -> None:
    """Compare the loss and every gradient, not the metrics."""
    assert its.loss.isfinite()
    assert_close(mine.loss, its.loss, "loss")
    assert mine.gradients.keys() == its.gradients.keys()
    for name, gradient in its.gradients.items():
        assert gradient.abs().max() > 0, name
        assert_close(mine.gradients[name], gradient, name)


def assert_agree(case: Case, mine: Result, its: Result) -> None:
    """Compare loss, gradients and metrics (the clip fraction: at token level)."""
    assert_same_gradients(mine, its)
    if "kl" in its.metrics:
        assert_close(mine.metrics["kl"], its.metrics["kl"], "kl")
    if case.options().importance_sampling_level == "token":
        assert_close(clip_metric(case, mine), its.metrics["clip"], "clip fraction")
