"""The loop: sample, score, compare within the group, fused loss, step, log.

Left out on purpose: several GPUs, asynchronous rollouts, resuming. A run goes from its first step
to its last on one device.

P prompts, G completions a prompt, B = P * G completions, K reward functions.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import torch

from .adapters import base_trained
from .assets import Assets, load_assets
from .batch import Batch, micro_batches
from .checkpoint import name_base, save_checkpoint
from .config import TrainConfig, is_due
from .console import Console
from .entropy_bonus import EntropyBonus
from .evaluate import Evaluator, evaluator_of
from .experience import Collector
from .journal import Journal
from .loss import (
    SAMPLING_DIFFERENCE,
    batch_logps,
    batch_loss,
    importance_metrics,
    sampler_correction,
    sampling_difference,
)
from .metrics import StepMetrics, peak_memory_gib, sequence_means, timed
from .optim import build_optimizer, clip_gradients
from .ref_model import Reference
from .rollout_fn import RolloutFunction
from .run_directory import RunDirectory
from .samples import Sampler
from .setup import (
    build_judges,
    build_rollout,
    build_rollout_fn,
    check_datasets,
    load_policy,
    notes,
    prepare,
)


class Trainer:
    """GRPO on one device: prompts in, a trained model out."""

    def __init__(
        self,
        config: TrainConfig,
        assets: Assets | None = None,
        *,
        reward_funcs: Sequence[Any] | Callable[..., Any] | None = None,
        rollout_fn: RolloutFunction | None = None,
        run_name: str = "train",
        console: Console | None = None,
    ) -> None:
        """Load everything, check it, and only then make the run directory.

        Args:
            config: the run.
            assets: your own model, tokenizer and prompts; None: what the configuration names.
            reward_funcs: functions, or reward models, in place of the configuration's names.
            rollout_fn: a function in place of the configuration's name.
            run_name: how a new directory under `runs/` is called.
            console: where progress is shown.

        Raises:
            ValueError: something does not exist or does not fit; the message says what to do.
        """
        prepare(config)
        self.config = config
        console = console or Console(logging_steps=config.logging_steps)
        self.judges = build_judges(config, reward_funcs)
        with ExitStack() as undo:
            undo.callback(self.judges.close)
            self._build(config, assets or load_assets(config), rollout_fn, console)
            given = {
                "reward_funcs": None if reward_funcs is None else self.judges.names,
                "rollout_fn": getattr(rollout_fn, "__name__", None),
            }
            self.run = RunDirectory(config, run_name, given)
            undo.callback(self.run.discard)
            self.journal = Journal(config, self.run, console, self.judges.names)
            undo.pop_all()  # nothing has gone wrong

    def _build(
        self,
        config: TrainConfig,
        assets: Assets,
        rollout_fn: RolloutFunction | None,
        console: Console,
    ) -> None:
        """Make the parts of the loop, and check that they fit together."""
        self.assets, self.train_dataset = assets, assets.train_dataset
        self.policy = load_policy(config, assets)
        self.sampler = Sampler(
            config,
            self.policy,
            build_rollout(config, self.policy, console.message),
            self.judges,
            build_rollout_fn(config, rollout_fn),
        )
        check_datasets(config, assets, self.sampler)
        self.reference = Reference(self.policy, config) if config.loss.beta > 0 else None
        self.collector = Collector(config, self.sampler, self.train_dataset)
        self.test = evaluator_of(config, self.sampler, assets.test_dataset)
        self.num_steps = config.num_steps(len(self.train_dataset))
        self.epoch = config.steps_per_epoch(len(self.train_dataset))
        self.optimizer, self.scheduler = build_optimizer(self.policy.model, config, self.num_steps)
        self.entropy_bonus = EntropyBonus(config)
        self.sampler.state.max_steps = self.num_steps
        self.tokens_seen = 0

    def train(self) -> dict[str, Any]:
        """Run all steps and return what `summary.json` holds."""
        config, journal, start = self.config, self.journal, time.perf_counter()
        with closing(self.judges), journal, journal.console:
            for note in notes(config, self.policy):
                journal.console.message(note)
            self.warm_start()
            name_base(self.run.path / "base", self.policy.model, self.policy.tokenizer)
            before = self.test_accuracy("before")
            journal.console.phase("train", self.num_steps)
            if config.eval_on_start and self.test is not None:
                journal.step({"step": 0} | self.test.metrics(), fresh=False)
            step = 0
            while step < self.num_steps:
                times: dict[str, float] = {}
                batches, metrics = self.collect(step + 1, times)
                # Each batch of the generation once, then all of them again.
                for batch in batches * config.num_iterations:
                    if step == self.num_steps:
                        break
                    step += 1
                    self.finish_step(step, batch, metrics | self.optimise(batch, times), times)
                    times = {}
            self.save(self.run.path / "final")
            after = self.test_accuracy("after")
            facts = {"steps": self.num_steps, "num_tokens": self.tokens_seen}
            return journal.finish(before, after, **facts, seconds=time.perf_counter() - start)

    def finish_step(
        self, step: int, batch: Batch, metrics: dict[str, float], times: dict[str, float]
    ) -> None:
        """Do what follows an optimisation step: measure, log, save."""
        config = self.config
        self.sampler.state.global_step = step
        if self.reference is not None:
            self.reference.sync(step)
        every, last = config.eval_steps or config.logging_steps, step == self.num_steps
        measures = is_due(config.eval_strategy, every, step, self.epoch)
        measures |= last and config.eval_strategy != "no"  # as in transformers, where the last
        saves = is_due(config.save_strategy, config.save_steps, step, self.epoch)
        saves |= last and config.save_strategy == "epoch"  # step ends an epoch too
        if self.test is not None and measures:
            metrics = metrics | self.test.metrics()
        self.log(step, batch, metrics, times)
        if saves:
            self.save(self.run.path / "checkpoints" / f"step-{step}")
            self.run.remove_old_checkpoints(config.save_total_limit)

    def warm_start(self) -> None:
        """Teach the untrained model of a task until GRPO has something to reinforce."""
        validation = self.assets.validation_dataset
        if self.assets.warm_start is None or validation is None:
            return
        console = self.journal.console
        console.phase("warm start", None)
        with base_trained(self.policy.model):
            steps = self.assets.warm_start(
                accuracy=Evaluator(self.config, self.sampler, validation).accuracy,
                on_step=lambda step, loss: console.step({"step": step, "loss": loss}),
            )
        console.message(f"warm start: {steps} supervised steps")
        if self.reference is not None:  # GRPO's start, not the untrained model
            self.reference.renew()

    def collect(self, step: int, times: dict[str, float]) -> tuple[list[Batch], dict[str, float]]:
        """Sample and score completions; return the batch of each optimisation step, and metrics."""
        config = self.config
        parts = config.optimizer_steps_per_generation
        found = self.collector.collect(config.prompts_per_step * parts, times)
        with timed(times, "logps"):
            self.add_logps(found.batch)
        self.tokens_seen += found.num_tokens
        serves = range(step, step + parts * config.num_iterations)
        logged = any(s == 1 or s % config.logging_steps == 0 for s in serves)
        self.journal.generation(step, found, logged=logged)
        size = config.completions_per_step
        batches = [found.batch.select(range(i * size, (i + 1) * size)) for i in range(parts)]
        seen = [row for rows in self.passes(found.batch) for row in rows]
        return batches, found.metrics | importance_metrics(found.batch, seen)

    def passes(self, batch: Batch) -> list[list[int]]:
        """Return the sequences of each forward and backward pass of a batch."""
        config = self.config
        rows = list(range(len(batch)))
        # Means and quantiles of a micro-batch depend on all that is in it.
        whole = config.loss.loss_type == "bnpo" or config.top_entropy_quantile < 1
        if config.filter_zero_advantages and not (whole or config.use_adaptive_entropy):
            rows = batch.contributing(config.loss)
        passes = micro_batches(
            [batch.lengths[i] for i in rows],
            size=config.per_device_train_batch_size,
            max_tokens=config.max_tokens_per_microbatch,
            padded=not self.policy.packed,
        )
        return [[rows[i] for i in each] for each in passes]

    def add_logps(self, batch: Batch) -> None:
        """Add the log-probs the loss will need beside the policy's own, as far as it will."""
        config, temperature = self.config, self.config.temperature
        moves = config.optimizer_steps_per_generation > 1
        is_policy = self.sampler.rollout.is_policy
        if moves or not is_policy:
            batch.old_logps = batch_logps(self.policy, batch, self.passes(batch), temperature)
        if not is_policy and config.vllm_importance_sampling_correction:
            batch.importance_weights = sampler_correction(batch, config)
        if self.reference is not None:
            with self.reference.ready() as reference:
                batch.ref_logps = batch_logps(reference, batch, self.passes(batch), temperature)

    def optimise(self, batch: Batch, times: dict[str, float]) -> dict[str, float]:
        """Take one optimisation step on a batch, a micro-batch at a time."""
        config, model, loss = self.config, self.policy.model, self.entropy_bonus.loss
        totals = StepMetrics(sequence_means(loss))
        totals.add({"loss": 0.0, **dict.fromkeys(SAMPLING_DIFFERENCE, 0.0)}, weight=0)  # no signal
        with timed(times, "train"), self.policy.packing():
            model.train()
            self.optimizer.zero_grad()  # also of what came before, a warm start for example
            passes = self.passes(batch)
            share = 1 / len(passes) if config.loss.loss_type == "bnpo" else 1.0
            keep = config.num_iterations > 1 and batch.old_logps is None
            logps = torch.zeros_like(batch.sampling_logps)
            for rows in passes:
                micro = batch.select(rows)
                output = batch_loss(
                    self.policy, micro, loss, batch, options=config, num_passes=len(passes)
                )
                part = output.loss * share
                part.backward()
                if keep:
                    index = batch.tokens_of(rows).to(logps.device, non_blocking=True)
                    logps[index] = output.logps
                report = {"loss": part, **sampling_difference(output.logps, micro)}
                totals.add(output.metrics | report, weight=micro.num_completion_tokens)
            if not passes:  # a gradient of 0, which AdamW's momentum outlives, is not no gradient
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.grad = torch.zeros_like(parameter)
            if keep:
                batch.old_logps = logps  # the policy as it was, at no cost
            grad_norm = clip_gradients(model, config.max_grad_norm)
            learning_rate = float(self.scheduler.get_last_lr()[0])
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()  # frees the gradients while sampling
        sequences = {"num_sequences": len(batch), "num_computed_sequences": sum(map(len, passes))}
        rates = {"grad_norm": grad_norm, "learning_rate": learning_rate}
        metrics = totals.result()
        self.entropy_bonus.update(metrics.get("entropy"))
        if config.use_adaptive_entropy:
            rates["entropy_coef"] = self.entropy_bonus.coefficient
        return metrics | sequences | rates

    def log(
        self, step: int, batch: Batch, metrics: dict[str, float], times: dict[str, float]
    ) -> None:
        """Write a step's line to metrics.jsonl and show it."""
        seconds = sum(times.values())
        self.journal.warn(step, *self.sampler.take_problems())
        metrics = {"step": step, **metrics, "num_tokens": self.tokens_seen, "step_time": seconds}
        metrics |= {f"time/{name}": value for name, value in times.items()}
        metrics["tokens_per_second"] = batch.num_completion_tokens / seconds
        metrics["memory/peak_gib"] = peak_memory_gib(self.policy.device)
        self.journal.step(metrics, fresh="generate" in times)

    def test_accuracy(self, when: str) -> dict[str, float]:
        """Return the first reward function's mean on the test split, greedy and sampled."""
        if self.test is None:
            return {}
        self.journal.console.phase(f"test {when} training", None)
        found = {"greedy": self.test.accuracy(temperature=0.0), "sampled": self.test.accuracy()}
        self.journal.warn(self.sampler.state.global_step, *self.sampler.take_problems())
        return found

    def save(self, path: Path) -> None:
        """Write a Hugging Face checkpoint."""
        save_checkpoint(path, self.policy.model, self.policy.tokenizer)
