"""What an entry of `reward_funcs` stands for."""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn

from .built_in import BUILT_IN, soft_overlong_punishment
from .contract import RewardFunction
from .functions import Source

SOFT_OVERLONG = soft_overlong_punishment.__name__

_OF_TRL = {
    "accuracy_reward": "accuracy",
    "reasoning_accuracy_reward": "accuracy",
    "think_format_reward": "format",
    "get_soft_overlong_punishment": SOFT_OVERLONG,
}
"""Names that TRL's command line knows, and the built-in function nearest to each."""
_OPTIONS_OF_TRL: dict[str, dict[str, Any]] = {
    "get_soft_overlong_punishment": {"max_completion_len": 1280, "soft_punish_cache": 256}
}
"""What TRL's command line calls them with."""
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_DOTTED = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")


class Checkpoint(str):
    """The directory or Hub name of a reward model."""


def identify(name: str) -> Checkpoint | Source | Callable[..., Any]:
    """Say what a name stands for; whether it exists is found out as it is loaded.

    Args:
        name: a built-in name; one of TRL's registry; 'module:function', 'path.py:function' or
            'package.module.function'; the directory or the Hub name of a reward model.

    Raises:
        ValueError: it is none of these, or of TRL, which is not installed.
    """
    if is_object(name):
        raise ValueError(
            f"reward_funcs: {name!r} was a Python object in the run that this configuration is of; "
            "name it here ('path.py:function'), or give it to Trainer again"
        )
    if name in BUILT_IN:
        return BUILT_IN[name]
    if name in _OF_TRL:
        return _of_trl(name)
    if is_checkpoint(name):
        return Checkpoint(name)
    module, _, function = name.rpartition(":")
    if module and function:
        return "name", name
    if _DOTTED.fullmatch(name) and not name.endswith(".py"):
        module, _, function = name.rpartition(".")
        return "name", f"{module}:{function}"
    known = [*BUILT_IN, SOFT_OVERLONG]
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
    raise ValueError(
        f"unknown reward function {name!r}, did you mean {nearest!r}? Give a built-in name "
        f"({', '.join(known)}), 'module:function', 'path.py:function', or the directory or Hub "
        "name of a reward model"
    )


def as_object(name: str) -> str:
    """Return what the configuration of a run says where it was given a Python object."""
    return f"<object {name}>"


def is_object(name: str) -> bool:
    """Say whether a configuration says that there was an object."""
    return name.startswith("<object ")


def is_checkpoint(name: str) -> bool:
    """Say whether a name stands for a reward model: a directory, a path to one, or `org/name`."""
    if name in BUILT_IN or name in _OF_TRL or name == SOFT_OVERLONG:
        return False
    if Path(name).is_dir():
        return True
    like_path = name.startswith((".", "/", "~")) or _HUB_NAME.fullmatch(name) is not None
    return like_path and ":" not in name and not name.endswith(".py")


def _of_trl(name: str) -> Source:
    if find_spec("trl") is None:
        raise ValueError(
            f"reward function {name!r} is TRL's, which is not installed; pip install trl, or use "
            f"the built-in {_OF_TRL[name]!r}"
        )
    place = f"trl.rewards:{name}"
    return ("made", (place, _OPTIONS_OF_TRL[name])) if name in _OPTIONS_OF_TRL else ("name", place)


def is_ours(entry: Source | Callable[..., Any]) -> bool:
    """Say whether a function is of this package, which keeps to its own limits of time."""
    while isinstance(entry, functools.partial):
        entry = entry.func
    if isinstance(entry, tuple):
        module = str(entry[1]) if entry[0] == "name" else ""
    else:
        module = str(getattr(entry, "__module__", None))
    return re.split("[.:]", module)[0] == __name__.partition(".")[0]


def soft_overlong(
    max_completion_length: int | None, soft_punish_cache: int | None
) -> RewardFunction:
    """Return the built-in function of that name, which has no default.

    Raises:
        ValueError: an argument is missing, or does not fit.
    """
    if max_completion_length is None or soft_punish_cache is None:
        raise ValueError(
            f"soft_punish_cache: {SOFT_OVERLONG!r} in reward_funcs needs it, the number of tokens "
            "before max_completion_length in which punishment grows"
        )
    return soft_overlong_punishment(max_completion_length, soft_punish_cache)


def is_model(entry: Any) -> bool:
    """Say whether an entry is a reward model, or the name of one."""
    return isinstance(entry, nn.Module | Checkpoint)


def write(function: Callable[..., Any]) -> Source:
    """Return a function in a form that can go to another process.

    Raises:
        ValueError: it holds on to something that cannot.
    """
    import dill

    try:
        return "dill", dill.dumps(function, recurse=True)
    except Exception as error:
        name: str = getattr(function, "__name__", type(function).__name__)
        raise ValueError(
            f"reward function {name!r} cannot be sent to a process of its own ({error}); give it "
            "by name ('path.py:function'), or set reward_timeout: null to call it in this one"
        ) from error
