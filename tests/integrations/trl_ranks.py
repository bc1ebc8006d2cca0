"""One of several processes of a run of TRL's trainer and of ours; started by torchrun.

`torchrun --nproc-per-node 2 tests/integrations/trl_ranks.py {ddp,fsdp} DIRECTORY`
"""

from __future__ import annotations

import copy
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from trl_pairs import make_trainer, micro_batch, saved_model, trl

from fastgrpo.integrations.trl import FastGRPOTrainer

OPTIONS = {
    "max_steps": 3, "learning_rate": 1e-2, "adam_epsilon": 1e-4, "logging_steps": 1,
    "save_strategy": "no", "max_completion_length": 20, "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2, "num_generations": 4, "beta": 0.1, "entropy_coef": 0.01,
    "top_entropy_quantile": 0.8, "mask_truncated_completions": True, "epsilon": 0.01,
    "num_iterations": 2,
}  # fmt: skip


def sevens(completions: list[str], **_: Any) -> list[float]:
    return [text.count("7") + 0.1 * len(set(text)) for text in completions]


def ddp(directory: Path) -> None:
    """Train both, in earnest; the metrics and the weights are the same."""
    train_both(directory, **OPTIONS)
    gspo = {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 1e-3}
    train_both(directory, **OPTIONS | gspo)


def train_both(directory: Path, **options: Any) -> None:
    runs = []
    for trainer_class in (trl.GRPOTrainer, FastGRPOTrainer):
        model = saved_model(directory)
        trainer = make_trainer(trainer_class, model, directory, reward=sevens, **options)
        trainer.train()
        assert type(trainer.model_wrapped).__name__ == "DistributedDataParallel"
        assert trainer.accelerator.num_processes == 2
        runs.append(trainer)
    theirs, ours = runs
    for wanted, found in zip(theirs.state.log_history, ours.state.log_history, strict=True):
        for name, value in wanted.items():
            if isinstance(value, float) and not ("time" in name or "per_second" in name):
                assert abs(found[name] - value) <= 2e-3 * abs(value) + 2e-5, (name, found, wanted)
    names = {name for line in ours.state.log_history for name in line}
    assert {"kl", "policy_loss", "clip_ratio/low_min", "entropy_coef"} <= names
    started = dict(saved_model(directory).named_parameters())
    for (name, wanted), found in zip(
        theirs.model.named_parameters(), ours.model.parameters(), strict=True
    ):
        moved = (wanted - started[name]).square().mean().sqrt()
        assert (found - wanted).abs().max() < 0.02 * moved, name


def fsdp(directory: Path) -> None:
    """Shard the model (FSDP2): gradients are those of whole models, averaged over the ranks."""
    for options in ({}, {"loss_type": "grpo", "beta": 0.1}, {"top_entropy_quantile": 0.5}):
        for tie in (True, False):
            model = saved_model(directory, tie=tie)
            trainer = make_trainer(FastGRPOTrainer, model, directory, **options)
            rank = trainer.accelerator.process_index
            inputs: dict[str, Any] = dict(micro_batch(rank, empty=rank == 0))
            inputs["ref_per_token_logps"] = torch.full((6, 7), -3.0)
            whole = gradients(trainer, trainer.model, inputs)
            sharded = trainer.model
            sharded.zero_grad()
            for layer in sharded.model.layers:
                fully_shard(layer)
            fully_shard(sharded)
            found = gradients(trainer, sharded, inputs)
            for name, wanted in whole.items():
                torch.distributed.all_reduce(wanted)
                torch.testing.assert_close(found[name], wanted / 2, rtol=1e-4, atol=1e-6)


def gradients(trainer: Any, model: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
    trainer._compute_loss(model, copy.copy(inputs)).backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    whole = {name: getattr(x, "full_tensor", lambda x=x: x)() for name, x in found.items()}
    return {name: x.clone() for name, x in whole.items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    {"ddp": ddp, "fsdp": fsdp}[sys.argv[1]](Path(sys.argv[2]) / os.environ["RANK"])
    torch.distributed.destroy_process_group()
    print("same")
