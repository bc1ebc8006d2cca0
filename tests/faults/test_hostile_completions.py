"""Completions as hostile input: to the built-in rewards, and to the terminal that shows them."""

import io
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console as RichConsole

from fastgrpo.console import Console
from fastgrpo.rewards import accuracy, answers, format, tag_count

CODE = (
    "__import__('os').system('touch MARK')",
    "open('MARK', 'w')",
    "().__class__.__mro__[1].__subclasses__()",
    "exec(\"open('MARK', 'w')\")",
    "[open('MARK', 'w') for _ in (1,)]",
    "(lambda: open('MARK', 'w'))()",
    "sympify(\"open('MARK', 'w')\")",
    "1 if open('MARK', 'w') else 2",
    r"\text{__import__('os').system('touch MARK')}",
    r"\operatorname{open}('MARK', 'w')",
    r"x_{\text{open('MARK', 'w')}}",
    r"\input{/etc/passwd} \write18{touch MARK}",
    "${7*7}{{7*7}}<%= 7*7 %>",
    "0 and open('MARK', 'w')",
    "9 + open('MARK', 'w').fileno()",
)
PIECES = (
    *CODE,
    *("{", "}", "(", ")", "[", "]", "$", "$$", r"\(", r"\)", r"\[", r"\]", r"\{", r"\left(", "^{"),
    *(
        r"\boxed{",
        r"\frac{",
        r"\sqrt[",
        r"\text{",
        r"\begin{pmatrix}",
        r"\end{pmatrix}",
        "&",
        r"\\",
    ),
    *("<answer>", "</answer>", "####", "=", "+", "-", "*", "/", "^", "!", "%", ",", ".", "_", "|"),
    *(
        "x",
        "7",
        "0.1",
        "1e400",
        "-3",
        "9" * 60,
        "٣",
        "\uff19",
        "½",
        "\U0001d7d7",
        "π",
        "∞",
        "e",
        "i",
        r"\pi",
    ),
    *(r"\sum_{i=1}^{9}", r"\int_0^1", r"\lim_{x\to0}", r"\binom{9}{3}", r"\cup", r"\in", r"\pm"),
    *("\x00", "\x1b[2J", "\ud800", "\u202e", "\u2028", "\ufeff", "\r\n", "\t", "🙂", "\U0010ffff"),
)
BOMBS = (
    "10^{10^{10}}",
    "9^9^9^9",
    r"\binom{10^9}{5\cdot10^8}",
    "(10^9)!",
    r"\prod_{i=1}^{10^9} i",
    r"\boxed{2^{2^{2^{2^{2^2}}}}}",
    "(x+1)^{99999}",
    r"\sqrt[10^9]{10^{10^9}}",
    "it is " + "9**" * 40 + "9",
    "it is " + "(" * 150 + "1+1" + ")" * 150,
)


def hostile(chance: random.Random, bombs: float) -> str:
    pieces = list(PIECES) + (list(BOMBS) if chance.random() < bombs else [])
    text = "".join(chance.choices(pieces, k=chance.randint(1, 24)))
    if bombs and len(pieces) > len(PIECES):
        text += chance.choice(BOMBS)
    return text * chance.choice([1, 1, 1, 40])


def judge(gold: str, completion: str) -> float | None:
    return accuracy(prompts=["?"], completions=[completion], completion_ids=[[1]], answer=[gold])[0]


def judge_hostile(seed: int, cases: int, bombs: float, place: Path) -> None:
    chance = random.Random(seed)
    for _ in range(cases):
        text = hostile(chance, bombs).replace("MARK", str(place / "MARK"))
        start = time.perf_counter()
        assert judge("-7/3", text) == 0.0, text
        # It is read alone and then compared; and a process that was ended is started again.
        assert time.perf_counter() - start < 2 * answers.CHECK_TIMEOUT_S + 30, text
    assert judge("-7/3", "-14/6") == 1.0
    assert list(place.iterdir()) == []


@pytest.mark.fault(
    "200 made-up completions of code, broken LaTeX, control characters and deep nesting",
    "`accuracy` gives 0 in time, evaluates nothing and writes nothing",
)
@pytest.mark.slow
def test_hostile_answers(tmp_path):
    judge_hostile(1, 200, 0.0, tmp_path)


@pytest.mark.slow
@pytest.mark.fault(
    "4,000 made-up completions, with towers of powers, factorials and endless sums among them",
    "`accuracy` gives 0 in time, evaluates nothing and writes nothing",
)
def test_many_hostile_answers(tmp_path, monkeypatch):
    monkeypatch.setattr(answers, "CHECK_TIMEOUT_S", 0.5)
    judge_hostile(2, 4000, 0.01, tmp_path)


@pytest.mark.fault(
    "a completion of 1 MB of braces, brackets, dollars or digits",
    "the built-in rewards are done in a second, and their time grows with the length alone",
)
@pytest.mark.parametrize(
    "piece", ["{", "(", "$", r"\boxed{", "<answer>", "<think>", "9", r"\[", " "]
)
def test_a_megabyte_of_anything(piece):
    text = f"<think></think> <answer> {piece * (1_000_000 // len(piece))}"
    start = time.perf_counter()
    assert judge("-7/3", text) == 0.0
    assert format([text]) == [0.0]
    assert tag_count([text])[0] <= 0.75
    assert time.perf_counter() - start < 5  # 0.1 s on a machine that does nothing else
    # The regular expression of `format` with all four tags: no place is tried twice.
    for broken in (f"<think>{piece * 100_000}</think>{' ' * 900_000}.<answer></answer>",):
        start = time.perf_counter()
        assert format([broken]) == [0.0]
        assert time.perf_counter() - start < 5


AUDIT = """
import sys
from importlib.util import module_from_spec, spec_from_file_location
spec = spec_from_file_location("worker", sys.argv[1])
worker = module_from_spec(spec)
spec.loader.exec_module(worker)
compiled = []
there = open("THERE", "wb", buffering=0)
worker.forbid()
sys.addaudithook(lambda event, a: compiled.append(repr(a[0])) if event == "compile" else None)
for text in TEXTS:
    for wrapped in (f"${text}$", f"it is 1 + {text}"):
        try:
            formulas = worker.read(wrapped)
            worker.verify(formulas, formulas, timeout_seconds=0)
        except Exception:
            pass
# What SymPy compiles of its own has no name in it that only an answer can have brought.
assert worker.read("it is 1 + 2*3**2")[0].doit() == 19
assert not [code for code in compiled if "MARK" in code or "Integer" in code], compiled
import os, socket, subprocess
def forbidden(*attempts):
    for attempt in attempts:
        try:
            attempt()
        except PermissionError:
            continue
        raise AssertionError("was allowed")
forbidden(
    lambda: os.system("true"), lambda: subprocess.run(["true"]), lambda: open("MARK", "w"),
    lambda: os.remove("MARK"), lambda: os.mkdir("MARK"), os.fork,
    lambda: socket.create_connection(("127.0.0.1", 9)), lambda: os.open("MARK", os.O_CREAT),
    lambda: os.kill(os.getpid(), 9), lambda: os.rename("a", "b"),
    lambda: os.execv("/bin/true", ["true"]),
    lambda: os.open("THERE", os.O_TRUNC), lambda: os.open("THERE", os.O_APPEND),
)
try:
    there.write(b"x")  # opened before, and so not seen by the hook
    raise AssertionError("was written")
except OSError:
    pass
try:
    bytes(worker.MEMORY_BYTES)
except MemoryError:
    print("done")
"""


@pytest.mark.fault(
    "answers that are Python code, where SymPy would evaluate text",
    "none is compiled; behind that, Python's own ways to start, open for writing and write are "
    "refused, and more than 4 GiB too",
)
@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux's")
def test_no_answer_is_evaluated(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", f"TEXTS = {CODE!r}\n{AUDIT}", answers._WORKER],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.stdout == "done\n", done.stderr
    assert [(file.name, file.stat().st_size) for file in tmp_path.iterdir()] == [("THERE", 0)]


@pytest.mark.fault(
    "completions, warnings and names with escape sequences, carriage returns and markup of rich",
    "the terminal gets none of it, and shows the text",
)
@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_obeys_no_completion(terminal):
    evil = (
        "\x1b]0;owned\x07\x1b[2J\rgone\x9b31m[bold red]text[/]\x00\u202e[link=http://a.b]x[/link]"
    )
    out = io.StringIO()
    console = Console(console=RichConsole(file=out, force_terminal=terminal, width=100, height=40))
    with console:
        console.phase(f"train {evil}", 3)
        console.sample(prompt=evil, completion=evil, rewards={evil: 1.0}, advantage=0.5)
        console.step({"step": 1, "loss": 1.0, f"rewards/{evil}/mean": 1.0})
        console.warning(f"warning: {evil}")
        console.message(evil)
        console.table(evil, [evil, "b"], [[evil, evil]])
    shown = out.getvalue()
    assert "[bold red]" in shown
    for obeyed in ("\x1b]", "\x1b[2J\r", "\x07", "\x9b", "\x00", "\u202e", "\rgone"):
        assert obeyed not in shown
    if not terminal:
        assert "\x1b" not in shown and "\r" not in shown
