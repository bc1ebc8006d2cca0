"""What is trained on: prompts, and how they are put to the model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """The part of a `TrainConfig` that is about prompts."""

    dataset_name: str | None = None
    """A Hub name, a .jsonl, .json, .csv or .parquet file, a folder of them, or one that
    `save_to_disk` has made. All fields of .csv are text."""
    dataset_config: str | None = None
    """Configuration of a Hub dataset (`main` of GSM8K)."""
    dataset_train_split: str = "train"
    """Split to train on."""
    dataset_test_split: str | None = None
    """Split measured before and after training, never trained on. None: not measured, or `test`
    where `eval_strategy` asks for evaluations."""
    prompt_column: str = "prompt"
    """Column that holds the prompts: strings or chat messages."""
    system_prompt: str | None = None
    """Put before every prompt, which then goes through the tokenizer's chat template."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Arguments of the chat template, for example {enable_thinking: false}."""
    shuffle_dataset: bool = True
    """Visit the prompts in a new random order every epoch; otherwise in that of the dataset."""
    task: Literal["arithmetic"] | None = None
    """A task made on the spot instead of a model and a dataset: no download."""
    warm_start_accuracy: float = 0.28
    """With `task`: supervised training goes on until sampled answers are right this often."""

    def data_problems(self) -> Iterator[str]:
        """Yield what is wrong with these values."""
        own = {"tokenize", "return_dict", "add_generation_prompt"}
        for name in sorted(own & (self.chat_template_kwargs or {}).keys()):
            yield f"chat_template_kwargs: {name} is set for every prompt; leave it out"
        accuracy = self.warm_start_accuracy
        if not 0 < accuracy < 1:
            yield f"warm_start_accuracy: must be above 0 and below 1, got {accuracy}"
