"""Our advantages against those TRL's trainers log, for every option TRL has and the same rewards.

Where ours differ on purpose:

- TRL computes in fp32. Of rewards that are all equal it leaves the rounding of their mean, divided
  by `advantage_eps`; ours are exactly 0.
- With "normalize_then_sum" TRL ignores `scale_rewards`; we refuse what would be ignored.
- `normalize_advantages` of TRL's RLOO, a second scaling of the leave-one-out advantages by their
  std in the batch, we do not have: scale by the std of the rewards (`scale_rewards`), or not.
- TRL's `frac_reward_zero_std` is of what rewards are scaled by; our `zero_std` of the groups.
"""

from __future__ import annotations

import copy
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.trainer_cells import Task, TrainerCell, make_task
from fastgrpo.advantages import group_advantages

trl: Any = pytest.importorskip("trl", minversion="1.16")
transformers: Any = pytest.importorskip("transformers")
pytestmark = pytest.mark.peers

NAN = math.nan
WEIGHTS = [1.0, 0.5, -2.0]
CELL = TrainerCell(
    "demo", prompts=3, num_generations=7, completion_length=2, prompt_length=4, micro_batch=21
)
# The error of TRL's arithmetic, whose results are near 1: a few roundings of fp32.
TOLERANCE = 3e-6


def some_rewards() -> dict[str, Tensor]:
    """Return (21, 3) rewards: three groups of seven completions, three functions."""
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(21, 3, generator=generator)
    binary = torch.randint(0, 2, (21, 3), generator=generator).float()
    gaps = real.masked_fill(torch.rand(21, 3, generator=generator) < 0.3, NAN)
    gaps[0] = NAN  # judged by nobody
    gaps[8:14, 1] = NAN  # judged in its group alone
    gaps[15:] = NAN  # the same, by all functions
    silent = binary.clone()
    silent[:7] = 0.5  # equal for every function, and in fp32 without a rounding
    silent[7:14, 1] = 1.0  # equal for one
    opposed = binary.clone()
    opposed[:7, 1] = opposed[:7, 0] + 3
    opposed[:7, 2] = opposed[:7, 0] * 0.75  # the weighted sum is 1.5 for all
    return {"real": real, "binary": binary, "gaps": gaps, "silent": silent, "opposed": opposed}


REWARDS = some_rewards()


@pytest.fixture(scope="module")
def task() -> Task:
    return make_task(CELL, "cpu")


def advantages_of_trl(
    task: Task, directory: Path, rewards: list[Tensor], kind: str = "GRPO", **options: Any
) -> list[Tensor]:
    """Let a trainer of TRL make a step with each of the rewards and return what it logs."""
    calls = [iter(rewards) for _ in WEIGHTS]
    found: list[Tensor] = []

    def reward_function(k: int) -> Any:
        def give(completions: list[str], **columns: Any) -> list[float | None]:
            values = next(calls[k])[:, k].tolist()
            assert len(values) == len(completions)
            return [None if math.isnan(value) else value for value in values]

        give.__name__ = f"reward_{k}"
        return give

    class Collect(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            found.append(torch.tensor(list(trainer._logs["advantages"])))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TRL's and transformers' own
        trainer = getattr(trl, f"{kind}Trainer")(
            copy.deepcopy(task.model),
            [reward_function(k) for k in range(len(WEIGHTS))],
            args=getattr(trl, f"{kind}Config")(
                output_dir=str(directory),
                per_device_train_batch_size=CELL.completions,
                num_generations=CELL.num_generations,
                max_completion_length=CELL.completion_length,
                max_steps=len(rewards),
                reward_weights=WEIGHTS,
                beta=0.0,
                gradient_checkpointing=False,
                use_cpu=True,
                bf16=False,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                **options,
            ),
            train_dataset=task.dataset,
            processing_class=task.tokenizer,
            callbacks=[Collect()],
        )
        trainer.train()
    return found


def ours(rewards_BK: Tensor, **options: Any) -> Tensor:
    return group_advantages(rewards_BK, WEIGHTS, CELL.num_generations, **options).advantages


def assert_same(theirs: list[Tensor], **options: Any) -> None:
    for (name, rewards_BK), wanted in zip(REWARDS.items(), theirs, strict=True):
        found = ours(rewards_BK, **options)
        assert found.abs().max() > 0.5
        torch.testing.assert_close(
            found, wanted, atol=TOLERANCE, rtol=TOLERANCE, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("scale_rewards", ["group", "batch", "none"])
def test_sum_then_normalize(task: Task, tmp_path: Path, scale_rewards: str) -> None:
    theirs = advantages_of_trl(task, tmp_path, list(REWARDS.values()), scale_rewards=scale_rewards)
    assert_same(theirs, scale_rewards=scale_rewards)


def test_normalize_then_sum(task: Task, tmp_path: Path) -> None:
    """Whatever they are told of `scale_rewards`."""
    option = {"multi_objective_aggregation": "normalize_then_sum"}
    rewards = list(REWARDS.values())
    theirs = advantages_of_trl(task, tmp_path, rewards, **option)
    assert_same(theirs, **option)
    ignored = advantages_of_trl(task, tmp_path, rewards, scale_rewards="none", **option)
    assert all(map(torch.equal, ignored, theirs))
    with pytest.raises(ValueError, match=r"scale_rewards = 'none' .* leave it at 'group'"):
        ours(REWARDS["real"], scale_rewards="none", **option)


def test_leave_one_out(task: Task, tmp_path: Path) -> None:
    theirs = advantages_of_trl(task, tmp_path, list(REWARDS.values()), "RLOO")
    assert_same(theirs, baseline="leave_one_out", scale_rewards="none")


@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
def test_of_equal_rewards_they_leave_a_rounding(
    task: Task, tmp_path: Path, aggregation: str
) -> None:
    option = {"multi_objective_aggregation": aggregation}
    # A group whose mean may be another number in fp32, a group that differs, and zeros.
    rewards = [
        torch.cat([torch.full((7,), n / 10), torch.arange(7.0), torch.zeros(7)])[:, None]
        for n in range(1, 10)
    ]
    rewards = [rewards_B1.repeat(1, len(WEIGHTS)) for rewards_B1 in rewards]
    theirs = torch.stack(advantages_of_trl(task, tmp_path, rewards, **option))
    found = torch.stack([ours(rewards_BK, **option) for rewards_BK in rewards])
    assert not found[:, :7].any() and not found[:, 14:].any() and found[:, 7:14].any()
    noise = theirs[:, :7].abs().max().item()
    assert 1e-5 < noise < 1e-2
    # With "normalize_then_sum" the noise of one group moves the mean of the batch.
    torch.testing.assert_close(found, theirs, atol=1.1 * noise, rtol=0)
