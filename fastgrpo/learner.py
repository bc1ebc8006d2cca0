"""Optimisation steps: a batch in, an updated policy and the step's metrics out."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from shutil import rmtree

from torch import Tensor

from .bad_steps import (
    BadStep,
    BadSteps,
    forget_other_weights,
    random_states,
    save_bad_step,
    set_random_states,
)
from .batch import Batch
from .checkpoint import save_checkpoint
from .config import TrainConfig
from .distributed import World
from .durable import WriteError, writing
from .entropy_bonus import EntropyBonus
from .gradient import Passes, Step
from .loss import batch_logps, importance_metrics, sampler_correction
from .metrics import StepMetrics, peak_memory_gib
from .model import Policy
from .optim import build_optimizer, clip_gradients
from .ref_model import Reference
from .shortage import free_memory, shortage
from .token_budget import TokenBudget
from .trace import Finding, first_bad


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
        self.budget = TokenBudget(config, world, packed=policy.packed)
        self.bad_steps = BadSteps(config)
        self.run_directory: Path | None = None
        """Where steps that are not taken are kept; None: they are not."""
        self._problems: list[str] = []

    def passes(self, batch: Batch) -> Passes:
        """Divide a batch among the ranks, and what falls to each among its passes."""
        return self.budget.passes(batch)

    def add_logps(self, batch: Batch, *, is_policy: bool = True) -> dict[str, float]:
        """Add the log-probs the loss will need beside the policy's own, as far as it will.

        Args:
            batch: completions of the policy as it is.
            is_policy: the very weights that are trained have sampled them.

        Returns:
            Metrics of the difference between sampler and policy, if they are not the same.
        """
        config = self.config
        moves = config.optimizer_steps_per_generation > 1
        if moves or not is_policy:
            batch.old_logps = self._logps(self.policy, batch)
        if not is_policy and config.vllm_importance_sampling_correction:
            batch.importance_weights = sampler_correction(batch, config)
        if self.reference is not None:
            with self.reference.ready() as reference:
                batch.ref_logps = self._logps(reference, batch)
        return importance_metrics(batch, self.passes(batch).rows)

    def _logps(self, policy: Policy, batch: Batch) -> Tensor:
        def run(passes: Passes, own: Iterable[list[int]]) -> Tensor:
            return batch_logps(policy, batch, own, self.config.temperature)

        return self.world.sum_(self.budget.run(batch, run))

    def optimise(self, batch: Batch, step: int = 0) -> dict[str, float]:
        """Take one optimisation step on a batch, a micro-batch at a time; return its metrics.

        A step whose numbers have gone wrong is not taken: parameters and the states of the
        optimizer stay as they are. The schedule goes on, so that the learning rate of a step does
        not depend on those before it.

        Args:
            batch: of the step.
            step: its number, under which it is kept if it is not taken.

        Raises:
            FloatingPointError: too many steps in a row could not be taken.
            torch.OutOfMemoryError: memory ran out, and smaller passes are no way out.
        """
        config, policy, world = self.config, self.policy, self.world
        random, loss = random_states(policy.device), self.entropy_bonus.loss
        keep = config.num_iterations > 1 and batch.old_logps is None

        def run(passes: Passes, own: Iterable[list[int]]) -> tuple[Step, StepMetrics, Tensor]:
            set_random_states(random, policy.device)
            step = Step(policy, config, loss, batch, passes, world)
            return step, *step.accumulate(own, keep=keep)

        parts, totals, logps = self.budget.run(batch, run)
        # All ranks go by what the first has found.
        grad_norm = world.gather(clip_gradients(policy.model, config.max_grad_norm))[0]
        metrics = totals.result(world.gather)
        learning_rate = float(self.scheduler.get_last_lr()[0])
        reason = self.bad_steps.reason(metrics["loss"], grad_norm)
        if reason is None:
            self.bad_steps.took(grad_norm)
            if keep:
                batch.old_logps = world.sum_(logps)  # the policy as it was, at no cost
            self.optimizer.step()
            self.entropy_bonus.update(metrics.get("entropy"))
        else:
            self._skip(step, reason, (metrics["loss"], grad_norm), parts, random)
        with warnings.catch_warnings():
            # PyTorch's, of a run whose first step was not taken.
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            self.scheduler.step()
        self.optimizer.zero_grad()  # frees the gradients while sampling
        return self._metrics(batch, parts.passes, metrics) | {
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
        }

    def _skip(
        self,
        number: int,
        reason: str,
        values: tuple[float, float],
        step: Step,
        random: dict[str, Tensor],
    ) -> None:
        """Find out where a step went wrong, keep it, and say so.

        Raises:
            FloatingPointError: there were too many.
        """
        bad_steps, world = self.bad_steps, self.world
        bad_steps.skip()
        self.optimizer.zero_grad()
        set_random_states(random, self.policy.device)
        finding, where = self._find(step)
        said = reason + where
        if self.run_directory is not None:
            name = f"step-{number}"
            begins = bad_steps.weights is None
            bad = BadStep(
                number,
                reason,
                *values,
                bad_steps.limit,
                finding,
                step.passes.of_ranks,
                self.entropy_bonus.state_dict(),
                name if bad_steps.weights is None else bad_steps.weights,
            )
            folder = self.run_directory / "bad_steps" / name
            everyone = world.gather(random)
            weights = self.policy.state_dict(self.policy.model) if begins else {}
            write = partial(self._write, folder, bad, step.batch, everyone, weights)
            try:
                kept = world.on_main(write)
            except WriteError as error:  # no reason to end the run
                said += f"; it could not be kept: {error}"
            else:
                bad_steps.weights = bad.weights
                said += f"; `fastgrpo replay {folder}` runs it again{kept}"
        bad_steps.check(f"step {number}: {said}", finding)
        self._problems.append(f"step {number} was skipped, nothing has changed: {said}")

    def _find(self, step: Step) -> tuple[Finding | None, str]:
        """Return where a step went wrong, and the same in words; it may not be known.

        Raises:
            torch.OutOfMemoryError: looking took too much in one of several processes.
        """
        try:
            finding = first_bad(step)
            return finding, f"; {finding}" if finding else ""
        except Exception as error:
            said = shortage(error)
            if said is None or self.world.size > 1:  # the others are in the middle of a look
                raise
        # The exception is gone here, and with it the frames that held the pass.
        self.optimizer.zero_grad()
        free_memory()
        return None, f"; there was not enough memory to find out where ({said})"

    def _write(
        self,
        folder: Path,
        bad: BadStep,
        batch: Batch,
        random: list[dict[str, Tensor]],
        weights: dict[str, Tensor],
    ) -> str:
        """Write a step that is not taken; return how much its parameters take, if they are new."""
        policy, place = self.policy, folder / "weights"
        try:
            with writing(folder):
                save_bad_step(folder, bad, batch, random)
                if not weights:
                    return ""
                save_checkpoint(place, policy.model, policy.tokenizer, state_dict=weights)
                forget_other_weights(folder)
        except WriteError:
            rmtree(folder, ignore_errors=True)
            raise
        size = sum(file.stat().st_size for file in place.iterdir())
        return f" (its weights take {size / 2**20:,.1f} MiB)"

    def take_problems(self) -> list[str]:
        """Return what went wrong since the last time, a sentence each."""
        problems, self._problems = self.budget.take_problems() + self._problems, []
        return problems

    def _metrics(self, batch: Batch, passes: Passes, metrics: dict[str, float]) -> dict[str, float]:
        """Return what all ranks have measured in a step, with what is known of it beside."""
        metrics = metrics | {
            "num_sequences": len(batch),
            "num_computed_sequences": len(passes.rows),
            "skipped_steps": self.bad_steps.skipped,
        }
        if self.world.size > 1:
            metrics["parallel/imbalance"] = passes.imbalance
        if self.config.use_adaptive_entropy:
            metrics["entropy_coef"] = self.entropy_bonus.coefficient
        if self.budget.lowered:
            metrics["memory/max_tokens_per_microbatch"] = self.budget.max_tokens or 0
        peaks = self.world.gather(peak_memory_gib(self.policy.device))
        return metrics | {"memory/peak_gib": max(peaks)}
