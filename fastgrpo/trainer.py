"""The loop: sample, score, compare within the group, fused loss, step, log.

Left out on purpose: several GPUs, asynchronous rollouts, resuming. A run goes from its first step
to its last on one device.

P prompts, G completions a prompt, B = P * G completions, K reward functions.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import set_seed

from .adapters import base_trained
from .assets import Assets, load_assets
from .batch import Batch, micro_batches
from .checkpoint import name_base, save_checkpoint
from .config import TrainConfig, is_due
from .console import Console
from .data import check_prompts
from .evaluate import evaluate
from .experience import Collector
from .health import Health
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
from .rewards import check_columns, load_rewards
from .rollout import SamplingParams
from .run_directory import RunDirectory, check_free
from .setup import build_rollout, check_installed, load_policy, notes

if TYPE_CHECKING:
    from datasets import Dataset


class Trainer:
    """GRPO on one device: prompts in, a trained model out."""

    def __init__(
        self,
        config: TrainConfig,
        assets: Assets | None = None,
        *,
        run_name: str = "train",
        console: Console | None = None,
    ) -> None:
        """Load everything, check it, and only then make the run directory.

        Args:
            config: the run.
            assets: your own model, tokenizer and prompts; None: what the configuration names.
            run_name: how a new directory under `runs/` is called.
            console: where progress is shown.

        Raises:
            ValueError: something does not exist or does not fit; the message says what to do.
        """
        if config.cpu_threads is not None:
            torch.set_num_threads(config.cpu_threads)
        set_seed(config.seed)
        self.config = config
        self.console = console or Console(logging_steps=config.logging_steps)
        check_installed(config)
        check_free(config.output_dir)  # before the minutes that a large model takes to load
        self.rewards = load_rewards(config.reward_funcs, config.reward_weights)
        self.assets = assets = assets or load_assets(config)
        self.train_dataset, self.test_dataset = assets.train_dataset, assets.test_dataset
        datasets = [x for x in (self.train_dataset, self.test_dataset) if x is not None]
        for dataset in datasets:
            check_columns(self.rewards, dataset.column_names)
        self.policy = load_policy(config, assets)
        limits = {"the model": self.policy.positions} | config.limits
        for dataset in datasets:
            check_prompts(
                dataset,
                assets.tokenizer,
                system_prompt=config.system_prompt,
                max_completion_length=config.max_completion_length,
                limits=limits,
            )
        self.reference = Reference(self.policy, config) if config.loss.beta > 0 else None
        self.rollout = build_rollout(config, self.policy, self.console.message)
        self.collector = Collector(
            config, self.policy, self.rollout, self.rewards, self.train_dataset
        )
        self.num_steps = config.num_steps(len(self.train_dataset))
        self.optimizer, self.scheduler = build_optimizer(self.policy.model, config, self.num_steps)
        self.tokens_seen = 0
        self.health = Health()

        self.run = RunDirectory(config, run_name)

    def train(self) -> dict[str, Any]:
        """Run all steps and return what `summary.json` holds."""
        config, start = self.config, time.perf_counter()
        with self.console:
            for note in notes(config, self.policy):
                self.console.message(note)
            self.warm_start()
            name_base(self.run.path / "base", self.policy.model, self.policy.tokenizer)
            before = self.test_accuracy("before")
            self.console.phase("train", self.num_steps)
            step, epoch = 0, config.steps_per_epoch(len(self.train_dataset))
            while step < self.num_steps:
                times: dict[str, float] = {}
                batches, metrics = self.collect(step + 1, times)
                # Each batch of the generation once, then all of them again.
                for batch in batches * config.num_iterations:
                    if step == self.num_steps:
                        break
                    step += 1
                    self.log(step, batch, metrics | self.optimise(batch, times), times)
                    if self.reference is not None:
                        self.reference.sync(step)
                    if is_due(config.save_strategy, config.save_steps, step, epoch):
                        self.save(self.run.path / "checkpoints" / f"step-{step}")
                    times = {}
            self.save(self.run.path / "final")
            after = self.test_accuracy("after")
        return self.finish(before, after, time.perf_counter() - start)

    def warm_start(self) -> None:
        """Teach the untrained model of a task until GRPO has something to reinforce."""
        validation = self.assets.validation_dataset
        if self.assets.warm_start is None or validation is None:
            return
        self.console.phase("warm start", None)
        with base_trained(self.policy.model):
            steps = self.assets.warm_start(
                accuracy=lambda: self.measure(validation, self.collector.sampling),
                on_step=lambda step, loss: self.console.step({"step": step, "loss": loss}),
            )
        self.console.message(f"warm start: {steps} supervised steps")
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
        steps = range(step, step + parts * config.num_iterations)  # that these completions serve
        if any(s == 1 or s % config.logging_steps == 0 for s in steps):
            count = config.num_completions_to_log
            self.run.add_completions(
                step,
                found.samples[:count],
                [reward.name for reward in self.rewards],
                found.advantages[:count].tolist(),
            )
        size = config.completions_per_step
        batches = [found.batch.select(range(i * size, (i + 1) * size)) for i in range(parts)]
        seen = [row for rows in self.passes(found.batch) for row in rows]
        return batches, found.metrics | importance_metrics(found.batch, seen)

    def passes(self, batch: Batch) -> list[list[int]]:
        """Return the sequences of each forward and backward pass of a batch."""
        config = self.config
        rows = list(range(len(batch)))
        # The means of bnpo are those of micro-batches: there nothing may be left out.
        if config.filter_zero_advantages and config.loss.loss_type != "bnpo":
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
        if moves or not self.rollout.is_policy:
            batch.old_logps = batch_logps(self.policy, batch, self.passes(batch), temperature)
        if not self.rollout.is_policy and config.vllm_importance_sampling_correction:
            batch.importance_weights = sampler_correction(batch, config)
        if self.reference is not None:
            with self.reference.ready() as reference:
                batch.ref_logps = batch_logps(reference, batch, self.passes(batch), temperature)

    def optimise(self, batch: Batch, times: dict[str, float]) -> dict[str, float]:
        """Take one optimisation step on a batch, a micro-batch at a time."""
        config, model = self.config, self.policy.model
        totals = StepMetrics(sequence_means(config.loss))
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
                output = batch_loss(self.policy, micro, config.loss, step=batch)
                loss = output.loss * share
                loss.backward()
                if keep:
                    index = batch.tokens_of(rows).to(logps.device, non_blocking=True)
                    logps[index] = output.logps
                report = {"loss": loss, **sampling_difference(output.logps, micro)}
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
        return totals.result() | sequences | rates

    def log(
        self, step: int, batch: Batch, metrics: dict[str, float], times: dict[str, float]
    ) -> None:
        """Write a step's line to metrics.jsonl and show it."""
        seconds = sum(times.values())
        metrics = {"step": step, **metrics, "num_tokens": self.tokens_seen, "step_time": seconds}
        metrics |= {f"time/{name}": value for name, value in times.items()}
        metrics["tokens_per_second"] = batch.num_completion_tokens / seconds
        metrics["memory/peak_gib"] = peak_memory_gib(self.policy.device)
        self.run.add_metrics(metrics)
        self.console.step(metrics)
        for warning in self.health.warnings(metrics, fresh="generate" in times):
            self.console.message(warning)

    def test_accuracy(self, when: str) -> dict[str, float]:
        """Return the first reward function's mean on the test split, greedy and sampled."""
        if self.test_dataset is None:
            return {}
        self.console.phase(f"test {when} training", None)
        sampling = self.collector.sampling
        return {
            "greedy": self.measure(self.test_dataset, replace(sampling, temperature=0.0)),
            "sampled": self.measure(self.test_dataset, sampling),
        }

    def measure(self, dataset: Dataset, sampling: SamplingParams) -> float:
        """Return the first reward function's mean on a dataset, one completion a prompt."""
        return evaluate(
            self.policy,
            self.rollout,
            dataset,
            self.rewards[0],
            sampling,
            batch_size=self.config.completions_per_step,
            system_prompt=self.config.system_prompt,
            seed=self.config.seed,
        )

    def save(self, path: Path) -> None:
        """Write a Hugging Face checkpoint."""
        save_checkpoint(path, self.policy.model, self.policy.tokenizer)

    def finish(
        self, before: dict[str, float], after: dict[str, float], seconds: float
    ) -> dict[str, Any]:
        """Write the summary and show what was reached."""
        judge = self.rewards[0].name
        summary: dict[str, Any] = {
            "steps": self.num_steps,
            "seconds": seconds,
            "num_tokens": self.tokens_seen,
        }
        if before:
            summary["test"] = {how: {"before": before[how], "after": after[how]} for how in before}
            prompts = len(self.test_dataset or [])
            self.console.accuracies(f"{judge} on {prompts} held-out prompts", summary["test"])
        summary = self.run.finish(f"rewards/{judge}/mean", **summary)
        self.console.message(f"run directory: {self.run.path}")
        return summary
