"""Whatever stands in a file of prompts, it is taken, or refused in a sentence."""

import csv
import gc
import gzip
import io
import json
import math
import shutil
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
from datasets import Dataset, DatasetDict
from fuzzing import FEW, MANY, assert_sentences, check_each
from hypothesis import strategies as st

from fastgrpo.data import load_prompts

pytestmark = [
    # What pandas does not close when it fails.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    # A case that fails is shown, however long.
    pytest.mark.filterwarnings("ignore:Generating overly large repr"),
]
MESSAGE = {"role": "user", "content": "Why?"}
TEXTS = [
    "a",
    "Why?",
    "",
    " ",
    "NA",
    "null",
    "1",
    "2024-01-01",
    "a,b",
    'say "no"',
    "a\r\nb",
    "é" * 9,
]
VALUES = [
    *("a", "b", "", " ", "\n", "\0", "\u2028", "\ud800", "\ufeff", "é" * 300, "x" * 100_000),
    *(None, True, 0, -1, 1.5, 2**63 - 1, 2**63, -(2**64), 10**400, float("inf"), float("nan")),
    *([], {}, [1, "a"], [None], [[]], {"a": {"b": [1]}}, {"bytes": "aGk=", "path": None}),
    *([MESSAGE], [MESSAGE, {"role": "bot", "content": "x"}], [{"role": "user"}], [{}], MESSAGE),
    *([{"role": 1, "content": "a"}], [{"role": "user", "content": None}], [MESSAGE, None]),
    *([{"role": "user", "content": [{"type": "image"}]}], [{"role": "", "content": ""}]),
    *([{**MESSAGE, "name": "x"}, MESSAGE], "2024-01-01T00:00:00Z", "NaN", "1e999"),
]
LINES = [
    *('{"prompt": "a"', '{"prompt": "a"}}', '{"prompt": "a"} {"prompt": "b"}', '["a"]', '"a"', "1"),
    *("null", "{}", "[]", "{oops", "[{", '{"prompt": "a", "prompt": "b"}', '{"prompt": 1e999}'),
    *('{"prompt": "a", "x": {"y": 1, "y": 2}}', '{"prompt": "a", "x": -1e400}', "{'prompt': 'a'}"),
    *('{"prompt": "a", "x": %s}' % ("[" * 60 + "]" * 60), "[" * 3000, '{"a":' * 3000, "\ufeff{}"),
    *('{"prompt": "\\ud800"}', '{"prompt": "\\x"}', '{"prompt": "a\tb"}', '{"prompt": NaN}', "\0"),
    *('{"prompt": "a", "": 1}', '{"prompt": "a", "x": Infinity}', "# no", "", "\u2028", "\r"),
]  # fmt: skip
BYTES = [
    b"",
    b"\n\n",
    b"\xff",
    b"\xc3",
    b"\xef\xbb\xbf",
    b"\x00" * 9,
    gzip.compress(b"{}", mtime=0),
    b"PAR1",
]

columns = st.sampled_from(["prompt", "prompt", "prompt", "answer", "question", "", "\n", "x" * 300])
rows = st.dictionaries(columns, st.sampled_from(VALUES) | st.text(max_size=5), max_size=3)
good = st.fixed_dictionaries({"prompt": st.sampled_from(["a", "b"])})
some_rows = st.lists(good | rows, max_size=4)


def dumped(row) -> str:
    return json.dumps(row, ensure_ascii="é" in str(row))


def damaged(data, draw) -> bytes:
    """Cut a file off, or change a byte of it, now and then."""
    how, place = draw(st.integers(0, 7)), draw(st.integers(0, len(data)))
    if how == 0:
        return data[:place]
    if how == 1:
        return data[:place] + draw(st.binary(min_size=1, max_size=1)) + data[place + 1 :]
    return data


@st.composite
def jsonl(draw):
    lines = draw(
        st.lists(
            some_rows.map(lambda r: "\n".join(map(dumped, r))) | st.sampled_from(LINES), max_size=3
        )
    )
    text = draw(st.sampled_from(["\n", "\r\n"])).join(lines)
    return ".jsonl", damaged(text.encode(errors="surrogatepass"), draw)


@st.composite
def documents(draw):
    whole = draw(
        some_rows
        | st.dictionaries(columns, st.lists(st.sampled_from(VALUES), max_size=3), max_size=3)
        | rows
        | st.sampled_from(VALUES)
    )
    return ".json", damaged(dumped(whole).encode(errors="surrogatepass"), draw)


@st.composite
def csvs(draw):
    fields = st.sampled_from(
        [*TEXTS, *['"a,b"', '"a\nb"', '"', '""', '"a""b"', "\0", ";", "x" * 200_000]]
    )
    header = draw(
        st.lists(columns | fields, min_size=1, max_size=3).map(lambda x: ["prompt", *x][: len(x)])
    )
    records = draw(
        st.lists(
            st.lists(fields, min_size=len(header), max_size=len(header)) | st.lists(fields),
            max_size=3,
        )
    )
    end = draw(st.sampled_from(["\n", "\r\n", "\r"]))
    return ".csv", damaged(end.join(",".join(r) for r in [header, *records]).encode(), draw)


def parquet(table) -> bytes:
    sink = pa.BufferOutputStream()
    pyarrow.parquet.write_table(table, sink)
    return sink.getvalue().to_pybytes()


ARRAYS = [
    *(["a", "b"], ["a", None], [1, 2], [b"a", b"\xff"], [[MESSAGE], [MESSAGE]], [["a"], []]),
    *([{"a": 1}, None], [None, None], [1.5, None], [True, False], [[None], [MESSAGE]], ["", "x"]),
]  # fmt: skip
HF = {"features": {"prompt": {"_type": "Image"}}}


@st.composite
def parquets(draw):
    names = draw(st.lists(columns, min_size=1, max_size=2, unique=True))
    table = pa.table({name: pa.array(draw(st.sampled_from(ARRAYS))) for name in names})
    if draw(st.integers(0, 5)) == 0:
        info = draw(
            st.sampled_from([{"info": HF}, {"info": 1}, {"info": {"features": {"a": 1}}}, []])
        )
        table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
    return ".parquet", damaged(parquet(table.slice(0, draw(st.integers(0, 2)))), draw)


@cache
def saved() -> dict[str, bytes]:
    """Return the files of a dataset that `save_to_disk` has made, and of one with two splits."""
    prompts = Dataset.from_dict({"prompt": ["a", "b"]})
    files = {}
    with TemporaryDirectory() as place:
        prompts.save_to_disk(f"{place}/one")
        DatasetDict(train=prompts, test=prompts).save_to_disk(f"{place}/two")
        for path in Path(place).rglob("*.*"):
            files[str(path.relative_to(place))] = path.read_bytes()
    return files


@st.composite
def folders(draw):
    """A folder of data files, or one that was saved, with a damaged file or without one."""
    if draw(st.booleans()):
        names = st.sampled_from(["train", "test", "data", ".hidden", "a/train", "a/b/test"])
        files = draw(st.lists(st.tuples(names, one_file), max_size=3))
        others = st.sampled_from([""] * 9 + [".ndjson", ".tsv", ".gz", ".txt", ".JSONL"])
        return "", {name + (draw(others) or suffix): data for name, (suffix, data) in files}
    which = draw(st.sampled_from(["one/", "two/"]))
    files = {n.removeprefix(which): data for n, data in saved().items() if n.startswith(which)}
    name = draw(st.sampled_from(sorted(files)))
    damage = draw(
        st.sampled_from([b"", b"{", b"[]", b"null", b'"x"', b'{"_data_files": []}', None])
    )
    files[name] = damaged(files[name], draw) if damage is None else damage
    if draw(st.integers(0, 4)) == 0:
        del files[name]
    return "", files


raw = st.tuples(
    st.sampled_from([".jsonl", ".json", ".csv", ".parquet", ".txt", ".gz"]),
    st.sampled_from(BYTES) | st.binary(max_size=30),
)
one_file = st.one_of(jsonl(), jsonl(), documents(), csvs(), csvs(), parquets(), raw)
cases = st.tuples(
    st.one_of(one_file, one_file, one_file, one_file, one_file, one_file, folders()),
    st.sampled_from(["prompt", "prompt", "prompt", "question", "answer", "", "x" * 300, "a\nb"]),
    st.sampled_from(["train", "train", "train", "test", "train[:1]", "x" * 300, "a\nb"]),
)


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Load prompts with nothing kept from one time to the next."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    progress_bars = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    longest = csv.field_size_limit(sys.maxsize)

    def make(path, column, split):
        try:
            loaded = load_prompts(str(path), split, prompt_column=column)
        except ValueError as error:
            assert_sentences(error, r"(row \d+ of |split .* of )?dataset ")
            return None
        else:
            return loaded[:]
        finally:
            shutil.rmtree(tmp_path / "cache", ignore_errors=True)

    yield make
    gc.collect()
    csv.field_size_limit(longest)
    datasets.logging.set_verbosity_warning()
    if not progress_bars:
        datasets.enable_progress_bars()


def check_files(load, place, count):
    """Hold what is loaded of each case to what stands there."""
    number = 0

    def check(case):
        nonlocal number
        (suffix, data), column, split = case
        number += 1
        path = place / f"{number}{suffix}"
        if isinstance(data, dict):
            for name, content in data.items():
                (path / name).parent.mkdir(parents=True, exist_ok=True)
                (path / name).write_bytes(content)
            path.mkdir(exist_ok=True)
        else:
            path.write_bytes(data)
        loaded = load(path, column, split)
        if loaded is not None and suffix in (".jsonl", ".csv"):
            rows = json_rows(data) if suffix == ".jsonl" else csv_rows(data)
            prompts = [row.pop(column) for row in rows]
            assert whole(loaded.pop("prompt")) == whole(prompts)
            for name, values in loaded.items():
                assert whole(values) == whole([row.get(name) for row in rows]), name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    check_each(cases, check, count)


def json_rows(data):
    return [json.loads(line) for line in data.decode("utf-8-sig").split("\n") if line.strip()]


def csv_rows(data):
    """Return texts; a field without one is None."""
    header, *records = [r for r in csv.reader(io.StringIO(data.decode("utf-8-sig"), "")) if r]
    names = [name or f"Unnamed: {i}" for i, name in enumerate(header)]  # as pandas calls them
    return [{n: x or None for n, x in zip(names, r, strict=True)} for r in records]


def whole(value):
    """Return a value without keys that are None: Arrow gives those to objects that lack them."""
    if isinstance(value, dict):
        return {name: whole(x) for name, x in value.items() if whole(x) is not None} or None
    if isinstance(value, list):
        return [whole(x) for x in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def test_some_files(load, tmp_path):
    check_files(load, tmp_path, FEW)


@pytest.mark.slow
@pytest.mark.fault("10,000 made-up files of prompts", "each is taken, or refused in a sentence")
def test_many_files(load, tmp_path):
    check_files(load, tmp_path, MANY)
