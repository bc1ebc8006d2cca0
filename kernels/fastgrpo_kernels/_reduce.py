"""From what each row found to the loss and the metrics of a call, in a fixed order: no atomics.

B sequences, N tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ._inputs import COUNTED, TokenBatch
from .config import GRPOLossConfig


@dataclass
class Statistics:
    """What the logits of each row say, as far as the gradient of the row needs it again."""

    logps_N: Tensor
    entropy_N: Tensor
    largest_N: Tensor  # the largest logit, 0 if that is -inf
    log_sum_N: Tensor  # log of the sum of exp(logit - largest)
    # While the columns of a row come in parts, of those seen so far: the sum of exp(z - largest)
    # without the target's, that of exp(z - largest) * (z - largest), and the target's logit.
    rest_N: Tensor | None = None
    moment_N: Tensor | None = None
    target_N: Tensor | None = None

    @classmethod
    def beside(cls, logps_N: Tensor, entropy_N: Tensor, in_parts: bool = False) -> Statistics:
        """Make room for statistics of rows whose log-probs and entropies have their place."""
        found = cls(logps_N, entropy_N, torch.zeros_like(logps_N), torch.zeros_like(logps_N))
        if in_parts:
            found.largest_N.fill_(-torch.inf)
            found.rest_N, found.moment_N = torch.zeros_like(logps_N), torch.zeros_like(logps_N)
            found.target_N = torch.full_like(logps_N, torch.nan)
        return found

    def tensors(self) -> list[Tensor]:
        """Return what remains when all columns were seen."""
        return [self.logps_N, self.entropy_N, self.largest_N, self.log_sum_N]


@dataclass
class RowResults:
    """One value per token, 0 where nothing was computed."""

    logps_N: Tensor
    entropy_N: Tensor
    loss_N: Tensor  # row_weight * (policy + beta * kl) - entropy_weight * entropy
    policy_N: Tensor
    kl_N: Tensor | None  # None = beta is 0
    report_N: Tensor  # -1 clipped below, +1 clipped above, 0 not clipped; vespo: the weight

    @classmethod
    def zeros(cls, batch: TokenBatch, dtype: torch.dtype) -> RowResults:
        """Make room for the results of a batch."""

        def zeros() -> Tensor:
            return torch.zeros(batch.ids_N.shape, device=batch.ids_N.device, dtype=dtype)

        kl_N = None if batch.ref_logps_N is None else zeros()
        return cls(zeros(), zeros(), zeros(), zeros(), kl_N, zeros())

    def without_skipped(self, batch: TokenBatch) -> RowResults:
        """Return NaN as log-probs and entropies of rows that count and were not computed."""
        skipped_N = (batch.state_N == COUNTED).to(self.logps_N.device)
        logps_N = self.logps_N.masked_fill(skipped_N, torch.nan)
        return replace(
            self, logps_N=logps_N, entropy_N=self.entropy_N.masked_fill(skipped_N, torch.nan)
        )


def reduce_rows(
    rows: RowResults,
    batch: TokenBatch,
    config: GRPOLossConfig,
    *,
    num_computed_rows: int | Tensor,
    num_gradient_rows: int | Tensor,
    mean_over: int | Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum the rows of a call.

    Args:
        rows: what the rows found.
        batch: the call's inputs; its denominator divides the loss.
        config: the mathematics: which metrics there are.
        num_computed_rows: rows whose logits were computed.
        num_gradient_rows: rows whose gradient was computed.
        mean_over: number of rows the metrics are means over; None = the counted tokens.

    Returns:
        The loss, 0-d fp32 and still attached to `rows.loss_N`, and the detached metrics named as
        TRL names them.
    """
    device = rows.loss_N.device
    loss = rows.loss_N.sum() / batch.denominator

    def scalar(number: int | Tensor) -> Tensor:
        if isinstance(number, Tensor):
            return number.to(device, non_blocking=True)
        return torch.full((), number, device=device)

    count = scalar(batch.num_tokens if mean_over is None else mean_over).clamp(min=1)

    def mean(values_N: Tensor) -> Tensor:
        return values_N.sum() / count

    metrics = {
        "policy_loss": mean(rows.policy_N),
        "entropy": mean(rows.entropy_N),
        "num_tokens": batch.num_tokens,
        "num_computed_rows": scalar(num_computed_rows),
        "num_gradient_rows": scalar(num_gradient_rows),
    }
    if rows.kl_N is not None:
        metrics["kl"] = mean(rows.kl_N)
    if batch.num_sequences is not None:
        metrics["num_sequences"] = batch.num_sequences
    if config.entropy_coef:
        metrics["entropy_coef"] = torch.full_like(loss, config.entropy_coef)
    return loss, metrics | _reports(rows.report_N, batch, config, count, mean_over is None)


def _reports(
    report_N: Tensor, batch: TokenBatch, config: GRPOLossConfig, count: Tensor, all_counted: bool
) -> dict[str, Tensor]:
    """Return the metrics of what the loss type reports of each token.

    Ratios of whole sequences are counted by sequence; one without a counted token is among them
    (as in TRL), unclipped, with a VESPO weight of 1.
    """
    if config.loss_type == "sapo":
        return {}
    layout = batch.layout
    below_N, above_N = (report_N < 0).to(report_N.dtype), (report_N > 0).to(report_N.dtype)
    if layout.num_sequences is None:
        if config.loss_type == "cispo":
            return {"cispo_clip_ratio": (below_N + above_N).sum() / count}
        return _clip_ratios(below_N.sum() / count, above_N.sum() / count)
    counted_N = torch.ones_like(report_N) if batch.mask_N is None else batch.mask_N
    length_B = layout.sum_sequences(counted_N.to(report_N.dtype))
    some_B = length_B > 0

    def fraction(values_N: Tensor) -> Tensor:
        return layout.sum_sequences(values_N) / length_B.clamp(min=1)

    all_counted &= not config.skip_empty_sequences
    sequences = torch.full_like(count, layout.num_sequences) if all_counted else some_B.sum()
    sequences = sequences.clamp(min=1)
    if config.loss_type == "vespo":
        empty = layout.num_sequences - some_B.sum() if all_counted else 0
        return {"vespo/phi_seq_mean": (fraction(report_N).sum() + empty) / sequences}

    def mean(values_N: Tensor) -> Tensor:
        if config.importance_sampling_level == "sequence":
            return fraction(values_N).sum() / sequences
        return values_N.sum() / count

    if config.loss_type == "cispo":
        return {"cispo_clip_ratio": mean(below_N + above_N)}
    metrics = _clip_ratios(mean(below_N), mean(above_N))
    if layout.num_sequences:
        # A ratio of an empty sequence is 1; of the tokens of one there is no fraction.
        of_sequences = config.importance_sampling_level == "sequence" and all_counted
        among_B = torch.ones_like(some_B) if of_sequences else some_B
        lowest = torch.where(among_B, fraction(below_N), 1).amin()
        metrics["clip_ratio/low_min"] = torch.where(among_B.any(), lowest, 0)
        metrics["clip_ratio/high_max"] = torch.where(some_B, fraction(above_N), 0).amax()
    return metrics


def _clip_ratios(low: Tensor, high: Tensor) -> dict[str, Tensor]:
    return {
        "clip_ratio/low_mean": low,
        "clip_ratio/high_mean": high,
        "clip_ratio/region_mean": low + high,
    }


def metric_names(
    loss_type: str, *, with_kl: bool, with_entropy_bonus: bool, num_sequences: int | None
) -> list[str]:
    """Return the names of the metrics of `reduce_rows`, for a graph that must know them before."""
    names = ["policy_loss", "entropy", "num_tokens", "num_computed_rows", "num_gradient_rows"]
    names += ["kl"] if with_kl else []
    names += [] if num_sequences is None else ["num_sequences"]
    names += ["entropy_coef"] if with_entropy_bonus else []
    if loss_type == "sapo":
        return names
    if loss_type == "cispo":
        return [*names, "cispo_clip_ratio"]
    if loss_type == "vespo":
        return [*names, "vespo/phi_seq_mean"]
    names += ["clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"]
    return [*names, "clip_ratio/low_min", "clip_ratio/high_max"] if num_sequences else names
