"""Bytes alive at the peak of a call: formulas for both methods, and the budgets that they keep."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from counting import LiveBytes, config_of, silence_kernels
from loss_cases import BACKENDS, DEVICE
from torch import Tensor

from fastgrpo_kernels import (
    _backend,
    _products,
    _recompute,
    _row_torch,
    linear_grpo_loss,
    linear_logps,
)

ON_CPU = DEVICE == "cpu"
N, H, V, C = 96, 8, 64, 12
SLICE = 16 * 32  # bytes of the converted slices of 16-bit products, here 512 instead of 16 MiB
SCALED = 16 * 32  # elements of a gradient that backward scales at a time, instead of 16 Mi
SCALARS = 160  # 0-d tensors


@pytest.fixture(autouse=True)
def silent(monkeypatch: pytest.MonkeyPatch) -> None:
    silence_kernels(monkeypatch)


@dataclass
class Call:
    """A loss of 96 tokens in 8 sequences, and which of its vectors have how many bytes a token."""

    loss: str = "dapo"
    off_policy: bool = False
    listed: bool = False  # every other row is inactive
    beta: float = 0.0
    softcap: float | None = None
    entropy_coef: float = 0.0
    fp32_logits: bool = False

    @property
    def coupled(self) -> bool:
        return self.loss in ("gspo", "vespo", "gmpo")

    @property
    def surrogate(self) -> bool:
        return self.coupled and not self.off_policy

    def kept_vectors(self) -> int:
        """Bytes a token that are alive with a chunk in the single pass."""
        results = 4 * (6 if self.beta else 5)  # log-prob, entropy, loss, policy term, report; KL
        factors = 4 * (self.loss in ("gspo", "gmpo"))  # weight of the row: 1 / length
        factors += 8 * (self.entropy_coef != 0)  # the bonus's weight and its negative
        factors += 4 * self.surrogate  # the slope of the surrogate
        statistics = 12 if self.coupled and self.off_policy else 0  # largest, log_sum, dlogps
        return results + factors + statistics + 1 + 8 * self.listed  # what a row is, the order


CALLS = {
    "plain": Call(),
    "kl": Call(beta=0.1),
    "skipping": Call(listed=True),
    "softcap": Call(softcap=5.0),
    "entropy": Call(entropy_coef=0.1),
    "softcap-entropy": Call(softcap=5.0, entropy_coef=0.1),
    "fp32-logits": Call(fp32_logits=True),
    "off-policy-gspo": Call(loss="gspo", off_policy=True),
    "on-policy-gspo": Call(loss="gspo"),
    "off-policy-vespo": Call(loss="vespo", off_policy=True),
}
types = pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
backends = pytest.mark.parametrize("backend", BACKENDS)


def make_call(c: Call, dtype: torch.dtype) -> tuple[list[Tensor], dict[str, Any]]:
    """Return hidden states, weight, ids, advantages, and the other arguments."""
    torch.manual_seed(0)
    hidden = torch.randn(N, H, device=DEVICE).to(dtype).requires_grad_()
    weight = torch.randn(V, H, device=DEVICE).to(dtype).requires_grad_()
    ids, advantages = torch.randint(V, (N,), device=DEVICE), torch.ones(N, 1, device=DEVICE)
    if c.listed:
        advantages[::2] = 0
    arguments: dict[str, Any] = {"fp32_logits": c.fp32_logits}
    arguments["config"] = config_of(
        c.loss, beta=c.beta, logit_softcap=c.softcap, entropy_coef=c.entropy_coef
    )
    if c.off_policy:
        arguments["old_logps"] = torch.full((N,), -3.0, device=DEVICE)
    if c.beta:
        arguments["ref_logps"] = torch.zeros(N, device=DEVICE)
    if c.coupled:
        arguments["cu_seqlens"] = torch.arange(0, N + 1, C, dtype=torch.int32, device=DEVICE)
    return [hidden, weight, ids, advantages], arguments


def peaks(
    tensors: list[Tensor], upstream: float = 1.0, *, keep_graph: bool = False, **arguments: Any
) -> tuple[int, int, LiveBytes]:
    """Return the peaks of forward and of backward."""
    given = [x for x in arguments.values() if isinstance(x, Tensor)]
    with LiveBytes(*tensors, *given) as live:
        output = linear_grpo_loss(*tensors, **arguments)  # pyright: ignore[reportArgumentType]
        forward, live.peak = live.peak, 0
        (output.loss * upstream).backward(retain_graph=keep_graph)
    return forward, live.peak, live


def temporaries(c: Call, dtype: torch.dtype, backend: str, rows: int, columns: int) -> int:
    """Return the most that a matrix of logits needs beside itself, in bytes.

    The torch row step holds two fp32 matrices of a slab, three with softcap, and one of bool. A CPU
    adds up products of 16-bit matrices from one slice of each operand in fp32.
    """
    products = rows * H * 4
    if dtype == torch.bfloat16 and ON_CPU:
        # dX of the rows is there when dW is added.
        products = rows * H * (2 + 4) + rows * min(SLICE // (4 * rows), columns) * 4
    if backend == "triton":
        return products
    statistics = 4 + 4
    gradient = 4 + (4 if c.softcap else 0) + (4 + 1 if c.entropy_coef else 0)
    slope = 4 + 4 + 4 if c.softcap else 0
    return max(products, rows * columns * max(statistics, gradient, slope))


def logits_bytes(c: Call, dtype: torch.dtype) -> int:
    """Bytes of a logit: of its value, and of its gradient where that does not take its place."""
    apart = c.fp32_logits and dtype == torch.bfloat16
    return 4 + 2 if apart else dtype.itemsize


@backends
@types
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("keep_graph", [False, True])
def test_peak_of_the_single_pass(
    backend: str,
    dtype: torch.dtype,
    name: str,
    keep_graph: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A chunk, dX, dW in fp32 and 21 to 61 bytes a token; 8 of those are returned."""
    monkeypatch.setattr(_products, "MIB", 32)
    c = CALLS[name]
    tensors, arguments = make_call(c, dtype)
    forward, backward, live = peaks(
        tensors,
        method="single_pass",
        chunk_rows=C,
        backend=backend,
        keep_graph=keep_graph,
        **arguments,
    )
    # Nothing as large as the logits of all tokens, N being 8 chunks.
    assert live.largest_tensor == max(C * V, N * H, V * H)

    itemsize = dtype.itemsize
    accumulators = N * H * itemsize + 4 * V * H  # dX as it will be returned, dW in fp32
    chunk = C * V * logits_bytes(c, dtype) + c.listed * C * H * itemsize
    chunk += temporaries(c, dtype, backend, C, V)
    tokens, slack = N * c.kept_vectors(), SCALARS
    if backend == "torch":
        # Where Triton's kernel has them in registers: largest logit, log of the sum, derivative.
        tokens += 0 if c.coupled and c.off_policy else 12 * N
        slack += 64 * C
    expected = accumulators + tokens + chunk
    if backend == "triton" and c.coupled and not c.off_policy:
        # The surrogate is made before the first product: five results, and its slope.
        surrogate = N * (c.kept_vectors() + 24) + C * V * itemsize
        expected = max(expected, accumulators + surrogate)
    assert expected <= forward <= expected + slack

    # Backward: scaled copies, made in slices; the accumulators live on for a second backward. If
    # there will be none, what has the type of its gradient already is scaled where it is.
    expected = accumulators + 8 * N  # log-probs and entropies are returned
    if keep_graph or dtype != torch.float32:
        expected += N * H * itemsize + max(4 * SCALED, V * H * itemsize + 4 * SCALED)
    assert expected <= backward <= expected + SCALARS


@pytest.mark.parametrize("name", CALLS)
def test_peak_of_recompute(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tile, dX in fp32 and 41 to 61 bytes a token; nothing of the weight's size but dW."""
    rows, columns = C, 32
    monkeypatch.setattr(_recompute, "tile_shape", lambda *_: (rows, columns))
    c, dtype = CALLS[name], torch.float32
    tensors, arguments = make_call(c, dtype)
    forward, backward, live = peaks(tensors, method="recompute", backend="triton", **arguments)
    assert live.largest_tensor == max(N * H, V * H)
    tile = 4 * rows * columns + c.listed * 2 * 4 * rows * H  # rows of the tile before, too
    # Of each row over the slices seen: largest logit, sum, moment and target; log of the sum.
    tokens = N * (c.kept_vectors() - 12 * (c.coupled and c.off_policy) - 4 * c.surrogate + 20)
    tokens -= N * 4 * (c.entropy_coef != 0)
    # The metrics of coupled rows come after the tiles, and take more vectors than these do.
    assert tokens + tile <= forward <= tokens + tile + SCALARS + 16 * N * c.coupled
    # Backward: the sums of the slices are gone, the derivative by log-probs is there.
    # So are log-probs and entropies twice: those returned are the caller's.
    tokens += N * (4 - 12 + 8) + N * 4 * (c.entropy_coef != 0)
    sums = 4 * H * (N // 2 if c.listed else N) + 4 * H * columns + 4 * V * H
    end = 4 * N * H * c.listed  # rows go back to their places
    least = tokens + sums + tile
    assert least <= backward <= least + SCALARS + end


TILES = {
    "listed-small-head": (40_000, 16, 4096, {}),
    "fp32-logits": (8192, 16, 4096, {"fp32_logits": True}),
    "softcap-entropy": (4096, 64, 8192, {"logit_softcap": 5.0, "entropy_coef": 0.1}),
    "many-tokens": (131_072, 4, 1024, {"beta": 0.1, "entropy_coef": 0.1}),
}


@backends
@types
@pytest.mark.parametrize("shape", TILES)
def test_recompute_needs_no_more_than_4nh_and_128_mib(
    backend: str, dtype: torch.dtype, shape: str
) -> None:
    """With the tiles of real calls; every other row is skipped where there is no KL, no bonus."""
    tokens, hidden_size, vocabulary, options = TILES[shape]
    if backend == "torch" and tokens * vocabulary > 40e6:
        tokens = 40_000_000 // vocabulary
    options = dict(options)
    fp32_logits = options.pop("fp32_logits", False)
    hidden = torch.randn(tokens, hidden_size, device=DEVICE).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, hidden_size, device=DEVICE).to(dtype).requires_grad_()
    ids = torch.randint(vocabulary, (tokens,), device=DEVICE)
    advantages = (torch.arange(tokens, device=DEVICE) % 2).float()[:, None]
    ref_logps = torch.zeros(tokens, device=DEVICE) if "beta" in options else None
    forward, backward, _ = peaks(
        [hidden, weight, ids, advantages], method="recompute", backend=backend,
        ref_logps=ref_logps, fp32_logits=fp32_logits, config=config_of("dapo", **options),
    )  # fmt: skip
    results = 8 * tokens  # log-probs and entropies
    gradients = dtype.itemsize * hidden_size * (tokens + vocabulary)
    assert forward - results <= 128 * 2**20
    assert backward - results - gradients <= 4 * tokens * hidden_size + 128 * 2**20
    # Not much less either: small tiles read the hidden states more often than they must.
    if tokens * vocabulary > 100e6:
        assert backward > 64 * 2**20


@types
@pytest.mark.parametrize(("hidden_size", "vocabulary"), [(512, 128), (64, 2048)])
def test_rows_that_are_gathered_count_in_a_tile(
    dtype: torch.dtype, hidden_size: int, vocabulary: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Listed rows are copies, and those of two tiles exist at once; everything 64 times smaller."""
    mib = 2**20 // 64
    monkeypatch.setattr(_products, "MIB", mib)
    monkeypatch.setattr(_recompute, "TILE_BYTES", _recompute.TILE_BYTES // 64)
    tokens = 2000
    hidden = torch.randn(tokens, hidden_size, device=DEVICE).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, hidden_size, device=DEVICE).to(dtype).requires_grad_()
    ids = torch.randint(vocabulary, (tokens,), device=DEVICE)
    advantages = (torch.arange(tokens, device=DEVICE) % 8 != 0).float()[:, None]
    forward, backward, _ = peaks(
        [hidden, weight, ids, advantages], method="recompute", backend="triton"
    )
    results = 8 * tokens + dtype.itemsize * hidden_size * (tokens + vocabulary)
    assert forward <= 128 * mib
    assert backward - results <= 4 * tokens * hidden_size + 128 * mib


def test_peak_of_logps() -> None:
    hidden = torch.randn(N, H, device=DEVICE, requires_grad=True)
    weight = torch.randn(V, H, device=DEVICE, requires_grad=True)
    ids = torch.randint(V, (N,), device=DEVICE)
    with LiveBytes(hidden, weight, ids) as live:
        logps, entropy = linear_logps(hidden, weight, ids, chunk_rows=C, backend="triton")
        forward = live.peak
        (logps.sum() + entropy.sum()).backward()
    assert live.largest_tensor == max(C * V, N * H, V * H)
    # Log-probs and entropies, and for backward the largest logit and the log of the sum.
    assert 0 <= forward - (4 * C * V + 16 * N) <= 64
    # dX and dW themselves, the gradients of log-probs and entropies, and one product.
    expected = 4 * C * V + 4 * N * H + 4 * V * H + 24 * N + 4 * C * H
    assert 0 <= live.peak - expected <= 64


@types
@pytest.mark.parametrize("method", ("single_pass", "recompute"))
def test_a_gradient_buffer_is_the_only_tensor_of_its_size(
    method: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The peak is lower by all of dW: the accumulator, or what would be returned."""
    monkeypatch.setattr(_products, "MIB", 32)
    vocabulary = 4096
    hidden = torch.randn(N, H, device=DEVICE).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, H, device=DEVICE).to(dtype).requires_grad_()
    buffer = torch.zeros(vocabulary, H, device=DEVICE)
    ids, advantages = torch.randint(vocabulary, (N,), device=DEVICE), torch.ones(N, 1).to(DEVICE)
    tensors, found = [hidden, weight, ids, advantages], {}
    for grad_buffer in (None, buffer):
        live = LiveBytes(*tensors, buffer)
        with live:
            output = linear_grpo_loss(
                *tensors, method=method, chunk_rows=C, backend="triton", grad_buffer=grad_buffer
            )  # pyright: ignore[reportCallIssue, reportArgumentType]
            found[grad_buffer is None, "forward"], live.peak = live.peak, 0
            output.loss.backward()
        found[grad_buffer is None, "backward"] = live.peak
    saved = 4 * vocabulary * H if method == "single_pass" else 0
    assert found[True, "forward"] - found[False, "forward"] == pytest.approx(saved, abs=2 * SLICE)
    if method == "recompute" or dtype != torch.float32:  # else it is scaled where it is
        saved += dtype.itemsize * vocabulary * H
    assert found[True, "backward"] - found[False, "backward"] == pytest.approx(saved, abs=8 * SLICE)


# Not Triton in bf16: only tests run it on a CPU, where its products convert slices on top.
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("torch", torch.float32), ("torch", torch.bfloat16), ("triton", torch.float32)],
)
@pytest.mark.parametrize("name", ("plain", "softcap", "softcap-entropy", "fp32-logits"))
def test_default_chunk_stays_within_the_budget(
    backend: str, dtype: torch.dtype, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mib = 2**20 // 32
    monkeypatch.setattr(_backend, "MIB", mib)
    monkeypatch.setattr(_products, "MIB", mib)
    monkeypatch.setattr(_row_torch, "_CPU_SLAB_BYTES", 4 * mib)
    budget, c = 256 * mib, CALLS[name]
    rows, hidden_size, vocabulary = 700, 4, 3000
    hidden = torch.randn(rows, hidden_size, device="cpu").to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, hidden_size, device="cpu").to(dtype).requires_grad_()
    ids, advantages = torch.randint(vocabulary, (rows,)), torch.ones(rows, 1)
    config = config_of("dapo", logit_softcap=c.softcap, entropy_coef=c.entropy_coef)

    def loss() -> Tensor:
        return linear_grpo_loss(
            hidden, weight, ids, advantages, backend=backend, config=config,
            fp32_logits=c.fp32_logits,
        ).loss  # fmt: skip

    def logps() -> Tensor:
        logps, entropy = linear_logps(
            hidden, weight, ids, backend=backend, logit_softcap=c.softcap, fp32_logits=c.fp32_logits
        )
        return logps.sum() + entropy.sum()

    accumulators = 4 * rows * hidden_size + 4 * vocabulary * hidden_size + 50 * rows
    calls: list[Callable[[], Tensor]] = [loss, logps]
    for call in calls:
        with LiveBytes(hidden, weight, ids, advantages) as live:
            result, forward = call(), live.peak
            result.backward()
        peak = forward if call is loss else live.peak
        # Not much less either: small chunks read the weight more often than they must.
        assert budget / 2 < peak <= budget + accumulators, call


@pytest.mark.parametrize("vocabulary", (50_000, 151_936))
@backends
def test_default_chunk_rows(backend: str, vocabulary: int) -> None:
    from fastgrpo_kernels import _row_triton

    def rows(**changes: Any) -> int:
        arguments: dict[str, Any] = {
            "num_rows": 100_000,
            "hidden_size": 1024,
            "vocabulary": vocabulary,
            "dtype": torch.bfloat16,
            "logits_dtype": torch.bfloat16,
            "device": torch.device("cpu"),
            "backend": _row_triton if backend == "triton" else _row_torch,
            "with_weight_gradient": True,
        }
        return _backend.chunk_rows_for(None, **(arguments | changes))

    budget = (256 - (16 if backend == "torch" else 0)) * 2**20  # less the torch row step's slabs
    a_row = vocabulary * 2 + 1024 * 6
    assert rows() * a_row <= budget < (rows() + 16) * a_row
    assert rows() % 16 == 0
    wide_row = vocabulary * (2 + 4) + 1024 * 6  # the gradient has a place of its own
    wide = rows(logits_dtype=torch.float32)
    assert wide * wide_row <= budget < (wide + 16) * wide_row
    assert rows(num_rows=7) == 7
    assert rows(num_rows=0) == 1
    assert rows(vocabulary=10**9) == 1
