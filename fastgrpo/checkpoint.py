"""Checkpoints that are there whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging


def save_checkpoint(
    path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, **options: Any
) -> None:
    """Write a Hugging Face checkpoint (safetensors) to `path`: aside first, then renamed.

    Of a model with adapters (PEFT) these alone and the name of what they are for: as long as that
    can be found, `AutoModelForCausalLM.from_pretrained(path)` loads both. Options are those of
    `save_pretrained`.
    """
    aside = path.with_name(f".{path.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    if hasattr(model, "get_base_model"):
        # Else PEFT would ask the Hub whether the embeddings, which are frozen, have another size.
        options["save_embedding_layers"] = False
    with _no_progress_bar():  # it would tear the live display
        model.save_pretrained(aside, **options)
    tokenizer.save_pretrained(aside)
    os.replace(aside, path)


def name_base(path: Path, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Save what adapters were put on to `path`, unless it has a name to load it by already."""
    if not hasattr(model, "get_base_model"):
        return
    base: Any = model.get_base_model()
    if base.name_or_path:
        return
    state = {
        name.replace(".base_layer.", "."): value
        for name, value in base.state_dict().items()
        if ".lora_" not in name
    }
    save_checkpoint(path, base, tokenizer, state_dict=state)
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
