"""What sharding costs: steps and sampling, sharded and copied, beside a process that does neither.

    python -m benchmarks.parallel --processes 1 2 --out benchmarks/results/parallel_cpu_DATE.json
    python -m benchmarks.parallel --processes 1 8 --model DIRECTORY --out FILE

Each number of processes is a run of torchrun of its own, over the same completions in total. Every
way takes the same steps from the same weights; that loss and norm of the gradient agree is checked
before anything is written. Sampling is timed twice: on the whole model, which is gathered once, as
the trainer does, and on the pieces, where every token gathers every layer.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3Config

from fastgrpo.assets import Assets
from fastgrpo.batch import Batch, make_batch
from fastgrpo.config import TrainConfig
from fastgrpo.distributed import World, join_world, leave_world
from fastgrpo.learner import Learner
from fastgrpo.model import Policy
from fastgrpo.rollout import SamplingParams
from fastgrpo.rollout.static import StaticCacheRollout
from fastgrpo.setup import load_policy
from fastgrpo.tasks import arithmetic

from .runs import header

COMPLETIONS = 16
"""Of a step, of all processes together."""
PROMPT, LONGEST = 32, 96
STEPS = 5
"""That are timed, after one that is compared."""
TOLERANCE = {"fp32": 1e-4, "bf16": 0.05}
"""Relative, of loss and gradient norm: another order of sums; in bf16 all sharded parameters are
rounded before they are gathered, and one process rounds those that it multiplies."""
SMALL = Qwen3Config(
    vocab_size=32_000,
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=8,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    tie_word_embeddings=True,
)


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.parallel")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--model", help="directory of a config.json; without it, a small Qwen3")
    parser.add_argument("--bf16", action="store_true", help="compute in bf16; without it, in fp32")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.model, options.out, bf16=options.bf16)
        return
    run = header("benchmarks.parallel", sys.argv[1:], _device())
    run["shape"] = {"completions": COMPLETIONS, "prompt": PROMPT, "longest": PROMPT + LONGEST}
    for count in options.processes:
        with tempfile.TemporaryDirectory() as folder:
            part = Path(folder) / "records.json"
            command = ["--standalone", f"--nproc-per-node={count}", "-m", "benchmarks.parallel"]
            command += ["--worker", "--out", str(part)]
            command += ["--model", options.model] if options.model else []
            command += ["--bf16"] if options.bf16 else []
            subprocess.run([sys.executable, "-m", "torch.distributed.run", *command], check=True)
            run["records"] += json.loads(part.read_text())
    check(run["records"], TOLERANCE["bf16" if options.bf16 else "fp32"])
    options.out.write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")


def check(records: list[dict[str, Any]], tolerance: float) -> None:
    """Refuse numbers of ways that do not compute the same.

    Raises:
        SystemExit: says which.
    """
    for record in records:
        for name in ("loss", "grad_norm"):
            if abs(record[name] - records[0][name]) > tolerance * abs(records[0][name]):
                sys.exit(f"{record['way']}: {name} {record[name]}, not {records[0][name]}")


def work(model: str | None, out: Path, *, bf16: bool) -> None:
    """Measure all ways of this number of processes; the first writes."""
    world = join_world()
    torch.set_num_threads(1)
    records: list[dict[str, Any]] = []
    for way, parallel in _ways(world.size):
        config = replace(_config(world, parallel), bf16=bf16)
        policy = load_policy(config, _assets(model))
        facts = {"processes": world.size, "way": way}
        records.append(facts | _steps(config, policy, world) | _sampling(policy, world))
    if world.is_main:
        out.write_text(json.dumps(records))
    leave_world()


def _ways(size: int) -> Iterator[tuple[str, dict[str, int] | None]]:
    if size == 1:
        yield "plain", None
        yield "wrapped", {"data": 1, "shard": 1}
    else:
        yield "sharded", {"data": 1, "shard": size}
        yield "copied", {"data": size, "shard": 1}


def _config(world: World, parallel: dict[str, int] | None) -> TrainConfig:
    return TrainConfig(
        parallel=parallel,
        reward_funcs=["accuracy"],
        num_generations=COMPLETIONS,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=COMPLETIONS // 4 // world.size,
        max_completion_length=LONGEST,
        max_steps=STEPS + 1,
        learning_rate=1e-5,
    )


def _assets(directory: str | None) -> Assets:
    config = SMALL if directory is None else AutoConfig.from_pretrained(directory)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    tokenizer = arithmetic.build_tokenizer()  # of which only the end of a sequence is used
    return Assets(
        model=model, tokenizer=tokenizer, train_dataset=arithmetic.build_dataset()["test"]
    )


def _batch(policy: Policy) -> Batch:
    generator = torch.Generator().manual_seed(0)
    vocabulary: int = policy.head.weight.shape[0]
    lengths = torch.randint(1, LONGEST + 1, (COMPLETIONS,), generator=generator).tolist()

    def ids(length: int) -> list[int]:
        return torch.randint(vocabulary, (length,), generator=generator).tolist()

    return make_batch(
        [ids(PROMPT) for _ in lengths],
        [ids(length) for length in lengths],
        [torch.zeros(length) for length in lengths],
        torch.randn(COMPLETIONS, generator=generator),
        device=policy.device,
    )


def _steps(config: TrainConfig, policy: Policy, world: World) -> dict[str, Any]:
    learner, batch = Learner(config, policy, world, STEPS + 1), _batch(policy)
    first = learner.optimise(batch)
    seconds = [_seconds(lambda: learner.optimise(batch), world) for _ in range(STEPS)]
    return {
        "loss": first["loss"],
        "grad_norm": first["grad_norm"],
        "seconds_step": [min(seconds), statistics.median(seconds), max(seconds)],
    }


def _sampling(policy: Policy, world: World) -> dict[str, Any]:
    """Time the sampling of completions that all have the same length, so that pieces can be."""
    vocabulary: int = policy.head.weight.shape[0]
    rollout = StaticCacheRollout(policy.model, eos_token_ids=[vocabulary], pad_token_id=0)
    sampling = SamplingParams(max_completion_length=LONGEST)
    found: dict[str, Any] = {}
    for name, context in (("whole", policy.whole), ("pieces", nullcontext)):
        if name == "pieces" and policy.sharding is None:
            continue

        def draw(context: Callable[[], Any] = context) -> None:
            with context(), policy.sampling():
                rollout.generate([[5] * PROMPT], COMPLETIONS // world.size, sampling, [world.rank])

        draw()
        seconds = [_seconds(draw, world) for _ in range(3)]
        policy.reshard()
        found[f"seconds_{name}"] = [min(seconds), statistics.median(seconds), max(seconds)]
    return found


def _seconds(function: Callable[[], object], world: World) -> float:
    """Return the seconds until the last process is done."""
    world.gather(None)
    begin = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    world.gather(None)
    return time.perf_counter() - begin


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # else torchrun says that it sets it
    main()
