"""Files of reward functions, and batches for them."""

import pytest

from fastgrpo.rewards import Judges


@pytest.fixture
def write(tmp_path):
    """Write a file of reward functions; return the beginning of their names."""

    def write(text: str) -> str:
        path = tmp_path / "mine.py"
        path.write_text(text)
        return f"{path}:"

    return write


@pytest.fixture
def judge():
    """Have two completions of two and three tokens judged; the judges are closed in the end."""
    made = []

    def judge(*reward_funcs, columns=None, trainer_state=None, **options):
        judges = Judges(reward_funcs, **options)
        made.append(judges)

        def score(**arguments):
            return judges.score(
                **{
                    "prompts": ["p", "p"],
                    "completions": ["a", "bcd"],
                    "completion_ids": [[1, 4], [2, 3, 4]],
                    "columns": columns or {},
                    "trainer_state": trainer_state,
                    **arguments,
                }
            )

        return judges, score

    yield judge
    for judges in made:
        judges.close()
