"""From a batch to the gradient of an optimisation step, a micro-batch at a time.

Every rank has the whole batch and runs the passes that fall to it; a rank that has fewer than
another runs one without effect in their place, since all take part in all collectives.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fastgrpo_kernels import GRPOLossConfig

from .batch import Batch, micro_batches
from .config import TrainConfig
from .distributed import World, deal
from .loss import SAMPLING_DIFFERENCE, batch_loss, sampling_difference
from .metrics import StepMetrics, sequence_means
from .model import Policy


@dataclass(frozen=True)
class Passes:
    """Which rank runs which sequences of a batch in which pass."""

    of_ranks: list[list[list[int]]]
    imbalance: float = 1.0
    """Tokens of the rank that has most, over their mean."""

    @property
    def rounds(self) -> int:
        """Passes that every rank runs, those without effect included."""
        return max(map(len, self.of_ranks))

    @property
    def num(self) -> int:
        """Passes with sequences, of all ranks."""
        return sum(map(len, self.of_ranks))

    @property
    def rows(self) -> list[int]:
        """All sequences that are run."""
        return [row for passes in self.of_ranks for rows in passes for row in rows]

    def of(self, rank: int) -> list[list[int]]:
        """Return the passes of a rank; those without effect are empty."""
        own = self.of_ranks[rank]
        return own + [[] for _ in range(self.rounds - len(own))]


def depends_on_passes(config: TrainConfig) -> bool:
    """Say whether means and quantiles of a micro-batch depend on all that is in it."""
    return config.loss.loss_type == "bnpo" or config.top_entropy_quantile < 1


def divide(
    batch: Batch, config: TrainConfig, world: World, *, max_tokens: int | None, packed: bool
) -> Passes:
    """Divide a batch among the ranks, and what falls to each among its passes.

    Args:
        batch: of the whole optimisation step, or of several.
        config: the run.
        world: its processes.
        max_tokens: tokens a pass may have; None: it has so many sequences.
        packed: sequences are not padded to the longest.
    """
    rows = list(range(len(batch)))
    whole = depends_on_passes(config)
    if config.filter_zero_advantages and not (whole or config.use_adaptive_entropy):
        rows = batch.contributing(config.loss)

    def of_some(rows: list[int]) -> list[list[int]]:
        passes = micro_batches(
            [batch.lengths[i] for i in rows],
            size=config.per_device_train_batch_size,
            max_tokens=max_tokens,
            padded=not packed,
        )
        return [[rows[i] for i in each] for each in passes]

    if whole:  # the very micro-batches of one process
        passes = of_some(rows)
        of_ranks = [passes[rank :: world.size] for rank in range(world.size)]
    else:
        hands = deal([batch.lengths[i] for i in rows], world.size)
        of_ranks = [of_some([rows[i] for i in hand]) for hand in hands]
    loads = [sum(batch.lengths[i] for each in passes for i in each) for passes in of_ranks]
    return Passes(of_ranks, max(loads) * world.size / sum(loads) if any(loads) else 1.0)


@dataclass(frozen=True)
class Share:
    """What a pass adds to the loss of its step."""

    rows: list[int]
    """Its sequences; of a pass without effect there are none."""
    loss: Tensor
    """Its share of the step's loss, with its graph."""
    logps: Tensor  # (tokens of its sequences,)
    metrics: Mapping[str, Tensor]
    num_tokens: int
    """That count."""


class Step:
    """The passes of one optimisation step that fall to this rank."""

    def __init__(
        self,
        policy: Policy,
        config: TrainConfig,
        loss: GRPOLossConfig,
        batch: Batch,
        passes: Passes,
        world: World,
    ) -> None:
        """Bind what the passes have in common.

        Args:
            policy: what is trained.
            config: the run.
            loss: the mathematics of this step's loss.
            batch: of the whole step, all ranks.
            passes: who runs what.
            world: the ranks.
        """
        self.policy, self.config, self.loss, self.batch = policy, config, loss, batch
        self.passes, self.world = passes, world

    def forward(self, rows: list[int], *, last: bool) -> Share:
        """Run a pass, in the policy's context `packing`."""
        self.policy.begin_pass(last=last)
        micro = self.batch.select(rows) if rows else self.batch.without_effect()
        num = self.passes.num
        output = batch_loss(
            self.policy, micro, self.loss, self.batch, options=self.config, num_passes=num
        )
        part = output.loss * (1 / num if self.loss.loss_type == "bnpo" else 1.0)
        report = {"loss": part, **sampling_difference(output.logps, micro)}
        return Share(rows, part, output.logps, output.metrics | report, micro.num_completion_tokens)

    def backward(self, share: Share) -> None:
        """Add a pass's gradient to those of the parameters."""
        # FSDP2 averages the gradients of the ranks, and their sum is the step's.
        (share.loss * self.world.size).backward()

    def accumulate(
        self, own: Iterable[list[int]], *, keep: bool = False
    ) -> tuple[StepMetrics, Tensor]:
        """Leave this rank's gradient with the parameters; what they had before is gone.

        Args:
            own: the passes of this rank.
            keep: the log-probs.

        Returns:
            What the passes have measured, and the log-probs (N,) of the tokens that were run, 0
            where they were not kept.
        """
        policy, model = self.policy, self.policy.model
        totals = StepMetrics(sequence_means(self.loss))
        totals.add({"loss": 0.0, **dict.fromkeys(SAMPLING_DIFFERENCE, 0.0)}, weight=0)  # no signal
        logps = torch.zeros_like(self.batch.sampling_logps)
        model.zero_grad()  # also of what came before, a warm start for example
        with policy.packing():
            model.train()
            for i, rows in enumerate(own, 1):
                share = self.forward(rows, last=i == self.passes.rounds)
                self.backward(share)
                if rows:
                    totals.add(share.metrics, weight=share.num_tokens)
                if rows and keep:
                    index = self.batch.tokens_of(rows).to(logps.device, non_blocking=True)
                    logps[index] = share.logps
            policy.reshard()  # what passes without a gradient have left gathered as well
        if not self.passes.num:  # a gradient of 0, which momentum outlives, is not no gradient
            for parameter in model.parameters():
                if parameter.requires_grad:  # and of what is no number it is none either
                    parameter.grad = parameter.detach() * 0
        return totals, logps
