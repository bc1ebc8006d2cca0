"""From what each row found to the loss and the metrics of a call, in a fixed order: no atomics.

N tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ._inputs import TokenBatch


@dataclass
class RowResults:
    """One value per token, 0 where nothing was computed."""

    logps_N: Tensor
    entropy_N: Tensor
    loss_N: Tensor  # row_weight * (policy + beta * kl)
    policy_N: Tensor
    kl_N: Tensor | None  # None = beta is 0
    clip_N: Tensor  # int8: -1 clipped below, +1 clipped above, 0 not clipped

    @classmethod
    def zeros(
        cls, num_tokens: int, with_kl: bool, device: torch.device, dtype: torch.dtype
    ) -> RowResults:
        """Make room for the results of N rows."""

        def zeros(dtype: torch.dtype = dtype) -> Tensor:
            return torch.zeros(num_tokens, device=device, dtype=dtype)

        kl_N = zeros() if with_kl else None
        return cls(zeros(), zeros(), zeros(), zeros(), kl_N, zeros(torch.int8))


def reduce_rows(
    rows: RowResults,
    batch: TokenBatch,
    *,
    num_computed_rows: int | Tensor,
    num_gradient_rows: int | Tensor,
    mean_over: int | Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum the rows of a call.

    Args:
        rows: what the rows found.
        batch: the call's inputs; its denominator divides the loss.
        num_computed_rows: rows whose logits were computed.
        num_gradient_rows: rows whose gradient was computed.
        mean_over: number of rows the metrics are means over; None = the counted tokens.

    Returns:
        The loss, 0-d fp32 and still attached to `rows.loss_N`, and the detached metrics named as
        TRL names them.
    """
    device = rows.loss_N.device
    loss = rows.loss_N.sum() / batch.denominator
    count = batch.num_tokens if mean_over is None else mean_over

    def scalar(number: int | Tensor) -> Tensor:
        return number if isinstance(number, Tensor) else torch.full((), number, device=device)

    def mean(values_N: Tensor) -> Tensor:
        return values_N.detach().sum(dtype=rows.loss_N.dtype) / scalar(count).clamp(min=1)

    metrics = {
        "policy_loss": mean(rows.policy_N),
        "entropy": mean(rows.entropy_N),
        "clip_ratio/low_mean": mean(rows.clip_N < 0),
        "clip_ratio/high_mean": mean(rows.clip_N > 0),
        "clip_ratio/region_mean": mean(rows.clip_N != 0),
        "num_tokens": batch.num_tokens,
        "num_computed_rows": scalar(num_computed_rows),
        "num_gradient_rows": scalar(num_gradient_rows),
    }
    if rows.kl_N is not None:
        metrics["kl"] = mean(rows.kl_N)
    if batch.num_sequences is not None:
        metrics["num_sequences"] = scalar(batch.num_sequences)
    return loss, metrics
