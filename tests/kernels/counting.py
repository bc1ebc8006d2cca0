"""What tests of costs count with: FLOPs, bytes alive at the peak, kernels that do nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from benchmarks.measure import FlopCounter as FlopCounter
from benchmarks.measure import LiveBytes as LiveBytes
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
    with FlopCounter() as counter:
        result = call()
        if backward:
            result.backward()
    return counter.get_total_flops()


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
