"""What tests of costs count with: FLOPs, bytes alive at the peak, kernels that do nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from fastgrpo_kernels import GRPOLossConfig

KERNELS = ("loss_kernel", "objective_kernel", "statistics_kernel", "dlogits_kernel", "scale_kernel")

# Losses of which a row's gradient depends on the log-probs of its whole sequence.
COUPLED: dict[str, dict[str, Any]] = {
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    "sapo-sequence": {"loss_type": "sapo", "importance_sampling_level": "sequence"},
    "vespo": {"loss_type": "vespo"},
    "gmpo": {"loss_type": "gmpo"},
}
LOSSES: dict[str, dict[str, Any]] = {
    **{name: {"loss_type": name} for name in ("grpo", "bnpo", "dapo", "luspo", "sapo")},
    "dr_grpo": {"loss_type": "dr_grpo", "max_completion_length": 8},
    "cispo": {"loss_type": "cispo", "epsilon_high": 5.0},
    **COUPLED,
}


def config_of(loss: str, **options: Any) -> GRPOLossConfig:
    return GRPOLossConfig(**{**LOSSES[loss], **options})


def flops(call: Callable[[], Tensor], backward: bool = True) -> int:
    with FlopCounterMode(display=False) as counter:
        result = call()
        if backward:
            result.backward()
    return counter.get_total_flops()


class LiveBytes(TorchDispatchMode):
    """The bytes alive at the peak, inputs apart, and the largest tensor ever seen."""

    def __init__(self, *inputs: Tensor | None) -> None:
        super().__init__()
        self.inputs = {x.untyped_storage()._cdata for x in inputs if x is not None}
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = self.largest_tensor = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                self.largest_tensor = max(self.largest_tensor, x.numel())
                storage = x.untyped_storage()
                if storage._cdata not in self.inputs:
                    self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.alive = {key: x for key, x in self.alive.items() if not x[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return result


class KernelWithoutMemory:
    """Stands in for a kernel: the interpreter's copies of its arguments are not the call's."""

    def __init__(self) -> None:
        self.launches: list[dict[str, bool]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda **arguments: self.launches.append(
            {key: value is not None for key, value in arguments.items() if key.endswith("_ptr")}
        )


def silence_kernels(monkeypatch: pytest.MonkeyPatch) -> dict[str, KernelWithoutMemory]:
    """Replace the Triton kernels: costs do not depend on what they write."""
    pytest.importorskip("triton")
    from fastgrpo_kernels import _row_triton

    kernels = {name: KernelWithoutMemory() for name in KERNELS}
    for name, kernel in kernels.items():
        monkeypatch.setattr(_row_triton, name, kernel)
    return kernels
