"""The options of TRL's `GRPOConfig` that its loss reads, as ours."""

from __future__ import annotations

import functools
import warnings
from typing import Any

from fastgrpo_kernels import GRPOLossConfig

# What TRL and we call by one name, and what only some loss types read.
_ALL = (
    "loss_type", "importance_sampling_level", "beta", "use_bias_correction_kl", "temperature",
    "entropy_coef", "max_completion_length",
)  # fmt: skip
_OF_SAPO = ("sapo_temperature_pos", "sapo_temperature_neg")
_OF_VESPO = ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg")
_CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")


def loss_config(args: Any) -> GRPOLossConfig:
    """Return the mathematics that a `trl.GRPOConfig` asks for.

    Raises:
        ValueError: our loss does not have it; names the option.
    """
    try:
        return GRPOLossConfig(**options_of(args))
    except ValueError as error:
        raise ValueError(str(error).replace("epsilon_low", "epsilon")) from None


def options_of(args: Any, **now: Any) -> dict[str, Any]:
    """Return the options of `GRPOLossConfig` that TRL's loss reads; `now` goes before `args`."""
    found = {
        **{name: getattr(args, name) for name in (*_ALL, *_OF_SAPO, *_OF_VESPO, "delta")},
        "epsilon_low": args.epsilon,
        "epsilon_high": args.epsilon if args.epsilon_high is None else args.epsilon_high,
        **now,
    }
    loss_type = found["loss_type"]
    names = {*_ALL}
    if loss_type in _CLIPPED:
        names |= {"epsilon_low", "epsilon_high", "delta"}
    elif loss_type == "cispo":
        names |= {"epsilon_high"}
    elif loss_type == "sapo":
        names |= {*_OF_SAPO}
    elif loss_type == "vespo":
        names |= {*_OF_VESPO}
        for name in ("vespo_lambda_pos", "vespo_lambda_neg"):
            found[name] = max(found[name], 1e-4)  # as TRL
        if found["importance_sampling_level"] == "sequence":
            # TRL's vespo reads the level for this alone; otherwise it warns and goes on.
            if found["beta"] and found["use_bias_correction_kl"]:
                raise ValueError(
                    "importance_sampling_level='sequence' with loss_type='vespo' corrects the KL "
                    "term by the ratio of the sequence: use 'token', or "
                    "use_bias_correction_kl=False"
                )
            found["importance_sampling_level"] = "token"
    return {name: found[name] for name in names}


@functools.lru_cache(maxsize=4)
def warned_of(**options: Any) -> GRPOLossConfig:
    """Return options whose oddities were told when the trainer was made."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return GRPOLossConfig(**options)
