"""The bytes alive while a model without values runs, counted after every operation.

E operations, K kinds of tensors.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

KINDS = ("activations", "copies", "gradients", "loss")
"""Copies are those of weights in bf16 that autocast makes."""


@contextmanager
def without_values(model_type: str) -> Generator[None]:
    """Make tensors without values inside, and say of which model it was if it needs them.

    Raises:
        ValueError: the model asks what is in a tensor, or for an operation that has no such form.
    """
    logger = logging.getLogger("torch._subclasses.fake_tensor")  # tells tracebacks
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with FakeTensorMode():
            yield
    except (RuntimeError, NotImplementedError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"model_name_or_path: a {model_type} model does not run on tensors without values, so "
            f"its memory cannot be planned ({reason})"
        ) from error
    finally:
        logger.setLevel(level)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes alive after each operation, by kind, of tensors that are made inside."""

    def __init__(self, given: Iterable[Tensor]) -> None:
        """Begin with nothing; tensors that are there already are no business of a pass."""
        super().__init__()
        self.given = {_storage(x) for x in given}
        self.alive: dict[int, list[Any]] = {}  # by storage: its kind, its bytes, a reference to it
        self.bytes_K = [0] * len(KINDS)
        self.kind = "activations"
        self.recording = True
        self.events_EK: list[list[int]] = []
        self.marks: dict[str, int] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        converts = func is torch.ops.aten._to_copy.default and _storage(args[0]) in self.given
        for x in (result,) if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(x, Tensor):
                self._add(x, "copies" if converts else self.kind)
        if self.recording:
            self.events_EK.append(list(self.bytes_K))
        return result

    def mark(self, name: str) -> None:
        """Remember the next operation."""
        self.marks[name] = len(self.events_EK)

    def is_gradient_of(self, parameter: Tensor) -> None:
        """Count the gradient of a parameter as one."""
        entry = None if parameter.grad is None else self.alive.get(_storage(parameter.grad))
        if entry is not None:
            self.bytes_K[KINDS.index(entry[0])] -= entry[1]
            self.bytes_K[KINDS.index("gradients")] += entry[1]
            entry[0] = "gradients"

    def _add(self, x: Tensor, kind: str) -> None:
        storage, key = x.untyped_storage(), _storage(x)
        if key in self.alive or key in self.given:
            return
        size = storage.nbytes()
        self.bytes_K[KINDS.index(kind)] += size

        def forget(_: Any) -> None:
            kind, size, _ = self.alive.pop(key)
            self.bytes_K[KINDS.index(kind)] -= size

        self.alive[key] = [kind, size, weakref.ref(storage, forget)]


def _storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata  # pyright: ignore[reportPrivateUsage]
