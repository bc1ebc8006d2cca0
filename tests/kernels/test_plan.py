"""Which method, which tiles, which rows: what is decided before anything is computed."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from counting import COUPLED, LOSSES, config_of
from loss_cases import DEVICE
from torch import Tensor

from fastgrpo_kernels import GRPOLossOutput, linear, linear_grpo_loss
from fastgrpo_kernels._recompute import TILE_BYTES, tile_shape

GIB = 2**30

# ---------------------------------------------------------------- method="auto"


def head_on_a_gpu(dtype: torch.dtype = torch.bfloat16, trainable: bool = True) -> Any:
    """What `_way` looks at: a head whose gradient in fp32 takes 2,374 MiB."""
    return SimpleNamespace(
        device=torch.device("cuda"),
        needs_weight=trainable,
        weight=torch.empty(151_936, 4096, dtype=dtype, device="meta"),
        accumulator_dtype=torch.float32,
    )


def buffer(dtype: torch.dtype) -> Tensor:
    return torch.empty(151_936, 4096, dtype=dtype, device="meta")


HEAD_BYTES = 4 * 151_936 * 4096
AN_EIGHTH = 8 * HEAD_BYTES


@pytest.mark.parametrize(
    ("memory", "trainable", "grad_buffer", "expected", "why"),
    [
        (AN_EIGHTH, True, None, "single_pass", "gradients in the forward pass"),
        (
            AN_EIGHTH - 8, True, None, "recompute",
            f"an fp32 gradient of the head takes {HEAD_BYTES // 2**20} of "
            f"{(AN_EIGHTH - 8) // 2**20} MiB",
        ),
        (12 * GIB, True, None, "recompute", "takes 2374 of 12288 MiB"),
        (12 * GIB, False, None, "single_pass", "gradients in the forward pass"),
        (12 * GIB, True, torch.float32, "single_pass", "gradients in the forward pass"),
        (141 * GIB, True, torch.bfloat16, "recompute", "grad_buffer is torch.bfloat16"),
    ],
)  # fmt: skip
def test_auto_goes_by_total_memory_and_says_why(
    memory: int,
    trainable: bool,
    grad_buffer: torch.dtype | None,
    expected: str,
    why: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    card = SimpleNamespace(total_memory=memory)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    given = None if grad_buffer is None else buffer(grad_buffer)
    with caplog.at_level(logging.DEBUG, "fastgrpo_kernels"):
        assert linear._way("auto", head_on_a_gpu(trainable=trainable), given) == expected
    (record,) = caplog.records
    assert record.name == "fastgrpo_kernels" and record.levelno == logging.DEBUG
    message = record.getMessage()
    assert message.startswith(f"linear_grpo_loss: method {expected} (") and why in message


def test_a_method_that_was_named_is_taken_in_silence(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "fastgrpo_kernels"):
        for method in ("single_pass", "recompute"):
            assert linear._way(method, head_on_a_gpu(), None) == method
    assert not caplog.records


class Inputs:
    """24 tokens in 5 sequences, one of them empty; the advantages of two of them are 0."""

    lengths = (3, 8, 0, 7, 6)

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        self.hidden = torch.randn(24, 8, device=DEVICE).to(dtype).requires_grad_()
        self.weight = torch.randn(37, 8, device=DEVICE).to(dtype).requires_grad_()
        self.ids = torch.randint(37, (24,), device=DEVICE)
        self.advantages = torch.tensor([0.5, 0.0, 1.0, -1.0, 0.0], device=DEVICE)
        bounds = torch.tensor((0, *self.lengths), device=DEVICE)
        self.cu_seqlens = bounds.cumsum(0).to(torch.int32)
        self.old_logps = torch.full((24,), -3.5, device=DEVICE)

    def run(self, **arguments: Any) -> GRPOLossOutput:
        output = linear_grpo_loss(
            self.hidden, self.weight, self.ids, arguments.pop("advantages", self.advantages),
            cu_seqlens=self.cu_seqlens, **arguments,
        )  # fmt: skip
        output.loss.backward()
        return output


@pytest.mark.skipif(DEVICE != "cpu", reason="of the CPU")
def test_auto_is_the_single_pass_on_a_cpu(caplog: pytest.LogCaptureFixture) -> None:
    inputs, again = Inputs(), Inputs()
    with caplog.at_level(logging.DEBUG, "fastgrpo_kernels"):
        automatic, named = inputs.run(), again.run(method="single_pass")
    assert torch.equal(automatic.loss, named.loss)
    assert inputs.weight.grad is not None and again.weight.grad is not None
    assert torch.equal(inputs.weight.grad, again.weight.grad)
    assert [record.getMessage() for record in caplog.records] == [
        "linear_grpo_loss: method single_pass (gradients in the forward pass)"
    ]


# ---------------------------------------------------------------- tiles


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("temporary_bytes", (0, 16 * 2**20))
@pytest.mark.parametrize("hidden_size", (64, 896, 4096, 8192, 12_288, 16_384))
def test_tiles_fill_their_budget_with_neither_side_too_small(
    hidden_size: int, temporary_bytes: int, dtype: torch.dtype
) -> None:
    head: Any = SimpleNamespace(
        accumulator_dtype=torch.float32,
        dtype=dtype,
        logits_dtype=dtype,
        hidden_size=hidden_size,
        vocabulary=128_256,
    )
    rows, columns = tile_shape(head, 32_768, None, temporary_bytes)
    # A product of fewer rows or columns is bound by memory.
    assert rows >= 256 and columns >= 256 and columns & (columns - 1) == 0
    logits = rows * columns * dtype.itemsize
    hidden_rows = rows * hidden_size * (dtype.itemsize + 4)
    slices = columns * hidden_size * (8 if dtype == torch.bfloat16 else 4)
    # Where all rows fit, columns are rounded down to a power of two.
    least = 0.9 if rows < 32_768 else 0.5
    budget = TILE_BYTES - temporary_bytes
    assert least * budget < logits + hidden_rows + slices <= budget
    assert tile_shape(head, 100, None, temporary_bytes)[0] == 100
    assert tile_shape(head, 32_768, 300, temporary_bytes)[0] == 300
    assert tile_shape(head, 0, None, temporary_bytes)[0] == 1


# ---------------------------------------------------------------- rows that are left out


methods = pytest.mark.parametrize("method", ("single_pass", "recompute"))


def gradients(inputs: Inputs) -> tuple[Tensor, Tensor]:
    assert inputs.hidden.grad is not None and inputs.weight.grad is not None
    return inputs.hidden.grad, inputs.weight.grad


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("loss", ("dapo", "vespo", "dapo-sequence"))
@methods
def test_skipping_is_bit_for_bit_the_dense_computation_of_the_rows_that_are_left(
    backend: str, loss: str, method: str, dtype: torch.dtype
) -> None:
    """Given alone, with the denominator of all and in the same chunks."""
    name, _, level = loss.partition("-")
    config = config_of(name, importance_sampling_level=level or "token")
    inputs, alone = Inputs(dtype), Inputs(dtype)
    options: dict[str, Any] = {"config": config, "method": method, "chunk_rows": 8}
    options["backend"] = backend
    skipping = inputs.run(old_logps=inputs.old_logps, statistics="active", **options)

    keep = torch.cat([torch.arange(3), torch.arange(11, 18)]).to(DEVICE)
    alone.hidden = alone.hidden.detach()[keep].requires_grad_()
    alone.ids, alone.advantages = alone.ids[keep], alone.advantages[[0, 3]]
    alone.cu_seqlens = torch.tensor([0, 3, 10], dtype=torch.int32, device=DEVICE)
    dense = alone.run(
        old_logps=alone.old_logps[keep], num_items_in_batch=24, skip_rows=False, **options
    )
    assert torch.equal(skipping.logps[keep], dense.logps)
    assert torch.equal(skipping.entropy[keep], dense.entropy)
    (dhidden, dweight), (expected_dhidden, expected_dweight) = gradients(inputs), gradients(alone)
    assert torch.equal(dhidden[keep], expected_dhidden)
    assert torch.equal(dweight, expected_dweight) and dweight.abs().sum() > 0
    torch.testing.assert_close(skipping.loss, dense.loss, rtol=3e-7, atol=0)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("off_policy", (False, True))
@methods
def test_skipping_differs_from_dense_by_no_more_than_the_order_of_sums(
    loss: str, method: str, off_policy: bool
) -> None:
    """Rows of other chunks, and other rows in a chunk: a few units of the largest value."""
    for chunk_rows in (8, 5):
        found: list[tuple[Tensor, ...]] = []
        for skip_rows in (False, True):
            inputs = Inputs()
            output = inputs.run(
                config=config_of(loss), method=method, chunk_rows=chunk_rows, skip_rows=skip_rows,
                backend="torch", old_logps=inputs.old_logps if off_policy else None,
            )  # fmt: skip
            found.append((output.loss.detach(), output.logps, output.entropy, *gradients(inputs)))
            assert output.metrics["num_computed_rows"] == 24
            assert output.metrics["num_gradient_rows"] == (10 if skip_rows else 24)
            inactive = [*range(3, 11), *range(18, 24)]
            assert (found[-1][3][inactive] == 0).all()
        for dense, skipping in zip(*found, strict=True):
            unit = torch.finfo(torch.float32).eps * dense.abs().max().item()
            torch.testing.assert_close(skipping, dense, rtol=0, atol=8 * unit)


@pytest.mark.parametrize(
    ("backend", "loss"), [("triton", "gspo"), *(("torch", loss) for loss in COUPLED)]
)
def test_chunks_of_sequences_give_what_one_chunk_of_all_gives(
    backend: str, loss: str, small_blocks: None
) -> None:
    """Whole sequences together, sequences longer than a chunk apart, an empty one in between."""
    found: list[tuple[Tensor, ...]] = []
    for chunk_rows in (24, 7) if backend == "triton" else (24, 11, 8, 7, 3, 1):
        inputs = Inputs()
        output = inputs.run(
            config=config_of(loss, entropy_coef=0.1, beta=0.1), backend=backend,
            chunk_rows=chunk_rows, method="single_pass", old_logps=inputs.old_logps,
            ref_logps=inputs.old_logps + 0.1,
        )  # fmt: skip
        found.append((output.loss.detach(), output.logps, *gradients(inputs)))
    for others in found[1:]:
        for value, expected in zip(others, found[0], strict=True):
            unit = torch.finfo(torch.float32).eps * expected.abs().max().item()
            torch.testing.assert_close(value, expected, rtol=0, atol=16 * unit)
