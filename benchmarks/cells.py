"""What is measured: shapes, types and shares, and the inputs that go with them.

B sequences, T positions, N = B * T tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

QWEN, LLAMA, GEMMA = 151_936, 128_256, 262_144
# log(old ratio) of the tokens: inside the clip bounds and far outside, on neither side so near that
# rounding the logits would clip another token.
DRIFT = (-0.6, -0.05, 0.05, 0.6)


@dataclass(frozen=True)
class Cell:
    """One measurement, the same for every peer."""

    op: str  # "linear": loss from hidden states; "logits": from logits; "logps": log-probs, forward
    N: int
    H: int
    V: int
    rho: float = 1.0  # share of sequences with an advantage other than 0
    frozen: bool = False  # the head gets no gradient
    dtype: str = "bfloat16"

    @property
    def products(self) -> int:
        """How many products of 2NHV a step needs at least: logits, dX, dW."""
        if self.op == "logits":
            return 0
        return 1 if self.op == "logps" else 2 if self.frozen else 3

    def facts(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Inputs:
    """Inputs of a cell on a device; what gets a gradient requires one."""

    hidden: Tensor  # (B, T, H)
    weight: Tensor  # (V, H)
    ids: Tensor  # (B, T) int64
    advantages: Tensor  # (B,)
    mask: Tensor  # (B, T) bool, all true: N counts the tokens that count
    old_logps: Tensor  # (B, T) fp32
    logits: Tensor | None = None  # (B, T, V)


def make_inputs(cell: Cell, device: str) -> Inputs:
    """Make inputs whose logits look like those of a trained model: confident, but not always.

    Random hidden states would give nearly uniform distributions, which flatter methods that drop
    small probabilities. Here half of the tokens have most of their probability, and the other half
    are one of some hundred that are likely.
    """
    torch.manual_seed(0)
    dtype = getattr(torch, cell.dtype)
    length = min(1024, max(cell.N // 8, 2))
    sequences = cell.N // length
    if sequences * length != cell.N:
        raise ValueError(f"N={cell.N} must be a multiple of the sequence length {length}")
    options = {"device": device, "dtype": torch.float32}
    weight = torch.randn(cell.V, cell.H, **options)
    ids = torch.randint(cell.V, (sequences, length), device=device)
    hidden = torch.randn(sequences, length, cell.H, **options)
    sure = torch.rand(sequences, length, 1, device=device) < 0.5
    # Standard deviation of the logits, and how far the target's is above their mean.
    spread, above = torch.where(sure, 1.5, 4.0), torch.where(sure, 12.0, 14.0)
    hidden = (hidden * spread + weight[ids] * above / cell.H**0.5) / cell.H**0.5
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    advantages = torch.randn(sequences, device=device)
    advantages[: round(sequences * (1 - cell.rho))] = 0
    with torch.no_grad():
        logps = _logps(hidden.view(cell.N, -1), weight, ids.view(-1)).view(ids.shape)
    drift = torch.tensor(DRIFT, device=device)[torch.arange(cell.N, device=device) % len(DRIFT)]
    inputs = Inputs(
        hidden, weight, ids, advantages, torch.ones_like(ids, dtype=torch.bool),
        logps - drift.view(ids.shape),
    )  # fmt: skip
    if cell.op == "logits":
        inputs.logits = torch.nn.functional.linear(hidden, weight)
    elif cell.op == "linear":
        hidden.requires_grad_()
        weight.requires_grad_(not cell.frozen)
    return inputs


def _logps(hidden_NH: Tensor, weight: Tensor, ids_N: Tensor) -> Tensor:
    chunks = []
    for hidden_CH, ids_C in zip(hidden_NH.split(1024), ids_N.split(1024), strict=True):
        logits_CV = (hidden_CH @ weight.t()).float()
        chunks.append(logits_CV.log_softmax(-1).gather(1, ids_C[:, None])[:, 0])
    return torch.cat(chunks)


def quick_cells() -> list[Cell]:
    """Return tiny shapes for a CPU: is every peer right, and does the harness work?"""
    shape = (64, 48, 320)
    return [
        Cell("linear", *shape, dtype="float32"),
        Cell("linear", *shape, rho=0.5),
        Cell("linear", *shape, frozen=True),
        Cell("logits", *shape, dtype="float32"),
        Cell("logps", *shape, dtype="float32"),
    ]


def every_cell() -> list[Cell]:
    """Return every kind of cell in tiny, for the tests."""
    types, shape = ("float32", "bfloat16"), (64, 48, 320)
    cells = [
        Cell("linear", *shape, rho, frozen, dtype)
        for dtype in types
        for rho in (1.0, 0.5)
        for frozen in (False, True)
    ]
    return cells + [Cell(op, *shape, dtype=dtype) for op in ("logits", "logps") for dtype in types]


def cpu_cells() -> list[Cell]:
    """Return shapes at which a CPU's time is spent in the products; one with a real vocabulary."""
    shape = (2048, 512, 32_000)
    return [
        Cell("linear", *shape, dtype="float32"),
        Cell("linear", *shape),
        Cell("linear", *shape, rho=0.5),
        Cell("linear", *shape, frozen=True),
        Cell("linear", 1024, 256, QWEN),
    ]


def gpu_cells() -> list[Cell]:
    """Return the shapes of Qwen2.5/3, Llama 3 and Gemma 3, those that decide first."""
    heads = [(896, QWEN), (1536, QWEN), (3584, QWEN), (2048, QWEN), (5120, QWEN)]
    heads += [(4096, LLAMA), (1152, GEMMA)]
    cells = [Cell("linear", 8192, H, V) for H, V in heads]
    for H in (896, 1536, 3584):
        cells += [
            Cell("linear", 8192, H, QWEN, rho=0.5),
            Cell("linear", 8192, H, QWEN, frozen=True),
            Cell("logps", 8192, H, QWEN),
        ]
    cells += [Cell("logits", N, 896, QWEN) for N in (2048, 8192)]
    cells += [Cell("linear", N, H, QWEN) for H in (896, 3584) for N in (2048, 32_768)]
    return [*cells, Cell("linear", 131_072, 896, QWEN)]
