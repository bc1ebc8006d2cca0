"""This package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fastgrpo import GRPOLossConfig, TrainConfig
from fastgrpo.assets import Assets
from fastgrpo.rollout import Completions, Rollout
from fastgrpo.trainer import Trainer

from ..trainer_cells import Task, TrainerCell, given_completions, mean_id
from ..trainer_recorder import MAX_GRAD_NORM, Recorder

METHOD = "Trainer"


def unavailable() -> str | None:
    return None


class GivenOrSampled:
    """The trainer's own rollout, except in the steps whose completions are given."""

    is_policy = True

    def __init__(self, rollout: Rollout, cell: TrainerCell, recorder: Recorder) -> None:
        self.rollout, self.cell, self.recorder = rollout, cell, recorder
        self.update_weights, self.sleep = rollout.update_weights, rollout.sleep
        self.take_problems = rollout.take_problems

    def generate(self, prompt_ids: list[list[int]], *rest: Any) -> Completions:
        length = self.recorder.given_length()
        if length is None:
            return self.rollout.generate(prompt_ids, *rest)
        given = [given_completions(ids, self.cell, length) for ids in prompt_ids]
        ids = torch.tensor(given, device=self.recorder.device).flatten(0, 1)
        return Completions(
            ids=ids,
            mask=torch.ones_like(ids, dtype=torch.bool),
            logps=torch.zeros_like(ids, dtype=torch.float32),
            finished=torch.zeros_like(ids[:, 0], dtype=torch.bool),
        )


def train(task: Task, cell: TrainerCell, recorder: Recorder, directory: Path) -> None:
    config = TrainConfig(
        reward_funcs=[f"{mean_id.__module__}:{mean_id.__name__}"],
        num_generations=cell.num_generations,
        max_completion_length=cell.completion_length,
        per_device_train_batch_size=cell.micro_batch,
        gradient_accumulation_steps=cell.completions // cell.micro_batch,
        max_grad_norm=MAX_GRAD_NORM,
        max_steps=len(recorder.plan),
        bf16=cell.dtype == "bfloat16",
        gradient_checkpointing=cell.gradient_checkpointing,
        save_strategy="no",
        output_dir=str(directory / "run"),
        loss=GRPOLossConfig(loss_type="dapo", epsilon_low=0.2, epsilon_high=0.2, beta=0.0),
    )
    assets = Assets(model=task.model, tokenizer=task.tokenizer, train_dataset=task.dataset)
    trainer: Any = Trainer(config, assets)
    trainer.sampler.rollout = GivenOrSampled(trainer.sampler.rollout, cell, recorder)
    collect = recorder.timed("rollout", trainer.collect)
    optimise, finish_step = trainer.optimise, trainer.finish_step

    def collect_in_step(step: int, times: dict[str, float]) -> Any:
        recorder.begin()
        found = collect(step, times)
        recorder.steps[-1]["generation"] = times["generate"]
        return found

    def optimise_in_step(*args: Any) -> dict[str, float]:
        metrics = optimise(*args)
        recorder.trained()
        return metrics

    def finish_and_check(metrics: dict[str, float], times: dict[str, float], tokens: int) -> None:
        finish_step(metrics, times, tokens)
        recorder.report(metrics)

    trainer.collect, trainer.optimise, trainer.finish_step = (
        collect_in_step,
        optimise_in_step,
        finish_and_check,
    )
    trainer.saver.save = lambda path: recorder.end()  # the final checkpoint, which nobody wants
    trainer.train()
