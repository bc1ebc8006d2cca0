"""What a run starts from: a model, its tokenizer and prompts, loaded by name or made by a task."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .config import ConfigError, TrainConfig
from .data import load_prompts
from .loading import load_model, load_tokenizer
from .model import eos_token_ids

if TYPE_CHECKING:
    from datasets import Dataset


class WarmStart(Protocol):
    """Supervised training before GRPO."""

    def __call__(self, accuracy: Callable[[], float], on_step: Callable[[int, float], None]) -> int:
        """Train until `accuracy()` is enough; report step and loss; return the number of steps."""
        ...


@dataclass(frozen=True, kw_only=True)
class Assets:
    """Give these to `Trainer` to train your own objects."""

    model: PreTrainedModel
    """A causal LM, in the type it is trained in; also with adapters of PEFT."""
    tokenizer: PreTrainedTokenizerBase
    """Its tokenizer."""
    train_dataset: Dataset
    """Has a column `prompt`; the other columns go to the reward functions."""
    test_dataset: Dataset | None = None
    """Measured before and after training, never trained on."""
    validation_dataset: Dataset | None = None
    """What the accuracy that ends the warm start is measured on."""
    warm_start: WarmStart | None = None
    """Teaches the untrained model of a task until its accuracy is enough for GRPO to take over."""


def load_assets(config: TrainConfig) -> Assets:
    """Load what the configuration names, or make what its task needs.

    Raises:
        ValueError: something does not exist or does not fit; the message says what to do.
    """
    if config.task is not None:
        return _arithmetic(config)
    for name in ("model_name_or_path", "dataset_name"):
        if not getattr(config, name):
            raise ConfigError(
                f"{name}: required (or set task: arithmetic); the configuration of a run that was "
                "given a model and a dataset as objects has none"
            )
    load_split = partial(
        load_prompts,
        str(config.dataset_name),
        config_name=config.dataset_config,
        prompt_column=config.prompt_column,
    )
    train_dataset = load_split(split=config.dataset_train_split)
    test_dataset = None
    if config.test_split is not None:
        test_dataset = load_split(split=config.test_split)
    tokenizer, model = load_tokenizer(config), load_model(config)
    _check_ends(model, tokenizer)
    return Assets(
        model=model,
        tokenizer=tokenizer,
        train_dataset=train_dataset,
        test_dataset=test_dataset,
    )


def _check_ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a model that cannot end a completion; objects of your own may be made so.

    Raises:
        ValueError: says which token it has no embedding for.
    """
    ids = eos_token_ids(model, tokenizer)
    embeddings: Any = model.get_input_embeddings()
    vocabulary = len(embeddings.weight)
    if not any(0 <= i < vocabulary for i in ids):
        raise ValueError(
            f"the end-of-sequence token has the id {ids[0]}, and the model has embeddings of "
            f"{vocabulary} tokens: take the model's own tokenizer, or resize its embeddings"
        )


def _arithmetic(config: TrainConfig) -> Assets:
    from .tasks import arithmetic

    tokenizer = arithmetic.build_tokenizer()
    model = arithmetic.build_model(tokenizer, config.seed)
    datasets = arithmetic.build_dataset()

    def warm_start(accuracy: Callable[[], float], on_step: Callable[[int, float], None]) -> int:
        return arithmetic.warm_start(
            model,
            tokenizer,
            datasets["train"],
            accuracy,
            gate=config.warm_start_accuracy,
            seed=config.seed,
            on_step=on_step,
        )

    return Assets(
        model=model,
        tokenizer=tokenizer,
        train_dataset=datasets["train"],
        test_dataset=datasets["test"],
        validation_dataset=datasets["validation"],
        warm_start=warm_start,
    )
