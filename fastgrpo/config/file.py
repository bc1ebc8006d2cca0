"""From flat YAML and key=value to a `TrainConfig`.

An unknown key, a value of the wrong type and a value out of range are errors that name the key;
all of them are reported together.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from fastgrpo_kernels import GRPOLossConfig

from .checks import ConfigError
from .train import LOSS_KEYS, TrainConfig
from .trl import translate


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> TrainConfig:
    """Read a YAML file, put `key=value` overrides over it, and check everything.

    Raises:
        ConfigError: the file, a key or a value is wrong; every problem found is in the message.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        values = yaml.safe_load(text)
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: no such file; the repository has examples in configs/"
        ) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {error}") from None
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must hold `key: value` lines, got {type(values).__name__}")
    counts = Counter(key.value for key, _ in yaml.compose(text).value) if values else Counter()
    problems = [f"{key}: is given {n} times" for key, n in counts.items() if n > 1]
    over: dict[str, Any] = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise ConfigError(f"{override!r}: overrides look like key=value")
        try:
            over[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"{key}: {value!r} cannot be read as YAML: {error}") from None
    # What is overridden may be wrong, or another name of what it is overridden with.
    first, of_file = translate({k: v for k, v in values.items() if k not in over}, values | over)
    second, of_overrides = translate(over, values | over)
    try:
        return _build(first | second, [*problems, *of_file, *of_overrides])
    except ConfigError as error:
        raise ConfigError(f"{path}:\n{error}") from None


def config_from(values: Mapping[str, Any]) -> TrainConfig:
    """Build a configuration from flat keys and values, ours or TRL's.

    Raises:
        ConfigError: unknown keys (with the nearest name) and wrong values, all together.
    """
    return _build(*translate(values))


def _build(values: Mapping[str, Any], refused: Sequence[str]) -> TrainConfig:
    """Build a configuration, unless something was refused before: then say all that is wrong."""
    own = typing.get_type_hints(TrainConfig)
    del own["loss"]
    loss = {k: v for k, v in typing.get_type_hints(GRPOLossConfig).items() if k in LOSS_KEYS}
    problems: list[str] = []
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        hint = own.get(key, loss.get(key))
        if hint is None:
            nearest = difflib.get_close_matches(str(key), [*own, *loss], 1, 0.6)
            suggestion = f"; did you mean {nearest[0]}?" if nearest else ""
            problems.append(f"{key}: unknown key{suggestion}")
            continue
        try:
            arguments[key] = _convert(value, hint)
        except ConfigError as error:
            problems.append(f"{key}: {error}")
    if problems:
        raise ConfigError("\n".join([*refused, *problems]))
    try:
        loss_config = GRPOLossConfig(
            **{key: arguments.pop(key) for key in loss if key in arguments},
            max_completion_length=arguments.get("max_completion_length", 1),
        )
        config = TrainConfig(**arguments, loss=loss_config)
    except ValueError as error:
        raise ConfigError("\n".join([*refused, str(error)])) from None
    if refused:
        raise ConfigError("\n".join(refused))
    return config


def _convert(value: Any, hint: Any) -> Any:
    """Return `value` as the annotated type, or say what was expected."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        (hint,) = (a for a in arguments if a is not type(None))
        return _convert(value, hint)
    if origin is Literal:
        if value is False and "no" in arguments:
            return "no"  # YAML reads a bare no as false
        if value in arguments and type(value) is str:
            return value
        raise ConfigError(f"must be one of {', '.join(map(str, arguments))}, got {value!r}")
    if origin is list:
        if not isinstance(value, list):
            raise ConfigError(f"must be a list, got {value!r}")
        return [_convert(item, arguments[0]) for item in value]
    if origin is dict:
        if isinstance(value, dict):
            return value
        raise ConfigError(f"must be `key: value` pairs, got {value!r}")
    if hint is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1e-6 as text
        except ValueError:
            pass
    elif type(value) is hint:
        return value
    raise ConfigError(f"must be {_NAMES[hint]}, got {value!r}")


_NAMES = {float: "a number", int: "a whole number", str: "text", bool: "true or false"}
