"""What GPUs send each other in an optimisation step, and what each of them holds.

    python -m benchmarks.communication tests/model_configs/Qwen2.5-7B-Instruct --shard 8
    python -m benchmarks.communication MODEL --data 8 2 1 --shard 1 4 8     three ways, side by side
    python -m benchmarks.communication MODEL --shard 8 --bandwidth 300 40   and seconds

MODEL is a directory with a `config.json`, that file, or a name on the Hub. The model is made on the
device `meta`, so any architecture of transformers is known, and nothing but the file is loaded.
Bytes follow from the shapes of the parameters, and from what `fastgrpo.sharding` gathers and
reduces when; `tests/test_traffic.py` holds the elements of every collective to those that
FSDP2 moves. Left out, because they come from the tokens and not from the model: the sampled
sequences that ranks exchange, log-probs summed over ranks, activations, the KV cache. Left out as
well: single numbers, such as the norm of the gradient.

A ring of R ranks is assumed: of B bytes each rank sends (R - 1) / R * B to gather them or to reduce
and scatter them, and twice that to reduce them for all.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn
from transformers import AutoConfig, PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from fastgrpo.config import config_from
from fastgrpo.console import Console
from fastgrpo.loading import load_from
from fastgrpo.memory.fake_model import build_fake
from fastgrpo.memory.plan import GIB

from .facts import number
from .tables import table

FP32, BF16 = 4, 2  # bytes; gradients are reduced, and AdamW's states held, in fp32


@dataclass(frozen=True, kw_only=True)
class Step:
    """An optimisation step as one rank takes it."""

    data: int = 1
    """Copies of the model."""
    shard: int = 1
    """Pieces of each copy, a GPU each."""
    micro_batches: int = 1
    """Forward and backward passes of this rank."""
    bf16: bool = True
    """Parameters are gathered and products computed in bf16, not in fp32."""
    lora_r: int | None = None
    """Rank of the adapters that alone are trained; None: all parameters are."""
    beta: bool = False
    """Log-probs of a reference are asked for."""
    old_logps: bool = False
    """Log-probs of the policy before the step take passes of their own."""

    def __post_init__(self) -> None:
        for name in ("data", "shard", "micro_batches", "lora_r"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")

    @property
    def gathered_bytes(self) -> int:
        """Bytes of a parameter that is gathered."""
        return BF16 if self.bf16 else FP32


class Groups(NamedTuple):
    """Parameters that FSDP2 gathers together: those of each layer, and all others (the root)."""

    layers: list[list[nn.Parameter]]
    root: list[nn.Parameter]

    @property
    def all(self) -> list[nn.Parameter]:
        return [*self.root, *(parameter for layer in self.layers for parameter in layer)]


class Collective(NamedTuple):
    """Collectives of one kind over a whole step."""

    what: str
    kind: str
    ranks: int
    elements: int  # of the whole tensors, summed over the step
    element_bytes: int

    @property
    def sent(self) -> float:
        """Bytes that each rank sends."""
        trips = 2 if self.kind == "all-reduce" else 1
        return trips * (self.ranks - 1) / self.ranks * self.elements * self.element_bytes


def parameter_groups(architecture: PreTrainedConfig, step: Step) -> Groups:
    """Return the parameters of a model as FSDP2 groups them; tied ones are there once.

    Raises:
        ValueError: the model has no layers that transformers marks as such, or takes no adapters.
    """
    adapters = {} if step.lora_r is None else {"use_peft": True, "lora_r": step.lora_r}
    frozen_in_bf16 = {"dtype": "bfloat16"} if adapters and step.bf16 else {}
    config = config_from({"model_name_or_path": "given", **adapters, **frozen_in_bf16})
    model = build_fake(architecture, config, bf16=step.bf16)
    marked = (m for m in model.modules() if isinstance(m, GradientCheckpointingLayer))
    layers = [list(layer.parameters()) for layer in marked]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no layers to shard, so it runs on one GPU")
    inside = {id(parameter) for layer in layers for parameter in layer}
    return Groups(layers, [p for p in model.parameters() if id(p) not in inside])


def elements(parameters: Iterable[nn.Parameter], shard: int = 1, *, trained: bool = False) -> int:
    """Count elements; FSDP2 cuts the first dimension into `shard` pieces of the same size.

    Args:
        parameters: of a group.
        shard: pieces; the rows that are missing in the last ones are sent and held all the same.
        trained: only of parameters that get a gradient.
    """
    return sum(
        math.ceil(p.shape[0] / shard) * shard * math.prod(p.shape[1:])
        for p in parameters
        if p.requires_grad or not trained
    )


def collectives(groups: Groups, step: Step) -> list[Collective]:
    """Return all that a rank takes part in for one optimisation step and its generation."""
    shard, passes, size = step.shard, step.micro_batches, step.gathered_bytes
    layers = sum(elements(layer, shard) for layer in groups.layers)
    layers_trained = sum(elements(layer, shard, trained=True) for layer in groups.layers)
    root, root_trained = elements(groups.root, shard), elements(groups.root, shard, trained=True)
    trained = (layers_trained + root_trained) // shard

    def gather(what: str, count: int) -> Collective:
        return Collective(what, "all-gather", shard, count, size)

    def scatter(what: str, count: int) -> Collective:
        return Collective(what, "reduce-scatter", shard, count, FP32)

    further = ["old log-probs"] * step.old_logps + ["log-probs of the reference"] * step.beta
    # A reference that is a copy takes the policy's place: what is gathered is so anew.
    copied = step.beta and step.lora_r is None
    return [
        gather("sampling: everything", layers + root),
        *(gather(what, passes * layers + copied * root) for what in further),
        gather("embeddings and head, once", root),
        gather("layers, forward", passes * layers),
        gather("layers, backward", passes * layers),
        scatter("gradients of layers", passes * layers_trained),
        scatter("gradients of embeddings and head, once", root_trained),
        Collective("gradients between copies, once", "all-reduce", step.data, trained, FP32),
    ]


def memory(groups: Groups, step: Step) -> dict[str, int]:
    """Return the bytes that a rank holds, by what; all but the last while training.

    Of layers there are at most, in forward, the one that computes and what the next one and the one
    before came in; in backward, two of these, and the gradient of one, as it is computed and in
    fp32. A piece that is all of a model is copied for that too.
    """
    shard, size = step.shard, step.gathered_bytes
    pieces = sum(elements([p], shard) * p.element_size() for p in groups.all) // shard
    trained = elements(groups.all, shard, trained=True) // shard
    held = {"parameters": pieces, "states of AdamW": 2 * FP32 * trained}
    if step.beta and step.lora_r is None:
        held["reference"] = pieces
    training = {"gradients": FP32 * trained}
    layer, gradient = (
        max(elements(layer, shard, trained=trained) for layer in groups.layers)
        for trained in (False, True)
    )
    training["layers at work, with gradient"] = max(
        3 * size * layer, 2 * size * layer + (size + FP32) * gradient
    )
    root, gradient = (elements(groups.root, shard, trained=trained) for trained in (False, True))
    training["embeddings and head, with gradient"] = size * root + FP32 * gradient
    sampling = size * elements(groups.all, shard)
    return {
        **held,
        **training,
        "together in training": sum(held.values()) + sum(training.values()),
        "the whole model while sampling": sampling,
        "together while sampling": sum(held.values()) + sampling,
    }


def traffic_table(
    groups: Groups, steps: Sequence[Step], bandwidth: Sequence[float] | None = None
) -> tuple[list[str], list[list[str]]]:
    """Return what each GPU sends, in GB.

    Args:
        groups: of the model.
        steps: a column each.
        bandwidth: GB/s that a GPU sends within its copy, and between copies; None: no seconds.
    """
    found = [collectives(groups, step) for step in steps]
    rows = [
        [same[0].what, same[0].kind, *(_gb(each.sent) for each in same)]
        for same in zip(*found, strict=True)
    ]
    rows += [["together", "", *(_gb(sum(each.sent for each in column)) for column in found)]]
    if bandwidth is not None:
        seconds = [sum(_seconds(each, bandwidth) for each in column) for column in found]
        said = " and ".join(f"{x:g}" for x in bandwidth)
        rows += [[f"seconds at {said} GB/s", "", *map(number, seconds)]]
    return ["GB sent by each GPU in a step", "", *map(_name, steps)], rows


def memory_table(groups: Groups, steps: Sequence[Step]) -> tuple[list[str], list[list[str]]]:
    """Return what each GPU holds, in GiB."""
    found = [memory(groups, step) for step in steps]
    rows = [[name, *(number(each[name] / GIB) for each in found)] for name in found[0]]
    return ["GiB on each GPU", *map(_name, steps)], rows


def describe(groups: Groups, step: Step) -> str:
    """Return what is trained and how, in a sentence."""
    total, trained = elements(groups.all), elements(groups.all, trained=True)
    passes = "micro-batch" if step.micro_batches == 1 else "micro-batches"
    return (
        f"{total:,} parameters, {trained:,} of them trained, in {len(groups.layers)} layers of at "
        f"most {max(map(elements, groups.layers)):,} and {elements(groups.root):,} around them; "
        f"{'bf16' if step.bf16 else 'fp32'}, {step.micro_batches} {passes} a GPU and step."
    )


def load_architecture(name: str) -> PreTrainedConfig:
    """Load the configuration of a model.

    Raises:
        ValueError: there is none; says why.
    """
    path = Path(name)
    return load_from(AutoConfig, str(path.parent if path.name == "config.json" else name))


def main(arguments: list[str] | None = None) -> None:
    parser = _parser()
    options = parser.parse_args(arguments)
    if len(options.data) == 1:
        options.data *= len(options.shard)
    if len(options.shard) == 1:
        options.shard *= len(options.data)
    if len(options.data) != len(options.shard):
        parser.error(
            f"--data has {len(options.data)} values and --shard {len(options.shard)}: give as many "
            "of each, or one of either"
        )
    try:
        steps = [
            Step(
                data=data, shard=shard, micro_batches=options.micro_batches, bf16=not options.fp32,
                lora_r=options.lora_r, beta=options.beta, old_logps=options.old_logps,
            )
            for data, shard in zip(options.data, options.shard, strict=True)
        ]  # fmt: skip
        groups = parameter_groups(load_architecture(options.model), steps[0])
    except ValueError as error:
        parser.error(str(error))
    found = [traffic_table(groups, steps, options.bandwidth), memory_table(groups, steps)]
    if options.markdown:
        for words, (columns, rows) in zip((1, 0), found, strict=True):
            aligned = [f"{'>' * (i > words)}{name}" for i, name in enumerate(columns)]
            print(table(aligned, rows), end="\n\n")
        print(describe(groups, steps[0]))
        return
    console = Console()
    console.message(f"{options.model}: {describe(groups, steps[0])}")
    for columns, rows in found:
        console.table(columns[0], ["", *columns[1:]], rows)


def _parser() -> argparse.ArgumentParser:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        "python -m benchmarks.communication", description=__doc__.split("\n")[0]
    )
    add: Any = parser.add_argument
    add("model", help="a directory with a config.json, that file, or a name on the Hub")
    add("--data", type=int, nargs="+", default=[1], help="copies of the model")
    add("--shard", type=int, nargs="+", default=[1], help="pieces of each copy, a GPU each")
    add("--micro-batches", type=int, default=1, help="passes of a GPU in a step (1)")
    types = parser.add_mutually_exclusive_group()
    types.add_argument("--bf16", action="store_true", help="gather and compute in bf16 (default)")
    types.add_argument("--fp32", action="store_true", help="gather and compute in fp32")
    add("--lora-r", type=int, help="train adapters of this rank on all linear layers")
    add("--beta", action="store_true", help="with a reference")
    add("--old-logps", action="store_true", help="with passes for the log-probs before the step")
    add(
        "--bandwidth",
        type=_positive,
        nargs=2,
        metavar=("WITHIN", "BETWEEN"),
        help="GB/s of a GPU in collectives within a copy and between copies (the bus bandwidth of "
        "nccl-tests), for the seconds these take",
    )
    add("--markdown", action="store_true", help="print the tables of fastgrpo/PARALLEL.md")
    return parser


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be above 0 and finite, got {text}")
    return value


def _seconds(each: Collective, bandwidth: Sequence[float]) -> float:
    within, between = bandwidth
    return each.sent / 1e9 / (between if each.kind == "all-reduce" else within)


def _name(step: Step) -> str:
    return f"data {step.data}, shard {step.shard}"


def _gb(size: float) -> str:
    return number(size / 1e9)


if __name__ == "__main__":
    main()
