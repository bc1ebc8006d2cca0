"""What goes in and out of the modules of a model, and which of them first gives what is no number.

A second look at a step that went wrong: good steps are not watched.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves, tree_map

from .gradient import Step

_OF_BATCH = " of the batch"


@dataclass(frozen=True)
class Range:
    """What some tensors hold."""

    low: float
    """The least of their finite values; NaN: they have none."""
    high: float
    not_finite: float
    """Share of their values that are infinite or NaN."""

    @property
    def finite(self) -> bool:
        """Whether all are."""
        return self.not_finite == 0


def range_of(tensors: Iterable[Tensor]) -> Range | None:
    """Return what the floating-point tensors among some hold; None: there is nothing."""
    found: list[Range] = []
    sizes: list[int] = []
    for x in tensors:
        if not x.is_floating_point() or x.numel() == 0:
            continue
        low, high = x.detach().aminmax()  # NaN where there is a NaN, and no further memory
        least, most, share = float(low), float(high), 0.0
        if not (math.isfinite(least) and math.isfinite(most)):
            finite = x.detach()[x.detach().isfinite()]
            share = 1 - finite.numel() / x.numel()
            least, most = (
                (float(finite.min()), float(finite.max()))
                if finite.numel()
                else (math.nan, math.nan)
            )
        found.append(Range(least, most, share))
        sizes.append(x.numel())
    if not found:
        return None
    known = [one for one in found if not math.isnan(one.low)]
    return Range(
        min((one.low for one in known), default=math.nan),
        max((one.high for one in known), default=math.nan),
        sum(one.not_finite * size for one, size in zip(found, sizes, strict=True)) / sum(sizes),
    )


@dataclass
class Call:
    """A module that was called, or that the gradient went back through."""

    module: str
    phase: str
    """forward or backward."""
    given: Range | None = None
    """Its inputs; backward the gradients of its outputs. None: it has none that are numbers."""
    made: Range | None = None
    """Its outputs; backward the gradients of its inputs."""

    @property
    def is_bad(self) -> bool:
        """Whether it has made what is no number from numbers."""
        return bool(self.made and not self.made.finite and (not self.given or self.given.finite))


@dataclass(frozen=True)
class Finding:
    """Where a step went wrong."""

    module: str
    """The first bad module, or parameter, or what the batch has."""
    phase: str
    """before (it was bad before the pass), forward, loss, backward, gradient (of a parameter)."""
    rank: int = 0
    index: int = 0
    """Of the pass among those of the rank."""

    @property
    def is_parameter(self) -> bool:
        """Whether the model was bad before the step."""
        return self.phase == "before" and not self.module.endswith(_OF_BATCH)

    def __str__(self) -> str:
        name = self.module
        return {
            "before": f"{name} held values that are no numbers before the step",
            "forward": f"the first bad module is {name}, in the forward pass",
            "loss": f"the first bad value is the loss, of {name} and the advantages",
            "backward": f"the first bad module is {name}, in the backward pass",
            "gradient": f"the first bad value is the gradient of {name}",
        }[self.phase]


class Trace:
    """The calls of a model's modules while it is watched, in the order in which they end."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.forward: list[Call] = []
        self.backward: list[Call] = []
        self.goes_back = False
        """Backward has begun: what is called now has been called before."""
        self._open: list[tuple[Call, Call]] = []

    @contextmanager
    def watching(self) -> Generator[None]:
        """Watch the model inside."""
        handles: list[Any] = []
        for name, module in self.model.named_modules():
            before, after = partial(self._enter, name), partial(self._leave, name)
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(after))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(
        self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        call, back = Call(name, "forward"), Call(name, "backward")
        # A mask may be infinite.
        taken = (args, {key: x for key, x in kwargs.items() if key != "attention_mask"})
        if not self.goes_back:
            call.given = range_of(x for x in tree_leaves(taken) if isinstance(x, Tensor))
            self._open.append((call, back))

        def own(x: Any) -> Any:
            # A view's gradient is what comes back from this module alone.
            if not isinstance(x, Tensor) or not x.requires_grad or not torch.is_grad_enabled():
                return x
            x = x.view_as(x)
            if not self.goes_back:
                x.register_hook(partial(self._gradient_of_input, back))
            return x

        return tree_map(own, args), {key: tree_map(own, x) for key, x in kwargs.items()}

    def _leave(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        if self.goes_back:
            return
        call, back = self._open.pop()
        tensors = [x for x in tree_leaves(output) if isinstance(x, Tensor)]
        call.made = range_of(tensors)
        self.forward.append(call)
        for x in tensors:
            if x.requires_grad:
                x.register_hook(partial(self._gradient_of_output, back))

    def _gradient_of_output(self, call: Call, gradient: Tensor) -> None:
        call.given = _both(call.given, range_of([gradient]))

    def _gradient_of_input(self, call: Call, gradient: Tensor) -> None:
        if call.made is None:
            self.backward.append(call)
        call.made = _both(call.made, range_of([gradient]))


def _both(a: Range | None, b: Range | None) -> Range | None:
    """Return what two tensors hold of which one has come later; the share is the larger one's."""
    if a is None or b is None:
        return a or b
    lows = [x for x in (a.low, b.low) if not math.isnan(x)]
    highs = [x for x in (a.high, b.high) if not math.isnan(x)]
    return Range(
        min(lows, default=math.nan),
        max(highs, default=math.nan),
        max(a.not_finite, b.not_finite),
    )


@dataclass(frozen=True)
class Watched:
    """A pass that was watched."""

    index: int
    """Among those of its rank."""
    trace: Trace
    loss: float
    """Its share of the step's."""
    finding: Finding | None
    """Where it went wrong; None: it did not."""


def watch(step: Step, own: Iterable[list[int]]) -> Iterator[Watched]:
    """Run passes one after the other, and say of each where it goes wrong; all ranks take all.

    Args:
        step: what they belong to. Its gradient is left with the parameters.
        own: the passes of this rank.
    """
    policy, rank = step.policy, step.world.rank
    model = policy.model
    model.zero_grad()
    with policy.packing():
        model.train()
        for i, rows in enumerate(own):
            trace = Trace(model)
            # What is compiled would be compiled anew.
            eager = torch.compiler.set_stance("force_eager") if policy.compiled else nullcontext()
            with trace.watching(), eager:
                share = step.forward(rows, last=i + 1 == step.passes.rounds)
                trace.goes_back = True
                step.backward(share)
            loss = float(share.loss.detach())
            where = _where(step, rows, trace, loss)
            finding = where and Finding(where[1], where[0], rank, i)
            yield Watched(i, trace, loss, finding)
        policy.reshard()


def bad_parameter(step: Step) -> Finding | None:
    """Return the first parameter that was no number before the step; all ranks call it."""
    bad = _not_finite((name, p) for name, p in step.policy.model.named_parameters())
    found = None if bad is None else Finding(bad, "before", step.world.rank)
    return next((one for one in step.world.gather(found) if one), None)


def first_bad(step: Step) -> Finding | None:
    """Return where a step goes wrong first, which may run its passes again; all ranks call it."""
    found = bad_parameter(step)
    if found is not None:
        return found
    for watched in watch(step, step.passes.of(step.world.rank)):
        found = found or watched.finding
        if found and step.world.size == 1:
            break
    step.policy.model.zero_grad()
    everywhere = [one for one in step.world.gather(found) if one]
    # The gradients of parameters may be bad for what another rank has added to them.
    everywhere.sort(key=lambda one: (one.phase == "gradient", one.index, one.rank))
    return everywhere[0] if everywhere else None


def _where(step: Step, rows: list[int], trace: Trace, loss: float) -> tuple[str, str] | None:
    """Return the phase and the module in which a pass has gone wrong."""
    micro = step.batch.select(rows) if rows else step.batch.without_effect()
    columns = ("advantages", "old_logps", "ref_logps", "importance_weights")
    given = ((name, getattr(micro, name)) for name in columns)
    bad = _not_finite((name, x[micro.mask.to(x.device)]) for name, x in given if x is not None)
    if bad:
        return "before", bad + _OF_BATCH
    head = next(n for n, m in step.policy.model.named_modules() if m is step.policy.head.module)
    if call := next((call for call in trace.forward if call.is_bad), None):
        return "forward", call.module
    if not math.isfinite(loss):
        return "loss", head
    if call := next((call for call in trace.backward if call.is_bad), None):
        return "backward", call.module
    if any(call.given and not call.given.finite for call in trace.backward):
        return "loss", head  # whose gradient it is
    named = step.policy.model.named_parameters()
    bad = _not_finite((name, p.grad) for name, p in named if p.grad is not None)
    return ("gradient", bad) if bad else None


def _not_finite(named: Iterable[tuple[str, Tensor]]) -> str | None:
    """Return the name of the first tensor that holds what is no number."""
    for name, x in named:
        held = range_of([x.to_local() if isinstance(x, DTensor) else x])
        if held and not held.finite:
            return name
    return None
