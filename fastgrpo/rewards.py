"""Rewards: the functions that judge completions, the built-in ones and the user's.

A reward function has TRL's signature, so that those written for TRL run unmodified. It is called by
keyword, `f(prompts=..., completions=..., completion_ids=..., **columns)`, with one entry per
completion in every argument, `columns` being the other columns of the dataset. It returns a number
per completion, or None for one it does not judge.

B completions, K reward functions.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import math
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from .answers import is_right

RewardFunction = Callable[..., Sequence[float | None]]
Completion = str | list[dict[str, Any]]


class RewardError(ValueError):
    """A reward function, or what it is called with, does not keep to the contract."""


@dataclass(frozen=True)
class Reward:
    """A reward function under the name its metrics carry, and its weight in the sum."""

    name: str
    function: RewardFunction
    weight: float = 1.0


def accuracy(completions: Sequence[Completion], **columns: Any) -> list[float | None]:
    r"""Reward 1 for the right answer, else 0.

    The right answer is the column `solution`, or else `answer`: what follows its last `####`
    (GSM8K) if there is one. A completion's answer is what its last `<answer>...</answer>` holds,
    or else all of it. In both, the last `\boxed{}` wins over the text around it, and only the last
    2,000 characters are read. Then:

    - equal text is right, without outer space, maths delimiters and `\text{}`;
    - two plain numbers ("1,000", "$18", "72.0", "1e3") are compared as numbers, exactly;
    - a right answer in mathematical notation is compared by math-verify, to six decimals: 1/2 is
      0.5 but 1/3 is not 0.3333, "x=5" is 5, 50% is 50 and 0.5. Of a completion in prose it takes
      the last formula or number. Whatever takes longer than `CHECK_TIMEOUT_S` is wrong;
    - any other right answer ("B", "Paris", "Apollo 11", "5 miles") is text and must be equal.
      Text is what has a word of three letters outside LaTeX, or no digit, operator or LaTeX.

    Returns:
        1.0 or 0.0; None where the right answer is None.

    Raises:
        ValueError: there is no column `solution` or `answer`.
    """
    golds = columns.get("solution", columns.get("answer"))
    if golds is None:
        present = sorted(columns.keys() - {"prompts", "completion_ids"})
        raise ValueError(
            "reward function 'accuracy' needs a column 'solution' or 'answer'; "
            f"the dataset has {', '.join(present) or 'no column beside the prompt'}"
        )
    return [
        None if gold is None else float(is_right(str(gold), _content(completion)))
        for gold, completion in zip(golds, completions, strict=True)
    ]


def format(completions: Sequence[Completion], **columns: Any) -> list[float]:
    """Reward 1 for `<think>...</think>` then `<answer>...</answer>` and nothing else but space."""
    shape = re.compile(r"<think>.*</think>\s*<answer>.*</answer>", re.DOTALL)
    texts = [_content(completion).strip() for completion in completions]
    return [float(_tags_once(text) == 4 and bool(shape.fullmatch(text))) for text in texts]


def tag_count(completions: Sequence[Completion], **columns: Any) -> list[float]:
    """Reward 0.25 for each of the four tags of `format` that stands exactly once (open-r1)."""
    return [0.25 * _tags_once(_content(completion)) for completion in completions]


BUILT_IN: dict[str, RewardFunction] = {f.__name__: f for f in (accuracy, format, tag_count)}


def load_reward_funcs(names: Sequence[str | RewardFunction]) -> list[RewardFunction]:
    """Find reward functions.

    Args:
        names: each a built-in name, "module:function", "path.py:function" (relative to the working
            directory), or a function, which is returned as it is.

    Raises:
        ValueError: a name is of no such form, or there is no such function.
        ModuleNotFoundError, FileNotFoundError: there is no such module or file.
        NotImplementedError: the function is a coroutine function.
    """
    functions = [_find(name) if isinstance(name, str) else name for name in names]
    for function in functions:
        if inspect.iscoroutinefunction(function):
            raise NotImplementedError(
                f"reward function {_name_of(function)!r} is async, which is not supported yet; "
                "make it a plain function that runs its coroutine with asyncio.run"
            )
    return functions


def load_rewards(
    reward_funcs: Sequence[str | RewardFunction], reward_weights: Sequence[float] | None = None
) -> list[Reward]:
    """Pair reward functions (see `load_reward_funcs`) with their weights, None meaning 1 each.

    Raises:
        ValueError: the lengths differ, or two functions have one name.
    """
    weights = [1.0] * len(reward_funcs) if reward_weights is None else reward_weights
    if len(weights) != len(reward_funcs):
        raise ValueError(
            f"reward_weights has {len(weights)} entries for {len(reward_funcs)} reward_funcs; "
            "give one weight per function"
        )
    functions = load_reward_funcs(reward_funcs)
    names = [_name_of(function) for function in functions]
    if len(set(names)) < len(names):
        raise ValueError(
            f"reward_funcs are named {', '.join(names)}; metrics are named after the functions, "
            "so give each a name of its own"
        )
    return [
        Reward(name=name, function=function, weight=float(weight))
        for name, function, weight in zip(names, functions, weights, strict=True)
    ]


def check_columns(rewards: Sequence[Reward], columns: Sequence[str]) -> None:
    """Refuse reward functions that cannot be called with the columns of a dataset.

    Raises:
        ValueError: names the function and what it lacks, or the column in its way.
    """
    _refuse_own_arguments(columns)
    arguments: dict[str, Any] = {name: [] for name in _OWN_ARGUMENTS.union(columns) - {"prompt"}}
    for reward in rewards:
        try:
            inspect.signature(reward.function).bind(**arguments)
        except TypeError as error:
            raise ValueError(
                f"reward function {reward.name!r} cannot be called with the dataset's columns "
                f"{', '.join(columns)}: {error}; take what is not needed as **columns"
            ) from None
        if reward.function is accuracy:
            accuracy(**arguments)  # looks for its column


_OWN_ARGUMENTS = frozenset({"prompts", "completions", "completion_ids"})


def _refuse_own_arguments(columns: Iterable[str]) -> None:
    if taken := _OWN_ARGUMENTS.intersection(columns):
        raise RewardError(
            f"the dataset has a column named {min(taken)!r}, but {min(taken)!r} is an argument's "
            "name; rename the column"
        )


def decode_completions(
    prompts: Sequence[Any], completion_ids: Sequence[Sequence[int]], tokenizer: Any
) -> list[Completion]:
    """Return completions as reward functions see them: text, or messages after such a prompt."""
    texts: list[str] = [tokenizer.decode(ids, skip_special_tokens=True) for ids in completion_ids]
    return [
        text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        for prompt, text in zip(prompts, texts, strict=True)
    ]


def score(
    rewards: Sequence[Reward],
    *,
    prompts: Sequence[Any],
    completions: Sequence[Completion],
    completion_ids: Sequence[Sequence[int]],
    columns: dict[str, list[Any]],
) -> Tensor:
    """Call every reward function on a batch of completions.

    Args:
        rewards: the functions.
        prompts: (B,) the prompt of each completion, repeated within its group, as the columns are.
        completions: (B,) texts, or lists of messages.
        completion_ids: (B,) the token ids of the completions.
        columns: the other columns of the dataset, (B,) each.

    Returns:
        (B, K) fp32, NaN where a function returned None.

    Raises:
        RewardError: a function returned a wrong number of values, or one that is not a finite
            number; or an argument has a wrong length. What a function raises goes through.
    """
    arguments: dict[str, Sequence[Any]] = {
        "prompts": prompts,
        "completions": completions,
        "completion_ids": completion_ids,
    }
    _refuse_own_arguments(columns)
    arguments |= columns
    for name, values in arguments.items():
        if len(values) != len(completions):
            raise RewardError(
                f"{name} has {len(values)} entries for {len(completions)} completions"
            )
    rewards_KB = [_call(reward, arguments) for reward in rewards]
    return torch.tensor(rewards_KB, dtype=torch.float32).T.contiguous()


def _call(reward: Reward, arguments: dict[str, Sequence[Any]]) -> list[float]:
    try:
        values: Any = reward.function(**arguments)
    except Exception as error:
        error.add_note(f"raised by the reward function {reward.name!r}")
        raise
    num_completions = len(arguments["completions"])
    sized = hasattr(values, "__len__")
    if not sized or len(values) != num_completions:
        returned = f"{len(values)} values" if sized else repr(values)
        raise RewardError(
            f"reward function {reward.name!r} returned {returned} for {num_completions} "
            "completions; return a list with one number or None for each"
        )
    return [_number_or_nan(reward.name, i, value) for i, value in enumerate(values)]


def _number_or_nan(name: str, index: int, value: Any) -> float:
    if value is None:
        return math.nan
    # float() would also take strings, and arrays of one element.
    scalar = not isinstance(value, str | bytes) and getattr(value, "ndim", 0) == 0
    try:
        number = float(value) if scalar else math.nan
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not abs(number) <= torch.finfo(torch.float32).max:
        raise RewardError(
            f"reward function {name!r} returned {value!r} for completion {index}; "
            "return a finite number, or None for a completion it does not judge"
        )
    return number


def _name_of(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", type(function).__name__)


def _find(name: str) -> RewardFunction:
    if name in BUILT_IN:
        return BUILT_IN[name]
    source, _, attribute = name.rpartition(":")
    if not source or not attribute:
        nearest = difflib.get_close_matches(name, BUILT_IN, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"unknown reward function {name!r}, did you mean {nearest!r}? Give a built-in name "
            f"({', '.join(BUILT_IN)}), 'module:function' or 'path.py:function'"
        )
    module = _load_file(Path(source)) if source.endswith(".py") else _import(source)
    function = getattr(module, attribute, None)
    if not callable(function):
        raise ValueError(f"reward function {name!r}: {source!r} has no function {attribute!r}")
    return cast("RewardFunction", function)


def _import(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        # A module that is there but imports one that is not must say so itself.
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        raise ModuleNotFoundError(
            f"no module {module!r} for a reward function; "
            "install it, or name its file: 'path.py:function'"
        ) from error


def _load_file(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(
            f"no file {str(path)!r} for a reward function; "
            f"it is looked up from the working directory {str(Path.cwd())!r}"
        )
    spec = importlib.util.spec_from_file_location(f"fastgrpo_rewards_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look their module up
    spec.loader.exec_module(module)
    return module


def _content(completion: Completion) -> str:
    if isinstance(completion, str):
        return completion
    return (completion[-1].get("content") or "") if completion else ""


def _tags_once(text: str) -> int:
    return sum(text.count(tag) == 1 for tag in ("<think>", "</think>", "<answer>", "</answer>"))
