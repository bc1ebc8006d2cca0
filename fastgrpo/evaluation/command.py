"""From a run or a configuration to a table, a file of estimates and one of completions.

P prompts, n samples of each, B = P * n samples, K reward functions.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import set_seed

from ..config import TrainConfig
from ..console import Console
from ..evaluate import Evaluator
from ..rewards.contract import content
from ..samples import Sample, Sampler
from ..setup import (
    build_judges,
    build_rollout,
    build_rollout_fn,
    check_dataset,
    check_installed,
)
from .measures import Judge, Verdict, count_votes, measure
from .results import Results, show, write, write_completions
from .subject import Subject, count_seen, find_subject, load_split, load_subject
from .votes import is_unmarked_prose

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """What `fastgrpo eval` is asked."""

    checkpoint: str | None = None
    """`final`, `best`, `step-N`, `base` (before training), or the directory or Hub name of another
    model; None: `final` of a run, `base` of a configuration."""
    split: str | None = None
    """Of the dataset; None: the configuration's test split."""
    num_samples: int | None = None
    """Samples of each prompt (n); None: 1 if decoded greedily, else as many as in evaluations
    during training, or the largest k if that is more."""
    ks: Sequence[int] | None = None
    """Sizes of k in pass@k and maj@k; None: 1 and n."""
    temperature: float | None = None
    """0 decodes greedily; None: the configuration's."""
    max_samples: int | None = None
    """Prompts, the first of the split; None: the configuration's `max_eval_samples`."""
    judge: str | None = None
    """Name of the reward function that says what is right; None: the first."""
    threshold: float | None = None
    """Least reward of a right answer. None: rewards must be 0 and 1."""
    out: str | None = None
    """Directory for the results; None: `eval/` of the run, or `runs/eval-NAME/`."""

    def __post_init__(self) -> None:
        if self.num_samples is not None and self.num_samples < 1:
            raise ValueError(f"--num-samples: must be at least 1, got {self.num_samples}")
        if self.temperature is not None and not 0 <= self.temperature < math.inf:
            raise ValueError(f"--temperature: must be 0 (greedy) or more, got {self.temperature}")
        if self.threshold is not None and not math.isfinite(self.threshold):
            raise ValueError(f"--threshold: must be finite, got {self.threshold}")
        if self.max_samples is not None and self.max_samples < 1:
            raise ValueError(f"--max-samples: must be at least 1, got {self.max_samples}")

    def counts(self, config: TrainConfig) -> tuple[int, list[int]]:
        """Return n and the ks.

        Raises:
            ValueError: they do not fit each other.
        """
        greedy = self.temperature == 0
        known, usual = self.ks or [], config.num_generations_eval or config.num_generations
        count = self.num_samples or (1 if greedy else max([usual, *known]))
        ks = sorted(set(known or (1, count)))
        if greedy and count > 1:
            raise ValueError(
                f"--temperature 0 gives the same completion every time, so --num-samples {count} "
                "would measure nothing more; leave it out, or sample with a temperature above 0"
            )
        if ks[0] < 1 or ks[-1] > count:
            wrong = ks[0] if ks[0] < 1 else ks[-1]
            raise ValueError(
                f"-k: must be between 1 and the samples of a prompt, which are {count}, got {wrong}"
                f"{'' if greedy or wrong < 1 else f'; give --num-samples {wrong} or more'}"
            )
        return count, ks


def evaluate(
    run: str,
    options: EvalOptions | None = None,
    overrides: Sequence[str] = (),
    *,
    console: Console | None = None,
) -> Path:
    """Measure a model on held-out prompts; print a table and return the file with the estimates.

    Args:
        run: a run directory, or a configuration file, whose model is then measured untrained.
        options: what to measure.
        overrides: `key=value` over the configuration.
        console: where progress and the table are shown.

    Raises:
        RewardError, RolloutError: a reward function or the rollout function failed.
        ValueError: something does not exist or does not fit; the message says what to do.
    """
    start = time.perf_counter()
    options = options or EvalOptions()
    subject = find_subject(run, options.checkpoint, overrides)
    # What is of training alone could not be what this split needs.
    config = replace(subject.config, max_tokens_per_microbatch=None)
    num_samples, ks = options.counts(config)
    if config.cpu_threads is not None:
        torch.set_num_threads(config.cpu_threads)
    check_installed(config)
    set_seed(config.seed)
    split, dataset = load_split(config, options.split, options.max_samples)
    console = console or Console(logging_steps=config.logging_steps)
    with closing(build_judges(config)) as judges:
        judge = Judge(judges, options.judge, options.threshold)
        policy = load_subject(subject)
        rollout = build_rollout(config, policy, console.message)
        sampler = Sampler(config, policy, rollout, judges, build_rollout_fn(config))
        sampler.state.global_step = subject.step
        sampler.state.max_steps = max(config.max_steps, subject.step, 1)
        if options.temperature is not None:
            sampler.sampling = replace(sampler.sampling, temperature=options.temperature)
        check_dataset(config, dataset, sampler)
        evaluator = Evaluator(config, sampler, dataset)
        with console:
            samples, verdicts = _sample(evaluator, num_samples, judge, console)
    # Before the answers are compared, which may take minutes and be interrupted.
    completions = write_completions(
        subject.results if options.out is None else Path(options.out).expanduser(),
        f"{Path(subject.checkpoint).name}-{split}",
        samples,
        verdicts,
        num_samples,
        judges.names,
    )
    with console:
        votes = _vote(verdicts, num_samples, ks, console)
    seen, unknown = _seen(dataset, subject)
    results = Results(
        checkpoint=subject.checkpoint,
        split=split,
        num_prompts=len(dataset),
        num_samples=num_samples,
        temperature=sampler.sampling.temperature,
        judge=judge.name,
        threshold=judge.threshold,
        seed=config.seed,
        metrics=measure(votes, ks),
        num_not_judged=sum(verdict.right is None for verdict in verdicts),
        num_seen_in_training=seen,
        averages=evaluator.averages(samples),
        seconds=time.perf_counter() - start,
    )
    path = write(completions, results)
    show(console, results, judges.names, name=run)
    if subject.place is None:
        console.message("note: this is the task's model before its warm start")
    for note in (*unknown, *_notes(subject.training, results, samples, ks[-1])):
        console.message(note)
    console.message(f"results: {path}")
    return path


def _sample(
    evaluator: Evaluator, num_samples: int, judge: Judge, console: Console
) -> tuple[list[Sample], list[Verdict]]:
    """Sample and judge completions of all prompts, and show how far it is."""
    samples: list[Sample] = []
    verdicts: list[Verdict] = []
    names = evaluator.sampler.judges.names
    console.phase("evaluate", evaluator.num_batches(num_samples))
    for some in evaluator.batches(num_samples):
        samples += some
        verdicts += map(judge.judge, some)
        rewards_K = some[0].rewards_K.tolist()
        console.sample(
            prompt=some[0].prompt,
            completion=some[0].text,
            rewards=dict(zip(names, rewards_K, strict=True)),
        )
        console.step(evaluator.averages(some))
        for problem in evaluator.sampler.take_problems():
            console.warning(problem)
    return samples, verdicts


def _vote(
    verdicts: Sequence[Verdict], num_samples: int, ks: Sequence[int], console: Console
) -> list[list[tuple[int, int]]]:
    """Compare the answers to each prompt, as far as the ks need it, and show how far it is."""
    by_answer = ks[-1] > 1
    if by_answer:
        console.phase("compare answers", None)
    starts, said = range(0, len(verdicts), num_samples), time.monotonic()
    votes: list[list[tuple[int, int]]] = []
    for start in starts:
        votes.append(count_votes(verdicts[start : start + num_samples], by_answer=by_answer))
        if time.monotonic() - said > _SILENCE_S:
            console.message(f"compared those to {len(votes):,} of {len(starts):,} prompts")
            said = time.monotonic()
    return votes


_SILENCE_S = 10.0
"""Seconds after which one would like to know how far it is."""


def _seen(dataset: Dataset, subject: Subject) -> tuple[int | None, list[str]]:
    """Return how many prompts are trained on; if that is not known, None and a sentence."""
    try:
        return count_seen(dataset, subject.training), []
    except (ValueError, OSError, ImportError) as error:
        return None, [f"note: are these prompts among those trained on? Not known: {error}"]


def _notes(
    training: TrainConfig, results: Results, samples: Sequence[Sample], most: int
) -> Iterator[str]:
    """Yield what of the numbers is not as one would expect."""
    if results.num_seen_in_training:
        yield (
            f"note: {results.num_seen_in_training:,} of {results.num_prompts:,} prompts are in "
            f"{training.dataset_train_split!r}, which is trained on"
        )
    if results.num_not_judged:
        yield (
            f"note: {results.judge} did not judge {results.num_not_judged:,} of {len(samples):,} "
            "completions; pass@k and maj@k are over the prompts with k others"
        )
    unmarked = sum(is_unmarked_prose(content(one.text)) for one in samples)
    if most > 1 and unmarked:
        yield (
            f"note: {unmarked:,} of {len(samples):,} completions have no <answer> and no "
            "\\boxed{} to say what of them is the answer; in maj@k each votes as it stands"
        )
