"""Without a GPU the Triton kernels run in its interpreter: to be asked for before its import."""

import json
import os
import sys
from importlib.util import find_spec

import pytest
import torch
from fault_tally import note_faults
from fault_tally import pytest_terminal_summary as pytest_terminal_summary

HAS_GPU = torch.cuda.is_available()
HAS_VLLM = find_spec("vllm") is not None
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Matrices this small are slower on several threads; and uninitialised memory must show (on a GPU
# the switch would also refuse operations whose order does not matter here).
torch.set_num_threads(1)
torch.use_deterministic_algorithms(not HAS_GPU)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    note_faults(items)
    for item in items:
        if "gpu" in item.keywords and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        if "vllm" in item.keywords and not HAS_VLLM:
            item.add_marker(pytest.mark.skip(reason="vLLM is not installed"))


@pytest.fixture
def device() -> str:
    return "cuda" if HAS_GPU else "cpu"


@pytest.fixture
def word_problems(tmp_path):
    from small_runs import REWARD

    rows = [
        {
            "prompt": f"Ann has {n} eggs and sells {n // 2}. How many are left?\n",
            "answer": f"She sells {n // 2}, so {n} - {n // 2} = {n - n // 2}.\n#### {n - n // 2}",
        }
        for n in range(2, 34)
    ]
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "my_rewards.py").write_text(REWARD)
    return path


@pytest.fixture
def start(tmp_path, word_problems):
    """Make a trainer on a model, with a reward that has no signal on half of the prompts."""
    from small_models import save_small_model
    from small_runs import HALF_SILENT, run_config

    from fastgrpo.trainer import Trainer

    (tmp_path / "silence.py").write_text(HALF_SILENT)
    model = save_small_model(tmp_path / "model")

    def make(name="run", reward="half_silent", **values):
        values = {
            "reward_funcs": [f"{tmp_path}/silence.py:{reward}"],
            "output_dir": str(tmp_path / name),
            "max_steps": 3,
            "save_strategy": "no",
            **values,
        }
        return Trainer(run_config(tmp_path, word_problems, model, **values))

    return make


@pytest.fixture
def launch(start, tmp_path):
    """Make a trainer with judges of small_runs.JUDGES, by their names."""
    from small_runs import JUDGES

    (tmp_path / "judges.py").write_text(JUDGES)

    def make(*judges, name="run", **values):
        names = [f"{tmp_path}/judges.py:{judge}" for judge in judges]
        return start(name, **{"reward_funcs": names, **values})

    return make


@pytest.fixture
def two_splits(tmp_path, word_problems):
    """Write the problems as a folder of 24 to train on and 8 that are held out."""
    folder = tmp_path / "data"
    folder.mkdir()
    text = word_problems.read_text().splitlines(keepends=True)
    (folder / "train.jsonl").write_text("".join(text[:24]))
    (folder / "test.jsonl").write_text("".join(text[24:]))
    return str(folder)


@pytest.fixture
def write(tmp_path):
    """Write a file of reward functions; return the beginning of their names."""

    def write(text: str) -> str:
        path = tmp_path / "mine.py"
        path.write_text(text)
        return f"{path}:"

    yield write
    sys.modules.pop("fastgrpo_rewards_mine", None)  # of a function that was called here


@pytest.fixture
def judge():
    """Have two completions of two and three tokens judged; the judges are closed in the end."""
    from fastgrpo.rewards import Judges

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
