"""A batch of log-probs as trainers hand it to a policy loss: uneven, far apart, half garbage.

B sequences, T positions.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

LENGTHS = (6, 2, 0, 5, 1)

# The values of verl's loss_agg_mode.
MODES = [
    "token-mean",
    "token-sum",
    "seq-mean-token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
]


@dataclass(frozen=True)
class Batch:
    """All (B, T) fp64; `mask` is bool, and has a hole."""

    logps: Tensor
    old: Tensor
    sampler: Tensor
    advantages: Tensor
    mask: Tensor
    weights: Tensor

    def rows(self, pick: slice) -> Batch:
        """Return some of the sequences, as a micro-batch or a rank has them."""
        return dataclasses.replace(
            self, **{name: value[pick].detach().clone() for name, value in vars(self).items()}
        ).with_graph()

    def with_graph(self) -> Batch:
        """Return the batch with log-probs that take gradients."""
        return dataclasses.replace(self, logps=self.logps.detach().clone().requires_grad_())

    def with_garbage(self) -> Batch:
        """Return the batch with NaN wherever a token does not count."""
        values = {n: x.detach().clone() for n, x in vars(self).items() if n != "mask"}
        for value in values.values():
            value[~self.mask] = torch.nan
        return dataclasses.replace(self, **values).with_graph()


def make_batch(seed: int = 0, spread: float = 0.8) -> Batch:
    """Return log-ratios of about `spread`: beyond every clip, in both directions."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(LENGTHS), max(LENGTHS))

    def normal() -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    old = normal().abs().neg() - 0.1
    mask = torch.arange(shape[1]) < torch.tensor(LENGTHS)[:, None]
    mask[0, 2] = False
    return Batch(
        logps=old + spread * normal(),
        old=old,
        sampler=old + 0.3 * normal(),
        advantages=normal(),
        mask=mask,
        weights=normal().exp(),
    ).with_graph()


def make_far_batch() -> Batch:
    """Return log-ratios on and beyond what trainers cut them at, 10 and 20, exact to the bit."""
    log_ratios = [
        [10.0] * 6,
        [10.25] * 6,
        [20.0, -20.0, 20.25, -20.25, 800.0, -800.0],
        [25.0, 24.0, -25.0, 20.0, 0.25, -0.25],
        [-30.0] * 6,
    ]
    batch = make_batch()
    logps = torch.full_like(batch.old, -1.0)
    ratios = torch.tensor(log_ratios, dtype=logps.dtype)
    advantages = torch.tensor([-1.0, -0.5, 2.0, -2.0, -1.5, -1.0]).to(logps).expand_as(logps)
    return dataclasses.replace(
        batch,
        logps=logps,
        old=logps - ratios,
        sampler=logps - ratios + 0.25,
        advantages=advantages.contiguous(),
        mask=torch.ones_like(batch.mask),
    ).with_graph()
