"""TRL's `GRPOTrainer` and ours, given the same options under the same names, and followed.

Both start from the same weights and visit the same prompts in the same order. They sample for
themselves, or are given the same completions by public means: a `rollout_func` there, a `Rollout`
here.
"""

from __future__ import annotations

import copy
import itertools
import random
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from benchmarks.trainer_cells import Task
from fastgrpo.assets import Assets
from fastgrpo.config import config_from
from fastgrpo.json_lines import read_lines
from fastgrpo.prompt_order import PromptSampler
from fastgrpo.rollout import Completions, SamplingParams
from fastgrpo.trainer import Trainer

trl: Any = pytest.importorskip("trl", minversion="1.16")


@dataclass
class Run:
    """What a trainer did, optimisation step by optimisation step."""

    model: nn.Module
    start: dict[str, Tensor]
    grads: list[dict[str, Tensor]] = field(default_factory=list)  # as the optimizer got them
    logs: list[dict[str, Any]] = field(default_factory=list)

    def logged(self, name: str) -> list[float]:
        """Return a metric of every step."""
        return [line[name] for line in self.logs]


class Given:
    """The completions of a prompt, the same for both trainers: uneven, and new every time."""

    is_policy = True

    def __init__(
        self, vocabulary: int, shortest: int, longest: int, eos: int | None = None
    ) -> None:
        self.vocabulary, self.shortest, self.longest = vocabulary, shortest, longest
        self.eos = eos  # every other completion ends with it; None: all are cut off
        self.turn = 0

    def completions(self, prompt_ids: list[int], count: int) -> list[list[int]]:
        """Return completions of a prompt, in this turn."""
        rng = random.Random(repr((self.turn, prompt_ids)))
        lengths = [rng.randint(self.shortest, self.longest) for _ in range(count)]
        ids = [[rng.randrange(1, self.vocabulary) for _ in range(n)] for n in lengths]
        if self.eos is not None:
            # A token of that kind elsewhere would be the last by chance.
            ids = [[2 if token == self.eos else token for token in each] for each in ids]
            ids = [[*each[:-1], self.eos] if i % 2 else each for i, each in enumerate(ids)]
        return ids

    def rollout_func(self, prompts: list[str], trainer: Any) -> dict[str, Any]:
        """Give them to TRL, which repeats a prompt for each of its completions."""
        prompt_ids, count = trainer.processing_class(prompts)["input_ids"], trainer.num_generations
        groups = [self.completions(ids, count) for ids in prompt_ids[::count]]
        self.turn += 1
        ids = list(itertools.chain(*groups))
        return {"prompt_ids": prompt_ids, "completion_ids": ids, "logprobs": None}

    def generate(
        self,
        prompt_ids: list[list[int]],
        num_generations: int,
        sampling: SamplingParams,
        seeds: Sequence[int] | None = None,
    ) -> Completions:
        """Give them to our trainer, which takes no log-probs from a sampler that is the policy."""
        groups = [self.completions(ids, num_generations) for ids in prompt_ids]
        self.turn += 1
        ids = [torch.tensor(each) for each in itertools.chain(*groups)]
        ids_BT = nn.utils.rnn.pad_sequence(ids, batch_first=True)
        lengths_B1 = torch.tensor([[len(each)] for each in ids])
        return Completions(
            ids=ids_BT,
            mask=torch.arange(ids_BT.shape[1]) < lengths_B1,
            logps=torch.full(ids_BT.shape, torch.nan),
            finished=torch.tensor([int(each[-1]) == self.eos for each in ids]),
        )

    def update_weights(self, model: object) -> None:
        """Do nothing: no weights are read."""

    def take_problems(self) -> list[str]:
        return []

    def sleep(self) -> None:
        """Do nothing: no memory is held."""


Prepare = Callable[[nn.Module], object]


def run_ours(
    task: Task,
    directory: Path,
    options: dict[str, Any],
    given: Given | None = None,
    prepare: Prepare | None = None,
) -> Run:
    """Let our trainer train; `prepare` sees the model, with its adapters, before it does."""
    config = config_from({"output_dir": str(directory / "ours"), "save_strategy": "no", **options})
    model = copy.deepcopy(task.model)
    assets = Assets(model=model, tokenizer=task.tokenizer, train_dataset=task.dataset)
    trainer = Trainer(config, assets)
    prompts = PromptSampler(len(task.dataset), config.seed, shuffle=False)
    trainer.collector.prompts = prompts
    if given is not None:
        trainer.sampler.rollout = given
    trained = trainer.policy.model
    if prepare is not None:
        prepare(trained)
    with _followed(trained) as run:
        trainer.train()
    run.logs = read_lines(directory / "ours" / "metrics.jsonl")
    return run


def run_trl(
    task: Task,
    directory: Path,
    options: dict[str, Any],
    reward: Callable[..., list[float]],
    given: Given | None = None,
    prepare: Prepare | None = None,
    peft_config: Any = None,
) -> Run:
    """Let TRL's trainer train, on CPU in float32 as ours; it does not shuffle."""
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")  # TRL's and transformers' own
        # Sequences go to the optimisation steps of their generation in the order of the prompts.
        patch.setattr(trl.trainer.grpo_trainer, "shuffle_sequence_dict", _as_they_are)
        trainer = trl.GRPOTrainer(
            copy.deepcopy(task.model),
            reward,
            args=trl.GRPOConfig(
                output_dir=str(directory / "trl"),
                shuffle_dataset=False,
                use_cpu=True,
                bf16=False,
                logging_steps=1,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                **options,
            ),
            train_dataset=task.dataset,
            processing_class=task.tokenizer,
            rollout_func=None if given is None else given.rollout_func,
            peft_config=peft_config,
        )
        if prepare is not None:
            prepare(trainer.model)
        with _followed(trainer.model) as run:
            trainer.train()
    run.logs = [line for line in trainer.state.log_history if "grad_norm" in line]
    return run


def _as_they_are(sequences: dict[str, Any]) -> dict[str, Any]:
    return sequences


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of the parameters that are trained."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


@contextmanager
def _followed(model: nn.Module) -> Generator[Run]:
    """Record the gradients that whichever optimizer is given."""
    run = Run(model, trainable(model))

    def record(*_: Any) -> None:
        parameters = dict(model.named_parameters())
        run.grads.append({n: p.grad.clone() for n, p in parameters.items() if p.grad is not None})

    hook = register_optimizer_step_pre_hook(record)
    try:
        yield run
    finally:
        hook.remove()


def distance(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Return the largest difference of an element, in root mean squares of its tensor."""
    assert found.keys() == wanted.keys() and found
    distances: list[Tensor] = []
    for name, x in found.items():
        size = wanted[name].double().square().mean().sqrt()
        distances.append((x.double() - wanted[name].double()).abs().max() / size)
    return float(torch.stack(distances).nan_to_num(nan=0.0).max())  # 0 / 0: equal
