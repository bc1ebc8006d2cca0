"""Prompts: every source, every refusal by name, encoding without a doubled token."""

import gzip
import importlib
import json
from pathlib import Path

import datasets
import pytest
from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from fastgrpo.data import encode_prompt, load_prompts

MESSAGES = [{"role": "user", "content": "two words"}]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    progress_bars = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    yield
    if not progress_bars:
        datasets.enable_progress_bars()


def write_jsonl(path, *rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_every_kind_of_file(tmp_path):
    rows = {"prompt": ["a", "b"], "answer": ["1x", "2x"]}
    dataset = Dataset.from_dict(rows)
    dataset.to_json("a.jsonl")
    (tmp_path / "a.json").write_text(json.dumps(dataset.to_list()))
    dataset.to_csv("a.csv")
    dataset.to_parquet("a.parquet")
    for name in ("a.jsonl", "a.json", "a.csv", str(tmp_path / "a.parquet")):
        assert load_prompts(name, "train").to_dict() == rows


@pytest.mark.parametrize("name", ["train.jsonl", "test.csv", "deep/train.parquet"])
def test_an_empty_file_in_a_folder_is_named(tmp_path, name):
    (tmp_path / "files" / "deep").mkdir(parents=True)
    write_jsonl(tmp_path / "files" / "train.json", {"prompt": "a"})
    (tmp_path / "files" / ".hidden.json").touch()
    (tmp_path / "files" / "notes.txt").touch()
    assert len(load_prompts("files", "train")) == 1
    (tmp_path / "files" / name).touch()
    with pytest.raises(ValueError, match=f"^dataset file 'files/{name}' is empty; put one prompt"):
        load_prompts("files", "train")


def test_a_folder_of_blank_lines_is_named(tmp_path):
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "train.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match="split 'train' of dataset 'files' is empty"):
        load_prompts("files", "train")


def test_a_configuration_of_what_has_none_is_refused():
    name = write_jsonl(Path("a.jsonl"), {"prompt": "a"})
    Dataset.from_dict({"prompt": ["a"]}).save_to_disk("saved")
    for dataset in (name, "saved"):
        with pytest.raises(ValueError, match=f"^dataset_config: '{dataset}' has no configurations"):
            load_prompts(dataset, "train", config_name="main")


def test_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_jsonl(tmp_path / "a.jsonl", {"prompt": "at home"})
    assert load_prompts("~/a.jsonl", "train")["prompt"][0] == "at home"


def test_prompts_of_messages(tmp_path):
    name = write_jsonl(tmp_path / "a.jsonl", {"prompt": MESSAGES}, {"prompt": MESSAGES * 2})
    assert list(load_prompts(name, "train")["prompt"]) == [MESSAGES, MESSAGES * 2]


def test_folders(tmp_path):
    one, two = Dataset.from_dict({"prompt": ["a"]}), Dataset.from_dict({"prompt": ["b"]})
    one.save_to_disk("one")
    DatasetDict(train=one, test=two).save_to_disk("both")
    (tmp_path / "files").mkdir()
    write_jsonl(tmp_path / "files" / "train.jsonl", {"prompt": "a"})
    write_jsonl(tmp_path / "files" / "test.jsonl", {"prompt": "b"})
    assert load_prompts("one", "train")["prompt"][0] == "a"
    for folder in ("both", "./both", "files", str(tmp_path / "files")):
        assert load_prompts(folder, "test")["prompt"][0] == "b"
    with pytest.raises(ValueError, match="'one' has no split 'test'; it has train"):
        load_prompts("one", "test")
    with pytest.raises(ValueError, match="'both' has no split 'dev'; it has train, test"):
        load_prompts("both", "dev")
    with pytest.raises(ValueError, match="'files' has no split 'dev'; it has train, test"):
        load_prompts("files", "dev")


def test_the_prompt_column_is_renamed(tmp_path):
    name = write_jsonl(tmp_path / "a.jsonl", {"question": "q", "answer": "x", "prompt": "old"})
    loaded = load_prompts(name, "train", prompt_column="question")
    assert loaded.to_dict() == {"answer": ["x"], "prompt": ["q"]}


def test_a_hub_name_goes_to_the_hub_with_its_config(monkeypatch):
    def load_dataset(name, config_name, split):
        assert (name, config_name, split) == ("openai/gsm8k", "main", "test")
        return Dataset.from_dict({"question": ["q"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    loaded = load_prompts("openai/gsm8k", "test", config_name="main", prompt_column="question")
    assert loaded.to_dict() == {"prompt": ["q"]}


@pytest.mark.parametrize("name", ["no.jsonl", "folder/no.csv", "./no", "../no", "~/no/such", "/no"])
def test_a_path_with_nothing_there(name):
    with pytest.raises(FileNotFoundError, match=f"'{name}' looks like a path but nothing is there"):
        load_prompts(name, "train")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("bad.parquet", "not parquet"),
        ("empty.jsonl", ""),
        ("empty.csv", ""),
        ("header.csv", "prompt\n"),
        ("empty.json", "[]"),
    ],
)
def test_files_without_data_or_that_do_not_parse(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=f"'{name}' (is empty|has no rows or does not parse)"):
        load_prompts(name, "train")


def test_an_unknown_extension_and_another_split_of_a_file(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ValueError, match=r"'a.txt' has the unknown extension '.txt'; use .*\.csv"):
        load_prompts("a.txt", "train")
    write_jsonl(tmp_path / "a.jsonl", {"prompt": "a"})
    with pytest.raises(ValueError, match="is one split, 'train', so split 'test' does not exist"):
        load_prompts("a.jsonl", "test")


def test_an_empty_dataset(tmp_path, monkeypatch):
    Dataset.from_dict({"prompt": []}).save_to_disk("none")
    with pytest.raises(ValueError, match="'none' is empty"):
        load_prompts("none", "train")
    (tmp_path / "files").mkdir()
    write_jsonl(tmp_path / "files" / "train.jsonl", {"prompt": "a"})
    with pytest.raises(ValueError, match=r"split 'train\[:0\]' of dataset 'files' is empty"):
        load_prompts("files", "train[:0]")
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *_, split: Dataset.from_dict({"prompt": []})
    )
    with pytest.raises(ValueError, match="'some/name' is empty; it needs at least one row"):
        load_prompts("some/name", "train")


def test_a_missing_column_lists_the_others_and_suggests_one(tmp_path):
    name = write_jsonl(tmp_path / "a.jsonl", {"id": 1, "question": "q"})
    with pytest.raises(
        ValueError, match=r"no column 'prompt' but id, question; .* prompt_column='question'"
    ):
        load_prompts(name, "train")
    with pytest.raises(ValueError, match="no column 'text' but id, question"):
        load_prompts(name, "train", prompt_column="text")


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        ("a", ""),
        ("a", None),
        (1, 2),
        (MESSAGES, []),
        (MESSAGES, [{"role": "user", "content": None}]),
        (["a"], ["b"]),
        ([{"text": "a"}], [{"text": "b"}]),
        ({"role": "user", "content": "a"}, {"role": "user", "content": "a"}),
    ],
)
def test_a_row_that_is_no_prompt_is_named(tmp_path, good, bad):
    name = write_jsonl(tmp_path / "a.jsonl", {"prompt": good}, {"prompt": bad})
    row = 1 if isinstance(good, str) or good is MESSAGES else 0
    with pytest.raises(
        ValueError, match=rf"row {row} of dataset .* a prompt is a non-empty string"
    ):
        load_prompts(name, "train")


def test_without_the_package_datasets(monkeypatch):
    def import_module(name):
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", import_module)
    with pytest.raises(ImportError, match="pip install datasets"):
        load_prompts("a.jsonl", "train")


WORDS = {word: i for i, word in enumerate(["<s>", "two", "words", "user", "system", "bot", "be"])}
TEMPLATE = (
    "<s> {% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}bot{% endif %}"
)


def make_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    backend = Tokenizer(WordLevel(WORDS, unk_token="<s>"))
    backend.pre_tokenizer = Whitespace()
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")
    tokenizer.chat_template = template
    return tokenizer


def test_encoding_has_one_bos_and_the_generation_prompt():
    tokenizer = make_tokenizer()
    assert encode_prompt("two words", tokenizer) == [0, 1, 2]
    assert encode_prompt("<s> two words", tokenizer) == [0, 1, 2]
    assert encode_prompt(MESSAGES, tokenizer) == [0, 3, 1, 2, 5]


def test_a_system_prompt_goes_in_front_unless_there_is_one():
    tokenizer = make_tokenizer()
    expected = [0, 4, 6, 3, 1, 2, 5]
    assert encode_prompt("two words", tokenizer, system_prompt="be") == expected
    assert encode_prompt(MESSAGES, tokenizer, system_prompt="be") == expected
    own = [{"role": "system", "content": "be"}, *MESSAGES]
    assert encode_prompt(own, tokenizer, system_prompt="two") == expected
    assert len(MESSAGES) == 1


def test_encodings_that_are_refused():
    without = make_tokenizer(template=None)
    assert encode_prompt("two", without) == [0, 1]
    with pytest.raises(ValueError, match=r"set tokenizer\.chat_template, or use string prompts"):
        encode_prompt(MESSAGES, without)
    with pytest.raises(ValueError, match=r"set tokenizer\.chat_template"):
        encode_prompt("two", without, system_prompt="be")
    without.backend_tokenizer.post_processor = None
    with pytest.raises(ValueError, match="'  ' encodes to no token"):
        encode_prompt("  ", without)


@pytest.mark.parametrize("kind", ["a.jsonl", "a.json", "files"])
def test_dates_and_long_numbers_of_json_stay_what_they_are(tmp_path, kind):
    rows = [
        {"prompt": "a", "answer": "2020-01-01", "n": 2**53 + 1, "x": {"at": ["2020-01-01 10:30"]}},
        {"prompt": "b", "answer": "2020-01-02T00:00:00Z", "n": 2.5, "x": {"at": []}},
        {"prompt": "2020-01-03", "answer": None, "n": 1, "x": None},
    ]
    (tmp_path / "files").mkdir()
    write_jsonl(tmp_path / "files" / "train.jsonl", *rows)
    write_jsonl(tmp_path / "a.jsonl", *rows)
    (tmp_path / "a.json").write_text(json.dumps(rows))
    assert list(load_prompts(kind, "train")) == rows


@pytest.mark.parametrize("kind", ["a.csv", "files"])
def test_all_of_csv_is_text(tmp_path, kind):
    (tmp_path / "files").mkdir()
    text = 'prompt,answer,x\nNA,007,1.50\nnull,None,\n1,2020-01-01," "\nTrue,1e5,""\n'
    for path in (tmp_path / "files" / "train.csv", tmp_path / "a.csv"):
        path.write_text(text)
    assert load_prompts(kind, "train").to_dict() == {
        "prompt": ["NA", "null", "1", "True"],
        "answer": ["007", "None", "2020-01-01", "1e5"],
        "x": ["1.50", None, " ", None],
    }


@pytest.mark.parametrize(("text", "line"), [("prompt\na\n ", 3), ("prompt\n \t\nb\n", 2)])
def test_a_line_of_blanks_is_no_prompt_that_is_lost(tmp_path, text, line):
    """Pandas would pass over it."""
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(ValueError, match=rf"'a.csv', line {line}: is blank; remove it"):
        load_prompts("a.csv", "train")


@pytest.mark.fault(
    "a folder of prompts with files that are not looked through, one with 100,000 brackets",
    "refused in a sentence with the file; the process lives",
)
@pytest.mark.parametrize("name", ["train.ndjson", "train.jsonl.gz", "train.tsv", "train.txt"])
def test_a_folder_holds_what_a_file_may_be(tmp_path, name):
    (tmp_path / "files").mkdir()
    data = b'{"prompt": "a", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n"
    (tmp_path / "files" / name).write_bytes(gzip.compress(data) if "gz" in name else data)
    with pytest.raises(ValueError, match=rf"files/{name}' has the unknown extension .*; use one"):
        load_prompts("files", "train")
