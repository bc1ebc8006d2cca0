"""Measures one trainer on one cell in a process of its own and prints the record as JSON.

`python -m benchmarks.trainer_worker` is called by `benchmarks.trainer`, not by people.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from . import measure, peers, trainers
from .trainer_cells import Task, TrainerCell, given_completions, make_task, mean_id
from .trainer_recorder import WARM_UP, Recorder, WrongResult

OUT_OF_MEMORY = "failed: out of memory"


def record_of(name: str, cell: TrainerCell, device: str, found: dict[str, Any]) -> dict[str, Any]:
    """Return a record: what identifies it, what was found, None for what was not."""
    return {
        "peer": name,
        "method": trainers.load(name).METHOD,
        "op": "trainer",
        "device": device,
        **cell.facts(),
        **dict.fromkeys(
            ("error_vs_fp64", "ms_forward", "ms_backward", "ms_generation", "ms_scoring",
             "ms_training", "ms_total", "ratio_to_ceiling", "peak_extra_bytes", "flops",
             "tokens_per_second", "gib", "longest_completion", "sampled")
        ),
        **found,
    }  # fmt: skip


def measured(name: str, cell: TrainerCell, device: str) -> dict[str, Any]:
    """Check the first step of a trainer against fp64, then time those that follow."""
    adapter = trainers.load(name)
    if reason := adapter.unavailable():
        return {"status": reason}
    if cell.threads is not None:
        torch.set_num_threads(cell.threads)
    task = make_task(cell, device)
    exact = exact_gradient(task, cell, device)
    gc.collect()  # the copy in fp64 must not count
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    sampled = WARM_UP - 1 + cell.steps + (device == "cpu")  # there the last is for the memory
    recorder = Recorder(cell, device, [cell.completion_length, *[None] * sampled], exact)
    del exact  # the recorder lets it go once it is checked
    return run(adapter, task, cell, recorder) | {
        "grad_norm": recorder.grad_norm, "error_vs_fp64": {"gradient": recorder.error},
        "peak_extra_bytes": recorder.peak, **recorder.times(),
    }  # fmt: skip


def probe(name: str, cell: TrainerCell, gib: float, *, sampled: bool) -> dict[str, Any]:
    """Say whether a step fits in so much of the GPU's memory, after a short one.

    The short one makes the state of the optimizer, which every later step has beside it.
    """
    adapter = trainers.load(name)
    if reason := adapter.unavailable():
        return {"status": reason}
    measure.emulate_memory(gib)
    recorder = Recorder(cell, "cuda", [16, None if sampled else cell.completion_length])
    return run(adapter, make_task(cell, "cuda"), cell, recorder) | {
        "peak_extra_bytes": recorder.peak
    }


def run(adapter: Any, task: Task, cell: TrainerCell, recorder: Recorder) -> dict[str, Any]:
    """Let a trainer train; whichever optimizer it has, the recorder sees what that is given."""
    hook = register_optimizer_step_pre_hook(lambda *_: recorder.check_gradient(task.model))
    try:
        with tempfile.TemporaryDirectory() as directory:
            adapter.train(task, cell, recorder, Path(directory))
    finally:
        hook.remove()
    if recorder.reported != len(recorder.plan):
        raise WrongResult(f"{recorder.reported} steps, wanted {len(recorder.plan)}")
    return {"status": "ok"}


def exact_gradient(task: Task, cell: TrainerCell, device: str) -> dict[str, Tensor]:
    """Return the first step's gradient from plain PyTorch in fp64, as copies in fp32 on the CPU.

    The policy has not moved since sampling, so the ratio is 1 and nothing is clipped. (Inside of
    their norms the models of transformers compute in fp32 all the same.)
    """
    model = copy.deepcopy(task.model).double().eval()
    G = cell.num_generations
    for row in task.dataset:
        prompt = task.tokenizer(row["prompt"])["input_ids"]
        completions = given_completions(prompt, cell, cell.completion_length)
        rewards = torch.tensor(mean_id(completions, [row["judged"]] * G), dtype=torch.float64)
        advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
        for ids, advantage in zip(completions, advantages.tolist(), strict=True):
            both = torch.tensor([prompt + ids], device=device)
            logits = model(both, use_cache=False).logits[0, len(prompt) - 1 : -1]
            logps = logits.log_softmax(-1).gather(1, both[0, len(prompt) :, None])
            (-advantage * logps.sum() / cell.N).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: grad.to("cpu", torch.float32) for name, grad in grads.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trainer", choices=trainers.NAMES)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--gib", type=float, help="does a step fit within so much memory?")
    parser.add_argument("--sampled", action="store_true", help="its completions are sampled")
    options = parser.parse_args()
    cell = TrainerCell(**json.load(sys.stdin))
    # Trainers print, C code and their child processes too: all of it goes to standard error.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        if options.gib is None:
            found = measured(options.trainer, cell, options.device)
        else:
            found = probe(options.trainer, cell, options.gib, sampled=options.sampled)
    except WrongResult as wrong:
        found = {"status": f"wrong: {wrong}"}
    except torch.OutOfMemoryError:
        found = {"status": OUT_OF_MEMORY}
    except Exception as error:
        # A trainer may fail in any way; the run goes on and the table says how it failed.
        traceback.print_exc()
        found = {"status": peers.failure(error)}
    with out:
        print(json.dumps(record_of(options.trainer, cell, options.device, found)), file=out)


if __name__ == "__main__":
    main()
