"""What must not change the loss: how a step is cut up, its order, its padding, its chunks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loss_cases import (
    DEVICE,
    Case,
    Result,
    assert_same,
    factors,
    linear_result,
    logits_result,
    make_case,
)
from loss_matrix import FAMILIES
from torch import Tensor

from fastgrpo_kernels import grpo_loss, linear_grpo_loss, reference

settings.register_profile("kernels", deadline=None, max_examples=15, derandomize=True)
few = settings.get_profile("kernels")


@st.composite
def cases(draw: st.DrawFn, families: Any = FAMILIES, **fixed: Any) -> Case:
    """Random sizes, options and masks; `fixed` replaces an option that would be drawn."""
    name, level = draw(st.sampled_from(families))
    config: dict[str, Any] = {
        "loss_type": name,
        "importance_sampling_level": level,
        "beta": draw(st.sampled_from([0.0, 0.2])),
        "kl_estimator": draw(st.sampled_from(["k3", "k1", "k2"])),
        "use_bias_correction_kl": draw(st.booleans()),
        "delta": draw(st.sampled_from([None, 1.5])),
        "cispo_bounds": "verl",
        "temperature": draw(st.sampled_from([1.0, 0.7])),
        "logit_scale": draw(st.sampled_from([1.0, 0.5])),
        "logit_softcap": draw(st.sampled_from([None, 3.0])),
        "entropy_coef": draw(st.sampled_from([0.0, 0.1])),
        "skip_empty_sequences": draw(st.booleans()),
    }
    case = make_case(
        sequences=draw(st.integers(2, 4)),
        length=draw(st.integers(1, 4)),
        hidden_size=4,
        vocabulary=draw(st.integers(2, 20)),
        seed=draw(st.integers(0, 1000)),
        off_policy=draw(st.booleans()),
        per_token=draw(st.booleans()),
        masked=False,
        **config | fixed,
    )
    if draw(st.booleans()):
        case = factors(case)
    keep = draw(st.sampled_from([0.2, 0.7, 1.0]))
    mask = (torch.rand(case.ids.shape) < keep).to(DEVICE)
    # A dead group: rows that count and have no gradient.
    dead = torch.rand(case.advantages.shape).to(DEVICE) < 0.2
    case.advantages.masked_fill_(dead, 0)
    return case.having(completion_mask=mask)


@few
@given(
    cases(),
    st.sampled_from(["single_pass", "recompute"]),
    st.integers(1, 8),
    st.booleans(),
    st.sampled_from(["all", "active"]),
)
def test_is_the_reference_in_fp64(
    case: Case, method: str, chunk_rows: int, skip_rows: bool, statistics: str
) -> None:
    expected = linear_result(reference.linear_grpo_loss, case)
    statistics = statistics if skip_rows else "all"
    ways = {"method": method, "chunk_rows": chunk_rows, "skip_rows": skip_rows}
    options = {"backend": "torch", "statistics": statistics, **ways}
    actual = linear_result(linear_grpo_loss, case, **options)
    if statistics == "all":
        assert_same(actual, expected, rtol=1e-8, atol=1e-10)
    for name, gradient in expected.gradients.items():
        torch.testing.assert_close(actual.gradients[name], gradient, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(actual.output.loss, expected.output.loss, rtol=1e-8, atol=1e-10)
    for inplace in (False, True):
        actual = logits_result(grpo_loss, case, inplace=inplace, backend="torch")
        expected = logits_result(reference.grpo_loss, case)
        assert_same(actual, expected, rtol=1e-8, atol=1e-10)


@settings(few, max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cases(), st.sampled_from(["single_pass", "recompute", "inplace", ""]), st.integers(1, 8))
def test_is_the_reference_on_triton(
    small_blocks: None, case: Case, path: str, chunk_rows: int
) -> None:
    case = case.to(torch.float32)
    if path in ("single_pass", "recompute"):
        options = {"backend": "triton", "method": path, "chunk_rows": chunk_rows}
        actual = linear_result(linear_grpo_loss, case, **options)
        expected = linear_result(reference.linear_grpo_loss, case.to(torch.float64))
    else:
        actual = logits_result(grpo_loss, case, inplace=bool(path), backend="triton")
        expected = logits_result(reference.grpo_loss, case, logits=case.logits.double())
    assert_same(actual, expected, rtol=1e-4, atol=1e-5)


def run(case: Case, **options: Any) -> Result:
    return linear_result(linear_grpo_loss, case.to(torch.float32), backend="torch", **options)


def pick(case: Case, which: Tensor | slice, **arguments: Any) -> Case:
    """Some of the sequences of a case."""
    rows = len(case.ids)
    picked = {
        k: v[which] if isinstance(v, Tensor) and v.dim() and len(v) == rows else v
        for k, v in case.arguments.items()
    }
    return replace(
        case,
        hidden=case.hidden[which],
        ids=case.ids[which],
        advantages=case.advantages[which],
        arguments={**picked, **arguments},
    )


def close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=3e-6)


def same_loss_and_head(actual: Result, expected: Result) -> None:
    close(actual.output.loss, expected.output.loss)
    for name in ("weight", "bias"):
        close(actual.gradients[name], expected.gradients[name])


@few
@given(
    # bnpo is local by definition, and nobody knows how many sequences of other ranks are empty.
    cases([f for f in FAMILIES if f[0] != "bnpo"], skip_empty_sequences=False),
    st.integers(1, 4),
)
def test_a_step_may_be_cut_into_micro_batches(case: Case, cut: int) -> None:
    whole = run(case)
    step = {
        "num_items_in_batch": int(case.mask.sum()),
        "num_sequences_in_batch": torch.tensor(len(case.ids)),
        "entropy_denominator": (case.arguments.get("entropy_mask", 1.0) * case.mask.float()).sum(),
    }
    cut = min(cut, len(case.ids) - 1)
    parts = [run(pick(case, part, **step)) for part in (slice(0, cut), slice(cut, None))]
    close(sum(p.output.loss for p in parts), whole.output.loss)
    for name in ("weight", "bias"):
        close(sum(p.gradients[name] for p in parts), whole.gradients[name])
    close(torch.cat([p.gradients["hidden"] for p in parts]), whole.gradients["hidden"])


@few
@given(cases(), st.randoms(use_true_random=False))
def test_sequences_may_come_in_any_order(case: Case, random: Any) -> None:
    order = list(range(len(case.ids)))
    random.shuffle(order)
    which = torch.tensor(order, device=DEVICE)
    whole, shuffled = run(case), run(pick(case, which))
    same_loss_and_head(shuffled, whole)
    close(shuffled.gradients["hidden"], whole.gradients["hidden"][which])
    for name, value in whole.output.metrics.items():
        close(shuffled.output.metrics[name], value)


@few
@given(cases(), st.integers(1, 3), st.booleans())
def test_masked_tokens_may_be_added(case: Case, extra: int, left: bool) -> None:
    sides = (extra, 0) if left else (0, extra)
    rows, length = case.ids.shape

    def pad(x: Tensor, value: float = torch.nan) -> Tensor:
        return torch.nn.functional.pad(x, sides, value=value)

    # One value per sequence, (B,) or (B, 1), has none to add to; nor is (B, T) one if T is 1 here.
    arguments = {
        k: pad(v) if isinstance(v, Tensor) and v.is_floating_point() and k != "policy_weight" else v
        for k, v in case.arguments.items()
    }
    arguments["completion_mask"] = pad(case.mask.float(), 0.0)
    advantages = case.advantages
    if advantages.dim() == 2:
        advantages = pad(advantages)
    longer = replace(
        case,
        hidden=torch.nn.functional.pad(case.hidden, (0, 0, *sides), value=torch.nan),
        ids=pad(case.ids, -100),
        advantages=advantages,
        arguments=arguments,
    )
    assert longer.ids.shape == (rows, length + extra)
    expected, actual = run(case), run(longer)
    same_loss_and_head(actual, expected)
    real = slice(extra, None) if left else slice(0, length)
    close(actual.gradients["hidden"][:, real], expected.gradients["hidden"])
    assert int((actual.gradients["hidden"] != 0).sum()) == int(
        (expected.gradients["hidden"] != 0).sum()
    )


@few
@given(cases(), st.sampled_from([-1.0, 1 / 7, 64.0]))
def test_the_gradient_is_linear_in_the_upstream_gradient(case: Case, upstream: float) -> None:
    expected, actual = run(case), run(case, upstream=upstream)
    for name, gradient in actual.gradients.items():
        close(gradient / upstream, expected.gradients[name])


@few
@given(cases(), st.integers(1, 30), st.booleans())
def test_chunks_may_have_any_size(case: Case, chunk_rows: int, skip_rows: bool) -> None:
    expected = run(case)
    actual = run(case, chunk_rows=chunk_rows, skip_rows=skip_rows)
    same_loss_and_head(actual, expected)
    close(actual.gradients["hidden"], expected.gradients["hidden"])
    close(actual.output.logps, expected.output.logps)


@few
@given(cases(), st.lists(st.integers(0, 5), min_size=5, max_size=5))
def test_padded_is_packed(case: Case, lengths: list[int]) -> None:
    rows, length = case.ids.shape
    length_B = torch.tensor(lengths[:rows]).clamp(max=length)
    keep = (torch.arange(length) < length_B[:, None]).to(DEVICE)
    padded = case.having(completion_mask=case.mask & keep)
    arguments = {
        k: v[keep]
        if isinstance(v, Tensor) and v.shape == keep.shape and k != "policy_weight"
        else v
        for k, v in case.arguments.items()
    }
    cu_seqlens = torch.nn.functional.pad(length_B.cumsum(0), (1, 0)).to(DEVICE, torch.int32)
    if "policy_weight" in arguments:
        arguments["policy_weight"] = arguments["policy_weight"].view(-1)
    advantages = case.advantages
    if advantages.dim() == 2:
        advantages = advantages[keep][:, None]  # a column: one a token
    packed = replace(
        case,
        hidden=case.hidden[keep],
        ids=case.ids[keep],
        advantages=advantages,
        arguments={**arguments, "cu_seqlens": cu_seqlens},
    )
    if "importance_sampling_ratio" in arguments:
        ratio = arguments["importance_sampling_ratio"][:, None]
        packed = packed.having(importance_sampling_ratio=ratio)
    expected, actual = run(padded), run(packed)
    same_loss_and_head(actual, expected)
    close(actual.gradients["hidden"], expected.gradients["hidden"][keep])
    assert (expected.gradients["hidden"][~keep] == 0).all()


@pytest.mark.parametrize("chunk_rows", [1, 4, 100])
def test_chunks_may_have_any_size_on_triton(chunk_rows: int, small_blocks: None) -> None:
    case = factors(make_case(beta=0.1, loss_type="grpo")).to(torch.float32)
    expected = linear_result(linear_grpo_loss, case, backend="triton")
    actual = linear_result(linear_grpo_loss, case, backend="triton", chunk_rows=chunk_rows)
    same_loss_and_head(actual, expected)
    close(actual.gradients["hidden"], expected.gradients["hidden"])
