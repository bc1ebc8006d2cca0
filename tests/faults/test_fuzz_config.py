"""Whatever stands in a configuration, it is taken, or refused in sentences."""

import pytest
import yaml
from fuzzing import FEW, MANY, assert_sentences, check_each
from hypothesis import strategies as st

from fastgrpo.config import load_config
from fastgrpo.config.train import DEFAULTS
from fastgrpo.config.trl import TRANSLATED
from fastgrpo.config.trl_refused import INSTEAD, NO_BEARING

KEYS = sorted({*DEFAULTS, *TRANSLATED, *INSTEAD, *NO_BEARING})
LAUGHS = "&a [x, x, x, x, x, x, x, x, x]" + "".join(
    f", &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
VALUES = [
    # What is often meant by it.
    *("1", "8", "0.1", "1e-6", "true", "no", "auto", "none", "group", "steps", "[accuracy]"),
    *("float32", "bfloat16", "dapo", "cosine", "{}", "[]", "~", "", "model", "[1, 2]", "0", "-1"),
    # What YAML makes something else of, or nothing.
    *("on", "off", "Yes", "010", "0x10", "0b1", "1:30", "1_000", "2024-01-01", "2024-13-45", "="),
    *("1e999", "-1e999", "1e400", ".inf", "-.inf", ".nan", "nan", "Infinity", "1.e", "._", "+"),
    *("9" * 400, "-" + "9" * 30, "9" * 5000, "1" + "0" * 18, "9223372036854775808"),
    *("0." + "1" * 300, "!!int x", "!!bool x", "!!int ''", "!!float ''", "!!str 1", "!!map [x]"),
    *("!!python/object:os.system x", "!!python/name:os.system", "!!set {a}", "!!binary aGk="),
    *("!!timestamp 1", "!!omap [a: 1]", "!!pairs x", "!!seq x", "!!null x", "!mine x", "! x"),
    *("!<tag:yaml.org,2002:int> x", "&a 1", "*a", "&a [*a]", "&a {b: *a}", "{<<: 1}"),
    *("{<<: [{a: 1}, 2]}", f"[{LAUGHS}]", "[" * 30 + "]" * 30, "{a: " * 30 + "}" * 30, "[" * 1000),
    *("{? [a] : b}", "{[a]: b}", "{1: 2}", "{a: 1, a: 2}", "{null: 1}", "{'': 1}"),
    *("[1, [2, {a: 3}]]", "{min_lr: 1}", "{data: 1, shard: 2}", "'", '"', "|", ">"),
    *("|\n  text\n  more", "'a\n\n  b'", "- a", "\n- a\n- b", "\n  a: 1\n b: 2", "\tx", "a: b"),
    *("a #b", "@x", "`x", "%x", "x" * 100_000, "é" * 300, "\U0001f600", "\u2028", '"\\0"'),
    *('"\\ud800"', '"\\n\\x1b[2J\\x85"', "'\x85'", "\x00", "\x07", "\ufeff", "\u202e"),
]
DOCUMENTS = [
    *(b"", b"\n\n", b"# nothing\n", b"---\n", b"--- 1\n--- 2\n", b"a: 1\n---\nb: 2\n", b"...\n"),
    *(b"- 1\n", b"text", b"1", b"null", b"[]", b"{}", b"\xff\xfe\x00", b"seed: 1\nseed: \xff\n"),
    *(b"\xef\xbb\xbfseed: 1\n", "seed: 1\n".encode("utf-16"), "run_name: é\n".encode("latin-1")),
    *(b"seed: 1\r\nmax_steps: 2\r\n", b"\tseed: 1\n", b"seed:1\n", b"seed: 1\n max_steps: 2\n"),
    *(b"%YAML 9.9\n---\nseed: 1\n", b"\x00", b"? [a]\n: b\n", b"? {a: 1}\n: b\n"),
    *(b"<<: {seed: 1}\n", b"<<: &a {<<: *a}\n", b"&a a: *a\n", b"seed: 1\nbeta: 2\nseed: 3\n"),
    *(b"[" * 1000, b"a: " * 300, b"x" * 1_000_001),
    b"\n".join(b"key%d: 1" % i for i in range(5000)),
]

keys = st.one_of(
    st.sampled_from(KEYS),
    st.sampled_from([*DEFAULTS]),
    st.sampled_from(["1", "on", "~", "[a]", "{a: b}", "<<", "?", "", "a b", "''", "*a", "x" * 300]),
    st.text(max_size=8),
)
values = st.one_of(
    st.sampled_from(VALUES),
    st.integers().map(str),
    st.floats().map(str),
    st.sampled_from([*DEFAULTS.values()]).map(lambda v: yaml.safe_dump(v, default_flow_style=True)),
    st.text(max_size=12),
)
pairs = st.tuples(keys, values)


@st.composite
def documents(draw):
    """Lines of a configuration, most of them nearly right; some with a character too many."""
    text = "".join(f"{key}: {value}\n" for key, value in draw(st.lists(pairs, max_size=6)))
    if draw(st.integers(0, 3)) == 0:
        place = draw(st.integers(0, len(text)))
        text = (
            text[:place]
            + draw(st.sampled_from([*"\t\0[]{}:,&*!|'\"%-\n \ufeff\x85"]))
            + text[place:]
        )
    return text.encode("utf-8", errors="surrogatepass")


files = st.one_of(documents(), documents(), st.sampled_from(DOCUMENTS), st.binary(max_size=40))
overrides = st.lists(
    st.one_of(pairs.map("=".join), pairs.map("=".join), st.text(max_size=10)), max_size=3
)


def check(path, case):
    text, given = case
    path.write_bytes(text)
    try:
        config = load_config(path, given)
    except ValueError as error:
        assert_sentences(error, f"{path}:" if not given else rf"{path}:|.{{1,100}}: ")
    else:
        path.write_text(yaml.safe_dump(config.flat(), sort_keys=False))
        assert load_config(path) == config


cases = st.tuples(files, st.one_of(st.just([]), overrides))


def test_some_configurations(tmp_path):
    check_each(cases, lambda case: check(tmp_path / "run.yaml", case), FEW)


@pytest.mark.slow
@pytest.mark.fault("10,000 made-up configurations", "each is taken, or refused in sentences")
def test_many_configurations(tmp_path):
    check_each(cases, lambda case: check(tmp_path / "run.yaml", case), MANY)
