"""Where our module and Liger's do not agree, and what either costs.

B sequences, T positions, H hidden, V vocabulary.
"""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist
from liger_calls import DEVICE, LOSSES, B, assert_close, make_call, run
from torch import Tensor

from benchmarks.measure import FlopCounter, LiveBytes
from fastgrpo.integrations.liger import FusedLinearGRPOLoss
from fastgrpo_kernels import _backend, _products, _row_torch, reference

pytestmark = pytest.mark.peers
liger: Any = pytest.importorskip("liger_kernel.chunked_loss")
its_chunks: Any = pytest.importorskip("liger_kernel.chunked_loss.fused_linear_ppo")
LigerFusedLinearGRPOLoss = liger.LigerFusedLinearGRPOLoss
TOLERANCE = 5e-6  # as in test_liger_same.py

LUSPO = LOSSES["luspo-sequence"]


@pytest.mark.parametrize("change", [{"importance_sampling_level": "token"}, {"beta": 0.3}])
def test_luspo_is_refused_where_liger_trains_on_padding(change: dict[str, Any]) -> None:
    options, call = {**LUSPO, **change}, make_call()
    padding = (call["attention_mask"] == 0) & (call["attention_mask"].sum(1, keepdim=True) > 0)
    its = run(LigerFusedLinearGRPOLoss, options, call)
    assert (its.gradients["_input"][padding] != 0).any()
    with pytest.raises(ValueError, match=r"loss_type='luspo' with .* trains on padding in Liger"):
        run(FusedLinearGRPOLoss, options, call)


def test_what_stands_behind_the_mask_reaches_liger_only() -> None:
    call, dirty = make_call(), make_call()
    hidden, padding = dirty["_input"].detach(), dirty["attention_mask"] == 0
    dirty["_input"] = hidden.masked_fill(padding[..., None], torch.nan).requires_grad_()
    for name in ("old_per_token_logps", "ref_per_token_logps"):
        dirty[name] = dirty[name].masked_fill(padding, torch.nan)
    assert run(LigerFusedLinearGRPOLoss, {}, dirty).loss.isnan()
    mine, its = run(FusedLinearGRPOLoss, {}, dirty), run(LigerFusedLinearGRPOLoss, {}, call)
    assert_close(mine.loss, its.loss, "loss", TOLERANCE)
    for name, gradient in its.gradients.items():
        assert_close(mine.gradients[name], gradient, name, TOLERANCE)
    for x, y in zip(mine.metrics, its.metrics, strict=True):
        assert_close(x, y, "metric", TOLERANCE)


def test_a_nan_where_the_advantage_is_0_reaches_liger_only_unless_it_meets_the_kl() -> None:
    call = make_call()
    hidden = call["_input"].detach().clone()
    hidden[4] = torch.nan  # the sequence without an advantage
    call["_input"] = hidden.requires_grad_()
    for beta in (0.0, 0.3):
        assert run(LigerFusedLinearGRPOLoss, {"beta": beta}, call).loss.isnan()
        assert run(FusedLinearGRPOLoss, {"beta": beta}, call).loss.isnan() == (beta > 0)


def test_a_policy_that_ran_away_overflows_liger_only() -> None:
    call = make_call(mask="full") | {"advantages": torch.full((B,), -1.0, device=DEVICE)}
    call["old_per_token_logps"] = call["old_per_token_logps"] - 100
    assert run(LigerFusedLinearGRPOLoss, {"beta": 0.0}, call).loss.isinf()
    mine = run(FusedLinearGRPOLoss, {"beta": 0.0}, call)
    assert mine.loss == pytest.approx(torch.tensor(60.0).exp().item(), rel=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_counts_of_a_16_bit_mask_are_rounded_in_liger_only(dtype: str) -> None:
    call, exact = make_call(mask=dtype), make_call(mask="int64")
    its, mine = run(LigerFusedLinearGRPOLoss, {}, call), run(FusedLinearGRPOLoss, {}, call)
    right = run(LigerFusedLinearGRPOLoss, {}, exact)
    assert_close(mine.metrics[1], right.metrics[1], "clip fraction", 1e-7)
    if dtype == "bfloat16":
        assert (its.metrics[1] - right.metrics[1]).abs() > 1e-5
    assert_close(its.metrics[1], right.metrics[1], "clip fraction", 2**-8)
    assert_close(mine.loss, right.loss, "loss", TOLERANCE)


def test_only_liger_leaves_a_given_reference_unread() -> None:
    options: dict[str, Any] = {"beta": 0.3, "use_ref_model": False}
    its = run(LigerFusedLinearGRPOLoss, options, make_call())
    without = run(LigerFusedLinearGRPOLoss, options, make_call(reference="none"))
    assert its.loss == without.loss and its.metrics[0] == 0
    with pytest.raises(ValueError, match=r"would leave the reference unread at beta=0\.3"):
        run(FusedLinearGRPOLoss, options, make_call())


def test_only_liger_takes_a_delta_inside_of_the_clip_range() -> None:
    assert run(LigerFusedLinearGRPOLoss, {"delta": 1.1}, make_call()).loss.isfinite()
    with pytest.raises(ValueError, match=r"delta must be .* above 1 \+ epsilon_high = 1.2"):
        FusedLinearGRPOLoss(delta=1.1)


@pytest.mark.parametrize("head", [torch.bfloat16, torch.float32])
def test_gradients_in_bf16_are_as_near_to_fp64_as_those_of_pytorch(head: torch.dtype) -> None:
    """Liger's are nearer: its products of gradients are in fp32. 17 rows are few to compare by."""
    call = make_call()
    names = ("_input", "lin_weight", "bias")
    for name in names:
        dtype = torch.bfloat16 if name == "_input" else head
        call[name] = call[name].detach().bfloat16().to(dtype).requires_grad_()

    def in_torch(dtype: torch.dtype) -> dict[str, Tensor]:
        leaves = [call[name].detach().to(dtype).requires_grad_() for name in names]
        loss = reference.linear_grpo_loss(
            *leaves[:2],
            call["selected_token_ids"],
            call["advantages"],
            bias=leaves[2],
            completion_mask=call["attention_mask"],
            old_logps=call["old_per_token_logps"],
        ).loss
        return dict(zip(names, torch.autograd.grad(0.7 * loss, leaves), strict=True))

    exact, naive = in_torch(torch.float64), in_torch(torch.bfloat16)

    def error(gradients: dict[str, Tensor], name: str) -> float:
        return ((gradients[name].double() - exact[name]).norm() / exact[name].norm()).item()

    mine = run(FusedLinearGRPOLoss, {"beta": 0.0}, call).gradients
    its = run(LigerFusedLinearGRPOLoss, {"beta": 0.0}, call).gradients
    for name in names:
        assert mine[name].dtype == its[name].dtype == call[name].dtype
        assert error(its, name) < error(mine, name) < 1.5 * error(naive, name), name


def costs(module: type, *, frozen: bool, reference: bool) -> tuple[float, int]:
    """Return FLOPs over NHV, counting the padding, and bytes at the peak."""
    g = torch.Generator().manual_seed(0)
    V, H, N, T = 16384, 128, 4, 64
    hidden = torch.randn(N, T, H, generator=g).bfloat16().requires_grad_()
    weight = torch.randn(V, H, generator=g).bfloat16().requires_grad_(not frozen)
    call: dict[str, Any] = {
        "_input": hidden,
        "lin_weight": weight,
        "selected_token_ids": torch.randint(V, (N, T), generator=g),
        "attention_mask": (torch.arange(T) < T // 2).expand(N, T).long().contiguous(),
        "advantages": torch.tensor([1.0, 0.0, -1.0, 0.0]),
        "old_per_token_logps": torch.full((N, T), -8.0),
    }
    if reference:
        call |= {"ref_input": 0.9 * hidden.detach(), "ref_weight": weight.detach()}
    loss = module(compiled=False, beta=0.1 if reference else 0.0, use_ref_model=reference)
    with LiveBytes(*call.values()) as memory, FlopCounter() as flops:
        loss(**call)[0].backward()
    return flops.get_total_flops() / (N * T * H * V), memory.peak


@pytest.mark.parametrize(
    ("frozen", "reference", "mine", "its"),
    [
        # Half of the rows count, of half of those the advantage is 0.
        (False, False, 6 / 4, 8),
        (True, False, 4 / 4, 6),
        (False, True, (2 + 6) / 2, 2 + 8),
        (True, True, (2 + 4) / 2, 2 + 6),
    ],
)
def test_it_computes_less_than_liger(
    frozen: bool, reference: bool, mine: float, its: float
) -> None:
    assert costs(FusedLinearGRPOLoss, frozen=frozen, reference=reference)[0] == mine
    assert costs(LigerFusedLinearGRPOLoss, frozen=frozen, reference=reference)[0] == its


@pytest.mark.parametrize("reference", [False, True])
def test_it_needs_less_memory_than_liger_with_a_16_bit_head_that_is_trained(
    reference: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a head, and with chunks and slices, 64 times smaller than those of a 0.6B model.

    Liger holds, of each chunk, a gradient of the head in fp32 and in 16 bits, and the sum; we an
    fp32 sum, and what it is rounded to.
    """
    mib = 2**20 // 64
    monkeypatch.setattr(_backend, "MIB", mib)
    monkeypatch.setattr(_products, "MIB", mib)
    monkeypatch.setattr(_row_torch, "_CPU_SLAB_BYTES", 4 * mib)
    monkeypatch.setattr(its_chunks, "_SELECTIVE_LOGPROB_VOCAB_CHUNK_SIZE", 4096 // 64)
    mine = costs(FusedLinearGRPOLoss, frozen=False, reference=reference)[1]
    its = costs(LigerFusedLinearGRPOLoss, frozen=False, reference=reference)[1]
    in_fp32 = 4 * 16384 * 128
    assert in_fp32 < mine < 1.8 * in_fp32
    assert its > 2 * in_fp32


def test_liger_is_not_imported() -> None:
    code = "import sys, fastgrpo.integrations.liger; print('liger_kernel' in sys.modules)"
    path = ":".join(sys.path)
    out = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert (out.stdout, out.stderr) == ("False\n", "")


def _rank(rank: int, meeting: str) -> None:
    """Compare on one rank of two, each with a micro-batch of its own."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    for loss in ("dapo", "cispo", "vespo", "grpo", "bnpo"):
        for items in (None, 50, torch.tensor(50)):
            call = make_call(items=items)
            call["attention_mask"][rank:3] = 0  # as many tokens as there are not on the other rank
            mine = run(FusedLinearGRPOLoss, LOSSES[loss], call)
            its = run(LigerFusedLinearGRPOLoss, LOSSES[loss], call)
            assert_close(mine.loss, its.loss, f"{loss} {items}", TOLERANCE)
            for name, gradient in its.gradients.items():
                assert_close(mine.gradients[name], gradient, name, TOLERANCE)
    dist.destroy_process_group()


def test_ranks_share_the_tokens_of_the_step_as_in_liger(tmp_path: Any) -> None:
    torch.multiprocessing.spawn(_rank, ((tmp_path / "meeting").as_uri(),), nprocs=2)
