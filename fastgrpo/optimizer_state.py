"""The states of an optimizer in a safetensors file, whichever optimizer it is.

They are read and written where they are: what bitsandbytes pages stays paged, and the tensors of
torchao, which hold others, are not made again but filled. Nothing is pickled.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import Optimizer

from .low_precision import MasterWeights, StochasticRoundingAdamW

_GENERATOR = "generator"


def save_optimizer(path: Path, optimizer: Optimizer) -> None:
    """Write all that an optimizer has gathered; its hyperparameters are the configuration's.

    Args:
        path: of the file.
        optimizer: any that `build_optimizer` makes.
    """
    numbers = {
        name: {key: x for key, x in owner.state[p].items() if not isinstance(x, Tensor)}
        for name, owner, p in _stepped(optimizer)
        if p in owner.state
    }
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # a GPU writes paged states, which are read here
    written: dict[str, Tensor] = {}
    places: set[int] = set()
    for name, x in gathered(optimizer).items():
        plain = x.detach().cpu().contiguous()
        # Parameters share the tables of bitsandbytes, and a file does not.
        written[name] = plain.clone() if plain.data_ptr() in places else plain
        places.add(plain.data_ptr())
    save_file(written, path, {"numbers": json.dumps(numbers)})


def gathered(optimizer: Optimizer) -> dict[str, Tensor]:
    """Return the tensors that an optimizer has beside its parameters, by name: the very tensors."""
    tensors: dict[str, Tensor] = {}
    for name, owner, parameter in _stepped(optimizer):
        if owner is not optimizer:
            tensors[f"{name}.copy"] = parameter
        if parameter in owner.state:
            tensors |= _tensors(name, owner.state[parameter])
    if isinstance(optimizer, StochasticRoundingAdamW):
        tensors[_GENERATOR] = optimizer.generator.get_state()
    return tensors


@torch.no_grad()
def load_optimizer(path: Path, optimizer: Optimizer) -> None:
    """Put an optimizer of the same parameters where the one was that `save_optimizer` has written.

    Args:
        path: of the file.
        optimizer: whose parameters have the values that they had, and no gradients.
    """
    with safe_open(path, framework="pt") as file:
        numbers: dict[str, dict[str, Any]] = json.loads(file.metadata()["numbers"])
        if set(file.keys()) - {_GENERATOR}:  # it had taken a step
            _make_states(optimizer)
        if isinstance(optimizer, StochasticRoundingAdamW):
            optimizer.generator.set_state(file.get_tensor(_GENERATOR))
        for name, owner, parameter in _stepped(optimizer):
            if owner is not optimizer:
                parameter.copy_(file.get_tensor(f"{name}.copy"))
            if name not in numbers:  # no step had reached it
                owner.state.pop(parameter, None)
                continue
            state = owner.state[parameter]
            for place, x in _tensors(name, state).items():
                x.copy_(file.get_tensor(place))
            state.update(numbers[name])


def _stepped(optimizer: Optimizer) -> Iterator[tuple[str, Optimizer, Tensor]]:
    """Yield what is stepped: a name, the optimizer that has its states, and the tensor."""
    if isinstance(optimizer, MasterWeights):
        for i, part in enumerate(optimizer.rounds):
            for name, owner, copy in _stepped(part.optimizer):
                yield f"{i}.{name}", owner, copy
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for i, parameter in enumerate(parameters):
        yield str(i), optimizer, parameter


def _tensors(name: str, state: dict[str, Any]) -> dict[str, Tensor]:
    """Return the plain tensors of a state by name: the very tensors, to be read or written."""
    found: dict[str, Tensor] = {}
    for key, x in state.items():
        if isinstance(x, Tensor):
            found |= _plain(f"{name}.{key}", x)
    return found


def _plain(name: str, x: Any) -> dict[str, Tensor]:
    if not hasattr(x, "__tensor_flatten__"):
        return {name: x}
    parts, _ = x.__tensor_flatten__()
    return {
        place: plain
        for part in parts
        if isinstance(getattr(x, part), Tensor)  # a DTensor has its mesh among them
        for place, plain in _plain(f"{name}.{part}", getattr(x, part)).items()
    }


def _make_states(optimizer: Optimizer) -> None:
    """Take a step that changes no parameter: after it there are states for all that are trained."""
    if isinstance(optimizer, MasterWeights):
        optimizer.rounds.clear()  # copies are made of the parameters as they are
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    set_rates(optimizer, [0.0] * len(rates))
    optimizer.step()
    set_rates(optimizer, rates)
    for parameter in parameters:
        parameter.grad = None


def set_rates(optimizer: Optimizer, rates: Sequence[float | Tensor]) -> None:
    """Set the learning rate of each group, which torchao has in a tensor."""
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = float(rate)
