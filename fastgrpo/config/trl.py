"""What a recipe written for TRL says under names, or with values, that are not ours.

Each of TRL's options is one of four: ours by the same name and with the same meaning; translated,
which is done here; without a bearing on a run on one GPU; or refused with what to do instead, both
in `trl_refused.py`. Names of older TRL, of transformers 4 and of open-r1 are among them. No option
is dropped that would have changed what is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..readable import shown
from .checks import ConfigError
from .train import TrainConfig
from .trl_refused import INSTEAD, NO_BEARING, asks_for_nothing

Values = Mapping[str, Any]


def translate(values: Values, run: Values | None = None) -> tuple[dict[str, Any], list[str]]:
    """Write a recipe of TRL's in our keys and values; ours stay as they are.

    Args:
        values: of one source, a file or the command line.
        run: those of all sources, for what depends on other keys; None: `values`.

    Returns:
        What is left to be checked, and a sentence for each option that cannot be had.
    """
    run = values if run is None else run
    ours = {key: value for key, value in values.items() if key not in _NOT_OURS}
    problems: list[str] = []
    for key, change in TRANSLATED.items():
        if key in values:
            try:
                ours.update(change(values[key], values, run))
            except ConfigError as error:
                problems.append(f"{key}: {error}")
    for key, instead in INSTEAD.items():
        if key in values and not asks_for_nothing(key, values[key]):
            problems.append(f"{key}: {instead}")
    return ours, problems


Change = Callable[[Any, Values, Values], dict[str, Any]]
"""From the value of one of TRL's options, beside its source and the whole run, to keys of ours."""


def _renamed(new: str) -> Change:
    def change(value: Any, source: Values, run: Values) -> dict[str, Any]:
        if value is None:
            return {}
        if source.get(new) not in (None, value):
            raise ConfigError(f"is TRL's name of {new}, which is given too; leave one out")
        return {new: value}

    return change


def _replaced(key: str, values: Mapping[Any, Any]) -> Change:
    """Return a change of some values of a key that is ours."""

    def change(value: Any, source: Values, run: Values) -> dict[str, Any]:
        for old, new in values.items():
            if value == old and type(value) is type(old):
                return {key: new}
        return {key: value}

    return change


def _listed(key: str, **whole: Any) -> Change:
    """Return a change of text to a list; of nothing, and of texts that stand for a whole value."""

    def change(value: Any, source: Values, run: Values) -> dict[str, Any]:
        if value is None:
            return {}
        texts = [value] if isinstance(value, str) else value
        for text, stands_for in whole.items():
            if texts == [text]:
                return {key: stands_for}
        return {key: texts}

    return change


def _epsilon(value: Any, source: Values, run: Values) -> dict[str, Any]:
    low = _renamed("epsilon_low")(value, source, run)
    both = low | {"epsilon_high": value} if low else {}
    return low if run.get("epsilon_high") is not None else both


def _epsilon_high(value: Any, source: Values, run: Values) -> dict[str, Any]:
    return {} if value is None else {"epsilon_high": value}


def _generation_batch_size(value: Any, source: Values, run: Values) -> dict[str, Any]:
    if value is None:
        return {}
    if source.get("steps_per_generation") is not None:
        raise ConfigError("and steps_per_generation say the same; leave one out")
    size = run.get("per_device_train_batch_size", TrainConfig.per_device_train_batch_size)
    if type(value) is not int or type(size) is not int or size < 1 or value % size:
        raise ConfigError(
            f"must be a multiple of per_device_train_batch_size = {shown(size)}, got {shown(value)}"
        )
    return {"steps_per_generation": value // size}


def _reward_funcs(value: Any, source: Values, run: Values) -> dict[str, Any]:
    """Return all rewards of a run, the model first, whichever source gives which."""
    model, functions = run.get("reward_model_name_or_path"), run.get("reward_funcs")
    if isinstance(functions, str):
        functions = [functions]
    if model is not None and isinstance(functions, list | None):
        functions = [model, *(functions or [])]
    return {} if functions is None else {"reward_funcs": functions}


def _log_completions(value: Any, source: Values, run: Values) -> dict[str, Any]:
    if value is not False:
        return {}
    if source.get("num_completions_to_log"):
        raise ConfigError("false and num_completions_to_log contradict each other; leave one out")
    return {"num_completions_to_log": 0}


def _warmup_ratio(value: Any, source: Values, run: Values) -> dict[str, Any]:
    if not value:
        return {}
    if value == 1:
        raise ConfigError("1 leaves no step at the full learning rate; take a share below 1")
    if source.get("warmup_steps"):
        raise ConfigError("and warmup_steps are both given; leave one out")
    return {"warmup_steps": value}


def _default_of_trl(key: str, default: Any, has_effect: Callable[[Values], Any]) -> Change:
    """Return a change that drops TRL's default, which is not ours, where it has no effect."""

    def change(value: Any, source: Values, run: Values) -> dict[str, Any]:
        return {} if value == default and not has_effect(run) else {key: value}

    return change


def _steps(key: str) -> Change:
    def change(value: Any, source: Values, run: Values) -> dict[str, Any]:
        if isinstance(value, float) and 0 < value < 1:
            raise ConfigError(f"write the number of steps; {value} would be a share of all steps")
        return {key: int(value) if isinstance(value, float) and value.is_integer() else value}

    return change


def _checkpointing_kwargs(value: Any, source: Values, run: Values) -> dict[str, Any]:
    options = dict(value) if isinstance(value, Mapping) else {}
    options.pop("use_reentrant", None)  # gradients are the same both ways
    offload = options.pop("offload", False)
    if options or not isinstance(value, Mapping | None):
        raise ConfigError("every layer is computed again; leave out all but offload: true")
    return {"activation_offloading": True} if offload else {}


def _model_init_kwargs(value: Any, source: Values, run: Values) -> dict[str, Any]:
    names = {name: name for name in ("dtype", "attn_implementation", "trust_remote_code")}
    names |= {"torch_dtype": "dtype", "revision": "model_revision"}
    if not isinstance(value, Mapping | None) or set(value or {}) - set(names):
        raise ConfigError(f"may hold {', '.join(names)}, got {shown(value)}; leave the others out")
    return {names[name]: x for name, x in (value or {}).items()}


def _same_as(key: str) -> Change:
    """Return a check of an option that we have no second value for."""

    def change(value: Any, source: Values, run: Values) -> dict[str, Any]:
        ours = run.get(key, getattr(TrainConfig, key))
        if value not in (None, ours):
            raise ConfigError(f"is {key} = {shown(ours)} here; leave it out, or change that")
        return {}

    return change


def _do_eval(value: Any, source: Values, run: Values) -> dict[str, Any]:
    measured = run.get("dataset_test_split") or run.get("eval_strategy") not in (None, False, "no")
    if value and not measured:
        raise ConfigError(
            "name a dataset_test_split, which is measured before and after training; eval_strategy "
            "asks for more"
        )
    return {}


TRANSLATED: dict[str, Change] = {
    "epsilon_high": _epsilon_high,
    "epsilon": _epsilon,
    "scale_rewards": _replaced("scale_rewards", {True: "group", False: "none"}),
    "optim": _replaced("optim", {"adamw_torch": "adamw_torch_fused"}),  # the same updates
    "top_k": _replaced("top_k", {None: 0, -1: 0}),
    "report_to": _listed("report_to", none=[]),
    "reward_funcs": _reward_funcs,
    "lora_target_modules": _listed("lora_target_modules", **{"all-linear": None}),
    "lora_dropout": _default_of_trl("lora_dropout", 0.05, lambda run: run.get("use_peft")),
    "use_bias_correction_kl": _default_of_trl(
        "use_bias_correction_kl", True, lambda run: run.get("beta")
    ),
    "logging_steps": _steps("logging_steps"),
    "eval_steps": _steps("eval_steps"),
    "save_steps": _steps("save_steps"),
    "generation_batch_size": _generation_batch_size,
    "reward_model_name_or_path": _reward_funcs,
    "log_completions": _log_completions,
    "activation_checkpointing": _renamed("gradient_checkpointing"),
    "gradient_checkpointing_kwargs": _checkpointing_kwargs,
    "activation_checkpointing_kwargs": _checkpointing_kwargs,
    "model_init_kwargs": _model_init_kwargs,
    "data_seed": _same_as("seed"),
    "do_eval": _do_eval,
    # Older TRL, transformers 4, open-r1:
    "vllm_importance_sampling_cap": _renamed("vllm_importance_sampling_clip_max"),
    "vllm_max_model_len": _renamed("vllm_max_model_length"),
    "torch_dtype": _renamed("dtype"),
    "evaluation_strategy": _renamed("eval_strategy"),
    "warmup_ratio": _warmup_ratio,
    "dataset_prompt_column": _renamed("prompt_column"),
    "max_completion_len": _same_as("max_completion_length"),
    "wandb_project": _renamed("project"),
}

_NOT_OURS = TRANSLATED.keys() | INSTEAD.keys() | NO_BEARING
