"""TRL's reward functions unmodified, and reward models, judge as they do in TRL."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from small_models import save_small_model, small_tokenizer
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Qwen3Config

from fastgrpo.rewards import Judges, RewardModel

pytestmark = pytest.mark.peers
pytest.importorskip("trl", minversion="1.16")

TEXTS = [
    r"<think>half of one</think> \boxed{\frac{1}{2}}",
    r"<think>hm</think> \boxed{0.3}",
    r"\boxed{0.5}",
    "no idea",
]
SOLUTIONS = [r"$\frac{1}{2}$", r"$\frac{1}{2}$", r"$\frac{1}{2}$", ""]
LENGTHS = [1000, 1024, 1152, 1281]


def test_functions_of_trl_run_unmodified_by_the_names_of_its_command_line() -> None:
    from trl import rewards

    completions = [[{"role": "assistant", "content": text}] for text in TEXTS]
    ids = [[1] * length for length in LENGTHS]
    expected: dict[str, Any] = {
        "accuracy_reward": rewards.accuracy_reward(completions, SOLUTIONS),
        "reasoning_accuracy_reward": rewards.reasoning_accuracy_reward(completions, SOLUTIONS),
        "think_format_reward": rewards.think_format_reward(completions),
        "soft_overlong_punishment_reward": rewards.get_soft_overlong_punishment(1280, 256)(ids),
        "cosine_scaled_reward": rewards.get_cosine_scaled_reward(2000)(completions, SOLUTIONS, ids),
    }
    assert expected["accuracy_reward"] == [1.0, 0.0, 1.0, None]
    assert expected["soft_overlong_punishment_reward"] == [0.0, 0.0, -0.5, -1.0]
    names = ["accuracy_reward", "reasoning_accuracy_reward", "think_format_reward"]
    entries = [*names, "get_soft_overlong_punishment", rewards.get_cosine_scaled_reward(2000)]
    with Judges(entries) as judges:
        assert judges.names == list(expected)
        assert judges.functions == {}  # each in its process
        judges.check_columns(["prompt", "solution"])
        scores = judges.score(
            prompts=[[{"role": "user", "content": "?"}]] * 4,
            completions=completions,
            completion_ids=ids,
            columns={"solution": SOLUTIONS},
        )
    wanted_KB = [[math.nan if x is None else x for x in values] for values in expected.values()]
    # Theirs in fp64, rounded here.
    torch.testing.assert_close(
        scores.rewards_BK, torch.tensor(wanted_KB).T, rtol=0, atol=0, equal_nan=True
    )
    assert scores.extra["solution"] == SOLUTIONS
    assert scores.extra["gold_parsed"][3] == "[unparseable]"


def test_names_that_are_dotted_as_on_trls_command_line() -> None:
    with Judges(["trl.rewards.think_format_reward"]) as judges:
        assert judges.names == ["think_format_reward"]


def test_a_reward_model_scores_as_in_trl(tmp_path: Path) -> None:
    from trl import GRPOConfig, GRPOTrainer

    tokenizer = small_tokenizer()
    judge = str(tmp_path / "tiny-judge")
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=256,
        initializer_range=0.3, pad_token_id=tokenizer.pad_token_id, num_labels=1,
    )  # fmt: skip
    AutoModelForSequenceClassification.from_config(config).save_pretrained(judge)
    tokenizer.save_pretrained(judge)
    policy = save_small_model(tmp_path / "policy")
    texts = ["4", "It is 42, I think.", "", "no"]
    plain = ["2+2=", "What is 7 times 6? ", "a", "b"], texts
    messages = (
        [[{"role": "user", "content": prompt}] for prompt in plain[0]],
        [[{"role": "assistant", "content": text}] for text in texts],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TRL's and transformers' own
        trainer: Any = GRPOTrainer(
            model=policy,
            reward_funcs=judge,
            args=GRPOConfig(str(tmp_path / "out"), report_to=[], bf16=False, use_cpu=True,
                            per_device_train_batch_size=4, num_generations=4),
            train_dataset=Dataset.from_dict({"prompt": plain[0]}),
            processing_class=AutoTokenizer.from_pretrained(policy),
        )  # fmt: skip
    ids = [[1]] * 4
    with Judges([RewardModel(judge, device="cpu", batch_size=3)]) as judges:
        assert judges.names == trainer.reward_func_names == ["tiny-judge"]
        for prompts, completions in (plain, messages):
            inputs = [{"prompt": prompt} for prompt in prompts]
            expected = trainer._calculate_rewards(inputs, prompts, completions, ids)
            scores = judges.score(
                prompts=prompts, completions=completions, completion_ids=ids, columns={}
            )
            assert expected.std() > 0.05
            # Theirs reads the four together, ours three and one: sums in another order.
            torch.testing.assert_close(scores.rewards_BK, expected.cpu(), rtol=1e-5, atol=1e-5)
