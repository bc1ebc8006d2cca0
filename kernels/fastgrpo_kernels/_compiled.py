"""Calls inside graphs of `torch.compile`: one opaque operator forward, at most one backward.

A call looks at values (rows to skip, ids out of range) and loops over chunks, which no graph can
hold, so a graph holds the call as a whole. Its results must be known before it runs, in number,
shape and type; autograd, which the call uses inside, has to be put back around it; and its
arguments have to fit a schema. Eager calls do not come here.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import itertools
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from ._autograd import once_differentiable
from ._reduce import Statistics, metric_names
from ._sharding import gathered
from .config import GRPOLossConfig, GRPOLossOutput

P = ParamSpec("P")
R = TypeVar("R")

# What gradients go to; everything else is data.
LEAVES = ("hidden", "weight", "bias", "logits")


@dataclass
class Memo:
    """What a call knows at its end and needs again in backward; a graph carries it as tensors.

    In backward the call is repeated, with the statistics there from the start: it then computes
    everything but the log-probs. Gradients that are known need no more than a factor.
    """

    statistics: Statistics | None = None
    gradients: Sequence[Tensor] = ()  # a factor, and the leaves' gradients without it
    in_graph: bool = False  # what comes must be as `Expected` says


class Expected(NamedTuple):
    """What can be said of a call from shapes, types and options alone."""

    dtype: torch.dtype  # of the loss, the log-probs and the statistics
    gradients: Sequence[Tensor] = ()  # of the memo


class _Function(NamedTuple):
    call: Callable[..., Any]
    expect: Callable[..., Expected]


_FUNCTIONS: dict[str, _Function] = {}
_FIELDS = tuple(field.name for field in fields(GRPOLossConfig))


def opaque_when_compiled(
    expect: Callable[..., Expected],
) -> Callable[[Callable[Concatenate[Memo, P], R]], Callable[P, R]]:
    """Make a function one operator of compiled graphs; elsewhere it is called as it is.

    Args:
        expect: gets the function's arguments and says what will come. Values are not known yet.
    """

    def decorate(function: Callable[Concatenate[Memo, P], R]) -> Callable[P, R]:
        name = function.__name__
        _FUNCTIONS[name] = _Function(function, expect)
        signature = inspect.signature(function)
        signature = signature.replace(parameters=list(signature.parameters.values())[1:])

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            if not torch.compiler.is_compiling():
                return function(Memo(), *args, **kwargs)
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            arguments = {n: x for n, x in _flat(bound.arguments) if x is not None}
            if "grad_buffer" in arguments:
                from ._uncompiled import outside

                return outside(function, Memo(), *args, **kwargs)
            for part in ("weight", "bias"):
                if part in arguments:
                    arguments[part] = gathered(arguments[part])
            results, _, _ = _operators.forward(name, *_pack(arguments))
            if "advantages" not in arguments:
                return tuple(results)  # pyright: ignore[reportReturnType]
            loss, logps, entropy, *values = (results[0], *(x.detach() for x in results[1:]))
            metrics = dict(zip(_metrics(arguments), values, strict=True))
            return GRPOLossOutput(loss, logps, entropy, metrics)  # pyright: ignore[reportReturnType]

        call.__signature__ = signature  # pyright: ignore[reportAttributeAccessIssue]
        return call

    return decorate


# ---------------------------------------------------------------- arguments

_ARGUMENTS = (
    "str function, str[] names, Tensor[] tensors, bool[] flags, SymInt[] integers, str[] floats, "
    "str[] words, str[] wanted, str autocast"
)


def _flat(arguments: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Take apart the config and the keyword arguments."""
    for name, value in arguments.items():
        if isinstance(value, GRPOLossConfig):
            for field in _FIELDS:
                yield f"config.{field}", getattr(value, field)
        elif isinstance(value, dict):
            yield from value.items()
        elif name != "inplace":  # a permission, which operators of a graph do not have
            yield name, value


def _pack(arguments: dict[str, Any]) -> tuple[Any, ...]:
    """Sort arguments by type, as `_ARGUMENTS` wants them; the compiler traces this.

    An integer may stay a symbol: another value compiles nothing anew. A float becomes text, which
    makes it a constant of the graph: as a symbol, torch 2.13 takes it from cached graphs with the
    value it had there. `hex` is exact, and the compiler can follow it.
    """
    tensors = {n: x for n, x in arguments.items() if isinstance(x, Tensor)}
    flags = {n: x for n, x in arguments.items() if isinstance(x, bool)}
    integers = {n: x for n, x in arguments.items() if isinstance(x, int) and n not in flags}
    floats = {n: x.hex() for n, x in arguments.items() if isinstance(x, float)}
    words = {n: x for n, x in arguments.items() if isinstance(x, str)}
    groups = tensors, flags, integers, floats, words
    enabled = torch.is_grad_enabled()
    wanted = [n for n in LEAVES if enabled and n in tensors and tensors[n].requires_grad]
    kind = next(iter(tensors.values())).device.type
    autocast = str(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else ""
    names = [n for group in groups for n in group]
    for name in arguments:
        if name not in names and arguments[name] is not None:
            kind = type(arguments[name]).__name__
            raise TypeError(f"{name} must be a tensor, a number or a word, got {kind}")
    return names, *(list(group.values()) for group in groups), wanted, autocast


@contextmanager
def _unpacked(call: Sequence[Any]) -> Generator[dict[str, Any]]:
    """Yield the arguments, in the state of autograd and autocast that the caller had."""
    names, tensors, flags, integers, floats, words, wanted, autocast = call
    detached = (x.detach() for x in tensors)
    values = *detached, *flags, *integers, *map(float.fromhex, floats), *words
    arguments: dict[str, Any] = dict(zip(names, values, strict=True))
    for name in wanted:
        arguments[name].requires_grad_()
    dtype = getattr(torch, autocast.removeprefix("torch.")) if autocast else None
    with (
        # Operators run below autograd, and calls use it. There is no public way back up.
        torch._C._SetExcludeDispatchKeyGuard(torch.DispatchKey.AutogradFunctionality, False),  # pyright: ignore[reportPrivateUsage]
        torch._C._SetExcludeDispatchKeyGuard(torch.DispatchKey.ADInplaceOrView, False),  # pyright: ignore[reportPrivateUsage]
        torch.set_grad_enabled(bool(wanted)),
        torch.autocast(tensors[0].device.type, dtype, enabled=bool(autocast)),
    ):
        yield arguments


def _run(function: str, memo: Memo, arguments: dict[str, Any]) -> list[Tensor]:
    """Call a function; its metrics follow its other results, in the order of `_metrics`."""
    prefix = "config."
    options = {n.removeprefix(prefix): x for n, x in arguments.items() if n.startswith(prefix)}
    rest = {n: x for n, x in arguments.items() if not n.startswith(prefix)}
    if options:
        rest["config"] = _config(**options)
    found = _FUNCTIONS[function].call(memo, **rest)
    if not isinstance(found, GRPOLossOutput):
        return list(found)
    names = _metrics(arguments)
    assert found.metrics.keys() == set(names), f"{list(found.metrics)}, expected {names}"
    return [found.loss, found.logps, found.entropy, *(found.metrics[n] for n in names)]


@functools.lru_cache
def _config(**options: Any) -> GRPOLossConfig:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the caller's own config has warned
        return GRPOLossConfig(**options)


def _metrics(arguments: dict[str, Any]) -> list[str]:
    ids, cu_seqlens = arguments["completion_ids"], arguments.get("cu_seqlens")
    num_sequences = ids.shape[0] if ids.dim() == 2 else None
    return metric_names(
        arguments["config.loss_type"],
        with_kl=arguments["config.beta"] != 0,
        with_entropy_bonus=arguments["config.entropy_coef"] != 0,
        num_sequences=num_sequences if cu_seqlens is None else cu_seqlens.shape[0] - 1,
    )


# ---------------------------------------------------------------- operators


def _free_namespace() -> str:
    """Return a namespace of this copy of the package alone: several may be in one process."""
    path = hashlib.sha1(f"{__name__} {__file__}".encode(), usedforsecurity=False)
    first = name = f"fastgrpo_{path.hexdigest()[:8]}"
    for again in itertools.count(2):
        if not hasattr(getattr(torch.ops, name), "forward"):
            return name
        name = f"{first}_{again}"
    raise AssertionError


_NAMESPACE = _free_namespace()
_library = torch.library.Library(_NAMESPACE, "FRAGMENT")
_operators = getattr(torch.ops, _NAMESPACE)
_library.define(
    f"forward({_ARGUMENTS}) -> (Tensor[] results, Tensor[] statistics, Tensor[] gradients)"
)
_library.define(
    f"backward({_ARGUMENTS}, Tensor[] statistics, int[] places, Tensor[] upstream) -> Tensor[]"
)


@torch.library.impl(_library, "forward", "CompositeExplicitAutograd")
def _forward(function: str, *call: Any) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    with _unpacked(call) as arguments:
        memo = Memo(in_graph=True)
        found = _run(function, memo, arguments)
        # Copies: what an operator returns shares no memory, and here several may be one tensor.
        results = [x.detach().clone() for x in found]
        if not call[-2] or memo.gradients:
            return results, [], list(memo.gradients)
        assert memo.statistics is not None
        return results, memo.statistics.tensors(), []


@torch.library.register_fake(f"{_NAMESPACE}::forward", lib=_library)
def _(function: str, *call: Any) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    with _unpacked(call) as arguments:
        dtype, gradients = _FUNCTIONS[function].expect(**arguments)
        has_loss = "advantages" in arguments
        ids = arguments["completion_ids" if has_loss else "ids"]
        results = [ids.new_empty(ids.shape, dtype=dtype) for _ in range(2)]
        if has_loss:
            results.insert(0, ids.new_empty((), dtype=dtype))
            for name in _metrics(arguments):
                counts = name.startswith("num_")
                results.append(ids.new_empty((), dtype=torch.int64 if counts else dtype))
        if not call[-2] or gradients:
            return results, [], list(gradients)
        return results, [ids.new_empty(ids.numel(), dtype=dtype) for _ in range(4)], []


@torch.library.impl(_library, "backward", "CompositeExplicitAutograd")
def _backward(function: str, *arguments_and_more: Any) -> list[Tensor]:
    *call, statistics, places, upstream = arguments_and_more
    with _unpacked(call) as arguments:
        results = _run(function, Memo(Statistics(*statistics), in_graph=True), arguments)
        leaves = [arguments[n] for n in call[-2]]
        return list(torch.autograd.grad([results[i] for i in places], leaves, upstream))


@torch.library.register_fake(f"{_NAMESPACE}::backward", lib=_library)
def _(function: str, *arguments_and_more: Any) -> list[Tensor]:
    call = arguments_and_more[:-3]
    with _unpacked(call) as arguments:
        return [arguments[n].new_empty(arguments[n].shape) for n in call[-2]]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[list[Tensor], ...]) -> None:
    ctx.function, ctx.names, tensors, *ctx.options = inputs
    _, statistics, gradients = output
    ctx.set_materialize_grads(False)
    ctx.dtypes = [x.dtype for x in tensors]
    ctx.known = bool(gradients)
    ctx.save_for_backward(*(gradients or [*tensors, *statistics]))


@once_differentiable
def _gradients(ctx: Any, upstream: list[Tensor | None], *_: Any) -> tuple[Any, ...]:
    count, wanted = len(ctx.dtypes), ctx.options[-2]
    places = [i for i, x in enumerate(upstream) if x is not None]
    given = [x for x in upstream if x is not None]
    dtypes = dict(zip(ctx.names, ctx.dtypes, strict=False))
    if ctx.known:
        power, *known = ctx.saved_tensors
        scale = given[0] * power
        # As `_head.scaled`; the compiler makes one kernel of it, and no slices.
        found = [
            (x.to(scale.dtype) * scale).to(dtypes[n]) for n, x in zip(wanted, known, strict=True)
        ]
    else:
        saved = ctx.saved_tensors
        found = _operators.backward(
            ctx.function, ctx.names, list(saved[:count]), *ctx.options, list(saved[count:]),
            places, given,
        )  # fmt: skip
    gradients = dict(zip(wanted, found, strict=True))
    # An empty list is taken for one of tensors.
    nothing = [[] if x == [] else None for x in ctx.options]
    return None, None, [gradients.get(n) for n in ctx.names[:count]], *nothing


torch.library.register_autograd(
    f"{_NAMESPACE}::forward", _gradients, setup_context=_save, lib=_library
)
