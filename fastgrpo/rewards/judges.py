"""The judges of a run: all its reward functions, called together on a batch of completions.

A reward function has TRL's signature, so that those written for TRL run unmodified. It is called by
keyword, `f(prompts=..., completions=..., completion_ids=..., **columns, trainer_state=...,
log_extra=..., log_metric=...)`, with one entry per completion in all but the last three, `columns`
being the other columns of the dataset. One without `**columns` gets the arguments it names. It may
be async. It returns a number per completion, or None for one it does not judge, or the rewards of
the completion's steps: a list of (index of the step's last token, reward).

B completions, K reward functions.
"""

from __future__ import annotations

import asyncio
import math
import pickle
import weakref
import zlib
from array import array
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import nn

from .answers import checks_limited
from .built_in import accuracy
from .contract import (
    ARGUMENTS,
    Completion,
    RewardError,
    RewardFunction,
    Scores,
    Steps,
    is_reserved,
    refuse_own_arguments,
)
from .failures import Failures
from .functions import Outcome, Source, Traits, Value, call_all, load, taken, traits_of
from .models import RewardModel
from .names import SOFT_OVERLONG, identify, is_model, is_ours, soft_overlong, write
from .process import Process
from .seeding import seed_generators

START_TIMEOUT_S = 300.0
"""Seconds that a process may take to start and to import what its function needs."""


class Judges:
    """The reward functions of a run; close them when they are not needed for a while."""

    def __init__(
        self,
        reward_funcs: Sequence[str | RewardFunction | nn.Module],
        reward_weights: Sequence[float] | None = None,
        *,
        reward_timeout: float | None = 300.0,
        reward_errors: Literal["stop", "none"] = "stop",
        soft_punish_cache: int | None = None,
        max_completion_length: int | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        trust_remote_code: bool = False,
        batch_size: int = 8,
        seed: int = 0,
    ) -> None:
        """Load everything; functions that are not of this package in processes of their own.

        Args:
            reward_funcs: names (see `names.identify`), functions or reward models.
            reward_weights: one a function; None: 1 each.
            reward_timeout: seconds that a function may take over a batch, the built-in `accuracy`
                with math-verify; None: all are called in this process, without a limit.
            reward_errors: what it does if a function raises, takes too long or returns what are
                no rewards: "stop" raises RewardError, "none" leaves the batch without rewards of
                that function, and counts.
            soft_punish_cache: of the built-in `soft_overlong_punishment`.
            max_completion_length: of the same.
            chat_template_kwargs: for the chat templates of reward models.
            trust_remote_code: of reward models.
            batch_size: completions that a reward model reads at once.
            seed: of the generators of random, NumPy and torch, which each call sets anew from it
                and the completions, in this process too: a run can be repeated and resumed.

        Raises:
            ValueError: a function or model does not exist or does not fit; or two have one name.
            ModuleNotFoundError, FileNotFoundError: there is no such module or file.
        """
        weights = [1.0] * len(reward_funcs) if reward_weights is None else reward_weights
        if len(weights) != len(reward_funcs):
            raise ValueError(
                f"reward_weights has {len(weights)} entries for {len(reward_funcs)} reward_funcs; "
                "give one weight per function"
            )
        if soft_punish_cache is not None and SOFT_OVERLONG not in reward_funcs:
            raise ValueError(
                f"soft_punish_cache: nothing reads it; add {SOFT_OVERLONG!r} to reward_funcs, or "
                "leave it out"
            )
        if reward_timeout is not None and not reward_timeout > 0:
            raise ValueError(
                f"reward_timeout: must be above 0 seconds, or null for none, got {reward_timeout}"
            )
        self.weights = [float(weight) for weight in weights]
        self.timeout, self.seed = reward_timeout, seed
        self.failures = Failures(reward_errors)
        self.functions: dict[int, Callable[..., Any]] = {}
        """By index, those that are called in this process."""
        self._processes: dict[int, Process] = {}
        self._pool = ThreadPoolExecutor(max(len(reward_funcs), 1), "reward")
        self._runner = asyncio.Runner()
        self._finalizer = weakref.finalize(self, _close, self._processes, self._pool, self._runner)
        try:
            for k, entry in enumerate(reward_funcs):
                if isinstance(entry, str) and entry == SOFT_OVERLONG:
                    self.functions[k] = soft_overlong(max_completion_length, soft_punish_cache)
                    continue
                found: Any = identify(entry) if isinstance(entry, str) else entry
                if is_model(found):
                    self.functions[k] = RewardModel(
                        found,
                        batch_size=batch_size,
                        chat_template_kwargs=chat_template_kwargs,
                        trust_remote_code=trust_remote_code,
                    )
                elif reward_timeout is None or is_ours(found):
                    self.functions[k] = load(found) if isinstance(found, tuple) else found
                else:
                    source: Source = found if isinstance(found, tuple) else write(found)
                    self._processes[k] = Process(source)
            started = {
                k: self._pool.submit(p.start, START_TIMEOUT_S) for k, p in self._processes.items()
            }
            traits = {k: traits_of(function) for k, function in self.functions.items()}
            traits |= {k: future.result() for k, future in started.items()}
            self._traits: list[Traits] = [traits[k] for k in range(len(reward_funcs))]
            self.names = [traits["name"] for traits in self._traits]
            if len(set(self.names)) < len(self.names):
                raise ValueError(
                    f"reward_funcs are named {', '.join(self.names)}; metrics are named after the "
                    "functions, so give each a name of its own"
                )
        except BaseException:
            for process in self._processes.values():
                process.interrupt()
            self._finalizer()
            raise

    def close(self) -> None:
        """End the processes; scoring again starts them again."""
        for process in self._processes.values():
            process.close()

    def __enter__(self) -> Judges:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def check_columns(self, columns: Sequence[str]) -> None:
        """Refuse reward functions that cannot be called with the columns of a dataset.

        Raises:
            ValueError: names the function and what it lacks, or the column in its way.
        """
        refuse_own_arguments(columns)
        given = set(ARGUMENTS).union(columns) - {"prompt"}
        for traits in self._traits:
            takes = given if traits["takes"] is None else given.intersection(traits["takes"])
            if missing := [repr(name) for name in traits["needs"] if name not in takes]:
                raise ValueError(
                    f"reward function {traits['name']!r} needs {', '.join(missing)}, and the "
                    f"dataset has {', '.join(columns)}; rename a column, or give it a default"
                )
        if accuracy in self.functions.values():
            accuracy([], **{name: [] for name in columns if name != "prompt"})  # looks for its own

    def score(
        self,
        *,
        prompts: Sequence[Any],
        completions: Sequence[Completion],
        completion_ids: Sequence[Sequence[int]],
        columns: dict[str, list[Any]],
        trainer_state: Any = None,
        evaluation: bool = False,
    ) -> Scores:
        """Call every reward function on a batch of completions.

        Args:
            prompts: (B,) the prompt of each completion, repeated within its group, as the columns
                are.
            completions: (B,) texts, or lists of messages.
            completion_ids: (B,) the token ids of the completions.
            columns: the other columns of the dataset, (B,) each.
            trainer_state: has what functions are told of the run, such as `global_step` and
                `max_steps`, as attributes; they get a copy.
            evaluation: failures are counted, and told once, apart from those of training.

        Raises:
            RewardError: a function logged a metric of the trainer's; or an argument has a wrong
                length; or, unless `reward_errors` is "none", a function raised something, took too
                long, or returned what are no finite numbers, one a completion.
        """
        refuse_own_arguments(columns)
        arguments: dict[str, Any] = {
            "prompts": prompts,
            "completions": completions,
            "completion_ids": completion_ids,
            **columns,
        }
        for name, values in arguments.items():
            if len(values) != len(completions):
                raise RewardError(
                    f"{name} has {len(values)} entries for {len(completions)} completions"
                )
        # Of a type that every process knows: another would be imported there, with its package.
        state = trainer_state and SimpleNamespace(**vars(trainer_state))
        lengths = [len(ids) for ids in completion_ids]
        outcomes = self._call(arguments | {"trainer_state": state}, lengths)
        problems = [
            problem
            for k, outcome in enumerate(outcomes)
            if (failure := outcome["failure"])
            and (
                problem := self.failures.note(
                    self.names[k], failure, len(prompts), evaluation=evaluation
                )
            )
        ]
        scores = self._scores(outcomes, lengths, problems)
        scores.metrics.update(self.failures.counts[evaluation])
        return scores

    def _call(self, arguments: dict[str, Any], lengths: list[int]) -> list[Outcome]:
        """Return what came of each function, those in processes running beside those here."""
        requests = self._requests(arguments, lengths)
        timeout = self.timeout or 0.0  # without one there are no processes
        calls = {
            k: self._pool.submit(process.call, requests[k], timeout, START_TIMEOUT_S)
            for k, process in self._processes.items()
        }
        here = sorted(self.functions)
        try:
            functions = [(self.functions[k], self._traits[k]) for k in here]
            seed_generators(self._seed_of(arguments))
            with checks_limited(self.timeout):
                called = call_all(functions, arguments, lengths, self._run)
            outcomes = dict(zip(here, called, strict=True))
            outcomes |= {k: call.result() for k, call in calls.items()}
        except BaseException:
            for process in self._processes.values():
                process.interrupt()
            raise
        return [outcomes[k] for k in range(len(outcomes))]

    def _requests(self, arguments: dict[str, Any], lengths: list[int]) -> dict[int, bytes]:
        """Return what is sent to each process: no more than its function takes."""
        if not self._processes:
            return {}
        seed = self._seed_of(arguments)
        given = {k: taken(arguments, self._traits[k]) for k in self._processes}
        distinct = {frozenset(some): some for some in given.values()}
        try:
            written = {names: pickle.dumps((seed, lengths, x)) for names, x in distinct.items()}
            return {k: written[frozenset(some)] for k, some in given.items()}
        except Exception as error:
            raise RewardError(
                f"what reward functions are given cannot be sent to their processes ({error}); "
                "set reward_timeout: null to call them in this one"
            ) from error

    def _seed_of(self, arguments: dict[str, Any]) -> int:
        """Return the seed of the random numbers of a call, in whatever process it is made."""
        seed = self.seed
        for ids in arguments["completion_ids"]:
            seed = zlib.crc32(array("q", ids), seed)
        return seed

    def _run(self, coroutine: Coroutine[Any, Any, None]) -> None:
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            self._runner.run(coroutine)
        else:  # in a notebook
            self._pool.submit(self._runner.run, coroutine).result()

    def _scores(
        self, outcomes: Sequence[Outcome], lengths: Sequence[int], problems: list[str]
    ) -> Scores:
        logged: dict[str, list[float]] = {}
        extra: dict[str, list[Any]] = {}
        steps: dict[int, list[Steps]] = {}
        rewards_KB: list[list[float]] = []
        for k, outcome in enumerate(outcomes):
            values = outcome["values"] or [None] * len(lengths)
            rewards_KB.append([_total(value) for value in values])
            if any(isinstance(value, list) for value in values):
                steps[k] = [_steps(x, n) for x, n in zip(values, lengths, strict=True)]
            for name, value in outcome["metrics"]:
                if is_reserved(name):
                    raise RewardError(
                        f"reward function {self.names[k]!r} logged the metric {name!r}, a name of "
                        f"the trainer's own; log it as {f'{self.names[k]}/{name}'!r}"
                    )
                logged.setdefault(name, []).append(value)
            for column, entries in outcome["extra"].items():
                # Two functions may log one column, as TRL's do with the solution.
                same = column not in extra or extra[column] == entries
                extra[column if same else f"{self.names[k]}/{column}"] = entries
        metrics = {name: sum(values) / len(values) for name, values in logged.items()}
        return Scores(
            rewards_BK=torch.tensor(rewards_KB, dtype=torch.float32).T.contiguous(),
            steps=steps,
            metrics=metrics,
            extra=extra,
            problems=problems,
        )


def _total(value: Value) -> float:
    if isinstance(value, list):
        return math.fsum(reward for _, reward in value) if value else math.nan
    return math.nan if value is None else value


def _steps(value: Value, length: int) -> Steps:
    if isinstance(value, list):
        return value
    return [] if value is None else [(length - 1, value)]


def _close(processes: dict[int, Process], pool: ThreadPoolExecutor, runner: asyncio.Runner) -> None:
    for process in processes.values():
        process.close()
    pool.shutdown()
    runner.close()
