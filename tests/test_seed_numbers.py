"""The worked numbers of the documents this project began with: rewards, advantages, loss.

A real trainer is given completions; a reward function gives each the number in its text.
"""

import math

import pytest
import torch

from fastgrpo.loss import batch_logps, batch_loss
from fastgrpo.rollout import Completions

NUMBERS = """
def number(completions, **columns):
    return [float(text) for text in completions]
"""


class Given:
    """Completions that were written before, the same for every prompt."""

    is_policy = True

    def __init__(self, tokenizer, texts):
        self.ids = torch.tensor([tokenizer(text)["input_ids"] for text in texts])

    def generate(self, prompt_ids, num_generations, sampling, seeds=None):
        assert num_generations == len(self.ids)
        ids = self.ids.repeat(len(prompt_ids), 1)
        return Completions(
            ids=ids,
            mask=torch.ones_like(ids, dtype=torch.bool),
            logps=torch.zeros(ids.shape),
            finished=torch.ones(len(ids), dtype=torch.bool),
        )

    def update_weights(self, model):
        pass

    def take_problems(self):
        return []

    def sleep(self):
        pass


@pytest.fixture
def collected(start, tmp_path):
    """Make a trainer and the batch of one group of completions that were given these rewards."""

    def make(rewards, **options):
        (tmp_path / "numbers.py").write_text(NUMBERS)
        trainer = start(
            f"run {rewards} {options}",
            reward_funcs=[f"{tmp_path}/numbers.py:number"],
            num_generations=len(rewards),
            per_device_train_batch_size=len(rewards),
            gradient_accumulation_steps=1,
            max_completion_length=4,
            max_grad_norm=0.0,
            **options,
        )
        texts = [f"{reward:.2f}" for reward in rewards]  # of four characters, and so four tokens
        trainer.sampler.rollout = Given(trainer.policy.tokenizer, texts)
        (batch,), metrics = trainer.collect(1, {})
        return trainer, batch, metrics

    return make


def advantages(batch):
    parts = zip(batch.advantages.split(batch.lengths), batch.mask.split(batch.lengths), strict=True)
    found = [advantages[mask] for advantages, mask in parts]
    assert all(len(part) == 4 and (part == part[0]).all() for part in found)
    return [float(part[0]) for part in found]


@pytest.mark.parametrize(
    ("rewards", "options", "expected", "atol"),
    [
        # Two of four are right; the seed divides by n and adds nothing to the std.
        (
            [1, 1, 0, 0],
            {"advantage_std": "population", "advantage_eps": 0.0},
            [1.0, 1.0, -1.0, -1.0],
            1e-7,
        ),
        (
            [1, 1, 0, 0],
            {"advantage_std": "population"},
            [0.5 / 0.5001] * 2 + [-0.5 / 0.5001] * 2,
            1e-7,
        ),
        # Four of eight, std 0.5345.
        ([1, 0, 1, 0, 1, 0, 1, 0], {}, [0.935, -0.935] * 4, 5e-4),
        ([0.9, 0.7, 0.8, 0.4], {"scale_rewards": "none"}, [0.2, 0.0, 0.1, -0.3], 1e-7),
        ([0, 0, 0.1, 0], {"scale_rewards": "none"}, [-0.025, -0.025, 0.075, -0.025], 1e-7),
        # The seed prints a mean of 0.625 here; it is 0.5.
        ([1, 0, 1, 0], {"scale_rewards": "none"}, [0.5, -0.5, 0.5, -0.5], 1e-7),
    ],
)
def test_from_rewards_to_advantages_to_the_loss_of_a_step(
    collected, rewards, options, expected, atol
):
    trainer, batch, metrics = collected(rewards, **options)
    assert metrics["reward"] == pytest.approx(sum(rewards) / len(rewards), abs=1e-6)
    assert advantages(batch) == pytest.approx(expected, abs=atol)
    # On-policy, of equal lengths: the ratio is 1 and the advantages of a group add up to 0.
    assert trainer.optimise(batch, {})["loss"] == pytest.approx(0, abs=1e-6)


def test_the_objective_of_the_ratio_example(collected):
    """Log-probs move by 0.2, 0.1, 0.1, 0.2 and A = 0.6: with 0.2 of clipping, 0.69 a token."""
    trainer, batch, _ = collected([1.2, 0.0], scale_rewards="none")
    assert advantages(batch) == pytest.approx([0.6, -0.6], abs=1e-7)
    up = batch.select([0])
    moved = torch.zeros(len(up.input_ids))
    moved[up.mask] = torch.tensor([-2.1, -1.8, -0.5, -1.2]) - torch.tensor([-2.3, -1.9, -0.6, -1.4])
    up.old_logps = batch_logps(trainer.policy, up, [[0]], 1.0) - moved
    with trainer.policy.packing():
        output = batch_loss(trainer.policy, up, trainer.config.loss, step=up)
    by_hand = 0.6 * (1.2 + math.exp(0.1) + math.exp(0.1) + 1.2) / 4
    assert float(output.loss.detach()) == pytest.approx(-by_hand, abs=1e-6)
    assert by_hand == pytest.approx(0.69, abs=2e-3)
    assert float(output.metrics["clip_ratio/high_mean"]) == 0.5


def test_the_weighted_rewards_of_the_gsm8k_example(start, tmp_path):
    """1.0 * accuracy + 0.1 * format + 0.05 * tag_count: 1.15 all right, 0.125 as it is printed."""
    (tmp_path / "three.py").write_text(
        "def accuracy_like(completions, **columns):\n"
        "    return [1.0, 0.0] * (len(completions) // 2)\n"
        "def format_like(completions, **columns):\n"
        "    return [1.0] * len(completions)\n"
        "def tags_like(completions, **columns):\n"
        "    return [1.0, 0.5] * (len(completions) // 2)\n"
    )
    names = [f"{tmp_path}/three.py:{f}_like" for f in ("accuracy", "format", "tags")]
    trainer = start(reward_funcs=names, reward_weights=[1.0, 0.1, 0.05])
    _, metrics = trainer.collect(1, {})
    assert metrics["reward"] == pytest.approx((1.15 + 0.125) / 2, abs=1e-6)
    # The group's mean is half way, and both are 1 sample standard deviation (of 4) from it.
    spread = (1.15 - 0.125) / 2
    assert metrics["advantages/std"] == pytest.approx(
        spread / (spread * math.sqrt(4 / 3) + 1e-4) * math.sqrt(32 / 31), abs=1e-5
    )
