"""The loop: sample, score, compare within the group, fused loss, step, log.

Under torchrun every rank runs this loop, and the first one alone writes. Left out on purpose:
asynchronous rollouts.

P prompts, G completions a prompt, B = P * G completions, K reward functions.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from typing import Any

from .adapters import base_trained
from .assets import Assets, load_assets
from .batch import Batch
from .checkpoint import nameless_base
from .config import TrainConfig, is_due
from .console import Console
from .distributed import join_world
from .evaluate import Evaluator, evaluator_of
from .experience import Collector
from .journal import Journal, MuteJournal
from .learner import Learner
from .metrics import timed
from .prompt_order import hashed_seed
from .rewards.seeding import seed_generators
from .rollout_fn import RolloutFunction
from .run_directory import RunDirectory, finished
from .samples import Sampler
from .saving import Saver
from .setup import (
    build_judges,
    build_rollout,
    build_rollout_fn,
    check_datasets,
    load_policy,
    notes,
    prepare,
)
from .signals import StopAsked, StopRequest
from .training_state import load_base, load_state


class Trainer:
    """GRPO on one device, or on one for each process of torchrun: prompts in, a model out."""

    def __init__(
        self,
        config: TrainConfig,
        assets: Assets | None = None,
        *,
        reward_funcs: Sequence[Any] | Callable[..., Any] | None = None,
        rollout_fn: RolloutFunction | None = None,
        run_name: str = "train",
        console: Console | None = None,
        resume: bool = False,
    ) -> None:
        """Load everything, check it, and only then make the run directory.

        Args:
            config: the run.
            assets: your own model, tokenizer and prompts; None: what the configuration names.
            reward_funcs: functions, or reward models, in place of the configuration's names.
            rollout_fn: a function in place of the configuration's name.
            run_name: how a new directory under `runs/` is called.
            console: where the first process shows progress.
            resume: go on from the newest checkpoint in `output_dir`, or begin if there is none. Of
                a run that is finished nothing is loaded, and `train` returns its summary.

        Raises:
            ValueError: something does not exist or does not fit; the message says what to do.
        """
        self.world = world = join_world()
        config = prepare(config, world, resume=resume)
        self.config = config
        if not world.is_main:
            console = Console.mute()
        console = console or Console(logging_steps=config.logging_steps)
        self.summary = world.on_main(lambda: finished(config)) if resume else None
        if self.summary is not None:
            console.message(f"the run in {config.output_dir} is finished: there is nothing to do")
            return
        self.judges = build_judges(config, reward_funcs)
        with ExitStack() as undo:
            undo.callback(self.judges.close)
            assets = assets or world.one_by_one(lambda: load_assets(config))
            self._build(config, assets, rollout_fn, console)
            given = {
                "reward_funcs": None if reward_funcs is None else self.judges.names,
                "rollout_fn": getattr(rollout_fn, "__name__", None),
            }
            self.run = world.on_main(lambda: RunDirectory(config, run_name, given, resume=resume))
            if world.is_main:
                undo.callback(self.run.discard)
            self.learner.run_directory = self.run.path
            journal = Journal if world.is_main else MuteJournal
            self.journal = journal(config, self.run, console, self.judges.names)
            undo.callback(self.journal.close_trackers, failed=True)
            if resume:
                self._resume()
            else:
                world.on_main(self.journal.begin)
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
            self.world,
        )
        check_datasets(config, assets, self.sampler)
        self.collector = Collector(config, self.sampler, self.train_dataset)
        self.stop = StopRequest(self.world.largest, joined=self.world.joined)
        self.test = evaluator_of(config, self.sampler, assets.test_dataset, self.stop.check)
        self.num_steps = config.num_steps(len(self.train_dataset))
        self.epoch = config.steps_per_epoch(len(self.train_dataset))
        self.learner = Learner(config, self.policy, self.world, self.num_steps)
        self.sampler.state.max_steps = self.num_steps
        self.step = self.tokens_seen = 0
        self.saver = Saver(self)
        self.taken: dict[str, Any] | None = None
        self.seconds = self.started = 0.0
        self.before: dict[str, float] = {}
        self.waiting: list[Batch] = []
        self.generation_metrics: dict[str, float] = {}

    def _resume(self) -> None:
        """Go back to the newest checkpoint, or to before the first step if there is none."""
        newest, base = self.run.checkpoints.newest, nameless_base(self.policy.model)
        checkpoint, damaged = self.world.on_main(lambda: newest(on_base=base is not None))
        step, sizes = -1, None  # without one also what was said before the first is taken back
        if checkpoint is not None:
            load_base(self.run.base, self.policy.model)
            sizes = load_state(checkpoint / "state", self)
            step = self.step
        self.world.on_main(lambda: self.journal.go_on(step, sizes))
        self.journal.warn(self.step, *damaged)
        self.saver.check_best()
        if checkpoint is not None:
            self.journal.console.message(f"resumed after step {self.step}: {checkpoint}")

    def train(self) -> dict[str, Any]:
        """Run all steps and return what `summary.json` holds.

        Raises:
            Stopped: a signal has asked for it, Ctrl-C for example; what is saved is told. A second
                one does what it does elsewhere. Handlers of your own, and another thread than the
                main one, know nothing of this.
        """
        if self.summary is not None:
            return self.summary
        config, journal = self.config, self.journal
        self.started = time.perf_counter() - self.seconds
        with closing(self.judges), journal, journal.console:
            for note in notes(config, self.policy):
                journal.console.message(note)
            if self.step == 0:
                self.begin()
            journal.console.phase("train", self.num_steps)
            if config.eval_on_start and self.test is not None and self.step == 0:
                evaluation = self.test.metrics()
                journal.step({"step": 0} | evaluation, fresh=False)
                self.saver.after_evaluation(evaluation)
            with self.stop.listening(journal.console.message):
                try:
                    while self.taken or self.step < self.num_steps:
                        self.taken = self.taken or self.take_step()
                        self.finish_step(**self.taken)
                    self.saver.save(self.run.path / "final")
                    after = self.test_accuracy("after")
                except StopAsked as asked:
                    raise self.saver.leave(asked.number) from None
            facts = {"steps": self.num_steps, "num_tokens": self.tokens_seen}
            facts |= self.saver.summary()
            seconds = time.perf_counter() - self.started
            return self.world.on_main(
                lambda: journal.finish(self.before, after, **facts, seconds=seconds)
            )

    def begin(self) -> None:
        """Do what comes before the first step of a run that is not resumed."""
        self.warm_start()
        self.saver.save_base()
        self.before = self.test_accuracy("before")

    def take_step(self) -> dict[str, Any]:
        """Take an optimisation step; return what `finish_step` needs, which JSON can hold."""
        times: dict[str, float] = {}
        if not self.waiting:
            batches, self.generation_metrics = self.collect(self.step + 1, times)
            # Each batch of the generation once, then all of them again.
            self.waiting = batches * self.config.num_iterations
        batch = self.waiting.pop(0)
        metrics = self.generation_metrics | self.optimise(batch, times)
        self.step += 1
        self.sampler.state.global_step = self.step
        if self.learner.reference is not None:
            self.learner.reference.sync(self.step)
        problems = [*self.sampler.take_problems(), *self.learner.take_problems()]
        self.journal.warn(self.step, *problems)
        return {"metrics": metrics, "times": times, "tokens": batch.num_completion_tokens}

    def finish_step(self, metrics: dict[str, float], times: dict[str, float], tokens: int) -> None:
        """Do what follows an optimisation step: measure, log, save.

        Args:
            metrics: of the step.
            times: what it spent where, in seconds.
            tokens: counted ones of its completions.

        Raises:
            StopAsked: the run is to stop, before or after all that.
        """
        config, step = self.config, self.step
        every, last = config.eval_steps or config.logging_steps, step == self.num_steps
        measures = is_due(config.eval_strategy, every, step, self.epoch)
        measures |= last and config.eval_strategy != "no"  # as in transformers, where the last
        saves = is_due(config.save_strategy, config.save_steps, step, self.epoch)
        saves |= last and config.save_strategy == "epoch"  # step ends an epoch too
        evaluation: dict[str, float] = {}
        if self.test is not None and measures:
            with self.judges.failures.undone_if_left():
                evaluation = self.test.metrics()
            self.journal.warn(step, *self.sampler.take_problems())
        seconds = sum(times.values())
        metrics = {"step": step, **metrics, **evaluation, **self.saver.metrics()}
        metrics |= {"num_tokens": self.tokens_seen, "step_time": seconds}
        metrics |= {f"time/{name}": value for name, value in times.items()}
        metrics["tokens_per_second"] = tokens / seconds
        self.journal.step(metrics, fresh="generate" in times)
        self.taken = None
        self.saver.after_evaluation(evaluation)
        if saves:
            self.saver.try_step()
        self.stop.check()

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
        if self.learner.reference is not None:  # GRPO's start, not the untrained model
            self.learner.reference.renew()

    def collect(self, step: int, times: dict[str, float]) -> tuple[list[Batch], dict[str, float]]:
        """Sample and score completions; return the batch of each optimisation step, and metrics."""
        config = self.config
        parts = config.optimizer_steps_per_generation
        found = self.collector.collect(config.prompts_per_step * parts, times)
        with timed(times, "logps"):
            is_policy = self.sampler.rollout.is_policy
            differences = self.learner.add_logps(found.batch, is_policy=is_policy)
        self.tokens_seen += found.num_tokens
        serves = range(step, step + parts * config.num_iterations)
        logged = any(s == 1 or s % config.logging_steps == 0 for s in serves)
        self.journal.generation(step, found, logged=logged)
        size = config.completions_per_step
        batches = [found.batch.select(range(i * size, (i + 1) * size)) for i in range(parts)]
        return batches, found.metrics | differences

    def optimise(self, batch: Batch, times: dict[str, float]) -> dict[str, float]:
        """Take one optimisation step on a batch; return its metrics."""
        # Dropout depends on no other step, so that a run can be resumed.
        seed_generators(hashed_seed("train", self.config.seed, self.step, self.world.rank))
        with timed(times, "train"):
            return self.learner.optimise(batch, self.step + 1)

    def test_accuracy(self, when: str) -> dict[str, float]:
        """Return the first reward function's mean on the test split, greedy and sampled."""
        if self.test is None:
            return {}
        self.journal.console.phase(f"test {when} training", None)
        with self.judges.failures.undone_if_left():
            found = {"greedy": self.test.accuracy(temperature=0.0), "sampled": self.test.accuracy()}
        self.journal.warn(self.sampler.state.global_step, *self.sampler.take_problems())
        return found
