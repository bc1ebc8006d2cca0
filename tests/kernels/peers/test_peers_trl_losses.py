"""Every loss of TRL with every option of it, against TRL's own code."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from peers_trl import (
    METRICS_TOLERANCE,
    TYPES,
    Inputs,
    assert_agree,
    assert_close,
    make_inputs,
    make_trainer,
    ours,
    theirs,
)

pytestmark = pytest.mark.peers

LOSSES = [(t, level) for t in TYPES for level in ("token", "sequence")]
LOSSES.remove(("vespo", "sequence"))  # weighs sequences by itself; ours refuses the pair


def with_tool_mask(inputs: Inputs) -> Inputs:
    tool_mask = torch.ones_like(inputs.mask)
    tool_mask[:, 2:4] = 0
    return replace(inputs, tool_mask=tool_mask)


def with_ratio(inputs: Inputs, per_sequence: bool = False) -> Inputs:
    """Give one value per token or per sequence, 1 where nothing counts, as TRL makes them."""
    counted = inputs.counted.amax(1, keepdim=True) if per_sequence else inputs.counted
    g = torch.Generator().manual_seed(5)
    ratio = torch.rand(counted.shape, generator=g, dtype=torch.float64) * 2
    return replace(inputs, ratio=torch.where(counted.bool(), ratio, 1))


def with_sampler(inputs: Inputs) -> Inputs:
    """Give the sampler's log-probs: far from the policy's in some sequences, one not known."""
    g = torch.Generator().manual_seed(6)
    drift = torch.randn(len(inputs.mask), 1, generator=g, dtype=torch.float64)
    sampler = inputs.logps + drift
    sampler[0, 0] = torch.nan
    return replace(inputs, sampler=sampler)


# Each option of TRL: those of the trainer, and what is done to the inputs.
OPTIONS: dict[str, tuple[dict[str, Any], Any]] = {
    "plain": ({}, None),
    "on_policy": ({}, lambda x: replace(x, old=None)),
    "wide": ({"epsilon": 0.05, "epsilon_high": 1.0}, None),
    "delta": ({"delta": 1.35}, None),
    "kl": ({"beta": 0.3, "use_bias_correction_kl": False}, None),
    "kl_corrected": ({"beta": 0.3, "use_bias_correction_kl": True, "delta": 1.5}, None),
    "kl_on_policy": ({"beta": 0.3}, lambda x: replace(x, old=None)),
    "off_policy_mask": ({"off_policy_mask_threshold": 0.1}, None),
    "off_policy_mask_of_sampler": ({"off_policy_mask_threshold": 0.1}, with_sampler),
    "top_entropy": ({"top_entropy_quantile": 0.4}, None),
    "ratio": ({"use_vllm": True}, with_ratio),
    "ratio_of_sequence": ({"use_vllm": True}, lambda x: with_ratio(x, per_sequence=True)),
    "tool_mask": ({}, with_tool_mask),
    "entropy_bonus": ({"entropy_coef": 0.2}, None),
    "entropy_bonus_of_some": ({"entropy_coef": 0.2, "top_entropy_quantile": 0.3}, None),
    "accumulation": ({"accumulation": 3}, None),
    "accumulation_of_part": ({"accumulation": 2, "steps_per_generation": 6}, None),
    "accumulation_with_bonus": ({"accumulation": 3, "entropy_coef": 0.2, "beta": 0.1}, None),
    "evaluation": ({"accumulation": 3, "entropy_coef": 0.2, "training": False}, None),
    "everything": (
        {
            "beta": 0.3,
            "off_policy_mask_threshold": 0.1,
            "top_entropy_quantile": 0.6,
            "use_vllm": True,
            "entropy_coef": 0.2,
            "accumulation": 2,
            "steps_per_generation": 6,
        },
        lambda x: with_ratio(with_tool_mask(with_sampler(x))),
    ),
}  # fmt: skip


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize(("loss_type", "level"), LOSSES)
def test_loss_gradients_and_metrics_are_those_of_trl(
    loss_type: str, level: str, option: str
) -> None:
    options, change = OPTIONS[option]
    trainer = make_trainer(loss_type, level=level, **options)
    inputs = make_inputs()
    inputs = inputs if change is None else change(inputs)
    assert_agree(ours(trainer, inputs), theirs(trainer, inputs))


def test_a_sequence_without_a_counted_token_is_the_least_clipped_of_all_sequences() -> None:
    """Its ratio is 1, and it is one of the sequences that the mean is over as well."""
    trainer, inputs = make_trainer("grpo", level="sequence"), make_inputs()
    clipped_below = replace(inputs, advantages=-inputs.advantages.abs(), old=inputs.logps + 1)
    its = theirs(trainer, clipped_below)
    assert its.metrics["clip_ratio/low_mean"] == pytest.approx(5 / 6)
    assert its.metrics["clip_ratio/low_min"] == 0
    mine = ours(trainer, clipped_below)
    for name, value in its.metrics.items():
        assert_close(mine.metrics[name], value, name, METRICS_TOLERANCE)
