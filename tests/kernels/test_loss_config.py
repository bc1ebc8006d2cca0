"""What GRPOLossConfig refuses: every bad value by name, and pairs that are not defined."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import pytest
import torch

from fastgrpo_kernels import GRPOLossConfig

nan, inf = math.nan, math.inf


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("loss_type", "ppo"),
        ("importance_sampling_level", "word"),
        ("kl_estimator", "k4"),
        ("cispo_bounds", "both"),
        *((f, v) for f in ("epsilon_low", "epsilon_high", "beta") for v in (-0.1, nan, inf)),
        ("epsilon_low", 1.5),
        *(
            (f, v)
            for f in (
                "temperature",
                "logit_scale",
                "sapo_temperature_pos",
                "sapo_temperature_neg",
                "vespo_k_pos",
                "vespo_lambda_pos",
                "vespo_k_neg",
                "vespo_lambda_neg",
                "gmpo_clip",
            )
            for v in (0, -1.0, nan, inf)
        ),
        ("entropy_coef", nan),
        ("entropy_coef", inf),
        ("delta", 1.2),
        ("delta", nan),
        ("logit_softcap", 0.0),
        ("logit_softcap", nan),
        ("logit_softcap", -5.0),
        ("logit_softcap", inf),
        ("max_completion_length", 0),
        ("max_completion_length", 2.5),
        ("max_completion_length", True),
        ("beta", "0.1"),
        ("beta", torch.tensor(0.1)),
    ],
)
def test_bad_values_of_the_config_name_field_and_value(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{field} must be .*got {re.escape(repr(value))}$"):
        GRPOLossConfig(**{field: value})


@pytest.mark.parametrize("loss_type", ("vespo", "gmpo"))
def test_losses_that_weigh_sequences_have_no_sequence_level(loss_type: Any) -> None:
    message = (
        "importance_sampling_level='sequence' is not defined for "
        f"loss_type='{loss_type}', which weighs whole sequences by itself: use 'token'"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        GRPOLossConfig(loss_type=loss_type, importance_sampling_level="sequence")


def test_cispo_warns_of_a_cap_below_the_ratio_of_an_unchanged_policy() -> None:
    with pytest.warns(UserWarning, match=r"caps ratios at epsilon_high itself, and 0\.2 is below"):
        GRPOLossConfig(loss_type="cispo")
    # No warning, which would be an error here:
    GRPOLossConfig(loss_type="cispo", epsilon_high=1.0)
    GRPOLossConfig(loss_type="cispo", cispo_bounds="verl")
    GRPOLossConfig(loss_type="dapo")


def test_dr_grpo_needs_its_constant() -> None:
    with pytest.raises(ValueError, match=r"dr_grpo.* max_completion_length"):
        GRPOLossConfig(loss_type="dr_grpo")


def test_the_config_is_frozen_and_keyword_only() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        GRPOLossConfig().beta = 1.0  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(TypeError):
        GRPOLossConfig("dapo")  # pyright: ignore[reportCallIssue]
