"""Prompts: where they come from, how they become token ids.

A dataset row is one prompt, with any other columns for the reward functions.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from datasets import Dataset

FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


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
    path = Path(dataset_name).expanduser()
    if config_name is not None and (path.is_file() or _is_saved_dataset(path)):
        raise ValueError(
            f"dataset_config: {str(path)!r} has no configurations, got {config_name!r}; leave "
            "dataset_config out"
        )
    if path.is_file():
        dataset = _load_file(datasets, path, split)
    elif _is_saved_dataset(path):
        dataset = _load_saved(datasets, path, split)
    elif not path.exists() and (path.suffix in FORMATS or dataset_name[:1] in {".", "/", "~"}):
        raise FileNotFoundError(
            f"dataset {dataset_name!r} looks like a path but nothing is there; "
            f"it is looked up from the working directory {str(Path.cwd())!r}"
        )
    else:
        for file in path.rglob("[!._]*.*") if path.is_dir() else ():
            if file.suffix in FORMATS:
                _check_not_empty(file)
        try:
            name = str(path) if path.exists() else dataset_name
            dataset = datasets.load_dataset(name, config_name, split=split)
        except (ValueError, datasets.exceptions.DatasetGenerationError) as error:
            raise ValueError(_why_not_loaded(dataset_name, config_name, split, error)) from error
    return _checked(dataset, dataset_name, prompt_column)


def _datasets() -> Any:
    try:
        return importlib.import_module("datasets")
    except ImportError as error:
        raise ImportError(
            "reading prompts needs the package datasets: pip install datasets"
        ) from error


def _load_file(datasets: Any, path: Path, split: str) -> Dataset:
    if path.suffix not in FORMATS:
        raise ValueError(
            f"dataset file {str(path)!r} has the unknown extension {path.suffix!r}; "
            f"use one of {', '.join(FORMATS)}"
        )
    if split != "train":
        raise ValueError(
            f"dataset file {str(path)!r} is one split, 'train', so split {split!r} does not exist; "
            "use a folder with the files train and test"
        )
    _check_not_empty(path)
    try:
        return datasets.load_dataset(FORMATS[path.suffix], data_files=str(path))["train"]
    # Each format has a parser with errors of its own; all of them are about this file.
    except Exception as error:
        raise ValueError(
            f"dataset file {str(path)!r} has no rows or does not parse as {path.suffix[1:]}; "
            f"put one prompt in each row ({error.__cause__ or error!r})"
        ) from error


def _check_not_empty(path: Path) -> None:
    if path.stat().st_size == 0:
        raise ValueError(f"dataset file {str(path)!r} is empty; put one prompt in each row")


def _why_not_loaded(name: str, config_name: str | None, split: str, error: Exception) -> str:
    """Return what kept a folder or a dataset of the Hub from being loaded, and what to do."""
    if there := re.search(r"Unknown split .* Should be one of \[(.*)\]", str(error)):
        found = there[1].replace("'", "")
        return f"dataset {name!r} has no split {split!r}; it has {found}"
    if "corresponds to no data" in str(error):
        return f"split {split!r} of dataset {name!r} is empty; it needs at least one row"
    return (
        f"dataset {name!r} with config {config_name!r} and split {split!r} did not load: "
        f"{error.__cause__ or error!r}; a folder must come from save_to_disk or hold data files"
    )


def _is_saved_dataset(path: Path) -> bool:
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def _load_saved(datasets: Any, path: Path, split: str) -> Dataset:
    try:
        saved: Any = datasets.load_from_disk(str(path))
    # Of no rows at all it raises an IndexError.
    except Exception as error:
        raise ValueError(
            f"dataset folder {str(path)!r} is empty or does not load; save it again ({error!r})"
        ) from error
    splits: Any = saved
    if isinstance(saved, datasets.Dataset):
        splits = {str(saved.split or "train"): saved}
    if split not in splits:
        raise ValueError(
            f"dataset folder {str(path)!r} has no split {split!r}; it has {', '.join(splits)}"
        )
    return splits[split]


def _checked(dataset: Any, name: str, prompt_column: str) -> Dataset:
    if len(dataset) == 0:
        raise ValueError(f"dataset {name!r} is empty; it needs at least one row")
    columns: list[str] = dataset.column_names
    if prompt_column not in columns:
        likely = [c for c in ("question", "problem", "query", "instruction") if c in columns]
        remedy = f"name the column of the prompts, prompt_column={(likely or columns)[0]!r}"
        raise ValueError(
            f"dataset {name!r} has no column {prompt_column!r} but {', '.join(columns)}; {remedy}"
        )
    if prompt_column != "prompt":
        if "prompt" in columns:
            dataset = dataset.remove_columns("prompt")
        dataset = dataset.rename_column(prompt_column, "prompt")
    for row, prompt in enumerate(dataset["prompt"]):
        if not _is_prompt(prompt):
            raise ValueError(
                f"row {row} of dataset {name!r} has the prompt {prompt!r:.80}; a prompt is a "
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
        ValueError: the chat template is needed and missing, or there is no token at all.
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
        ids = tokenizer.apply_chat_template(
            prompt,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            **(chat_template_kwargs or {}),
        )["input_ids"]
    if not ids:
        raise ValueError(
            f"the prompt {prompt!r:.80} encodes to no token; a model needs one to start"
        )
    return list(ids)


def check_prompts(
    dataset: Dataset,
    encode: Callable[[Any], list[int]],
    *,
    max_completion_length: int,
    limits: Mapping[str, int],
) -> None:
    """Refuse a dataset with a prompt that cannot be encoded or leaves no room for a completion.

    Args:
        dataset: has a column `prompt`.
        encode: returns the token ids of a prompt.
        max_completion_length: tokens that a completion may have.
        limits: tokens of prompt and completion together, by what has room for so many.

    Raises:
        ValueError: names the first such row, and what to do.
    """
    for row, prompt in enumerate(dataset["prompt"]):
        check_room(f"the prompt of row {row}", len(encode(prompt)), max_completion_length, limits)


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
