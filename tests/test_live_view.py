"""What a terminal shows fits it, whatever the metrics and completions are."""

import math
import os
import random
import re
import signal
import threading
import time
from dataclasses import replace
from io import BytesIO, TextIOWrapper
from itertools import product

import pytest
from rich.cells import cell_len
from rich.console import Console as RichConsole

from fastgrpo.console import Console
from fastgrpo.live_view import Sample, State, live_lines
from fastgrpo.readable import plain, printable, sparkline

pty = pytest.importorskip("pty")

METRICS = {
    "reward": 0.6123,
    **{f"rewards/judge_number_{i}/mean": i / 8 for i in range(8)},
    "frac_reward_zero_std": 0.125,
    "completions/mean_length": 1234.5,
    "completions/clipped_ratio": 0.004,
    "loss": -0.000347,
    "entropy": math.nan,
    "kl": None,
    "clip_ratio/region_mean": 0.02,
    "grad_norm": math.inf,
    "learning_rate": 1e-6,
    "tokens_per_second": 51234.0,
    "step_time": 12.5,
    "time/generate": 10.0,
    "time/reward": 0.0,
    "time/train": 2.5,
    "memory/peak_gib": 71.25,
}
TEXT = "Let me think 卵が十七個 🥚👩‍🔬 [bold]x[/bold] \x1b[2J\x1b]0;title\x07 é̸̡̢̧ ​word " * 40


def terminal(width: int, height: int, encoding: str = "utf-8") -> RichConsole:
    file = TextIOWrapper(BytesIO(), encoding=encoding)
    return RichConsole(file=file, force_terminal=True, width=width, height=height)


def state(**values: object) -> State:
    full = State(
        title="train",
        total=150,
        step=24,
        ends=tuple(float(10 * i) for i in range(1, 25)),
        recent=tuple({**METRICS, "reward": i / 24} for i in range(1, 25)),
        evaluations=((10, {"reward": 0.25}), (20, {"reward": 0.5, "rewards/judge/mean": 1.0})),
        sample=Sample(
            step=24,
            prompt=printable("first line\nlast line of the prompt"),
            completion=printable(f"the start\n{TEXT}\nthe end"),
            rewards={"judge": 1.0, "format": None},
            advantage=-0.4,
        ),
        warning="warning: something is up, and it takes many words to say what " * 8,
    )
    return replace(full, **values)


def shown(state: State, width: int = 120, height: int = 40, now: float = 240.0) -> list[str]:
    return [line.plain.rstrip() for line in live_lines(state, terminal(width, height), now)]


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize(
    "given", [state(), state(sample=None, warning=""), state(recent=(), total=None), State()]
)
def test_every_line_fits(given: State, encoding: str) -> None:
    sizes = product((1, 20, 59, 60, 80, 91, 200), (1, 6, 12, 20, 24, 50))
    for width, height in sizes:
        console = terminal(width, height, encoding)
        lines = live_lines(given, console, 245.0)
        assert len(lines) <= height - 1
        for line in lines:
            assert cell_len(line.plain) <= width
            assert "\x1b" not in line.plain and "\n" not in line.plain
            line.plain.encode(encoding)


def test_what_matters_is_there_from_60_columns_and_20_rows_on() -> None:
    for width, height in ((60, 20), (80, 24), (120, 40), (200, 50)):
        text = "\n".join(shown(state(), width, height))
        for part in (
            "train 24/150", " 16%", "0:04:00 elapsed, 0:21:00 left",
            "reward ", " judge_numbe", "silent groups", "12%", "mean length", "1,234", "truncated",
            "loss", "-3.5e-04", "entropy", "kl", "clip ratio", "2%", "grad norm", "learning rate",
            "51,234/s", "12.5 s", "generate", "80%", "train", "20%", "71.2 GiB",
            "evaluation at step 20  reward 0.5 (+0.25)  judge 1", "warning: something is up",
            "a completion of step 24", "last line of the prompt", "the end", "judge 1  format -",
        ):  # fmt: skip
            assert part in text, (width, height, part)


def test_where_an_evaluation_judged_nothing_there_is_no_change() -> None:
    for values in ((math.nan, 0.5), (0.5, math.nan), (None, 0.5)):
        given = state(evaluations=tuple((10 * i, {"reward": x}) for i, x in enumerate(values, 1)))
        (line,) = [line for line in shown(given) if line.startswith("evaluation at step 20")]
        assert line.endswith(("reward 0.5", "reward -"))


def test_the_pace_is_that_of_the_last_steps() -> None:
    slow_start = state(started=0.0, step=200, total=300, ends=(1000.0, 1002.0, 1004.0))
    assert "0:03:20 left" in shown(slow_start, now=1004.0)[0]
    assert "0:03:16 left" in shown(slow_start, now=1007.5)[0]
    assert "0:00:00 left" in shown(slow_start, now=9000.0)[0]
    first = state(started=5.0, step=1, total=11, ends=(8.0,))
    assert "0:00:30 left" in shown(first, now=8.0)[0]
    resumed = state(started=5.0, step=101, total=111, ends=(8.0,))  # when it began is not known
    assert "left" not in shown(resumed, now=8.0)[0]
    assert "left" not in shown(state(step=150), now=8.0)[0]


def test_a_long_completion_shows_both_ends_and_says_what_is_left_out() -> None:
    words = "\n".join(f"line {i}" for i in range(100))
    sample = Sample(step=1, prompt="p", completion=words, rewards={}, advantage=None)
    lines = shown(state(sample=sample, recent=(), evaluations=(), warning=""), height=13)
    begin = lines.index("p") + 1
    assert lines[begin:] == [
        "line 0", "line 1", "line 2", "line 3", "… 92 lines …",
        "line 96", "line 97", "line 98", "line 99",
    ]  # fmt: skip


def test_what_is_cut_says_so() -> None:
    scores = {f"judge_number_{i}": 1.0 for i in range(9)}
    given = state(sample=replace(state().sample, rewards=scores))
    lines = shown(given, 60, 20)
    assert lines[-1].endswith("  …")
    (warning,) = [i for i, line in enumerate(lines) if line.startswith("warning")]
    assert lines[warning + 1].endswith("…")
    assert lines[warning + 2].startswith("─ a completion")


def test_of_many_reward_functions_the_first_are_named() -> None:
    lines = shown(state(sample=None), 80, 16)
    named = [line for line in lines if line.startswith(" judge_number")]
    (rest,) = [line for line in lines if "more" in line.split("  ")[0]]
    assert rest.startswith(f" and {8 - len(named)} more")


def test_a_sparkline_is_the_mean_of_what_falls_into_each_character() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([0, 2, 6, 8], 2) == "▁█"
    assert sparkline([None, 1.0, math.nan, 2.0, math.inf, 3.0], 8) == "▁▅█"  # 3.5 rounds to even
    assert sparkline([0.1] * 64, 7) == "▁▁▁▁▁▁▁"  # the means differ by their rounding
    assert sparkline([1.0], 8) == sparkline([], 8) == sparkline([1.0, 2.0], 1) == ""


def test_what_a_terminal_would_obey_is_made_visible_or_dropped() -> None:
    assert printable("a\x1b[31m\x00\x9b\x7f\ud800b") == "a\ufffd[31m\ufffd\ufffd\ufffd\ufffdb"
    assert printable("a\r\nb\tc\u2028d\xa0e") == "a\nb    c\nd e"
    assert printable("👍🏽 👩\u200d🔬 ❤\ufe0f \u202ert\u200b") == "👍 👩🔬 ❤ rt"
    assert printable("e" + "\u0301" * 50 + "x") == "e\u0301\u0301x"
    long = printable("a" * 100_000 + "b" * 100_000)
    assert long.startswith("aaa") and long.endswith("bbb") and len(long) < 10_000


def test_what_is_printed_whole_keeps_all_but_what_a_terminal_would_obey() -> None:
    assert plain("a\x1b[31m\x00\x9b\x7f\ud800b\rc") == "a\ufffd[31m\ufffd\ufffd\ufffd\ufffdb\ufffdc"
    assert plain("a\r\nb\tc\n") == "a\nb\tc\n"
    assert (
        plain("".join(map(chr, [*range(0x202A, 0x202F), *range(0x2066, 0x206A)]))) == "\ufffd" * 9
    )
    kept = "runs/👩\u200d🔬 é\u0301\u0301\u0301 می\u200cکن שלום 卵\xa0" * 1000
    assert plain(kept) == kept


def test_any_text_is_drawn_within_milliseconds() -> None:
    draw = random.Random(0)
    for _ in range(5):
        text = "".join(chr(draw.choice([draw.randrange(0x300), draw.randrange(0x110000)]))
                       for _ in range(20_000))  # fmt: skip
        sample = replace(state().sample, completion=printable(text), prompt=printable(text))
        start = time.thread_time()  # of this thread alone, however busy the machine is
        lines = live_lines(state(sample=sample), terminal(80, 24), 0.0)
        assert time.thread_time() - start < 1.0  # measured: 0.03 s; it runs four times a second
        assert all(cell_len(line.plain) <= 80 for line in lines)


FRAME = re.compile(rb"\r(?:\x1b\[2K)(?:\x1b\[1A\x1b\[2K)*")


def wait_for_a_redraw(written: list[bytes], after: bytes) -> None:
    """Wait until the live area was drawn again by itself, however busy the machine is."""
    deadline = time.monotonic() + 60
    while not FRAME.search(b"".join(written).partition(after)[2]):
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("end", ["done", "error", "interrupt"])
def test_a_pseudo_terminal_is_left_as_it_was_found(end: str) -> None:
    width, height = 60, 20
    leader, follower = pty.openpty()
    written: list[bytes] = []

    def drain() -> None:
        while not written or b"afterwards" not in b"".join(written[-3:]):
            written.append(os.read(leader, 65536))

    reader = threading.Thread(target=drain)
    reader.start()
    stop = {"error": RuntimeError, "interrupt": KeyboardInterrupt}
    with os.fdopen(follower, "w", encoding="utf-8") as file:
        rich = RichConsole(file=file, width=width, height=height, _environ={"TERM": "xterm"})
        assert rich.is_terminal
        console = Console(console=rich)
        try:
            with console:
                console.phase("train", 12)
                for step in range(1, 13):
                    console.sample(prompt="how?", completion=TEXT, rewards={"a": 1.0})
                    console.step({**METRICS, "step": step})
                    console.message(f"message {step}")
                wait_for_a_redraw(written, after=b"message 12")
                console.message("last message")
                if end == "error":
                    raise RuntimeError
                if end == "interrupt":
                    signal.raise_signal(signal.SIGINT)
        except (RuntimeError, KeyboardInterrupt) as error:
            assert isinstance(error, stop[end])
        file.write("afterwards\n")
        file.flush()
        reader.join()
    os.close(leader)
    output = b"".join(written)
    assert output.count(b"\x1b[?25l") == output.count(b"\x1b[?25h") == 1
    frames = FRAME.findall(output)
    assert len(frames) >= 2
    assert max(frame.count(b"\x1b[1A") for frame in frames) == height - 2  # none scrolled away
    last = output[output.rindex(b"\x1b[1A") :].decode()
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", last).split("\r\n")
    assert "12/12" in plain[0]
    assert plain[-2:] == ["afterwards", ""]
    assert len(plain) == height - 1 + 2
    assert all(cell_len(line) <= width for line in plain)
    assert "last message\r\n" in output.decode()
