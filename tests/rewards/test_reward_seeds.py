"""Random numbers of reward functions belong to what they judge, wherever and whenever they do."""

import pytest

from fastgrpo.rewards import Judges

DRAWS = """
import random

def draws(completions, **columns):
    import numpy as np  # only now: a first call is like any other
    return [random.random() + np.random.random() for _ in completions]
"""


def rewards(judges, *ids):
    found = []
    for one in ids:
        scores = judges.score(
            prompts=["p", "p"], completions=["a", "b"], completion_ids=[[one], [2]], columns={}
        )
        found.append(scores.rewards_BK.flatten().tolist())
    return found


@pytest.mark.fault(
    "a process of a reward function that draws random numbers ends, and another takes its place",
    "rewards are those that they would have been",
)
def test_random_numbers_are_those_of_the_completions(tmp_path):
    (tmp_path / "draws.py").write_text(DRAWS)
    found = {}
    for timeout in (60.0, None):
        for name, ids in (("first", [1, 3, 4]), ("then", [4, 1])):
            with Judges([f"{tmp_path}/draws.py:draws"], reward_timeout=timeout) as judges:
                found[timeout, name] = rewards(judges, *ids)
    first, then = found[60.0, "first"], found[60.0, "then"]
    assert then == [first[2], first[0]]
    assert len({value for values in first for value in values}) == 6
    assert found[None, "first"] == first and found[None, "then"] == then
    with Judges([f"{tmp_path}/draws.py:draws"], seed=1) as judges:
        assert rewards(judges, 1) != first[:1]
