"""The hook `rollout_fn`: a function of the user's that makes completions.

It may take several turns or use tools, and asks the run's engine for tokens as it goes. What it is
given and returns follows TRL's `rollout_func`, but for the second argument: TRL passes its trainer,
here it is an `Engine`. A completion may hold tokens that the model did not sample, such as a tool's
answer: the model reads them, and they have no gradient.

B completions, those of a prompt next to each other; T tokens of one.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from math import gcd
from typing import Any

import torch
from torch import Tensor

from .model import Policy
from .prompt_order import hashed_seed
from .rewards.contract import ARGUMENTS
from .rewards.functions import load, traits_of
from .rollout import Drawn, Rollout, SamplingParams, new_seeds

RolloutFunction = Callable[..., Mapping[str, Any]]
"""`rollout_fn(prompts, engine, **columns)`, as `play` calls it."""

_IDS_AND_LOGPROBS = ("prompt_ids", "completion_ids", "logprobs")
_TAKEN = frozenset({"prompt", *ARGUMENTS, *_IDS_AND_LOGPROBS})
_ROUNDING = 0.1  # above 0, of a log-prob in bf16 whose logit is 16 or more


class RolloutError(ValueError):
    """A rollout function cannot be called, or what it returned breaks the contract."""


class Engine:
    """What a rollout function samples with."""

    def __init__(
        self,
        rollout: Rollout,
        policy: Policy,
        sampling: SamplingParams,
        seeds: Sequence[int],
        *,
        encode: Callable[[Any], list[int]],
    ) -> None:
        """Bind it to a policy and to the randomness of some prompts.

        Args:
            rollout: samples.
            policy: what it samples from.
            sampling: how tokens are drawn, in evaluation for example greedily.
            seeds: of the prompts it is for, all of which the draws of every call depend on: a call
                does not say whose it is. Other prompts beside them change what is sampled.
            encode: returns the token ids of a prompt, as those of the run are encoded.
        """
        self.tokenizer = policy.tokenizer
        self.eos_token_ids = policy.eos_token_ids
        self.sampling = sampling
        self.encode = encode
        self.device = policy.device
        self.positions = policy.positions
        self.vocabulary_size = len(policy.head.weight)
        self._rollout, self._policy = rollout, policy
        self._generator = torch.Generator().manual_seed(hashed_seed("rollout_fn", *seeds))

    def generate(
        self,
        prompt_ids: Sequence[list[int]],  # any number of them
        *,
        max_completion_length: int | Sequence[int] | None = None,
        stop_token_ids: Iterable[int] = (),
    ) -> list[Drawn]:
        """Sample one completion of each prompt, all of them together.

        Args:
            prompt_ids: all that the model is to read, earlier turns included; where they come in
                groups of equal ones, all as large, each group is read once. No prompt, no sample.
            max_completion_length: tokens that each may have, or each its own number of them; None:
                as many as a completion of the run.
            stop_token_ids: tokens that end a completion beside the end-of-sequence tokens; the one
                that does is the last of `completion_ids`.

        Raises:
            ValueError: a prompt is empty, or it and its completion do not fit in the model.
        """
        if not prompt_ids:
            return []
        length = max_completion_length
        if length is None:
            length = self.sampling.max_completion_length
        lengths = [length] * len(prompt_ids) if isinstance(length, int) else list(length)
        if len(lengths) != len(prompt_ids):
            raise ValueError(
                f"max_completion_length has {len(lengths)} entries for {len(prompt_ids)} prompts"
            )
        requests = list(zip(map(list, prompt_ids), lengths, strict=True))
        copies = gcd(*(len(list(equal)) for _, equal in groupby(requests)))
        prompts = [prompt for prompt, _ in requests[::copies]]
        sampling = replace(
            self.sampling,
            max_completion_length=max(lengths),
            stop_token_ids=tuple(stop_token_ids),
        )
        seeds = new_seeds(len(prompts), self._generator)
        with self._policy.sampling():
            completions = self._rollout.generate(
                prompts, copies, sampling, seeds, max_lengths=lengths[::copies]
            )
        return completions.drawn(prompts, copies)


def load_rollout_fn(function: str | RolloutFunction) -> RolloutFunction:
    """Find a rollout function.

    Args:
        function: "module:function", "path.py:function" (relative to the working directory),
            "package.module.function", or the function.

    Raises:
        ValueError: the name is of no such form, there is no such function, or it is async.
        ModuleNotFoundError, FileNotFoundError: there is no such module or file.
    """
    if isinstance(function, str):
        place, colon, name = function.rpartition(":")
        if not colon and not function.endswith(".py"):
            place, _, name = function.rpartition(".")
        if not place or not name:
            raise RolloutError(
                f"rollout_fn: {function!r} names no function; give 'module:function', "
                "'path.py:function' or 'package.module.function'"
            )
        function = load(("name", f"{place}:{name}"))
    if inspect.iscoroutinefunction(function):
        raise RolloutError(
            f"rollout_fn {_name_of(function)!r} is async, and is called plainly; make it a plain "
            "function that runs its coroutines with asyncio.run"
        )
    return function


def taken_columns(rollout_fn: RolloutFunction, columns: Iterable[str]) -> list[str]:
    """Return those columns of a dataset that a rollout function takes.

    Args:
        rollout_fn: takes prompts and an engine first, and then columns by name.
        columns: without the prompt.

    Raises:
        RolloutError: it needs a column that is not there, or cannot be called with one that is.
    """
    signature = inspect.signature(rollout_fn)
    parameters = list(signature.parameters.values())
    named = {p.name for p in parameters[2:]}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    taken = [column for column in columns if takes_any or column in named]
    try:
        signature.bind([], None, **dict.fromkeys(taken))
    except TypeError as error:
        raise RolloutError(
            f"rollout_fn {_name_of(rollout_fn)!r} cannot be called with the prompts, the engine "
            f"and the dataset's columns {', '.join(columns) or '(none)'}: {error}"
        ) from None
    return taken


def play(
    rollout_fn: RolloutFunction,
    prompts: Sequence[Any],
    columns: Mapping[str, Sequence[Any]],
    engine: Engine,
) -> tuple[list[Drawn], dict[str, list[Any]]]:
    """Have a rollout function make a completion for each prompt, and check what it returns.

    It is called as `rollout_fn(prompts, engine, **columns)` and may change what it is given. It
    returns a mapping with

    - `prompt_ids`, `completion_ids`: the tokens of each prompt, and all that follow it;
    - `logprobs`: of each token of a completion, as `Engine.generate` gives them; those of tokens
      that the model did not sample may be anything, NaN too;
    - `env_mask`, where some did not come from the model: 1 for those of the model, 0 for others;
    - under any other key a value for each completion, for the reward functions and the log.

    A completion is finished if the last token of the model's own ends sequences.

    Args:
        rollout_fn: the function.
        prompts: (B,) as the dataset has them, each as often as it is to be completed.
        columns: (B,) each; the function gets those that it takes.
        engine: what it samples with.

    Returns:
        The completions, and the values of other keys.

    Raises:
        RolloutError: what it returned breaks this. What the function raises goes through.
    """
    name, taken = _name_of(rollout_fn), taken_columns(rollout_fn, columns)
    try:
        output: Any = rollout_fn(
            _copies(prompts), engine, **{column: _copies(columns[column]) for column in taken}
        )
    except Exception as error:
        error.add_note(f"raised by the rollout_fn {name!r}")
        raise
    returned = _Returned(name, output, len(prompts), engine)
    others = returned.others(columns)
    prompt_ids = [returned.ids("prompt_ids", i).tolist() for i in range(len(prompts))]
    completions = [returned.completion(i) for i in range(len(prompts))]
    lengths = [len(ids) for ids, _, _ in completions]
    logps = torch.cat([logps for _, logps, _ in completions]).to(engine.device).split(lengths)
    for i, prompt in enumerate(prompt_ids):
        if len(prompt) + lengths[i] > engine.positions:
            raise returned.error(
                f"{len(prompt)} + {lengths[i]} tokens as prompt and completion {i}; the model has "
                f"{engine.positions} positions"
            )
    eos = set(engine.eos_token_ids)
    drawn: list[Drawn] = []
    for i, (ids_T, _, counted_T) in enumerate(completions):
        own = ids_T[counted_T].tolist()
        drawn.append(
            Drawn(
                prompt_ids=prompt_ids[i],
                completion_ids=ids_T.tolist(),
                logps=logps[i],
                finished=bool(own) and own[-1] in eos,
                counted=None if len(own) == lengths[i] else counted_T.tolist(),
            )
        )
    return drawn, others


class _Returned:
    """What a rollout function returned for B prompts, checked as it is read."""

    def __init__(self, name: str, output: Any, count: int, engine: Engine) -> None:
        self.name, self.output, self.engine = name, output, engine
        if not isinstance(output, Mapping):
            raise self.error(
                f"{output!r:.80}; return a mapping with {', '.join(_IDS_AND_LOGPROBS)}"
            )
        if missing := [key for key in _IDS_AND_LOGPROBS if key not in output]:
            raise self.error(
                f"nothing under {', '.join(missing)}; return {', '.join(_IDS_AND_LOGPROBS)}, "
                "with a list for each prompt"
            )
        for key in output:
            values: Any = output[key]
            listed = hasattr(values, "__len__") and not isinstance(values, str | Mapping)
            if not listed or len(values) != count:
                found = f"{len(values)} entries" if listed else f"{values!r:.80}"
                raise self.error(f"{found} under {key!r} for {count} prompts; give one for each")

    def error(self, what: str) -> RolloutError:
        """Return the error that says what was returned and what to do."""
        return RolloutError(f"rollout_fn {self.name!r} returned {what}")

    def others(self, columns: Iterable[str]) -> dict[str, list[Any]]:
        """Return what is not about tokens."""
        others = {
            key: values.tolist() if hasattr(values, "tolist") else list(values)
            for key, values in self.output.items()
            if key not in (*_IDS_AND_LOGPROBS, "env_mask")
        }
        if in_the_way := sorted(_TAKEN.union(columns).intersection(others)):
            raise self.error(
                f"something under {in_the_way[0]!r}, which is an argument of reward functions or a "
                "column of the dataset already; give it another name"
            )
        return others

    def ids(self, key: str, i: int) -> Tensor:
        """Return a row of token ids, int64."""
        ids_T = self._row(key, i)
        if len(ids_T) == 0:
            raise self.error(f"no token in {key}[{i}]; give at least one")
        size = self.engine.vocabulary_size
        if ids_T.is_floating_point() or ids_T.dtype == torch.bool:
            raise self.error(f"{ids_T.dtype} in {key}[{i}]; token ids are integers")
        if wrong := ids_T[(ids_T < 0) | (ids_T >= size)].tolist():
            raise self.error(
                f"the token id {wrong[0]} in {key}[{i}]; the model's vocabulary has {size} tokens"
            )
        return ids_T.long()

    def completion(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return ids, log-probs (0 where they do not count), and which tokens count."""
        ids_T, logps_T = self.ids("completion_ids", i), self._row("logprobs", i).float()
        counted_T = torch.ones(len(ids_T))
        if "env_mask" in self.output:
            counted_T = self._row("env_mask", i)
        for key, values_T in (("logprobs", logps_T), ("env_mask", counted_T)):
            if len(values_T) != len(ids_T):
                raise self.error(
                    f"{len(values_T)} values in {key}[{i}] for the {len(ids_T)} tokens of "
                    f"completion_ids[{i}]; give one for each token"
                )
        limit = self.engine.sampling.max_completion_length
        if len(ids_T) > limit:
            raise self.error(
                f"{len(ids_T)} tokens in completion_ids[{i}]; max_completion_length is {limit}, "
                "and tools and environments count too"
            )
        own_T = counted_T == 1
        if wrong := counted_T[~own_T & (counted_T != 0)].tolist():
            raise self.error(
                f"{wrong[0]} in env_mask[{i}]; it is 1 for tokens of the model, 0 for others"
            )
        logps_T = logps_T.masked_fill(~own_T, 0.0)
        if wrong := logps_T[~(logps_T.isfinite() & (logps_T < _ROUNDING))].tolist():
            raise self.error(
                f"{wrong[0]} in logprobs[{i}] for a token of the model; log-probabilities are "
                "finite and not above 0 (give 0 in env_mask to a token that was not sampled)"
            )
        return ids_T, logps_T, own_T

    def _row(self, key: str, i: int) -> Tensor:
        value = self.output[key][i]
        try:
            row_T = torch.as_tensor(value).cpu()
        except (TypeError, ValueError, RuntimeError):
            row_T = torch.empty(0, 0)
        if row_T.ndim != 1:
            raise self.error(f"{value!r:.80} as {key}[{i}]; give it as a list of numbers")
        return row_T


def _copies(values: Iterable[Any]) -> list[Any]:
    return [copy.deepcopy(value) for value in values]  # at once, equal ones would stay one


def _name_of(function: Callable[..., Any]) -> str:
    return traits_of(function)["name"]
