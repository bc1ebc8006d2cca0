"""Optimizers for parameters in bfloat16, and for states in CPU memory.

A bfloat16 has 8 significant bits: an update below 1/512 of a weight is rounded away, and at RL
learning rates nearly all are. `MasterWeights` steps fp32 copies of the parameters, which may lie in
CPU memory; `StochasticRoundingAdamW` keeps no copies and rounds so that the mean is right. Both
work through the parameters in pieces: fp32 gradients, or fp32 parameters, never exist all at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

PIECE = 2**22
"""Most elements that are held in fp32 at a time, 16 MiB: enough to keep a GPU busy, and a multiple
of the 256 elements that 8-bit states share a scale in."""


class Piece(NamedTuple):
    """Some consecutive elements of a parameter."""

    parameter: Tensor
    start: int
    stop: int

    def of(self, x: Tensor) -> Tensor:
        """Return the same elements of a tensor of the parameter's shape."""
        return x.reshape(-1).narrow(0, self.start, self.stop - self.start)

    @property
    def values(self) -> Tensor:
        """The elements themselves, as a view."""
        return self.of(self.parameter.detach().view(-1))


def pieces(parameter: Tensor) -> Iterator[Piece]:
    """Yield a parameter in pieces of at most `PIECE` elements."""
    for start in range(0, parameter.numel(), PIECE):
        yield Piece(parameter, start, min(start + PIECE, parameter.numel()))


def rounds(parameters: Iterable[Tensor]) -> list[list[Piece]]:
    """Return all pieces, in order, gathered in rounds of at most `PIECE` elements."""
    found: list[list[Piece]] = []
    room = 0
    for piece in (piece for parameter in parameters for piece in pieces(parameter)):
        size = piece.stop - piece.start
        if size > room:
            found.append([])
            room = PIECE
        found[-1].append(piece)
        room -= size
    return found


@dataclass
class Round:
    """Pieces that are stepped together, their fp32 copies, and the optimizer of the copies."""

    group: int
    pieces: list[Piece]
    copies: list[Tensor]
    optimizer: Optimizer


class MasterWeights(Optimizer):
    """Steps fp32 copies of the parameters and rounds the result to them.

    The copies are made in the first step; from then on they are what is trained: parameters that
    are changed by other hands are overwritten. Their states are those of the optimizer that `make`
    returns, which never sees the parameters.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        make: Callable[..., Optimizer],
        *,
        device: torch.device | None = None,
        **defaults: Any,
    ) -> None:
        """Take parameter groups as every optimizer does.

        Args:
            groups: parameters in bfloat16 or fp32.
            make: called as `make(tensors, lr=..., ...)` with the hyperparameters of a group.
            device: where copies and states are kept and stepped; None: beside the parameters.
            defaults: hyperparameters of groups that do not have their own.
        """
        self._names = tuple(defaults)
        super().__init__(groups, defaults)
        self._make, self._device = make, device
        self.rounds: list[Round] = []
        """None before the first step."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride] - there is no closure
        """Step the copies of all parameters that have a gradient, and write them back."""
        self._make_copies()
        for part in self.rounds:
            self._share_hyperparameters(part)
            for piece, copy in zip(part.pieces, part.copies, strict=True):
                gradient = piece.parameter.grad
                if gradient is not None:
                    copy.grad = _bring(piece.of(gradient), copy.device)
            part.optimizer.step()
            for piece, copy in zip(part.pieces, part.copies, strict=True):
                if copy.grad is not None:
                    copy.grad = None
                    _send(copy, piece.values)

    def _make_copies(self) -> None:
        if self.rounds:
            return
        for index, group in enumerate(self.param_groups):
            for these in rounds(group["params"]):
                device = self._device or these[0].parameter.device
                copies = [x.values.to(device, torch.float32, copy=True) for x in these]
                optimizer = self._make(copies, **{name: group[name] for name in self._names})
                self.rounds.append(Round(index, these, copies, optimizer))

    def _share_hyperparameters(self, part: Round) -> None:
        (inner,) = part.optimizer.param_groups
        for name in self._names:
            value = self.param_groups[part.group][name]
            if isinstance(inner[name], Tensor):  # torchao's learning rate
                inner[name].fill_(value)
            else:
                inner[name] = value


def _bring(gradient: Tensor, device: torch.device) -> Tensor:
    """Return a gradient in fp32 on `device`; the bus carries it in its own type."""
    if gradient.device != device:
        gradient = _pinned_like(gradient).copy_(gradient)
    return gradient.float()


def _send(copy: Tensor, values: Tensor) -> None:
    """Round a copy to nearest into its parameter; the bus carries the parameter's type."""
    if values.device == copy.device:
        values.copy_(copy)
    else:  # PyTorch does not reuse the pinned memory before it is read
        values.copy_(_pinned_like(values).copy_(copy), non_blocking=True)


def _pinned_like(x: Tensor) -> Tensor:
    """Return CPU memory that a GPU reads and writes at the full speed of the bus.

    It is for a piece at a time: copies and states need no such memory, of which PyTorch takes the
    next power of two.
    """
    return torch.empty_like(x, device="cpu", pin_memory=x.is_cuda)


class StochasticRoundingAdamW(Optimizer):
    """AdamW in fp32 whose parameters, in bfloat16, are rounded stochastically after each step.

    The expectation of a parameter moves as in fp32, at no memory beyond the fp32 states (Gupta et
    al., "Deep Learning with Limited Numerical Precision", 2015).
    """

    def __init__(self, groups: list[dict[str, Any]], *, seed: int, **defaults: Any) -> None:
        """Take parameter groups and hyperparameters as `torch.optim.AdamW` does, all of them."""
        super().__init__(groups, defaults)
        device = self.param_groups[0]["params"][0].device
        self.generator = torch.Generator(device).manual_seed(seed)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride] - there is no closure
        """Step all parameters that have a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, parameter.grad, group)

    def _step(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            zeros = torch.zeros_like(parameter, dtype=torch.float32)
            state["step"] = zeros.new_zeros(())
            state["exp_avg"], state["exp_avg_sq"] = zeros, zeros.clone()
        for piece in pieces(parameter):
            exact = piece.values.float()
            adamw(
                [exact],
                [piece.of(gradient).float()],
                [piece.of(state["exp_avg"])],
                [piece.of(state["exp_avg_sq"])],
                [],
                [state["step"].clone()],  # it counts, and would do so for every piece
                fused=True,
                amsgrad=False,
                maximize=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
            )
            if parameter.dtype == torch.bfloat16:
                piece.values.copy_(round_stochastically(exact, self.generator))
        state["step"] += 1


def round_stochastically(
    x: Tensor,  # fp32
    generator: torch.Generator,
) -> Tensor:
    """Round to one of the two neighbours in bfloat16, with the mean of many roundings being `x`.

    A bfloat16 is the upper half of an fp32: a random number added to the lower half carries into
    the upper one as often as the lower half is large. Values that are exact stay, also infinity
    and NaN; beyond the largest bfloat16 the neighbour is infinity.
    """
    bits = torch.empty_like(x, dtype=torch.int32).random_(0, 2**16, generator=generator)
    bits.add_(x.view(torch.int32)).bitwise_and_(-(2**16))
    rounded = bits.view(torch.float32).bfloat16()
    return rounded.masked_fill_(x.isnan(), torch.nan)  # the sum may overflow its lower half
