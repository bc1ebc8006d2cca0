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

from .advantages import group_advantages
from .assets import Assets, load_assets
from .batch import Batch, make_batch
from .checkpoint import save_checkpoint
from .config import TrainConfig
from .console import Console
from .data import PromptSampler, check_prompts, encode_prompt
from .evaluate import evaluate
from .loss import batch_logps, batch_loss, sampling_difference
from .metrics import StepMetrics, peak_memory_gib, rollout_metrics, sequence_means, timed
from .model import Policy
from .optim import build_optimizer, clip_gradients
from .rewards import check_columns, decode_completions, load_rewards, score
from .rollout import SamplingParams
from .rollout.static import StaticCacheRollout
from .run_directory import RunDirectory, check_free

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
        check_free(config.output_dir)  # before the minutes that a large model takes to load
        self.rewards = load_rewards(config.reward_funcs, config.reward_weights)
        self.assets = assets = assets or load_assets(config)
        self.train_dataset, self.test_dataset = assets.train_dataset, assets.test_dataset
        check_columns(self.rewards, self.train_dataset.column_names)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        bf16 = config.bf16
        if bf16 is None:
            bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
        model = assets.model
        model.to(device)  # pyright: ignore[reportArgumentType] - a wrapper hides its signature
        self.policy = Policy(model, assets.tokenizer, bf16=bf16)
        check_prompts(
            self.train_dataset,
            assets.tokenizer,
            system_prompt=config.system_prompt,
            room=self.policy.positions - config.max_completion_length,
        )
        if config.gradient_checkpointing:
            self.policy.enable_gradient_checkpointing()
        self.reference = self.policy.frozen_copy() if config.loss.beta > 0 else None
        self.rollout = StaticCacheRollout(
            model,
            eos_token_ids=self.policy.eos_token_ids,
            pad_token_id=self.policy.pad_token_id,
            max_batch=config.max_generation_batch_size,
        )
        self.sampling = SamplingParams(
            max_completion_length=config.max_completion_length,
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
        )
        self.prompts = PromptSampler(len(self.train_dataset), config.seed)
        self.generator = torch.Generator(device).manual_seed(config.seed)
        self.num_steps = config.num_steps(len(self.train_dataset))
        self.optimizer, self.scheduler = build_optimizer(model, config, self.num_steps)
        self.tokens_seen = 0

        self.run = RunDirectory(config, run_name)

    def train(self) -> dict[str, Any]:
        """Run all steps and return what `summary.json` holds."""
        start = time.perf_counter()
        with self.console:
            if self.config.top_p < 1 or self.config.top_k > 0:
                self.console.message(
                    f"note: top_p={self.config.top_p} and top_k={self.config.top_k} truncate what "
                    "is sampled; log-probs, ratios and KL are those of the whole distribution"
                )
            self.warm_start()
            before = self.test_accuracy("before")
            self.console.phase("train", self.num_steps)
            step = 0
            while step < self.num_steps:
                times: dict[str, float] = {}
                batch, metrics = self.collect(step + 1, times)
                for _ in range(min(self.config.num_iterations, self.num_steps - step)):
                    step += 1
                    self.log(step, batch, metrics | self.optimise(batch, times), times)
                    if self.config.save_steps and step % self.config.save_steps == 0:
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
        steps = self.assets.warm_start(
            accuracy=lambda: self.measure(validation, self.sampling),
            on_step=lambda step, loss: self.console.step({"step": step, "loss": loss}),
        )
        self.console.message(f"warm start: {steps} supervised steps")
        if self.reference is not None:  # GRPO's start, not the untrained model
            self.reference = self.policy.frozen_copy()

    def collect(self, step: int, times: dict[str, float]) -> tuple[Batch, dict[str, float]]:
        """Sample completions of the next prompts, score them and compare them in their groups."""
        config, tokenizer = self.config, self.policy.tokenizer
        rows = self.train_dataset[self.prompts.take(config.prompts_per_step)]
        columns = {
            name: [value for value in values for _ in range(config.num_generations)]
            for name, values in rows.items()
        }
        prompts = columns.pop("prompt")
        with timed(times, "generate"), self.policy.autocast():
            prompt_ids = [
                encode_prompt(prompt, tokenizer, system_prompt=config.system_prompt)
                for prompt in rows["prompt"]
            ]
            completions = self.rollout.generate(
                prompt_ids, config.num_generations, self.sampling, self.generator
            )
        with timed(times, "reward"):
            token_lists = completions.token_lists()
            texts = decode_completions(prompts, token_lists, tokenizer)
            rewards_BK = score(
                self.rewards,
                prompts=prompts,
                completions=texts,
                completion_ids=token_lists,
                columns=columns,
            )
            advantages = group_advantages(
                rewards_BK,
                torch.tensor([reward.weight for reward in self.rewards]),
                config.num_generations,
                scale_rewards=config.scale_rewards,
                std=config.advantage_std,
                advantage_eps=config.advantage_eps,
            )
        batch = make_batch(prompt_ids, completions, advantages.advantages, self.policy.pad_token_id)
        with timed(times, "logps"):
            self.add_logps(batch)
        self.tokens_seen += sum(batch.prompt_lengths) + batch.num_completion_tokens
        steps = range(step, step + config.num_iterations)  # that these completions serve
        if any(s == 1 or s % config.logging_steps == 0 for s in steps):
            some = slice(config.num_completions_to_log)
            self.run.add_completions(
                step,
                prompts[some],
                texts[some],
                {r.name: rewards_BK[some, k].tolist() for k, r in enumerate(self.rewards)},
                advantages.advantages[some].tolist(),
            )
        names = [reward.name for reward in self.rewards]
        return batch, rollout_metrics(names, rewards_BK, advantages, completions)

    def add_logps(self, batch: Batch) -> None:
        """Add the log-probs the loss will need beside the policy's own."""
        size, temperature = self.config.per_device_train_batch_size, self.config.temperature
        if self.config.num_iterations > 1:
            batch.old_logps = batch_logps(self.policy, batch, size, temperature)
        if self.reference is not None:
            batch.ref_logps = batch_logps(self.reference, batch, size, temperature)

    def optimise(self, batch: Batch, times: dict[str, float]) -> dict[str, float]:
        """Take one optimisation step on a batch, a micro-batch at a time."""
        totals = StepMetrics(sequence_means(self.config.loss))
        with timed(times, "train"):
            self.policy.model.train()
            self.optimizer.zero_grad()  # also of what came before, a warm start for example
            micros = list(batch.split(self.config.per_device_train_batch_size))
            # The means of bnpo are those of micro-batches; all other losses are shares of the step.
            share = 1 / len(micros) if self.config.loss.loss_type == "bnpo" else 1.0
            for micro in micros:
                output = batch_loss(self.policy, micro, self.config.loss, step=batch)
                loss = output.loss * share
                loss.backward()
                report = {"loss": loss, **sampling_difference(output.logps, micro)}
                totals.add(output.metrics | report, weight=micro.num_completion_tokens)
            grad_norm = clip_gradients(self.policy.model, self.config.max_grad_norm)
            learning_rate = float(self.scheduler.get_last_lr()[0])
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()  # frees the gradients while sampling
        return totals.result() | {"grad_norm": grad_norm, "learning_rate": learning_rate}

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

    def test_accuracy(self, when: str) -> dict[str, float]:
        """Return the first reward function's mean on the test split, greedy and sampled."""
        if self.test_dataset is None:
            return {}
        self.console.phase(f"test {when} training", None)
        return {
            "greedy": self.measure(self.test_dataset, replace(self.sampling, temperature=0.0)),
            "sampled": self.measure(self.test_dataset, self.sampling),
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
            self.console.table(
                f"{judge} on {len(self.test_dataset or [])} held-out prompts",
                ["decoding", "before", "after", "change"],
                [
                    [how, f"{b:.1%}", f"{a:.1%}", f"{100 * (a - b):+.1f} points"]
                    for how, b, a in ((how, before[how], after[how]) for how in before)
                ],
            )
        summary = self.run.finish(f"rewards/{judge}/mean", **summary)
        self.console.message(f"run directory: {self.run.path}")
        return summary
