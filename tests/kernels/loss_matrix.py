"""Every loss, at every level it is defined for, with options that cover each other.

The log-ratios of a case keep their distance from every bound, so that logits rounded to 16 bits
clip what exact ones clip.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from loss_cases import DEVICE, Case, factors, make_case, packed
from torch import Tensor

from fastgrpo_kernels import reference

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo", "gmpo")
FAMILIES = tuple((name, "token") for name in LOSS_TYPES) + tuple(
    (name, "sequence") for name in LOSS_TYPES if name not in ("vespo", "gmpo")
)
IDS = ["-".join(family) for family in FAMILIES]
LENGTHS = (3, 3, 2, 0, 2)  # counted tokens of each sequence of a matrix case

# What differs between families in a case beside their loss: each option is taken by some of both
# levels. Epsilons keep clear of the drifts below, whose sizes are 0.6, 0.1 and 0.
KL = ("k3", "k2", "k1")


def options(family: tuple[str, str], **config: Any) -> dict[str, Any]:
    """The options of a family's cases."""
    i = FAMILIES.index(family)
    name, level = family
    found: dict[str, Any] = {
        "loss_type": name,
        "importance_sampling_level": level,
        "kl_estimator": KL[i % 3],
        "use_bias_correction_kl": i % 2 == 0,
        "skip_empty_sequences": i % 4 == 1,
        "epsilon_low": 0.25,
        "epsilon_high": 0.35,
    }
    if name == "cispo":
        found["cispo_bounds"] = ("trl", "verl")[level == "sequence"]
        found["epsilon_high"] = 1.3 if level == "token" else 0.35
    elif name in ("grpo", "dapo"):
        found["delta"] = 1.5
    return found | config


def matrix_case(family: tuple[str, str], *, off_policy: bool = True, **config: Any) -> Case:
    """Five sequences, one of them empty, with a KL, as (B, T).

    The vocabulary of 21 is two blocks or slices of 16, the second of them cut.
    """
    found = options(family, **config)
    case = make_case(
        sequences=len(LENGTHS),
        length=max(LENGTHS),
        vocabulary=21,
        seed=FAMILIES.index(family),
        off_policy=off_policy,
        masked=False,
        **found,
    )
    counted = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    counted[1, 1] = False  # a gap: the output of a tool
    case = case.having(completion_mask=counted.to(DEVICE))
    if case.advantages.dim() == 1:
        sign = torch.tensor([-1.0, 1.0, -1.0, 1.0, 1.0], device=DEVICE)
        case = replace(case, advantages=(case.advantages.abs() + 0.25) * sign)
    if off_policy and found["importance_sampling_level"] == "sequence":
        # Every token of a sequence drifts alike, give or take: below, above, inside, -, below.
        drift = torch.tensor([-0.6, 0.6, 0.1, 0.0, -0.6], dtype=torch.float64)[:, None]
        jitter = torch.tensor([0.05, -0.05, 0.0], dtype=torch.float64)
        case = case.having(old_logps=(exact_logps(case) - (drift + jitter).to(DEVICE)).float())
    return case


def exact_logps(case: Case) -> Tensor:
    config = case.arguments["config"]
    logps, _ = reference.linear_logps(
        case.hidden,
        case.weight,
        case.ids,
        bias=case.bias,
        temperature=config.temperature,
        logit_scale=config.logit_scale,
        logit_softcap=config.logit_softcap,
    )
    return logps


def everything(family: tuple[str, str]) -> Case:
    """Off policy, with every option at once."""
    case = factors(
        matrix_case(
            family,
            beta=0.2,
            temperature=0.7,
            logit_scale=0.5,
            logit_softcap=4.0,
            entropy_coef=0.1,
        )
    )
    if FAMILIES.index(family) % 2:
        per_sequence = torch.linspace(0.25, 2, len(LENGTHS), device=DEVICE)
        case = case.having(
            importance_sampling_ratio=per_sequence[:, None],
            policy_weight=torch.rand(case.ids.shape, device=DEVICE) + 0.5,
        )
    if FAMILIES.index(family) % 3 == 0:
        case = case.having(
            num_items_in_batch=41, num_sequences_in_batch=7, entropy_denominator=torch.tensor(33.0)
        )
    return case


def plain(family: tuple[str, str]) -> Case:
    """Off policy, nothing but old log-probs, one sequence without a signal."""
    case = matrix_case(family)
    case.advantages[2] = 0
    return case


def on_policy(family: tuple[str, str]) -> Case:
    """On policy, one advantage and one weight a token, in both signs."""
    case = matrix_case(family, off_policy=False, beta=0.3, per_token=True)
    weight = torch.rand(case.ids.shape, device=DEVICE) * (torch.arange(3, device=DEVICE) != 1)
    return case.having(policy_weight=weight)


def mixed_signs(family: tuple[str, str]) -> Case:
    """Off policy, one advantage a token: a sequence's tokens clip on either side."""
    return matrix_case(family, per_token=True, beta=0.1)


def peaked(family: tuple[str, str]) -> Case:
    """On policy, as after training: most tokens are what the head is almost sure of."""
    case = matrix_case(family, off_policy=False, entropy_coef=0.1)
    case = replace(case, weight=case.weight * 4)
    sure = torch.arange(case.ids.numel(), device=DEVICE).view(case.ids.shape) % 3 > 0
    return replace(case, ids=torch.where(sure, case.logits.argmax(-1), case.ids))


SETTINGS = {
    "everything": everything,
    "plain": plain,
    "on policy": on_policy,
    "mixed signs": mixed_signs,
    "peaked": peaked,
}


def as_packed(case: Case) -> Case:
    """The same tokens without those behind the end of a sequence; a gap in the mask stays one."""
    lengths = torch.tensor(LENGTHS)
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(DEVICE, torch.int32)
    return packed(case, (), list(LENGTHS), cu_seqlens=cu_seqlens)
