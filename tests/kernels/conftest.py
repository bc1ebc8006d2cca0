"""Small blocks: a vocabulary of 37 then takes three, and the interpreter stays fast."""

import pytest
from loss_cases import BACKENDS


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastgrpo_kernels import _row_triton

    monkeypatch.setattr(
        _row_triton, "launch_options", lambda vocabulary: {"BLOCK_V": 16, "num_warps": 1}
    )


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, small_blocks: None) -> str:
    """Each row backend; Triton with blocks much smaller than the vocabulary."""
    return request.param
