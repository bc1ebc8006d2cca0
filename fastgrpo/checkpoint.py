"""Checkpoints that are there whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from .durable import sync, writing
from .manifest import seal

T = TypeVar("T")
_ENDS = ["", *(f"-{i}" for i in range(2, 1000))]
"""Of names, the second of which is for where the first is taken, and so on."""


def save_checkpoint(
    path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, **options: Any
) -> None:
    """Write a Hugging Face checkpoint (safetensors) to `path`: aside first, then renamed.

    Of a model with adapters (PEFT) these alone and the name of what they are for: as long as that
    can be found, `AutoModelForCausalLM.from_pretrained(path)` loads both. Options are those of
    `save_pretrained`.
    """
    begin_checkpoint(path)
    try:
        finish_checkpoint(path, model, tokenizer, **options)
    except BaseException:
        discard_checkpoint(path)
        raise


def begin_checkpoint(path: Path) -> Path:
    """Make the directory in which a checkpoint is written before it has its name.

    Raises:
        WriteError: the disk is full, for example.
    """
    aside = _aside(path)
    with writing(path):
        discard_checkpoint(path)
        aside.mkdir(parents=True)
    return aside


def discard_checkpoint(path: Path) -> None:
    """Remove what has been written of a checkpoint that has no name yet."""
    shutil.rmtree(_aside(path), ignore_errors=True)


def finish_checkpoint(
    path: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    **options: Any,
) -> None:
    """Add the model to what else has been written of a checkpoint, and give it its name.

    Raises:
        WriteError: the disk is full, for example.
    """
    aside = _aside(path)
    if hasattr(model, "get_base_model"):
        # Else PEFT would ask the Hub whether the embeddings, which are frozen, have another size.
        options["save_embedding_layers"] = False
    with writing(path):
        with _no_progress_bar():  # it would tear the live display
            model.save_pretrained(aside, **options)
        tokenizer.save_pretrained(aside)
        seal(aside)
        old = path.with_name(f".{path.name}.old")
        shutil.rmtree(old, ignore_errors=True)  # of a process that died right here
        if path.exists():
            path.replace(old)
        aside.replace(path)
        sync(path.parent)
        sync(path.parent.parent)  # the first of its kind has made a directory
    shutil.rmtree(old, ignore_errors=True)


def remove_checkpoint(path: Path) -> None:
    """Delete a checkpoint; what is half deleted has its name no more.

    What the system does not let go, a file in use on NFS for example, stays so until `tidy`.
    """
    names = (path.with_name(f".{path.name}{end}.deleted") for end in _ENDS)
    shutil.rmtree(_rename(path, names), ignore_errors=True)


def put_aside(path: Path) -> Path:
    """Give a damaged checkpoint another name, which is returned."""
    return _rename(path, (path.with_name(f"damaged-{path.name}{end}") for end in _ENDS))


def _rename(path: Path, names: Iterable[Path]) -> Path:
    """Give a directory the first of some names that is free, which is returned."""
    return path.rename(next(name for name in names if not name.exists()))


def tidy(folder: Path) -> None:
    """Do what a process that died could not in a directory of checkpoints.

    What was only being written or deleted goes; what was to be replaced has its name again.
    """
    for path in folder.glob(".*.old"):
        name = path.with_name(path.name.removeprefix(".").removesuffix(".old"))
        if not name.exists():
            path.rename(name)
    for end in ("partial", "deleted", "old"):
        for path in folder.glob(f".*.{end}"):
            shutil.rmtree(path, ignore_errors=True)  # no file, which is another's


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


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
