"""Runs on local files, short enough for a test."""

import json

from fastgrpo.config_file import config_from

# What a model of random weights can learn in seconds: to write more of one letter.
REWARD = """
def letter_e(completions, answer, **columns):
    assert len(answer) == len(completions)
    return [text.count("e") / max(len(text), 1) for text in completions]

def judges_nothing(completions, **columns):
    return [None] * len(completions)
"""


def run_config(tmp_path, dataset, model, **values):
    return config_from(
        {
            "model_name_or_path": model,
            "dataset_name": str(dataset),
            "output_dir": str(tmp_path / "run"),
            "reward_funcs": [f"{tmp_path}/my_rewards.py:letter_e"],
            "num_generations": 4,
            "per_device_train_batch_size": 16,
            "gradient_accumulation_steps": 2,
            "max_completion_length": 12,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "max_steps": 12,
            "save_steps": 5,
            "cpu_threads": 1,
            **values,
        }
    )


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]
