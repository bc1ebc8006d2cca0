"""Plain lines without a terminal, a live area with one."""

import math
import re
from collections.abc import Mapping
from io import BytesIO, StringIO, TextIOWrapper

import pytest
from rich.console import Console as RichConsole

from fastgrpo.console import Console


def plain(logging_steps: int = 1, width: int = 40) -> tuple[Console, StringIO]:
    file = StringIO()
    return Console(logging_steps=logging_steps, console=RichConsole(file=file, width=width)), file


def live() -> tuple[Console, StringIO]:
    file = StringIO()
    rich = RichConsole(file=file, force_terminal=True, width=80, height=40, _environ={"TERM": "x"})
    return Console(console=rich), file


def test_a_plain_step_is_one_line_of_the_metrics_that_matter() -> None:
    console, file = plain()
    with console:
        console.phase("train", 150)
        console.step(
            {
                "step": 10,
                "loss": -0.01234,
                "reward": 0.41234,
                "rewards/exact_match/mean": 0.375,
                "rewards/exact_match/std": 0.5,
                "tokens_per_second": 12345.6,
                "grad_norm": math.nan,
                "entropy": None,
                "time/generate": 1.0,
                "frac_reward_zero_std": 0.25,
                "completions/clipped_ratio": 0.0625,
            }
        )
    assert file.getvalue() == (
        "train: 150 steps\n"
        "step 10/150  reward 0.412  rewards/exact_match/mean 0.375  "
        "frac_reward_zero_std 0.25  loss -0.0123  entropy -  grad_norm -  "
        "completions/clipped_ratio 0.0625  tokens_per_second 12,346\n"
    )


def test_plain_lines_come_at_the_first_the_last_and_every_logging_step() -> None:
    console, file = plain(logging_steps=4)
    with console:
        console.phase("train", 10)
        for step in range(1, 11):
            console.step({"step": step, "reward": step / 10})
    assert file.getvalue().splitlines() == [
        "train: 10 steps",
        "step 1/10  reward 0.1",
        "step 4/10  reward 0.4",
        "step 8/10  reward 0.8",
        "step 10/10  reward 1",
    ]


def test_steps_without_a_number_or_a_total_are_counted() -> None:
    console, file = plain()
    console.phase("warm start", None)
    console.step({"loss": 2.0})
    console.step({"loss": 1.5})
    console.phase("train", 2)
    console.step({"loss": 1.0})
    assert file.getvalue().splitlines() == [
        "warm start",
        "step 1  loss 2",
        "step 2  loss 1.5",
        "train: 2 steps",
        "step 1/2  loss 1",
    ]


def test_an_evaluation_is_a_line_of_its_own_and_no_step() -> None:
    console, file = plain(logging_steps=10)
    console.phase("train", 20)
    console.step({"step": 0, "eval_reward": 0.25, "eval_runtime": 3.0})  # before the first step
    console.step({"step": 1, "reward": 0.5})
    console.step({"step": 2, "reward": 0.75, "eval_reward": 0.375, "eval_rewards/a/mean": 1.0})
    console.step({"reward": 1.0})  # counted on
    console.step({"eval_reward": 0.5})
    console.phase("done", None)
    assert file.getvalue().splitlines() == [
        "train: 20 steps",
        "evaluation at step 0  reward 0.25",
        "step 1/20  reward 0.5",
        "evaluation at step 2  reward 0.375  rewards/a/mean 1",
        "evaluation at step 3  reward 0.5",
        "done",
    ]


def test_samples_are_for_terminals_and_warnings_for_everybody() -> None:
    for console, file in (plain(), live()):
        with console:
            console.phase("train", 20)
            console.sample(
                prompt=[{"role": "user", "content": "ask[me]"}],
                completion=[{"role": "assistant", "content": "\x1b[2Jdone"}],
                rewards={"judge": 0.5, "other": None},
                advantage=-0.25,
            )
            console.warning("warning: [no] signal")
        shown = file.getvalue()
        assert shown.count("warning: [no] signal") == (1 if console_is_plain(shown) else 2)
        for text in ("ask[me]", "\ufffd[2Jdone", "judge 0.5  other -  advantage -0.25"):
            assert (text in shown) is not console_is_plain(shown)
        assert "\x1b[2J" not in shown


def console_is_plain(shown: str) -> bool:
    return "\x1b" not in shown


def test_the_step_before_an_error_is_not_lost() -> None:
    console, file = plain(logging_steps=10)
    with pytest.raises(RuntimeError, match="boom"), console:
        console.phase("train", 100)
        for step in (1, 2, 3):
            console.step({"step": step, "loss": float(step)})
        raise RuntimeError("boom")
    assert file.getvalue().splitlines()[-2:] == ["step 1/100  loss 1", "step 3/100  loss 3"]


def test_messages_are_neither_broken_nor_read_as_markup() -> None:
    text = "run directory: /a/very/long/path/of/a/run/[red]/that/is/wider/than/the/terminal :smile:"
    for console, file in (plain(), live()):
        with console:
            console.message(text)
        assert text in file.getvalue()


def test_nothing_that_a_terminal_would_obey_reaches_it() -> None:
    """An exception may quote a completion, whole; a log is looked at in a terminal later."""
    hostile = (
        "f failed: '\x1b[2J\x1b]0;owned\x07\x9b \u202e \ud800'\nline 2 end 👩\u200d🔬" + "x" * 9000
    )
    harmless = (
        "f failed: '\ufffd[2J\ufffd]0;owned\ufffd\ufffd \ufffd \ufffd'\nline 2 end 👩\u200d🔬"
    )
    console, file = plain()
    console.message(hostile)
    console.warning(hostile)
    assert file.getvalue() == 2 * (harmless + "x" * 9000 + "\n")
    for console, file in (plain(), live()):
        with console:
            console.phase(hostile, 3)
            console.message(hostile)
            console.warning(hostile)
            console.table(hostile, [hostile], [[hostile]])
            console.step({"step": 1, "rewards/\x1b[2J\u202ename/mean": 1.0})
        shown = file.getvalue()
        assert not re.search(r"\x1b(\[2J|\])|[\x07\x9b\u202e\ud800]", shown)


def test_a_text_that_the_log_has_no_characters_for_is_written() -> None:
    file = TextIOWrapper(BytesIO(), encoding="latin-1")
    Console(console=RichConsole(file=file, width=40)).warning("é\x1b 卵")
    file.flush()
    assert file.buffer.getvalue() == "é? ?\n".encode("latin-1")


def table_of(
    found: Mapping[str, Mapping[str, float | None]], share: bool = True
) -> list[list[str]]:
    console, file = plain(width=80)
    console.accuracies("judge on 8 held-out prompts", found, share=share)
    lines = [line.split("│")[1:-1] for line in file.getvalue().splitlines() if "│" in line]
    return [[cell.strip() for cell in row] for row in lines]


def test_accuracies_are_percents_and_other_rewards_are_not() -> None:
    shares = {"greedy": {"before": 0.5, "after": 0.844}, "sampled": {"before": 0.25, "after": 0.0}}
    assert table_of(shares) == [
        ["greedy", "50.0%", "84.4%", "+34.4 points"],
        ["sampled", "25.0%", "0.0%", "-25.0 points"],
    ]
    rewards = {"greedy": {"before": -1.2, "after": 2.31}, "sampled": {"before": 0.37, "after": 1.0}}
    assert table_of(rewards, share=False) == [
        ["greedy", "-1.2", "2.31", "+3.51"],
        ["sampled", "0.37", "1", "+0.63"],
    ]
    assert table_of({"greedy": {"before": math.nan, "after": 0.5}}) == [
        ["greedy", "-", "50.0%", "-"]
    ]
    assert table_of({"greedy": {"before": None, "after": math.nan}}) == [["greedy", "-", "-", "-"]]


def test_the_table_shows_every_cell() -> None:
    console, file = plain()
    console.table(
        "exact_match [test]",
        ["decoding", "before", "after"],
        [["greedy", "53.6%", "84.4%"], ["sampled", "34.8%", "69.7%"]],
    )
    lines = file.getvalue().splitlines()
    assert lines[0].strip() == "exact_match [test]"
    cells = [line.replace("┃", "│").split("│")[1:-1] for line in lines if "%" in line]
    assert [[cell.strip() for cell in row] for row in cells] == [
        ["greedy", "53.6%", "84.4%"],
        ["sampled", "34.8%", "69.7%"],
    ]


def test_a_terminal_shows_the_progress_and_the_last_metrics() -> None:
    console, file = live()
    with console:
        console.phase("warm start", None)
        console.phase("train", 150)
        console.step({"step": 7, "reward": 0.25, "rewards/exact_match/mean": 0.125, "kl": 0.5})
    last = file.getvalue().rpartition("train")[2]
    for text in ("7/150", "elapsed", "reward ", "0.25", " exact_match ", "0.125", "kl"):
        assert text in last
    assert "step 7/150" not in file.getvalue()


def test_an_error_leaves_the_last_state_on_the_terminal_and_gives_it_back() -> None:
    console, file = live()
    with pytest.raises(RuntimeError, match="boom"), console:
        console.phase("train", 10)
        console.message("before the step")
        console.step({"step": 3, "loss": 0.875})
        raise RuntimeError("boom")
    shown = file.getvalue()
    assert "before the step" in shown
    assert "3/10" in shown
    assert "0.875" in shown
    show_cursor = "\x1b[?25h"
    assert shown.rindex(show_cursor) > shown.rindex("0.875")
    console.message("afterwards")
    assert file.getvalue().endswith("afterwards\n")


def test_a_phase_without_steps_leaves_nothing_behind() -> None:
    console, file = live()
    with console:
        console.phase("test after training", None)
        console.message("run directory: runs/1")
    assert "test after training" not in file.getvalue().rpartition("\x1b[2K")[2]
    assert file.getvalue().endswith("run directory: runs/1\n\r\x1b[2K\x1b[?25h")


def test_standard_output_is_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    with Console() as console:
        console.phase("train", 3)
    assert capsys.readouterr().out == "train: 3 steps\n"
