"""Arguments for Liger's fused linear GRPO loss and ours, and what a call of either gives.

B sequences, T positions, H hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
B, T, H, V = 6, 5, 8, 37

LOSSES: dict[str, dict[str, Any]] = {
    **{name: {"loss_type": name} for name in ("grpo", "bnpo", "dapo", "sapo", "vespo")},
    "dr_grpo": {"loss_type": "dr_grpo", "max_completion_length": 9},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.3},
    **{
        f"{name}-sequence": {"loss_type": name, "importance_sampling_level": "sequence"}
        for name in ("grpo", "bnpo", "dapo")
    },
    "dr_grpo-sequence": {
        "loss_type": "dr_grpo",
        "max_completion_length": 9,
        "importance_sampling_level": "sequence",
    },
    "luspo-sequence": {
        "loss_type": "luspo",
        "importance_sampling_level": "sequence",
        "beta": 0.0,
    },
}


@dataclass
class Result:
    loss: Tensor
    gradients: dict[str, Tensor]
    metrics: tuple[Tensor, ...]


def make_call(
    *,
    policy: str = "off",
    reference: str = "logps",
    ratio: str = "none",
    mask: str = "int64",
    bias: bool = True,
    frozen: bool = False,
    items: object = None,
    temperature: float = 1.0,
) -> dict[str, Any]:
    """Return the arguments of a call: ratios on both sides of every bound, an empty sequence."""
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    hidden, weight, bias_V = normal(B, T, H), normal(V, H) / 2, normal(V)
    ids = torch.randint(V, (B, T), generator=g)
    logits = torch.nn.functional.linear(hidden, weight, bias_V if bias else None) / temperature
    logps = logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    drift = torch.tensor([[-0.7], [-0.5], [0.0], [0.6], [0.8], [0.1]])
    counted = torch.rand(B, T, generator=g) < 0.7
    counted[:, 0] = True
    counted[-1] = False
    if mask == "full":
        counted[:] = True
    call: dict[str, Any] = {
        "_input": hidden,
        "lin_weight": weight,
        "selected_token_ids": ids,
        "attention_mask": counted.to(torch.int64 if mask == "full" else getattr(torch, mask)),
        "advantages": torch.tensor([-1.03, 0.84, -0.51, 1.77, 0.0, 0.9]),
        "num_items_in_batch": items,
    }
    if bias:
        call["bias"] = bias_V
    if policy == "off":
        call["old_per_token_logps"] = logps - drift - 0.3 * normal(B, T)
    if reference == "logps":
        call["ref_per_token_logps"] = logps + 0.5 * normal(B, T)
    elif reference == "input":
        call["ref_input"] = hidden + 0.1 * normal(B, T, H)
        call["ref_weight"] = weight + 0.1 * normal(V, H)
        if bias:
            call["ref_bias"] = bias_V + 0.1 * normal(V)
    if ratio != "none":
        shape = {"(B,)": (B,), "(B, 1)": (B, 1), "(B, T)": (B, T)}[ratio]
        call["vllm_is_ratio"] = 2 * torch.rand(shape, generator=g)
        call["vllm_is_ratio"].view(B, -1)[0, 0] = 0.0  # refused by the sampler's correction
    call = {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in call.items()}
    for name in ["_input"] if frozen else ["_input", "lin_weight", "bias"]:
        if name in call:
            call[name].requires_grad_()
    return call


def run(module: type, options: dict[str, Any], call: dict[str, Any]) -> Result:
    """Compute loss, gradients and metrics; the upstream gradient is not 1."""
    function = module(compiled=False, **options)
    loss, metrics = function(**call)
    leaves = {name: x for name, x in call.items() if isinstance(x, Tensor) and x.requires_grad}
    assert loss.requires_grad and loss.shape == () and loss.dtype == torch.float32
    assert isinstance(metrics, tuple) and not any(x.requires_grad for x in metrics)
    gradients = torch.autograd.grad(0.7 * loss, list(leaves.values()))
    return Result(loss.detach(), dict(zip(leaves, gradients, strict=True)), metrics)


def assert_close(actual: Tensor, wanted: Tensor, what: str, tolerance: float) -> None:
    assert (actual.shape, actual.dtype) == (wanted.shape, wanted.dtype), what
    size = max(wanted.abs().max().item(), float(wanted.dim() == 0))
    torch.testing.assert_close(
        actual, wanted, rtol=0, atol=tolerance * size, msg=lambda m: f"{what}: {m}"
    )
