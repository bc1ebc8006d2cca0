"""From flat YAML and key=value to a `TrainConfig`.

An unknown key, a value of the wrong type, one out of range and one without effect are errors that
name the key; all of them are reported together.
"""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from fastgrpo_kernels import GRPOLossConfig

from ..readable import named, shown
from .checks import ConfigError, secrets
from .effects import OF_TRAINING, switched_off
from .text import MOST_BYTES, read_yaml
from .train import DEFAULTS, LOSS_KEYS, TrainConfig
from .trl import translate


def load_config(
    path: str | Path, overrides: Iterable[str] = (), kind: type[TrainConfig] = TrainConfig
) -> TrainConfig:
    """Read a YAML file, put `key=value` overrides over it, and check everything.

    An option of the file that an override leaves without effect, as `beta=0` does with
    `kl_estimator`, is as if the file did not have it.

    Args:
        path: of the file.
        overrides: `key=value` each.
        kind: what to build, `EvalConfig` where nothing is trained.

    Raises:
        ConfigError: the file, a key or a value is wrong; every problem found is in the message, in
            the order of the file.
    """
    path = Path(path)
    values = _read(path)
    over = _parse(overrides)
    # What is overridden may be wrong, or another name of what it is overridden with.
    first, of_file = translate({k: v for k, v in values.items() if k not in over}, values | over)
    second, of_overrides = translate(over, values | over)
    problems = [*of_file, *of_overrides]
    try:
        return _build(first | second, problems, order=values | over, overrides=second, kind=kind)
    except ConfigError as error:
        raise ConfigError(f"{path}:\n{error}") from None


def config_from(values: Mapping[str, Any]) -> TrainConfig:
    """Build a configuration from flat keys and values, ours or TRL's.

    Raises:
        ConfigError: unknown keys (with the nearest name) and wrong values, all together, in the
            order of `values`.
    """
    return _build(*translate(values), order=values)


def check_overrides_of_eval(overrides: Iterable[str]) -> None:
    """Refuse overrides that measuring a model has no use for.

    Raises:
        ConfigError: names them.
    """
    keys, _ = translate(_parse(overrides))
    problems = [
        f"{key}: is of training, and `fastgrpo eval` does not train; "
        + ("--out says where results go" if key == "output_dir" else "leave it out")
        for key in keys
        if key in OF_TRAINING
    ]
    if problems:
        raise ConfigError("\n".join(problems))


def suggestion(key: str) -> str | None:
    """Return the key that is meant by a name that is none, if there is one like it."""
    name = key.lower().replace("-", "_")
    nearest = difflib.get_close_matches(name, DEFAULTS, 1, 0.6)
    return _MEANT.get(name, nearest[0] if nearest else None)


def _read(path: Path) -> dict[str, Any]:
    """Return the keys and values of a file.

    Raises:
        ConfigError: names it, and the line.
    """
    place = shown(str(path), quoted=False)
    try:
        with path.open("rb") as file:  # also one without end, such as /dev/zero
            source = file.read(MOST_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(
            f"{place}: no such file; the repository has examples in configs/"
        ) from None
    except (OSError, ValueError) as error:  # the second of NUL in its name
        why = (isinstance(error, OSError) and error.strerror) or error
        raise ConfigError(f"{place}: cannot be read: {why}; name a YAML file") from None
    if len(source) > MOST_BYTES:
        raise ConfigError(f"{place}: is longer than {MOST_BYTES} bytes; name a YAML file")
    try:
        values = read_yaml(source)
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from None
    if not isinstance(values, dict | None):
        raise ConfigError(f"{place}: must hold `key: value` lines, got {shown(values)}")
    return values or {}


def _parse(overrides: Iterable[str]) -> dict[str, Any]:
    over: dict[str, Any] = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise ConfigError(f"{shown(override)}: overrides look like key=value")
        if key in over:
            raise ConfigError(f"{named(key)}: is given twice on the command line; leave one out")
        try:
            over[key] = read_yaml(value)
        except ConfigError as error:
            raise ConfigError(f"{named(key)}: {error}") from None
    return over


def _build(
    values: Mapping[str, Any],
    refused: Sequence[str],
    *,
    order: Mapping[str, Any],
    overrides: Collection[str] = (),
    kind: type[TrainConfig] = TrainConfig,
) -> TrainConfig:
    """Build a configuration, or say all that is wrong.

    Args:
        values: by our keys.
        refused: problems found before.
        order: the keys and values as they were given, in whose order problems are told.
        overrides: keys that win over what else is said by the others.
        kind: what to build.
    """
    if hidden := list(secrets(order)):  # alone: other problems would say the values
        raise ConfigError("\n".join(hidden))
    hints = typing.get_type_hints(GRPOLossConfig) | typing.get_type_hints(TrainConfig)
    problems, wrong, arguments = list(refused), set(map(_key_of, refused)), dict[str, Any]()
    for key, value in values.items():
        if key not in DEFAULTS:
            meant = suggestion(str(key))
            remedy = f"did you mean {meant}?" if meant else "and none is like it; leave it out"
            problems.append(f"{named(key)}: unknown key{'; ' if meant else ', '}{remedy}")
            wrong.add(meant or "")
            continue
        try:
            arguments[key] = _convert(value, hints[key])
        except ConfigError as error:
            problems.append(f"{key}: {error}")
            wrong.add(key)
    for key in switched_off(DEFAULTS | arguments, DEFAULTS, overrides, kind.EFFECTIVE):
        arguments.pop(key, None)
    loss = {key: arguments.pop(key) for key in LOSS_KEYS if key in arguments}
    while True:  # it tells of one problem at a time
        try:
            loss_config = GRPOLossConfig(**loss, max_completion_length=1)
            break
        except ValueError as error:
            key = _key_of(str(error))
            if wrong.isdisjoint(_WORD.findall(str(error))):
                problems.append(str(error).replace(f"{key} must", f"{key}: must", 1))
            wrong.add(key)
            del loss[key]
    try:
        config = kind(**arguments, loss=loss_config)
        if not problems:
            return config
    except ConfigError as error:
        # What was found out about a value that is wrong says nothing.
        problems += [x for x in str(error).splitlines() if wrong.isdisjoint(_WORD.findall(x))]
    places = {str(key): place for place, key in enumerate(order)}
    problems.sort(key=lambda problem: places.get(_key_of(problem), len(places)))
    if len(problems) > _MOST_TOLD:
        problems[_MOST_TOLD:] = [f"and {len(problems) - _MOST_TOLD} more"]
    raise ConfigError("\n".join(problems)) from None


_MOST_TOLD = 100
"""Problems in one message."""
_WORD = re.compile(r"[^\s:='\"]+")


def _key_of(problem: str) -> str:
    """Return the key that a sentence about a problem begins with."""
    return _WORD.findall(problem)[0]


def _convert(value: Any, hint: Any) -> Any:
    """Return `value` as the annotated type, or say what was expected."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        first, *others = (a for a in arguments if a is not type(None))
        if others and isinstance(value, dict):  # a word, or pairs
            return _convert(value, *others)
        try:
            return _convert(value, first)
        except ConfigError as error:
            pairs = ", or `key: value` pairs" if others else ""
            raise ConfigError(str(error).replace(", got", f"{pairs}, got", 1)) from None
    if origin is Literal:
        if value is False and "no" in arguments:
            return "no"  # YAML reads a bare no as false
        if value in arguments and type(value) is str:
            return value
        raise ConfigError(f"must be one of {', '.join(map(str, arguments))}, got {shown(value)}")
    if origin is list:
        if not isinstance(value, list):
            raise ConfigError(f"must be a list, got {shown(value)}")
        return [_convert(item, arguments[0]) for item in value]
    if origin is dict:
        if isinstance(value, dict):
            for name in value:
                if not isinstance(name, str):
                    raise ConfigError(f"must have texts as keys, got {shown(name)}")
            return value
        raise ConfigError(f"must be `key: value` pairs, got {shown(value)}")
    if hint is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1e-6 as text
        except (ValueError, OverflowError):
            pass
    elif type(value) is hint:
        if isinstance(value, int) and abs(value) > LARGEST:
            raise ConfigError(f"must be at most {LARGEST} in size, got {shown(value)}")
        if isinstance(value, str) and _NOWHERE.search(value):
            raise ConfigError(f"has a character that no text has, got {shown(value)}; delete it")
        return value
    raise ConfigError(f"must be {_NAMES[hint]}, got {shown(value)}")


LARGEST = 2**63 - 1
"""Of whole numbers: what PyTorch counts with."""
_NOWHERE = re.compile("[\\0\\ud800-\\udfff]")
"""What neither a path nor a file in UTF-8 can have."""
_NAMES = {float: "a number", int: "a whole number", str: "text", bool: "true or false"}
_MEANT = {
    name: key
    for key, names in {
        "model_name_or_path": "model model_name model_path model_id pretrained",
        "dataset_name": "dataset data data_path train_dataset train_files dataset_path",
        "per_device_train_batch_size": "batch_size train_batch_size micro_batch_size bs",
        "learning_rate": "lr",
        "lr_scheduler_type": "scheduler lr_scheduler schedule",
        "optim": "optimizer",
        "num_train_epochs": "epochs num_epochs total_epochs",
        "max_steps": "steps num_steps total_training_steps",
        "gradient_accumulation_steps": "grad_accum gradient_accumulation",
        "max_grad_norm": "grad_clip clip_grad gradient_clipping",
        "reward_funcs": "reward rewards reward_fn reward_func reward_function",
        "num_generations": "group_size n num_samples rollout_n",
        "max_completion_length": "max_new_tokens max_tokens max_response_length response_length",
        "beta": "kl_coef kl_beta kl_loss_coef init_kl_coef",
        "epsilon_low": "clip_ratio_low clip_range cliprange clip_ratio",
        "epsilon_high": "clip_ratio_high",
        "loss_type": "loss algorithm algo",
        "use_peft": "lora peft",
        "lora_r": "lora_rank rank",
        "output_dir": "output out run_dir save_dir",
        "report_to": "logger tracker wandb",
    }.items()
    for name in names.split()
}
"""Names of other trainers and of everyday speech, which no nearest name would find."""
