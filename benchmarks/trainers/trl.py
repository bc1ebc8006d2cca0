"""TRL's `GRPOTrainer`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..peers import missing
from ..trainer_cells import Task, TrainerCell, given_completions, mean_id
from ..trainer_recorder import MAX_GRAD_NORM, Recorder

METHOD = "GRPOTrainer"


def unavailable() -> str | None:
    return missing("trl")


def train(task: Task, cell: TrainerCell, recorder: Recorder, directory: Path) -> None:
    import trl
    from transformers import TrainerCallback

    class Steps(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            recorder.begin()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            recorder.trained()

        def on_log(self, *args: Any, logs: dict[str, Any], **kwargs: Any) -> None:
            if "grad_norm" in logs:  # not the summary of the run
                recorder.report(logs)

        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            recorder.end()

    trainer: Any = trl.GRPOTrainer(
        task.model,
        mean_id,
        args=trl.GRPOConfig(
            output_dir=str(directory / "run"),
            num_generations=cell.num_generations,
            max_completion_length=cell.completion_length,
            per_device_train_batch_size=cell.micro_batch,
            gradient_accumulation_steps=cell.completions // cell.micro_batch,
            max_grad_norm=MAX_GRAD_NORM,
            max_steps=len(recorder.plan),
            use_cpu=recorder.device == "cpu",
            bf16=cell.dtype == "bfloat16",
            gradient_checkpointing=cell.gradient_checkpointing,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            loss_type="dapo",
            epsilon=0.2,
            beta=0.0,
        ),
        train_dataset=task.dataset,
        processing_class=task.tokenizer,
        callbacks=[Steps()],
    )
    sample = recorder.timed("generation", trainer._generate_single_turn)

    def sample_or_give(prompt_ids: list[list[int]], *args: Any) -> Any:
        length = recorder.given_length()
        if length is None:
            return sample(prompt_ids, *args)
        groups = prompt_ids[:: cell.num_generations]
        return [ids for prompt in groups for ids in given_completions(prompt, cell, length)], None

    trainer._generate_single_turn = sample_or_give
    trainer._tokenize_prompts = recorder.timed("generation", trainer._tokenize_prompts)
    trainer._generate_and_score_completions = recorder.timed(
        "rollout", trainer._generate_and_score_completions
    )
    trainer.train()
