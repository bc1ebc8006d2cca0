"""The script that counts what GPUs send each other: by hand, and against what FSDP2 moves.

L layers, H hidden, V vocabulary.
"""

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
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, GPTNeoXJapaneseConfig, Qwen3Config

from benchmarks import communication
from benchmarks.communication import Collective, Step
from benchmarks.measure import CpuAllocations
from fastgrpo.activations import enable_gradient_checkpointing
from fastgrpo.adapters import add_adapters
from fastgrpo.config import config_from
from fastgrpo.sharding import Sharding, build_mesh

ROOT = Path(__file__).parents[1]
L, H, V = 3, 8, 37  # 37 rows: pieces of 2, 4 and 8 are padded


def architecture(*, tie: bool, **sizes: Any) -> Qwen3Config:
    small: dict[str, Any] = {
        "vocab_size": V, "hidden_size": H, "intermediate_size": 12, "num_hidden_layers": L,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4,
    }  # fmt: skip
    return Qwen3Config(
        **small | sizes, max_position_embeddings=64, tie_word_embeddings=tie,
        bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip


# q, o: 8 x 8; k, v: 4 x 8; gate, up: 12 x 8; down: 8 x 12; norms: 8, 8 and, of q and k, 4, 4.
LAYER = 2 * 64 + 2 * 32 + 3 * 96 + 2 * 8 + 2 * 4
UNTIED, TIED = 2 * V * H + H, V * H + H
ADAPTER_ROWS = (
    2 * (8 + 8) + 2 * (4 + 8) + 2 * (12 + 8) + (8 + 12)
)  # of all linear layers, at rank 1


def found(step: Step, *, tie: bool = False) -> dict[str, float]:
    """Return the bytes sent, by what."""
    groups = communication.parameter_groups(architecture(tie=tie), step)
    return {each.what: each.sent for each in communication.collectives(groups, step)}


def padded(rows: int, columns: int, pieces: int) -> int:
    return -(-rows // pieces) * pieces * columns


# By hand


@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_a_sharded_model(tie: bool, bf16: bool) -> None:
    """Two pieces: of everything gathered or reduced each rank sends half."""
    root = (1 if tie else 2) * padded(V, H, 2) + H
    size = 2 if bf16 else 4
    assert found(Step(shard=2, micro_batches=3, bf16=bf16), tie=tie) == {
        "sampling: everything": (L * LAYER + root) * size / 2,
        "embeddings and head, once": root * size / 2,
        "layers, forward": 3 * L * LAYER * size / 2,
        "layers, backward": 3 * L * LAYER * size / 2,
        "gradients of layers": 3 * L * LAYER * 4 / 2,
        "gradients of embeddings and head, once": root * 4 / 2,
        "gradients between copies, once": 0,
    }


def test_copies_send_their_gradients_once() -> None:
    """DDP: of a ring of 4 each sends every gradient 2 * 3 / 4 times, whatever the passes."""
    sent = found(Step(data=4, micro_batches=3))
    assert sent.pop("gradients between copies, once") == 1.5 * 4 * (L * LAYER + UNTIED)
    assert set(sent.values()) == {0}


def test_copies_of_pieces() -> None:
    """HSDP: what is between copies is a piece; within a copy it is as without others."""
    sent = found(Step(data=3, shard=4, micro_batches=2))
    alone = found(Step(shard=4, micro_batches=2))
    everything = L * LAYER + 2 * padded(V, H, 4) + H
    between = sent.pop("gradients between copies, once")
    assert between == pytest.approx(2 * 2 / 3 * 4 * everything / 4, rel=1e-12)
    assert alone.pop("gradients between copies, once") == 0
    assert sent == alone


def test_only_gradients_of_adapters_move() -> None:
    """Frozen parameters are gathered all the same."""
    r = 4
    step = Step(data=2, shard=4, micro_batches=2, lora_r=r, beta=True)
    layer, root = LAYER + r * ADAPTER_ROWS, 2 * padded(V, H, 4) + H
    assert found(step) == {
        "sampling: everything": (L * layer + root) * 2 * 3 / 4,
        "log-probs of the reference": 2 * L * layer * 2 * 3 / 4,
        "embeddings and head, once": root * 2 * 3 / 4,
        "layers, forward": 2 * L * layer * 2 * 3 / 4,
        "layers, backward": 2 * L * layer * 2 * 3 / 4,
        "gradients of layers": 2 * L * r * ADAPTER_ROWS * 4 * 3 / 4,
        "gradients of embeddings and head, once": 0,
        "gradients between copies, once": L * r * ADAPTER_ROWS / 4 * 4 * 2 * 1 / 2,
    }


def test_what_each_rank_holds() -> None:
    step = Step(shard=2, beta=True)
    groups = communication.parameter_groups(architecture(tie=True), step)
    root = padded(V, H, 2) + H
    everything = L * LAYER + root
    assert communication.memory(groups, step) == {
        "parameters": everything * 4 // 2,
        "states of AdamW": everything * 8 // 2,
        "reference": everything * 4 // 2,
        "gradients": everything * 4 // 2,
        "layers at work, with gradient": 2 * 2 * LAYER + (2 + 4) * LAYER,
        "embeddings and head, with gradient": (2 + 4) * root,
        "together in training": everything * 20 // 2 + 10 * LAYER + 6 * root,
        "the whole model while sampling": everything * 2,
        "together while sampling": everything * 16 // 2 + everything * 2,
    }


def test_what_each_rank_holds_beside_adapters() -> None:
    """Frozen parameters are bf16, adapters fp32, and the reference is the model without them."""
    step = Step(shard=2, beta=True, lora_r=2)
    groups = communication.parameter_groups(architecture(tie=True), step)
    adapters, root = 2 * ADAPTER_ROWS, padded(V, H, 2) + H
    held = communication.memory(groups, step)
    assert "reference" not in held
    assert held["parameters"] == (2 * (L * LAYER + root) + 4 * L * adapters) // 2
    assert held["states of AdamW"] == 8 * L * adapters // 2
    assert held["gradients"] == 4 * L * adapters // 2
    assert held["layers at work, with gradient"] == 3 * 2 * (LAYER + adapters)
    assert held["embeddings and head, with gradient"] == 2 * root


# Against FSDP2


# Where an operation of c10d has its whole tensor and its ranks, and what it is.
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
            whole, group, kind = WHOLE[func._schema.name.removeprefix("c10d::")]
            if dist.ProcessGroup.unbox(args[group]).size() > 1:
                for x in args[whole] if isinstance(args[whole], list) else [args[whole]]:
                    self.elements[kind, x.element_size()] += x.numel()
        return func(*args, **(kwargs or {}))


def moved_by(action: Callable[[], None]) -> dict[tuple[str, int], int]:
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

    def __init__(self, architecture: Qwen3Config, step: Step, *, checkpointing: bool) -> None:
        torch.manual_seed(0)
        adapters = {"use_peft": True, "lora_r": step.lora_r} if step.lora_r else {}
        frozen_in_bf16 = {"dtype": "bfloat16"} if adapters and step.bf16 else {}
        config = config_from({"model_name_or_path": "given", **adapters, **frozen_in_bf16})
        model: Any = AutoModelForCausalLM.from_config(
            architecture, dtype=getattr(torch, config.dtype)
        )
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
    groups = communication.parameter_groups(architecture(tie=tie), step)
    wanted = communication.collectives(groups, step)
    sharded = Sharded(architecture(tie=tie), step, checkpointing=checkpointing)
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
    sizes = architecture(
        tie=False, vocab_size=2000, hidden_size=256, intermediate_size=1024, num_hidden_layers=6,
        num_attention_heads=4, head_dim=64,
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


# The command


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["./nowhere"], "./nowhere is not a model directory"),
        (["--data", "1", "2", "--shard", "1", "2", "4"], "--data has 2 values and --shard 3"),
        (["--shard", "0"], "shard must be at least 1, got 0"),
        (["--bandwidth", "300", "-1"], "must be above 0 and finite, got -1"),
    ],
)
def test_what_it_refuses(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    architecture(tie=True).save_pretrained(tmp_path)
    model = [str(tmp_path)] if arguments[0].startswith("--") else []
    with pytest.raises(SystemExit):
        communication.main(model + arguments)
    assert said in " ".join(capsys.readouterr().err.split())


def test_models_without_layers_are_refused() -> None:
    without = GPTNeoXJapaneseConfig(
        hidden_size=8, num_attention_heads=2, num_hidden_layers=2, vocab_size=V,
        bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    with pytest.raises(ValueError, match="GPTNeoXJapaneseForCausalLM has no layers to shard"):
        communication.parameter_groups(without, Step())


def test_what_it_prints_without_markdown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same numbers, from the file itself too; two copies by two pieces, with seconds."""
    architecture(tie=True).save_pretrained(tmp_path)
    arguments = [str(tmp_path / "config.json"), "--data", "2", "--shard", "2", "--fp32"]
    communication.main([*arguments, "--bandwidth", "1e-6", "5e-7"])
    said = capsys.readouterr().out
    everything = L * LAYER + padded(V, H, 2) + H
    within, between = 4 * (3 * everything + L * LAYER) / 2, 4 * everything / 2
    assert f"{everything - H:,} parameters" in said  # what is there, without padding
    assert communication.number(within / 1e3 + between / 5e2) in said


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
    dist.destroy_process_group()
    print("as much")


@pytest.mark.slow
def test_two_processes_move_as_much(tmp_path: Path) -> None:
    places = map(str, (ROOT, ROOT / "kernels", ROOT / "tests"))
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
            __file__,
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
