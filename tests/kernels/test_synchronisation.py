"""How often a call waits for the GPU: once at most, and never where the contract says so."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
from counting import config_of

from fastgrpo_kernels import linear_grpo_loss

pytestmark = pytest.mark.gpu


@pytest.fixture
def waits() -> Iterator[list[warnings.WarningMessage]]:
    """Record every host synchronisation that PyTorch notices."""
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield seen
        finally:
            torch.cuda.set_sync_debug_mode("default")


def run(mask_device: str, **options: object) -> None:
    hidden = torch.randn(4, 8, 16, device="cuda", requires_grad=True)
    weight = torch.randn(64, 16, device="cuda", requires_grad=True)
    ids = torch.randint(64, (4, 8), device="cuda")
    mask = (torch.arange(32).view(4, 8) % 3 != 0).to(mask_device)
    old_logps = torch.full((4, 8), -4.0, device="cuda")
    advantages = torch.tensor([1.0, 0.0, -1.0, 0.5]).to(mask_device)
    torch.cuda.synchronize()
    output = linear_grpo_loss(
        hidden, weight, ids, advantages, completion_mask=mask, old_logps=old_logps, **options
    )
    output.loss.backward()


@pytest.mark.parametrize(
    ("mask_device", "options", "expected"),
    [
        (mask_device, options | {"method": method, "config": config_of(loss)}, expected)
        for mask_device, options, expected in (
            ("cuda", {}, 1),
            ("cpu", {}, 0),
            ("cuda", {"skip_rows": False}, 0),
        )
        for method in ("single_pass", "recompute")
        for loss in ("dapo", "gspo", "vespo")
    ],
)
def test_host_synchronisations(waits, mask_device, options, expected) -> None:
    run(mask_device, **options)  # compiles
    waits.clear()
    run(mask_device, **options)
    assert sum("synchroniz" in str(wait.message) for wait in waits) == expected
