"""What beta > 0 holds the policy near: a frozen copy of it, or the model without its adapters."""

from __future__ import annotations

import copy
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .config import TrainConfig
from .model import Policy


class Reference:
    """The policy as it was, in the type it is held in.

    With adapters it is the policy with these switched off, at no cost in memory. Otherwise it is a
    copy, which `offload_ref_model` leaves in CPU memory (pinned, if there is a GPU) but for the
    moments in which it is asked. Of a sharded policy it is a copy of this process's part, which
    changes places with the policy's for these moments.
    """

    def __init__(self, policy: Policy, config: TrainConfig) -> None:
        """Copy the policy, unless it has adapters to switch off.

        Args:
            policy: what is trained.
            config: its `use_peft`, and its options of the reference.
        """
        self.policy, self.config = policy, config
        self.frozen: Policy | None = None
        self._parts: list[Tensor] = []
        if config.use_peft:
            return
        if policy.sharding is None:
            self.frozen = _frozen_copy(policy, config.offload_ref_model)
        else:
            place = _to_cpu if config.offload_ref_model else torch.clone
            self._parts = [place(own) for own in _own_parts(policy)]

    @contextmanager
    def ready(self) -> Generator[Policy]:
        """Give the reference as a policy that can be asked inside the context only."""
        if self._parts:
            with self._in_place():
                yield self.policy
        elif self.frozen is None:
            adapted: Any = self.policy.model
            with adapted.disable_adapter():
                yield self.policy
        elif self.config.offload_ref_model:
            with _on_device(self.frozen):
                yield self.frozen
        else:
            yield self.frozen

    def sync(self, step: int) -> None:
        """Move towards the policy, if this optimisation step is one to do so (TR-DPO).

        The reference becomes alpha * policy + (1 - alpha) * reference, in place and parameter by
        parameter, every `ref_model_sync_steps` steps of a run with `sync_ref_model`
        (the soft update of arxiv.org/abs/2404.09656).
        """
        if self.config.sync_ref_model and step % self.config.ref_model_sync_steps == 0:
            self._move(self.config.ref_model_mixup_alpha)

    def renew(self) -> None:
        """Become what the policy is now, after a warm start; with adapters it is that already."""
        if self.frozen is not None or self._parts:
            self._move(1.0)

    def own_parts(self) -> list[Tensor]:
        """Return what this process has of the reference; nothing, if adapters are switched off."""
        return self._parts if self.frozen is None else _own_parts(self.frozen)

    @torch.no_grad()
    def _move(self, alpha: float) -> None:
        for old, new in zip(self.own_parts(), _own_parts(self.policy), strict=True):
            old.lerp_(new.to(old.device), alpha)

    @contextmanager
    def _in_place(self) -> Generator[None]:
        """Have the reference's values in the policy's place for a while."""
        own = _own_parts(self.policy)
        kept = [part.clone() for part in own]
        try:
            for there, part in zip(own, self._parts, strict=True):
                there.copy_(part, non_blocking=True)
            yield
        finally:
            self.policy.reshard()
            for there, part in zip(own, kept, strict=True):
                there.copy_(part)


def _own_parts(policy: Policy) -> list[Tensor]:
    """Return this process's part of each parameter, all of it if the policy is not sharded."""
    policy.reshard()  # the parts are what stays, and what is gathered is not
    parameters = [parameter.detach() for parameter in policy.model.parameters()]
    return [p.to_local() if isinstance(p, DTensor) else p for p in parameters]


def _frozen_copy(policy: Policy, offload: bool) -> Policy:
    """Copy a policy; with `offload` its parameters go straight to the CPU."""
    place = _to_cpu if offload else torch.clone
    # What deepcopy finds here it takes for copied already; tied parameters stay tied.
    memo: dict[int, object] = {id(policy.tokenizer): policy.tokenizer}
    for parameter in policy.model.parameters():
        memo[id(parameter)] = nn.Parameter(place(parameter.detach()), requires_grad=False)
    frozen = copy.deepcopy(policy, memo)
    frozen.model.eval()
    return frozen


def _to_cpu(x: Tensor) -> Tensor:
    return torch.empty_like(x, device="cpu", pin_memory=x.is_cuda).copy_(x)


@contextmanager
def _on_device(frozen: Policy) -> Generator[None]:
    """Have the parameters on the device for a while; they come back unchanged: nothing to copy."""
    homes = [(parameter, parameter.data) for parameter in frozen.model.parameters()]
    try:
        for parameter, home in homes:
            parameter.data = home.to(frozen.device, non_blocking=True)
        yield
    finally:
        for parameter, home in homes:
            parameter.data = home
