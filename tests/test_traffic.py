"""What FSDP2 moves and allocates in the trainer's hands, and what the script says it does."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from small_models import save_small_model, small_model
from small_runs import run_config
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, PreTrainedConfig, Qwen3Config

from benchmarks import communication
from benchmarks.communication import Collective, Step
from benchmarks.measure import CpuAllocations
from fastgrpo.activations import enable_gradient_checkpointing
from fastgrpo.adapters import add_adapters
from fastgrpo.batch import Batch
from fastgrpo.config import config_from
from fastgrpo.sharding import Sharding, build_mesh
from fastgrpo.trainer import Trainer

ROOT = Path(__file__).parents[1]
PARALLEL = {"data": 1, "shard": 2}


# Where an operation of c10d has its whole tensor and its ranks, and what it is; those that are not
# here exchange objects.
WHOLE = {
    "_allgather_base_": (0, 2, "all-gather"),
    "_reduce_scatter_base_": (1, 2, "reduce-scatter"),
    "allreduce_": (0, 1, "all-reduce"),
}


class Moved(TorchDispatchMode):
    """Adds up the elements of collectives of several ranks, by kind and bytes of an element."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: Counter[tuple[str, int]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::")
            whole, group, kind = WHOLE.get(name, (0, 0, ""))
            if kind and dist.ProcessGroup.unbox(args[group]).size() > 1:
                for x in args[whole] if isinstance(args[whole], list) else [args[whole]]:
                    self.elements[kind, x.element_size()] += x.numel()
        return func(*args, **(kwargs or {}))


def moved_by(action: Callable[[], object]) -> dict[tuple[str, int], int]:
    with Moved() as moved:
        action()
    return dict(moved.elements)


def expected(found: list[Collective], *whats: str) -> dict[tuple[str, int], int]:
    """Add up what the script says of some collectives, those of one rank left out."""
    total: Counter[tuple[str, int]] = Counter()
    for each in found:
        if each.what.startswith(whats) and each.ranks > 1 and each.elements:
            total[each.kind, each.element_bytes] += each.elements
    return dict(total)


class Sharded:
    """A model as the trainer shards it."""

    def __init__(self, sizes: PreTrainedConfig, step: Step, *, checkpointing: bool) -> None:
        torch.manual_seed(0)
        adapters = {"use_peft": True, "lora_r": step.lora_r} if step.lora_r else {}
        frozen_in_bf16 = {"dtype": "bfloat16"} if adapters and step.bf16 else {}
        config = config_from({"model_name_or_path": "given", **adapters, **frozen_in_bf16})
        model: Any = AutoModelForCausalLM.from_config(sizes, dtype=getattr(torch, config.dtype))
        model = add_adapters(model, config) if adapters else model
        if checkpointing:
            enable_gradient_checkpointing(model)
        self.step, self.model = step, model.train()
        self.sharding = Sharding(model, build_mesh(step.data, step.shard), bf16=step.bf16)

    def run(self) -> Tensor:
        ids_1L = torch.arange(5)[None]
        hidden = self.sharding.decode(input_ids=ids_1L, use_cache=False).last_hidden_state
        return (hidden @ self.model.get_output_embeddings().weight.t()).float().sum()

    def train(self) -> None:
        passes = self.step.micro_batches
        for i in range(passes):
            self.sharding.begin_pass(last=i == passes - 1)
            self.run().backward()
        self.sharding.reshard()

    def ask_and_train(self) -> None:
        """Old log-probs, those of the reference, a step; as `fastgrpo.learner` does."""
        for _ in range(2):
            if self.step.lora_r is None:
                self.sharding.reshard()  # the reference takes the policy's place
            with torch.no_grad():
                for _ in range(self.step.micro_batches):
                    self.run()
        if self.step.lora_r is None:
            self.sharding.reshard()
        self.train()

    @torch.no_grad()
    def sample(self) -> None:
        with self.sharding.whole():
            for _ in range(4):
                self.run()


def check_what_is_moved(step: Step, *, tie: bool, checkpointing: bool) -> None:
    """Count what sampling, log-probs and steps move."""
    sizes = small_model(tie=tie).config
    wanted = communication.collectives(communication.parameter_groups(sizes, step), step)
    sharded = Sharded(sizes, step, checkpointing=checkpointing)
    in_training = ("embeddings", "layers", "gradients")
    assert moved_by(sharded.sample) == expected(wanted, "sampling")
    assert moved_by(sharded.train) == expected(wanted, *in_training)
    assert moved_by(sharded.train) == expected(wanted, *in_training)  # no step is another
    assert moved_by(sharded.ask_and_train) == expected(wanted, *in_training, "old", "log-probs")


@contextmanager
def pretended(ranks: int) -> Generator[None]:
    """Be the first of so many ranks; their collectives are called and nothing comes of them."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("options", "tie", "checkpointing"),
    [
        ({"shard": 2}, False, False),
        ({"shard": 2}, True, True),
        ({"shard": 8, "bf16": False}, True, False),
        ({"data": 4}, True, True),
        ({"data": 2, "shard": 4}, False, True),
        ({"data": 2, "shard": 2, "lora_r": 2}, False, False),
        ({"data": 2, "shard": 2, "lora_r": 2}, True, True),
    ],
    ids=str,
)
def test_the_trainers_sharding_moves_as_much(
    options: dict[str, Any], tie: bool, checkpointing: bool
) -> None:
    step = Step(micro_batches=2, beta=True, old_logps=True, **options)
    with pretended(step.data * step.shard):
        check_what_is_moved(step, tie=tie, checkpointing=checkpointing)


@pytest.mark.parametrize("options", [{}, {"bf16": False}, {"lora_r": 8}], ids=str)
def test_it_holds_as_much(options: dict[str, Any]) -> None:
    """Activations are left out, and 5 tokens have next to none."""
    sizes = Qwen3Config(
        vocab_size=2000, hidden_size=256, intermediate_size=1024, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=1, head_dim=64, bos_token_id=None,
        eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    step = Step(shard=8, micro_batches=2, **options)
    groups = communication.parameter_groups(sizes, step)
    planned = communication.memory(groups, step)
    with pretended(8):
        sharded = Sharded(sizes, step, checkpointing=True)
        allocated = CpuAllocations()
        sharded.train()
        training = allocated.stop()
        sharded.model.zero_grad()
        allocated = CpuAllocations()
        sharded.sample()
        sampling = allocated.stop()
    held = planned["parameters"] + planned["states of AdamW"]
    assert held + training == pytest.approx(planned["together in training"], rel=0.05)
    # Before there is a KV cache the last layer is there a second time, as it came.
    came = step.gathered_bytes * communication.elements(groups.layers[-1], 8)
    assert held + sampling - came == pytest.approx(planned["together while sampling"], rel=0.02)


def check_a_run(directory: Path) -> None:
    """Train, and count what all steps of it gather and scatter."""
    config = run_config(
        directory, directory / "problems.jsonl", str(directory / "model"), parallel=PARALLEL,
        max_steps=2, save_strategy="no", per_device_train_batch_size=4, beta=0.1, bf16=False,
    )  # fmt: skip
    trainer = Trainer(config)
    optimise, rounds = trainer.learner.optimise, []

    def counted(batch: Batch, number: int) -> dict[str, float]:
        rounds.append(trainer.learner.passes(batch).rounds)
        return optimise(batch, number)

    trainer.learner.optimise = counted
    found = moved_by(trainer.train)
    sizes, wanted = small_model().config, Counter[tuple[str, int]]()
    for passes in rounds:
        step = Step(shard=2, micro_batches=passes, beta=True, bf16=False)
        groups = communication.parameter_groups(sizes, step)
        wanted.update(expected(communication.collectives(groups, step), ""))
    assert len(rounds) == 2 and min(rounds) > 0
    for kind in ("all-gather", "reduce-scatter"):
        assert found[kind, 4] == wanted[kind, 4]


def rank() -> None:
    """One of two processes, which do send each other something."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for checkpointing in (False, True):
        every: list[dict[str, Any]] = [{}, {"bf16": False}, {"lora_r": 2}]
        for options in every:
            step = Step(shard=2, micro_batches=2, beta=True, old_logps=True, **options)
            check_what_is_moved(step, tie=checkpointing, checkpointing=checkpointing)
    check_a_run(Path(sys.argv[1]))
    dist.destroy_process_group()
    print("as much")


@pytest.mark.slow
def test_two_processes_move_as_much(tmp_path: Path, word_problems: Path) -> None:
    save_small_model(tmp_path / "model")
    places = map(str, (ROOT, ROOT / "kernels", ROOT / "tests"))
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
            __file__, str(word_problems.parent),
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(places)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )  # fmt: skip
    assert done.stdout.count("as much") == 2, done.stderr[-3000:]


if __name__ == "__main__":
    rank()
