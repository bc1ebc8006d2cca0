"""What reward functions are given and what they return."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

RewardFunction = Callable[..., Any]
Completion = str | list[dict[str, Any]]
Steps = list[tuple[int, float]]
"""Rewards of a completion's steps, each with the index of the step's last token."""

ARGUMENTS = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
"""What a reward function is called with beside the columns of the dataset."""


_METRICS = frozenset(
    [
        "step",
        "loss",
        "policy_loss",
        "reward",
        "reward_std",
        "frac_reward_zero_std",
        "entropy",
        "entropy_coef",
        "kl",
        "cispo_clip_ratio",
        "grad_norm",
        "learning_rate",
        "num_tokens",
        "num_sequences",
        "num_computed_sequences",
        "num_computed_rows",
        "num_gradient_rows",
        "skipped_steps",
        "step_time",
        "tokens_per_second",
        "epoch",
    ]
)
_METRICS_UNDER = (
    "eval_", "rewards/", "advantages/", "completions/", "clip_ratio/", "vespo/", "sampling/",
    "dynamic_sampling/", "time/", "memory/", "parallel/", "checkpoints/",
)  # fmt: skip


def is_reserved(metric: str) -> bool:
    """Say whether a metric's name is one that the trainer writes, or how it begins those."""
    return metric in _METRICS or metric.startswith(_METRICS_UNDER)


class RewardError(ValueError):
    """A reward function failed, or what it is called with or returns breaks the contract."""


def refuse_own_arguments(columns: Iterable[str]) -> None:
    """Refuse columns that are named as an argument of reward functions.

    Raises:
        RewardError: there is one.
    """
    if taken := set(ARGUMENTS).intersection(columns):
        raise RewardError(
            f"the dataset has a column named {min(taken)!r}, but {min(taken)!r} is an argument's "
            "name; rename the column"
        )


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What K reward functions say of B completions."""

    rewards_BK: Tensor
    """(B, K) fp32; NaN where a function did not judge; the sum of a completion's steps."""
    steps: dict[int, list[Steps]]
    """By index of the functions that returned steps: those of each completion, a bare number being
    one that ends at the last token (-1 if there is none); none where it did not judge."""
    metrics: dict[str, float]
    """Means of what the functions logged, and how often they failed (`rewards/{name}/exceptions`,
    `rewards/{name}/timeouts`, `rewards/{name}/invalid`) in the whole run, or in its evaluations,
    for functions that did."""
    extra: dict[str, list[Any]]
    """Columns that the functions logged, one value a completion."""
    problems: list[str]
    """A sentence for each failure of a kind that this run had not seen before."""


def decode_completions(
    prompts: Sequence[Any], completion_ids: Sequence[Sequence[int]], tokenizer: Any
) -> list[Completion]:
    """Return completions as reward functions see them: text, or messages after such a prompt."""
    texts: list[str] = [tokenizer.decode(ids, skip_special_tokens=True) for ids in completion_ids]
    return [
        text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        for prompt, text in zip(prompts, texts, strict=True)
    ]


def content(completion: Completion) -> str:
    """Return the text of a completion, of its last message if it has several."""
    if isinstance(completion, str):
        return completion
    return (completion[-1].get("content") or "") if completion else ""
