"""The trainers: one adapter a file, each importing its package only when it is asked to.

An adapter makes a trainer with its public interface and lets it train, and tells a
`benchmarks.trainer_recorder.Recorder` of every step. What both are told, with equal names:
num_iterations 1, beta 0, loss_type dapo, epsilon 0.2, temperature 1, max_grad_norm 1, the batch
sizes, a log line every step, no checkpoint. AdamW (fused) at 1e-6 with a linear schedule and all
completions of a step sampled at once are the default of both. What differs is what a user gets:
transformers allows TF32 products beside bf16 autocast, this package leaves PyTorch's default.
"""

from __future__ import annotations

import importlib
from types import ModuleType

NAMES = ("fastgrpo", "trl")


def load(name: str) -> ModuleType:
    """Return an adapter: `METHOD`, `unavailable()` and `train(task, cell, recorder, directory)`."""
    return importlib.import_module(f".{name}", __package__)
