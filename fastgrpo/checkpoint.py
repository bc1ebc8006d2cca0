"""Checkpoints that are there whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

T = TypeVar("T")


def save_checkpoint(
    path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, **options: Any
) -> None:
    """Write a Hugging Face checkpoint (safetensors) to `path`: aside first, then renamed.

    Of a model with adapters (PEFT) these alone and the name of what they are for: as long as that
    can be found, `AutoModelForCausalLM.from_pretrained(path)` loads both. Options are those of
    `save_pretrained`.
    """
    aside = begin_checkpoint(path)
    finish_checkpoint(path, aside, model, tokenizer, **options)


def begin_checkpoint(path: Path) -> Path:
    """Make the directory in which a checkpoint is written before it has its name."""
    aside = path.with_name(f".{path.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    return aside


def finish_checkpoint(
    path: Path,
    aside: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    **options: Any,
) -> None:
    """Add the model to what else is in the directory, and give it its name."""
    if hasattr(model, "get_base_model"):
        # Else PEFT would ask the Hub whether the embeddings, which are frozen, have another size.
        options["save_embedding_layers"] = False
    with _no_progress_bar():  # it would tear the live display
        model.save_pretrained(aside, **options)
    tokenizer.save_pretrained(aside)
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)  # of a process that died right here
    if path.exists():  # of a run that goes on from before it
        path.replace(old)
    aside.replace(path)
    shutil.rmtree(old, ignore_errors=True)


def nameless_base(model: Any) -> PreTrainedModel | None:
    """Return what adapters were put on, if it has no name to load it by."""
    if not hasattr(model, "get_base_model"):
        return None
    base: Any = model.get_base_model()
    return None if base.name_or_path else base


def name_base(
    path: Path,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    state: Mapping[str, Any] | None = None,
) -> None:
    """Save what adapters were put on to `path`, unless it has a name to load it by already.

    Args:
        path: where.
        model: with adapters, or without.
        tokenizer: saved beside it.
        state: the parameters of the base, if it does not hold them whole itself.
    """
    base = nameless_base(model)
    if base is not None:
        own = without_adapters(state or base.state_dict())
        save_checkpoint(path, base, tokenizer, state_dict=own)
        point_to_base(path, model)


def without_adapters(state: Mapping[str, T]) -> dict[str, T]:
    """Return the parameters below adapters, by the names that they have without these."""
    return {
        name.replace(".base_layer.", "."): value
        for name, value in state.items()
        if ".lora_" not in name
    }


def point_to_base(path: Path, model: Any) -> None:
    """Let checkpoints of adapters say that what they were put on is in `path`."""
    for adapter in model.peft_config.values():
        adapter.base_model_name_or_path = str(path.resolve())


@contextmanager
def _no_progress_bar() -> Generator[None]:
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
