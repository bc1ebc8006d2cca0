"""Prompts: where they come from, how they become token ids.

A dataset row is one prompt, with any other columns for the reward functions.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from .data_files import FORMATS, FileError, check_file, check_not_empty, read_files
from .readable import shown

if TYPE_CHECKING:
    from datasets import Dataset


def load_prompts(
    dataset_name: str,
    split: str,
    *,
    config_name: str | None = None,
    prompt_column: str = "prompt",
) -> Dataset:
    """Load the rows to train or to be tested on, checked, with a `prompt` column.

    Args:
        dataset_name: a name on the Hugging Face Hub, a .jsonl, .json, .csv or .parquet file, or a
            folder (made by `save_to_disk`, or of data files).
        split: for example "train"; a single file is all "train".
        config_name: the configuration of a Hub dataset, for example "main" for GSM8K.
        prompt_column: the column that is renamed to `prompt` (GSM8K: "question").

    Returns:
        The dataset; every `prompt` is a non-empty string or a non-empty list of messages
        `{"role": str, "content": str}`.

    Raises:
        FileNotFoundError: `dataset_name` looks like a path and nothing is there.
        ValueError: the file does not parse, the split or the column is not there, there are no
            rows, or a prompt is neither of the two kinds; the message names which.
        ImportError: the package `datasets` is missing.
    """
    datasets = _datasets()
    path, quoted = Path(dataset_name).expanduser(), shown(dataset_name)
    if config_name is not None and (path.is_file() or _is_saved_dataset(path)):
        raise ValueError(
            f"dataset_config: {shown(str(path))} has no configurations, got {shown(config_name)}; "
            "leave dataset_config out"
        )
    if path.is_file():
        dataset = _load_file(datasets, path, split)
    elif _is_saved_dataset(path):
        dataset = _load_saved(datasets, path, split)
    elif not path.exists() and (path.suffix in FORMATS or dataset_name[:1] in {".", "/", "~"}):
        raise FileNotFoundError(
            f"dataset {quoted} looks like a path but nothing is there; "
            f"it is looked up from the working directory {str(Path.cwd())!r}"
        )
    else:
        try:
            if path.is_dir():
                dataset = _load_folder(datasets, path, config_name, split)
            else:
                dataset = datasets.load_dataset(dataset_name, config_name, split=split)
        except FileError:
            raise
        # It and its parsers have errors of many kinds; all of them are about what is named.
        except Exception as error:
            raise ValueError(
                _why_not_loaded(quoted, config_name, split, error, local=path.exists())
            ) from error
    return _checked(dataset, quoted, prompt_column)


def _datasets() -> Any:
    try:
        return importlib.import_module("datasets")
    except ImportError as error:
        raise ImportError(
            "reading prompts needs the package datasets: pip install datasets"
        ) from error


def _load_file(datasets: Any, path: Path, split: str) -> Dataset:
    name = shown(str(path))
    changed = check_file(path)
    if split != "train":
        raise ValueError(
            f"dataset file {name} is one split, 'train', so split {shown(split)} does not exist; "
            "use a folder with the files train and test"
        )
    try:
        kind = FORMATS[path.suffix]
        return read_files(datasets, kind, {"path": kind, "data_files": str(path)}, split, changed)
    # Each format has a parser with errors of its own; all of them are about this file.
    except Exception as error:
        raise ValueError(
            f"dataset file {name} has no rows or does not parse as {path.suffix[1:]}; "
            f"put one prompt in each row ({_first_line(error)})"
        ) from error


def _load_folder(datasets: Any, path: Path, config_name: str | None, split: str) -> Dataset:
    """Look through the files that are read of a folder, and for empty ones, which hide others."""
    for file in path.rglob("[!._]*.*"):
        if file.suffix in FORMATS:
            check_not_empty(file)
    builder = datasets.load_dataset_builder(str(path), config_name)
    changed = set[str]()
    for file in {Path(x) for names in (builder.config.data_files or {}).values() for x in names}:
        if file.is_file():
            changed |= check_file(file)
    where = {"path": str(path), "name": config_name}
    return read_files(datasets, builder.name, where, split, changed)


def _why_not_loaded(
    name: str, config_name: str | None, split: str, error: Exception, *, local: bool
) -> str:
    """Return what kept a folder or a dataset of the Hub from being loaded, and what to do."""
    if there := re.search(r"Unknown split .* Should be one of \[(.*)\]", str(error)):
        found = shown(there[1].replace("'", ""), quoted=False)
        return f"dataset {name} has no split {shown(split)}; it has {found}"
    if "corresponds to no data" in str(error):
        return f"split {shown(split)} of dataset {name} is empty; it needs at least one row"
    config = "" if config_name is None else f", config {shown(config_name)},"
    remedy = "there is no such file or folder, so it was taken for a Hub name"
    if local:
        remedy = "a folder must come from save_to_disk or hold data files"
    return (
        f"dataset {name}{config} with the split {shown(split)} did not load: "
        f"{_first_line(error)}; {remedy}"
    )


def _names(names: Iterable[str]) -> str:
    return shown(", ".join(names), quoted=False)


def _first_line(error: BaseException) -> str:
    """Return what is known of the cause of an error of `datasets`."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = next(iter(str(error).strip().splitlines()), "")
    return shown(text, quoted=False) or "no reason given"


def _is_saved_dataset(path: Path) -> bool:
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def _load_saved(datasets: Any, path: Path, split: str) -> Dataset:
    try:
        saved: Any = datasets.load_from_disk(str(path))
    # Of no rows at all it raises an IndexError.
    except Exception as error:
        raise ValueError(
            f"dataset folder {shown(str(path))} is empty or does not load; save it again "
            f"({_first_line(error)})"
        ) from error
    splits: Any = saved
    if isinstance(saved, datasets.Dataset):
        splits = {str(saved.split or "train"): saved}
    if split not in splits:
        raise ValueError(
            f"dataset folder {shown(str(path))} has no split {shown(split)}; it has "
            f"{_names(splits)}"
        )
    return splits[split]


def _checked(dataset: Any, name: str, prompt_column: str) -> Dataset:
    if len(dataset) == 0:
        raise ValueError(f"dataset {name} is empty; it needs at least one row")
    columns: list[str] = dataset.column_names
    if prompt_column not in columns:
        likely = [c for c in ("question", "problem", "query", "instruction") if c in columns]
        remedy = f"name the column of the prompts, prompt_column={shown((likely or columns)[0])}"
        raise ValueError(
            f"dataset {name} has no column {shown(prompt_column)} but {_names(columns)}; {remedy}"
        )
    if prompt_column != "prompt":
        if "prompt" in columns:
            dataset = dataset.remove_columns("prompt")
        dataset = dataset.rename_column(prompt_column, "prompt")
    try:
        prompts = enumerate(dataset["prompt"])
        wrong = next(((row, prompt) for row, prompt in prompts if not _is_prompt(prompt)), None)
    except Exception as error:  # of what decodes a column, of images for example
        raise ValueError(
            f"dataset {name} has a column of prompts that cannot be read ({_first_line(error)}); "
            "make it texts or messages"
        ) from error
    if wrong is not None:
        raise ValueError(
            f"row {wrong[0]} of dataset {name} has the prompt {shown(wrong[1])}; a prompt is a "
            'non-empty string or a non-empty list of messages {"role": ..., "content": ...}'
        )
    return dataset


def _is_prompt(prompt: Any) -> bool:
    if isinstance(prompt, str):
        return prompt != ""
    if not isinstance(prompt, list) or not prompt:
        return False
    return all(
        isinstance(message, Mapping)
        and isinstance(cast("Mapping[str, Any]", message).get("role"), str)
        and isinstance(cast("Mapping[str, Any]", message).get("content"), str)
        for message in cast("list[Any]", prompt)
    )


def encode_prompt(
    prompt: str | list[dict[str, Any]],
    tokenizer: Any,
    *,
    system_prompt: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[int]:
    """Return the token ids of a prompt, up to where the completion starts.

    Args:
        prompt: a string is tokenized as it is; messages go through the chat template.
        tokenizer: a transformers tokenizer.
        system_prompt: put in front as a system message (a string then becomes the user message),
            unless the messages start with one of their own.
        chat_template_kwargs: arguments of the chat template.

    Raises:
        ValueError: the chat template is needed and missing, or refuses it, or there is no token
            at all.
    """
    if system_prompt is not None:
        messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        if messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system_prompt}, *messages]
        prompt = messages
    if isinstance(prompt, str):
        # Text that was rendered before brings its own beginning-of-sequence token.
        rendered = bool(tokenizer.bos_token) and prompt.startswith(tokenizer.bos_token)
        ids = tokenizer(prompt, add_special_tokens=not rendered)["input_ids"]
    elif tokenizer.chat_template is None:
        raise ValueError(
            "a prompt of messages or a system prompt needs a chat template and this tokenizer has "
            "none; set tokenizer.chat_template, or use string prompts without a system prompt"
        )
    else:
        try:
            ids = tokenizer.apply_chat_template(
                prompt,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                **(chat_template_kwargs or {}),
            )["input_ids"]
        except Exception as error:  # whatever the template, a program of the model's, raises
            raise ValueError(
                f"the chat template does not take the prompt {shown(prompt)} "
                f"({_first_line(error)}); change the messages, or chat_template_kwargs"
            ) from error
    if not ids:
        raise ValueError(
            f"the prompt {shown(prompt)} encodes to no token; a model needs one to start"
        )
    return list(ids)


def check_prompts(
    dataset: Dataset,
    encode: Callable[[Any], list[int]],
    *,
    max_completion_length: int,
    limits: Mapping[str, int],
    vocabulary: int,
) -> None:
    """Refuse a dataset with a prompt that cannot be encoded or leaves no room for a completion.

    Args:
        dataset: has a column `prompt`.
        encode: returns the token ids of a prompt.
        max_completion_length: tokens that a completion may have.
        vocabulary: tokens that the model has embeddings of.
        limits: tokens of prompt and completion together, by what has room for so many.

    Raises:
        ValueError: names the first such row, and what to do.
    """
    for row, prompt in enumerate(dataset["prompt"]):
        try:
            ids = encode(prompt)
        except ValueError as error:
            raise ValueError(f"row {row} of the dataset: {error}") from error
        if not 0 <= min(ids) <= max(ids) < vocabulary:
            wrong = next(i for i in ids if not 0 <= i < vocabulary)
            raise ValueError(
                f"the prompt of row {row} has the token id {wrong}, and the model has embeddings "
                f"of {vocabulary} tokens; take the model's own tokenizer, or resize its embeddings"
            )
        check_room(f"the prompt of row {row}", len(ids), max_completion_length, limits)


def check_room(
    prompt: str, length: int, max_completion_length: int, limits: Mapping[str, int]
) -> None:
    """Refuse a prompt that leaves no room for a completion.

    Args:
        prompt: what it is called.
        length: its tokens.
        max_completion_length: tokens that a completion may have.
        limits: tokens of both together, by what has room for so many.

    Raises:
        ValueError: it leaves none; says what to do.
    """
    limit, most = narrowest(limits)
    if length + max_completion_length > most:
        raising = "" if limit == "the model" else f", raise {limit}"
        raise ValueError(
            f"max_completion_length: {prompt} has {length} tokens, which with "
            f"{max_completion_length} of the completion exceeds the {most} that {limit} has room "
            f"for; lower max_completion_length{raising}, or leave such prompts out of the dataset"
        )


def narrowest(limits: Mapping[str, int]) -> tuple[str, int]:
    """Return what has room for the fewest tokens, and how many these are."""
    limit = min(limits, key=lambda name: limits[name])
    return limit, limits[limit]
