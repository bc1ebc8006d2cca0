"""Optimisation steps: a batch in, an updated policy and the step's metrics out.

Every rank has the whole batch and runs the passes that fall to it; a rank that has fewer than
another runs one without effect in their place, since all take part in all collectives.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .batch import Batch, micro_batches
from .config import TrainConfig
from .distributed import World, deal
from .entropy_bonus import EntropyBonus
from .loss import (
    SAMPLING_DIFFERENCE,
    batch_logps,
    batch_loss,
    importance_metrics,
    sampler_correction,
    sampling_difference,
)
from .metrics import StepMetrics, peak_memory_gib, sequence_means
from .model import Policy
from .optim import build_optimizer, clip_gradients
from .ref_model import Reference


@dataclass(frozen=True)
class Passes:
    """Which rank runs which sequences of a batch in which pass."""

    of_ranks: list[list[list[int]]]
    imbalance: float
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


class Learner:
    """The policy, its reference and its optimizer, and the steps these take."""

    def __init__(self, config: TrainConfig, policy: Policy, world: World, num_steps: int) -> None:
        """Make the optimizer and the reference.

        Args:
            config: the run.
            policy: what is trained.
            world: who else does.
            num_steps: optimisation steps of the run.

        Raises:
            ValueError: see `build_optimizer`.
        """
        self.config, self.policy, self.world = config, policy, world
        self.optimizer, self.scheduler = build_optimizer(policy.model, config, num_steps)
        self.entropy_bonus = EntropyBonus(config)
        self.reference = Reference(policy, config) if config.loss.beta > 0 else None

    def passes(self, batch: Batch) -> Passes:
        """Divide a batch among the ranks, and what falls to each among its passes."""
        config, world = self.config, self.world
        rows = list(range(len(batch)))
        # Means and quantiles of a micro-batch depend on all that is in it.
        whole = config.loss.loss_type == "bnpo" or config.top_entropy_quantile < 1
        if config.filter_zero_advantages and not (whole or config.use_adaptive_entropy):
            rows = batch.contributing(config.loss)

        def divide(rows: list[int]) -> list[list[int]]:
            passes = micro_batches(
                [batch.lengths[i] for i in rows],
                size=config.per_device_train_batch_size,
                max_tokens=config.max_tokens_per_microbatch,
                padded=not self.policy.packed,
            )
            return [[rows[i] for i in each] for each in passes]

        if whole:  # the very micro-batches of one process
            passes = divide(rows)
            of_ranks = [passes[rank :: world.size] for rank in range(world.size)]
        else:
            hands = deal([batch.lengths[i] for i in rows], world.size)
            of_ranks = [divide([rows[i] for i in hand]) for hand in hands]
        loads = [sum(batch.lengths[i] for each in passes for i in each) for passes in of_ranks]
        return Passes(of_ranks, max(loads) * world.size / sum(loads) if any(loads) else 1.0)

    def add_logps(self, batch: Batch, *, is_policy: bool = True) -> dict[str, float]:
        """Add the log-probs the loss will need beside the policy's own, as far as it will.

        Args:
            batch: completions of the policy as it is.
            is_policy: the very weights that are trained have sampled them.

        Returns:
            Metrics of the difference between sampler and policy, if they are not the same.
        """
        config, temperature = self.config, self.config.temperature
        passes = self.passes(batch)
        own = passes.of(self.world.rank)
        moves = config.optimizer_steps_per_generation > 1
        if moves or not is_policy:
            logps = batch_logps(self.policy, batch, own, temperature)
            batch.old_logps = self.world.sum_(logps)
        if not is_policy and config.vllm_importance_sampling_correction:
            batch.importance_weights = sampler_correction(batch, config)
        if self.reference is not None:
            with self.reference.ready() as reference:
                logps = batch_logps(reference, batch, own, temperature)
            batch.ref_logps = self.world.sum_(logps)
        return importance_metrics(batch, passes.rows)

    def optimise(self, batch: Batch) -> dict[str, float]:
        """Take one optimisation step on a batch, a micro-batch at a time; return its metrics."""
        config, policy, world = self.config, self.policy, self.world
        model, loss = policy.model, self.entropy_bonus.loss
        totals = StepMetrics(sequence_means(loss))
        totals.add({"loss": 0.0, **dict.fromkeys(SAMPLING_DIFFERENCE, 0.0)}, weight=0)  # no signal
        with policy.packing():
            model.train()
            self.optimizer.zero_grad()  # also of what came before, a warm start for example
            passes = self.passes(batch)
            share = 1 / passes.num if config.loss.loss_type == "bnpo" else 1.0
            keep = config.num_iterations > 1 and batch.old_logps is None
            logps = torch.zeros_like(batch.sampling_logps)
            for i, rows in enumerate(passes.of(world.rank), 1):
                policy.begin_pass(last=i == passes.rounds)
                micro = batch.select(rows) if rows else batch.without_effect()
                output = batch_loss(
                    policy, micro, loss, batch, options=config, num_passes=passes.num
                )
                part = output.loss * share
                # FSDP2 averages the gradients of the ranks, and their sum is the step's.
                (part * world.size).backward()
                if not rows:
                    continue
                if keep:
                    index = batch.tokens_of(rows).to(logps.device, non_blocking=True)
                    logps[index] = output.logps
                report = {"loss": part, **sampling_difference(output.logps, micro)}
                totals.add(output.metrics | report, weight=micro.num_completion_tokens)
            policy.reshard()  # what passes without a gradient have left gathered as well
            if not passes.num:  # a gradient of 0, which momentum outlives, is not no gradient
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.grad = torch.zeros_like(parameter)
            if keep:
                batch.old_logps = world.sum_(logps)  # the policy as it was, at no cost
            grad_norm = clip_gradients(model, config.max_grad_norm)
            learning_rate = float(self.scheduler.get_last_lr()[0])
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()  # frees the gradients while sampling
        return self._metrics(batch, passes, totals) | {
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
        }

    def _metrics(self, batch: Batch, passes: Passes, totals: StepMetrics) -> dict[str, float]:
        """Return what all ranks have measured in a step together."""
        gather = self.world.gather
        metrics = totals.result(gather)
        metrics |= {"num_sequences": len(batch), "num_computed_sequences": len(passes.rows)}
        if self.world.size > 1:
            metrics["parallel/imbalance"] = passes.imbalance
        self.entropy_bonus.update(metrics.get("entropy"))
        if self.config.use_adaptive_entropy:
            metrics["entropy_coef"] = self.entropy_bonus.coefficient
        return metrics | {"memory/peak_gib": max(gather(peak_memory_gib(self.policy.device)))}
