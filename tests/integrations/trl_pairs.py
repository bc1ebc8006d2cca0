"""TRL's `GRPOTrainer` and our `FastGRPOTrainer` of the same model, given the same micro-batch.

Both are made by their constructors from a real configuration; nothing in them is replaced. B
sequences, P tokens of a prompt, T of a completion.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from small_models import small_model, small_tokenizer
from torch import Tensor, nn

trl: Any = pytest.importorskip("trl", minversion="1.15")

from fastgrpo.integrations.trl import FastGRPOTrainer  # noqa: E402 - after the skip

B, P, T = 6, 5, 7


def no_reward(completions: list[str], **_: Any) -> list[float]:
    return [0.0] * len(completions)


def make_trainer(
    trainer_class: Any,
    model: Any,
    directory: Path,
    *,
    peft_config: Any = None,
    reward: Callable[..., list[float]] = no_reward,
    **options: Any,
) -> Any:
    """Make a trainer of a copy of a model, as far as it is before its first step."""
    prompts = datasets.Dataset.from_dict({"prompt": ["1+1", "2+3", "45", "a?"] * 4})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TRL's, transformers' and, of bad options, ours
        trainer = trainer_class(
            copy.deepcopy(model),
            reward,
            args=trl.GRPOConfig(
                output_dir=str(directory),
                use_cpu=True,
                report_to=[],
                disable_tqdm=True,
                **{
                    "bf16": False,
                    "gradient_checkpointing": False,
                    "per_device_train_batch_size": B,
                    "num_generations": 2,
                    "max_completion_length": T + 2,
                    "temperature": 0.8,
                    **options,
                },
            ),
            train_dataset=prompts,
            eval_dataset=prompts,
            processing_class=small_tokenizer(),
            peft_config=peft_config,
        )
    # What the training loop and vLLM would have set.
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    return trainer


@dataclass
class Pair:
    """The same model in both trainers."""

    theirs: Any
    ours: Any

    @classmethod
    def make(cls, directory: Path, model: Any = None, **options: Any) -> Pair:
        model = saved_model(directory) if model is None else model
        with torch.random.fork_rng():  # their constructor seeds the global one
            return cls(
                make_trainer(trl.GRPOTrainer, model, directory, **options),
                make_trainer(FastGRPOTrainer, model, directory, **options),
            )

    def set(self, **attributes: Any) -> Pair:
        for trainer in (self.theirs, self.ours):
            for name, value in attributes.items():
                assert hasattr(trainer, name)
                setattr(trainer, name, value)
        return self

    def train(self, mode: bool) -> Pair:
        self.theirs.model.train(mode)
        self.ours.model.train(mode)
        return self


def saved_model(directory: Path, **options: Any) -> Any:
    """Return a model that TRL can load once more, as its reference, from where it came from."""
    model = small_model(**options)
    # Of the size of trained ones: with tiny logits all entropies were the same.
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(8)
    model.save_pretrained(directory / "model")
    model.config._name_or_path = str(directory / "model")
    return model


@cache
def micro_batch(seed: int = 0, *, empty: bool = True) -> dict[str, Tensor]:
    """Make what TRL hands to `_compute_loss`, but for log-probs: uneven prompts and completions.

    The last sequence has no token that counts if `empty`, as a truncated one that is masked.
    """
    g = torch.Generator().manual_seed(seed)
    prompt_lengths = torch.tensor([P, 2, 3, P, 1, 4])
    lengths = torch.tensor([T, 3, 1, 5, T, 0 if empty else 4])
    return {
        "prompt_ids": torch.randint(2, 90, (B, P), generator=g),
        "prompt_mask": (torch.arange(P) >= P - prompt_lengths[:, None]).long(),
        "completion_ids": torch.randint(2, 90, (B, T), generator=g),
        "completion_mask": (torch.arange(T) < lengths[:, None]).long(),
        "advantages": torch.tensor([1.5, -0.5, 0.0, -1.0, 0.7, 2.0]),
        "num_items_in_batch": torch.tensor(61),
    }


def policy_logps(trainer: Any, inputs: dict[str, Any]) -> Tensor:
    """Return (B, T) log-probs of the completions as the trainer itself computes them."""
    with torch.no_grad():
        logps, _, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model,
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1),
            inputs["completion_ids"].shape[1],
        )
    return logps


def drifted(logps: Tensor, seed: int, size: float = 0.3) -> Tensor:
    """Return log-probs of a policy that was another: by sequence, up and down, and by token."""
    by_sequence = torch.tensor([[-1.0], [-1.0], [0.5], [0.5], [1.0], [0.0]])
    noise = torch.randn(logps.shape, generator=torch.Generator().manual_seed(seed))
    return logps + size * (by_sequence + noise)


@dataclass
class Result:
    """What both are compared by."""

    loss: Tensor
    grads: dict[str, Tensor]
    metrics: dict[str, list[float]]


def result_of(trainer: Any, inputs: dict[str, Any]) -> Result:
    """Run a trainer's own `compute_loss`, and backward in training."""
    model, training = trainer.model, trainer.model.training
    model.zero_grad()
    metrics = trainer._metrics["train" if training else "eval"]
    metrics.clear()
    with torch.set_grad_enabled(training):
        loss = trainer.compute_loss(model, dict(inputs))
    if training:
        trainer.accelerator.backward(loss)
    return Result(loss.detach(), grads_of(model), {n: list(x) for n, x in metrics.items()})


def grads_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the gradients of the trainable parameters."""
    found = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in found.items()}


def assert_same(
    pair: Pair,
    inputs: dict[str, Any],
    *,
    tolerance: float = 2e-5,
) -> Result:
    """Compare loss, gradients of every parameter and metrics; return TRL's.

    The tolerance of a gradient is in root mean squares of its tensor. fp32 on both sides: a product
    of 32 columns and a softmax of 100 round by about 1e-6 of that.
    """
    theirs, ours = result_of(pair.theirs, inputs), result_of(pair.ours, inputs)
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=tolerance, atol=tolerance / 10)
    assert ours.grads.keys() == theirs.grads.keys() and ours.grads
    for name, found in ours.grads.items():
        wanted = theirs.grads[name].double()
        size = wanted.square().mean().sqrt()
        distance = (found.double() - wanted).abs().max() / size
        assert distance.nan_to_num(nan=0.0) < tolerance, f"{name}: {distance}"  # 0 / 0: equal
    assert ours.metrics.keys() == theirs.metrics.keys()
    for name, values in theirs.metrics.items():
        close = pytest.approx(values, rel=tolerance, abs=tolerance, nan_ok=True)
        assert ours.metrics[name] == close, name
    return theirs
