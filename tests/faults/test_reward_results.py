"""What reward functions return, log and raise, in the run's process as in one of their own."""

import asyncio

import pytest

both = pytest.mark.parametrize("reward_timeout", [None, 60.0], ids=["here", "apart"])

ODD = """
import asyncio

def gives_steps_beyond_the_largest(**columns):
    return [[(0, 3e38), (1, -3e38)], [(0, -3e38), (2, -3e38)]]

async def cancels(**columns):
    raise asyncio.CancelledError

def logs_a_long_number(log_extra, **columns):
    log_extra("o", [10**5000] * 2)
    return [1, 2]

def logs_what_has_no_end(log_extra, **columns):
    endless = []
    endless.append(endless)
    log_extra("o", [endless] * 2)
    return [1, 2]

def adds_a_note(**columns):
    error = ValueError("what is wrong")
    error.add_note("a hint\\nof two lines")
    raise error

def is_not_python(**columns):
    compile("1 +", "mine", "eval")
"""


@pytest.mark.fault(
    "a reward function returns steps whose sum is infinite, cancels itself, gives `log_extra` what "
    "JSON has nothing for, or raises an error with notes",
    "counted by kind and told in a line, wherever it is called",
)
@pytest.mark.parametrize(
    ("name", "kind", "said"),
    [
        ("gives_steps_beyond_the_largest", "invalid",
         "returned the steps [(0, -3e+38), (2, -3e+38)] for completion 1, whose sum is beyond 3.4"),
        ("cancels", "exceptions", "raised asyncio.exceptions.CancelledError over 2 completions"),
        ("logs_a_long_number", "invalid",
         "gave log_extra what JSON has nothing for (ValueError: Exceeds the limit (4300"),
        ("logs_what_has_no_end", "invalid",
         "gave log_extra what JSON has nothing for (ValueError: Circular reference"),
        ("adds_a_note", "exceptions", "raised ValueError: what is wrong over 2 completions"),
        ("is_not_python", "exceptions", "raised SyntaxError: invalid syntax over 2 completions"),
    ],
)  # fmt: skip
@both
def test_it_is_told_wherever_it_happens(write, judge, reward_timeout, name, kind, said):
    _, score = judge(write(ODD) + name, reward_timeout=reward_timeout, reward_errors="none")
    scores = score()
    assert scores.metrics == {f"rewards/{name}/{kind}": 1}
    (problem,) = scores.problems
    assert problem.startswith(f"reward function {name!r} {said}")
    assert scores.rewards_BK.isnan().all() and scores.extra == {}


def test_what_cancels_the_run_is_no_fault_of_the_function():
    from fastgrpo.rewards.functions import call_all, traits_of

    begun = []

    async def waits(**columns):
        begun.append(1)
        await asyncio.Event().wait()

    def run(coroutine):
        async def cancelled():
            task = asyncio.ensure_future(coroutine)
            while not begun:
                await asyncio.sleep(0)
            task.cancel()
            await task

        asyncio.run(cancelled())

    with pytest.raises(asyncio.CancelledError):
        call_all([(waits, traits_of(waits))], {}, [1, 1], run)
