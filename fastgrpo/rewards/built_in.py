"""The reward functions that need no file of the user's."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from .answers import is_right
from .contract import Completion, RewardFunction, content


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
      the last formula or number. Whatever takes longer than `CHECK_TIMEOUT_S` is wrong, and all
      of a batch together may take reward_timeout;
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
        None if gold is None else float(is_right(str(gold), content(completion)))
        for gold, completion in zip(golds, completions, strict=True)
    ]


def format(completions: Sequence[Completion], **columns: Any) -> list[float]:
    """Reward 1 for `<think>...</think>` then `<answer>...</answer>` and nothing else but space."""
    shape = re.compile(r"<think>.*</think>\s*<answer>.*</answer>", re.DOTALL)
    texts = [content(completion).strip() for completion in completions]
    return [float(_tags_once(text) == 4 and bool(shape.fullmatch(text))) for text in texts]


def tag_count(completions: Sequence[Completion], **columns: Any) -> list[float]:
    """Reward 0.25 for each of the four tags of `format` that stands exactly once (open-r1)."""
    return [0.25 * _tags_once(content(completion)) for completion in completions]


def soft_overlong_punishment(max_completion_length: int, soft_punish_cache: int) -> RewardFunction:
    """Return DAPO's punishment of length (arxiv.org/abs/2503.14476, equation 13).

    With L and C for the arguments it is 0 up to L - C tokens, (L - C - length) / C within the last
    C tokens, and -1 beyond L.

    Raises:
        ValueError: C is not between 1 and L.
    """
    free = max_completion_length - soft_punish_cache
    if not 1 <= soft_punish_cache <= max_completion_length:
        raise ValueError(
            f"soft_punish_cache: must be between 1 and max_completion_length "
            f"({max_completion_length}), got {soft_punish_cache}"
        )

    def punishment(completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float]:
        return [
            max(min((free - len(ids)) / soft_punish_cache, 0.0), -1.0) for ids in completion_ids
        ]

    punishment.__name__ = soft_overlong_punishment.__name__
    return punishment


BUILT_IN: dict[str, RewardFunction] = {f.__name__: f for f in (accuracy, format, tag_count)}
"""Those that take no options."""


def _tags_once(text: str) -> int:
    return sum(text.count(tag) == 1 for tag in ("<think>", "</think>", "<answer>", "</answer>"))
