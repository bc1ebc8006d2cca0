"""Gradients in the forward pass: 6NHV, with one chunk of logits and the fp32 gradient of the head.

For every chunk of rows: logits into one reused buffer, the row step writes their gradient over
them, and two more products take it to the hidden states and to the weight. Nothing is recomputed,
except the logits of sequences that couple their rows and are longer than a chunk.

B sequences, N tokens, C rows of a chunk, H hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

import torch
from torch import Tensor

from ._autograd import once_differentiable
from ._head import Chunk, Head, HeadGradients, early_and_late
from ._inputs import TokenBatch
from ._plan import RowPlan, Run, pieces
from ._products import scaled
from ._reduce import RowResults, Statistics
from .config import GRPOLossConfig


def needs_whole_sequences(batch: TokenBatch, config: GRPOLossConfig) -> bool:
    """Say whether a gradient depends on log-probs of other rows.

    On-policy every ratio is 1 and no gradient of the policy term depends on any log-prob.
    """
    kl_of_sequence = (
        batch.ref_logps_N is not None
        and config.use_bias_correction_kl
        and config.importance_sampling_level == "sequence"
    )
    return config.couples_rows and (batch.old_logps_N is not None or kl_of_sequence)


def linear_surrogate(
    batch: TokenBatch, config: GRPOLossConfig, row_step: ModuleType
) -> tuple[TokenBatch, GRPOLossConfig]:
    """Return a loss of single rows with the gradient that a coupled loss has on-policy.

    That gradient, g per token, is known before any log-prob is: the loss is the linear g * logp.
    """
    policy = replace(batch, ref_logps_N=None, row_weight_N=None, entropy_weight_N=None)
    scratch = RowResults.zeros(policy, batch.advantages_N.dtype)
    slope_N = torch.zeros_like(batch.advantages_N)
    row_step.objective_rows(policy, scratch, config, slope_N)
    linear = replace(
        config,
        loss_type="cispo",
        importance_sampling_level="token",
        epsilon_high=1.0,
        delta=None,
        cispo_bounds="trl",
    )
    return replace(batch, advantages_N=-slope_N, policy_weight_N=None), linear


class SinglePass:
    """What the forward pass finds, and the gradients it leaves for the backward pass."""

    def __init__(
        self,
        head: Head,
        batch: TokenBatch,
        plan: RowPlan,
        config: GRPOLossConfig,
        chunk_rows: int,
        row_step: ModuleType,
        grad_buffer: Tensor | None = None,
        grad_scale: float = 1.0,
        in_graph: bool = False,
    ) -> None:
        self.head, self.batch, self.plan, self.config = head, batch, plan, config
        self.size, self.row_step = chunk_rows, row_step
        self.rows = RowResults.zeros(batch, head.accumulator_dtype)
        self.early, self.power = early_and_late(1 / batch.denominator)
        num_chunks = -(-plan.num_gradient // chunk_rows)
        self.gradients = HeadGradients(
            head,
            grad_buffer,
            self.power * grad_scale,
            has_chunks=num_chunks > 0,
            sum_dtype=None if in_graph else head.sum_dtype(num_chunks, head.leaves[1].dtype),
        )
        self.buffers = head.buffers(chunk_rows * head.vocabulary)
        # Computed or not, a masked row must not reach the gradient of the weight: 0 * NaN is NaN.
        self.kept_N = None if plan.skips else batch.mask_N
        weight_N = batch.entropy_weight_N
        self.dentropy_N = None if weight_N is None else -weight_N
        if not config.couples_rows:
            self._row_by_row(batch, config)
        elif needs_whole_sequences(batch, config) or not head.wants_gradient:
            self._sequence_by_sequence()
        else:
            self._row_by_row(*linear_surrogate(batch, config, row_step))
            row_step.objective_rows(batch, self.rows, config, None)
        del self.buffers

    def _row_by_row(self, batch: TokenBatch, config: GRPOLossConfig) -> None:
        for run, with_gradient in ((self.plan.gradient, True), (self.plan.statistics, False)):
            for piece in pieces(run, self.size):
                chunk = self._chunk(piece)
                self.row_step.loss_rows(
                    chunk.logits_CV,
                    chunk.dlogits_CV if with_gradient else None,
                    chunk.tokens,
                    batch,
                    self.rows,
                    config,
                    self.early,
                )
                if with_gradient:
                    self.gradients.add(chunk)

    def _sequence_by_sequence(self) -> None:
        """Know the log-probs of a sequence before the gradient of its first row is written."""
        batch, rows, config = self.batch, self.rows, self.config
        found = Statistics.beside(rows.logps_N, rows.entropy_N)
        dlogps_N = torch.zeros_like(rows.logps_N)
        whole, longer = self.plan.whole_sequences(self.size)
        for piece in pieces(longer, self.size):
            self._statistics(piece, found)
        if longer[0] < longer[1]:
            self.row_step.objective_rows(batch, rows, config, dlogps_N)
        for piece in pieces(longer, self.size):
            self._gradient(self._chunk(piece), found, dlogps_N)
        for piece, sequences in whole:
            chunk = self._statistics(piece, found)
            self.row_step.objective_rows(batch, rows, config, dlogps_N, sequences)
            self._gradient(chunk, found, dlogps_N)
        for piece in pieces(self.plan.statistics, self.size):
            self._statistics(piece, found)
        self.row_step.objective_rows(batch, rows, config, None)

    def _chunk(self, run: Run) -> Chunk:
        return self.head.chunk(run, self.plan.order_N, self.buffers, kept_N=self.kept_N)

    def _statistics(self, run: Run, found: Statistics) -> Chunk:
        chunk, batch = self._chunk(run), self.batch
        self.row_step.statistics_rows(
            chunk.logits_CV, chunk.tokens, batch.ids_N, batch.mask_N, self.config, found
        )
        return chunk

    def _gradient(self, chunk: Chunk, found: Statistics, dlogps_N: Tensor) -> None:
        self.row_step.dlogits_rows(
            chunk.logits_CV, chunk.dlogits_CV, chunk.tokens, self.batch.ids_N, self.batch.mask_N,
            self.config, found, dlogps_N, self.dentropy_N, self.early,
        )  # fmt: skip
        self.gradients.add(chunk)


class KnownGradients(torch.autograd.Function):
    """A loss whose gradients were computed with it; backward scales them by the upstream."""

    @staticmethod
    def forward(ctx, loss, hidden, weight, bias, power, gradients):
        ctx.save_for_backward(power, gradients.dhidden, gradients.dweight_VH, gradients.dbias_V)
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        power, *gradients = ctx.saved_tensors
        scale = upstream * power
        # Of a graph that is kept, backward may come again; else nobody will read these again.
        once = not torch._C._autograd._get_current_graph_task_keep_graph()  # pyright: ignore
        found = [
            scaled(x, scale, dtype, in_place=once)
            for x, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        return None, *found, None, None
