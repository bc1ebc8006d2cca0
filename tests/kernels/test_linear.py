"""The fused loss from hidden states against `reference` in fp64, and all that its doc promises."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from loss_cases import (
    BACKENDS,
    DEVICE,
    DTYPES,
    Case,
    Result,
    assert_as_exact,
    assert_results_as_exact,
    assert_same,
    factors,
    linear_result,
    make_case,
    rounding_allowance,
)
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastgrpo_kernels import GRPOLossConfig, linear_grpo_loss, linear_logps, reference

CASES = {
    # what the numbers cover: a peaked head, factors, clipping, KL, temperature, skipped rows
    "dapo, everything": lambda: factors(make_case(beta=0.2, temperature=0.7, delta=1.5, seed=1)),
    "grpo, per-token, on policy": lambda: make_case(
        loss_type="grpo", per_token=True, off_policy=False, seed=2
    ),
    "bnpo, no mask": lambda: make_case(
        loss_type="bnpo", epsilon_low=0.05, epsilon_high=0.3, masked=False, seed=3
    ),
    "dr_grpo, denominators": lambda: make_case(loss_type="dr_grpo", seed=4).having(
        num_items_in_batch=50, num_sequences_in_batch=8
    ),
    "dapo, denominator a tensor": lambda: make_case(seed=5, off_policy=False).having(
        num_items_in_batch=torch.tensor(50)
    ),
}


def close_to(actual: Result, expected: Result) -> None:
    assert_same(actual, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_is_as_exact_as_the_reference(name: str, dtype: torch.dtype, backend: str) -> None:
    case = CASES[name]()
    exact = linear_result(reference.linear_grpo_loss, case)
    naive = linear_result(reference.linear_grpo_loss, case.to(dtype))
    # Four rows a chunk: 15 tokens are not a multiple of it, and dW adds up over chunks.
    actual = linear_result(linear_grpo_loss, case.to(dtype), backend=backend, chunk_rows=4)
    assert_results_as_exact(actual, naive, exact, dtype, backend)
    assert actual.output.loss.dtype == actual.output.logps.dtype == torch.float32
    for name, gradient in actual.gradients.items():
        assert gradient.dtype == dtype, name
        assert gradient.abs().max() > 0, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_weight_gradient_is_rounded_once_however_many_chunks(dtype: torch.dtype) -> None:
    case = make_case(sequences=2, length=40, masked=False, off_policy=False, per_token=True)
    exact = linear_result(reference.linear_grpo_loss, case)
    naive = linear_result(reference.linear_grpo_loss, case.to(dtype))
    actual = linear_result(linear_grpo_loss, case.to(dtype), backend="torch", chunk_rows=1)
    # Measured 0.9 to 1.2 times the naive error; 1.9 if chunks are added in the weight's type.
    values = (result.gradients["weight"] for result in (actual, naive, exact))
    assert_as_exact(*values, factor=1.25, what="dweight")


def test_real_block_size_takes_a_vocabulary_of_two_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(sequences=1, length=2, hidden_size=2, vocabulary=8200, masked=False)
    exact = linear_result(reference.linear_grpo_loss, case)
    naive = linear_result(reference.linear_grpo_loss, case.to(torch.float32))
    actual = linear_result(linear_grpo_loss, case.to(torch.float32), backend="triton")
    assert_results_as_exact(actual, naive, exact, torch.float32, "triton")


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_token_without_a_bias(backend: str) -> None:
    case = replace(make_case(sequences=1, length=1, masked=False, seed=3), bias=None)
    exact = linear_result(reference.linear_grpo_loss, case)
    close_to(linear_result(linear_grpo_loss, case.to(torch.float32), backend=backend), exact)


# ---------------------------------------------------------------- layouts and strides


def packed(case: Case, lead: tuple[int, ...], lengths: list[int], **arguments: Any) -> Case:
    """The first `lengths[i]` tokens of each sequence, one after the other, as (N,) or (1, N)."""
    keep = torch.arange(case.ids.shape[1]) < torch.tensor(lengths)[:, None]
    keep = keep.to(DEVICE)

    def flat(x: Tensor) -> Tensor:
        return x[keep].view(*lead, -1, *x.shape[2:]) if x[keep].numel() else x[keep]

    per_token = {
        k: flat(v) if isinstance(v, Tensor) and v.shape == case.ids.shape else v
        for k, v in case.arguments.items()
    }
    advantages = case.advantages
    if advantages.shape == case.ids.shape:
        advantages = flat(advantages)
    return replace(
        case,
        hidden=flat(case.hidden),
        ids=flat(case.ids),
        advantages=advantages,
        arguments={**per_token, **arguments},
    )


@pytest.mark.parametrize("lead", [(), (1,)], ids=["(N,)", "(1, N)"])
@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "bnpo", "dr_grpo"])
def test_packed_sequences_are_the_padded_ones(loss_type: str, lead: Any, backend: str) -> None:
    lengths = [3, 0, 5, 1]
    case = factors(make_case(sequences=4, loss_type=loss_type, beta=0.1, masked=False))
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    padded = case.having(completion_mask=mask.to(DEVICE)).to(torch.float32)
    cu_seqlens = torch.tensor([0, 3, 3, 8, 9], dtype=torch.int32, device=DEVICE)
    short = packed(case, lead, lengths, cu_seqlens=cu_seqlens).to(torch.float32)

    expected = linear_result(reference.linear_grpo_loss, padded)
    actual = linear_result(linear_grpo_loss, short, backend=backend)
    keep = mask.to(DEVICE)
    hidden_gradient = expected.gradients["hidden"]
    expected.gradients["hidden"] = hidden_gradient[keep].view(short.hidden.shape)
    out = expected.output
    flattened = {n: getattr(out, n)[keep].view(short.ids.shape) for n in ("logps", "entropy")}
    close_to(actual, Result(replace(out, **flattened), expected.gradients))


@pytest.mark.parametrize("loss_type", ["dapo", "bnpo"])
def test_token_means_need_no_cu_seqlens(loss_type: str, backend: str) -> None:
    case = make_case(loss_type=loss_type, per_token=True).to(torch.float32)
    flat = packed(case, (), [5, 5, 5])
    expected = linear_result(reference.linear_grpo_loss, case)
    actual = linear_result(linear_grpo_loss, flat, backend=backend)
    assert "num_sequences" not in actual.output.metrics
    assert actual.output.loss.item() == pytest.approx(expected.output.loss.item(), rel=1e-5)
    torch.testing.assert_close(
        actual.gradients["hidden"].view(3, 5, -1), expected.gradients["hidden"]
    )


def test_a_column_forces_per_token_when_there_are_as_many_sequences(backend: str) -> None:
    # Sequences of 0, 1 and 2 tokens: 3 of each.
    torch.manual_seed(0)
    hidden, weight = torch.randn(3, 4, device=DEVICE), torch.randn(7, 4, device=DEVICE)
    ids = torch.tensor([1, 2, 3], device=DEVICE)
    cu_seqlens = torch.tensor([0, 0, 1, 3], dtype=torch.int32, device=DEVICE)
    A = torch.tensor([1.0, 10.0, 100.0], device=DEVICE)

    def loss(advantages: Tensor, **arguments: Any) -> float:
        return linear_grpo_loss(
            hidden, weight, ids, advantages, cu_seqlens=cu_seqlens, backend=backend, **arguments
        ).loss.item()

    assert loss(A) == pytest.approx(-(10 + 100 + 100) / 3)
    assert loss(A[:, None]) == pytest.approx(-(1 + 10 + 100) / 3)
    ones = torch.ones_like(A)
    assert loss(ones, policy_weight=A) == pytest.approx(-(10 + 100 + 100) / 3)
    assert loss(ones, policy_weight=A[:, None]) == pytest.approx(-(1 + 10 + 100) / 3)


@pytest.mark.parametrize("kind", ["slice", "transposed", "packed slice"])
def test_strided_hidden_states_and_weights(kind: str, backend: str) -> None:
    case = make_case().to(torch.float32)
    if kind == "packed slice":
        case = packed(make_case(per_token=True).to(torch.float32), (), [5, 5, 5])
    wide = torch.full((*case.hidden.shape[:-2], case.hidden.shape[-2] + 3, 8), torch.nan)
    wide = wide.to(DEVICE)
    wide[..., 2:-1, :] = case.hidden
    view = wide[..., 2:-1, :]
    if kind == "transposed":
        view = case.hidden.transpose(0, 1).contiguous().transpose(0, 1)
        assert not view.is_contiguous()
    expected = linear_result(linear_grpo_loss, case, backend=backend, chunk_rows=4)
    leaves = [view.requires_grad_(), case.weight.t().contiguous().t().requires_grad_()]
    for skip_rows in (True, False):
        out = linear_grpo_loss(
            *leaves,
            case.ids,
            case.advantages,
            bias=case.bias,
            chunk_rows=4,
            skip_rows=skip_rows,
            backend=backend,
            **case.arguments,
        )
        actual = torch.autograd.grad(out.loss, leaves)
        torch.testing.assert_close(out.loss, expected.output.loss.detach())
        torch.testing.assert_close(actual[0], expected.gradients["hidden"])
        torch.testing.assert_close(actual[1], expected.gradients["weight"])


def test_one_advantage_for_one_sequence_of_many_tokens(backend: str) -> None:
    # A value per sequence is spread over its tokens as a view of stride 0.
    case = factors(make_case(sequences=1, masked=False, loss_type="grpo")).to(torch.float32)
    expected = linear_result(reference.linear_grpo_loss, case)
    close_to(linear_result(linear_grpo_loss, case, backend=backend), expected)
    plain = make_case(sequences=1, masked=False).to(torch.float32)
    expected = linear_result(reference.linear_grpo_loss, plain)
    close_to(linear_result(linear_grpo_loss, plain, backend=backend), expected)


@pytest.mark.parametrize(
    "name", ["ids", "advantages", "completion_mask", "old_logps", "ref_logps", "policy_weight"]
)
def test_strided_vectors(name: str, backend: str) -> None:
    case = factors(make_case(beta=0.1, per_token=True)).to(torch.float32)
    # `having` a weight per token, since it is the only factor left to stand for the others.
    case = case.having(
        importance_sampling_ratio=None, entropy_mask=None, policy_weight=torch.rand(3, 5) + 0.5
    )
    case = packed(case, (), [5, 5, 5])
    expected = linear_result(reference.linear_grpo_loss, case)

    def every_other(x: Tensor) -> Tensor:
        return torch.stack([x, torch.full_like(x, 1)], -1).flatten()[::2]

    if name in case.arguments:
        case = case.having(**{name: every_other(case.arguments[name])})
    else:
        case = replace(case, **{name: every_other(getattr(case, name))})
    for skip_rows in (True, False):
        actual = linear_result(linear_grpo_loss, case, backend=backend, skip_rows=skip_rows)
        close_to(actual, expected)
    logps, entropy = linear_logps(
        case.hidden, case.weight, case.ids, bias=case.bias, backend=backend
    )
    wanted = reference.linear_logps(case.hidden, case.weight, case.ids, bias=case.bias)
    torch.testing.assert_close(logps, wanted[0])
    torch.testing.assert_close(entropy, wanted[1])


# ---------------------------------------------------------------- masks and skipped rows


@pytest.mark.parametrize("skip_rows", [True, False])
@pytest.mark.parametrize("beta", [0.0, 0.2])
def test_what_stands_behind_the_mask_is_not_read(
    beta: float, skip_rows: bool, backend: str
) -> None:
    clean = make_case(beta=beta, per_token=True).to(torch.float32)
    masked = ~clean.mask
    garbage = {
        "old_logps": clean.arguments["old_logps"].masked_fill(masked, torch.nan),
        "policy_weight": torch.ones_like(clean.advantages).masked_fill(masked, torch.nan),
    }
    if beta:
        garbage["ref_logps"] = clean.arguments["ref_logps"].masked_fill(masked, torch.inf)
    dirty = replace(
        clean.having(**garbage),
        hidden=clean.hidden.masked_fill(masked[..., None], torch.nan),
        ids=clean.ids.masked_fill(masked, -100),
        advantages=clean.advantages.masked_fill(masked, torch.nan),
    )
    options = {"backend": backend, "skip_rows": skip_rows, "chunk_rows": 4}
    expected = linear_result(linear_grpo_loss, clean, **options)
    for mask in (clean.mask, clean.mask.long(), clean.mask.float()):
        actual = linear_result(linear_grpo_loss, dirty.having(completion_mask=mask), **options)
        assert_same(actual, expected, rtol=0, atol=0)
    for result in (actual, linear_result(reference.linear_grpo_loss, dirty)):
        assert (result.gradients["hidden"][masked] == 0).all()
        assert (result.output.logps[masked] == 0).all()
        assert (result.output.entropy[masked] == 0).all()
        assert_same(result, expected, rtol=2e-5, atol=2e-6)


def test_skipping_rows_changes_nothing_but_what_is_computed(backend: str) -> None:
    case = make_case(sequences=4, loss_type="grpo", seed=6).to(torch.float32)
    case.advantages[1] = 0
    counted, total = int(case.mask.sum()), case.ids.numel()
    active = int(case.mask[0].sum())
    options = {"backend": backend, "chunk_rows": 3}
    dense = linear_result(linear_grpo_loss, case, skip_rows=False, **options)
    assert dense.output.metrics["num_computed_rows"] == total
    assert dense.output.metrics["num_gradient_rows"] == total
    skipped = linear_result(linear_grpo_loss, case, **options)
    assert skipped.output.metrics["num_computed_rows"] == counted
    assert skipped.output.metrics["num_gradient_rows"] == active < counted
    close_to(skipped, dense)
    close_to(skipped, linear_result(reference.linear_grpo_loss, case))

    few = linear_result(linear_grpo_loss, case, statistics="active", **options)
    assert few.output.metrics["num_computed_rows"] == active
    unknown = case.mask & (case.advantages[:, None] == 0)
    for name in ("logps", "entropy"):
        value, wanted = getattr(few.output, name), getattr(dense.output, name)
        assert value[unknown].isnan().all()
        torch.testing.assert_close(value[~unknown], wanted[~unknown])
    mean = dense.output.entropy[case.mask & ~unknown].mean()
    torch.testing.assert_close(few.output.metrics["entropy"], mean)
    torch.testing.assert_close(few.output.loss, dense.output.loss)
    for name, gradient in few.gradients.items():
        torch.testing.assert_close(gradient, dense.gradients[name])


def test_a_policy_weight_of_0_makes_a_row_inactive(backend: str) -> None:
    case = make_case(masked=False).to(torch.float32)
    case = case.having(policy_weight=torch.tensor([1.0, 0.0, 1.0], device=DEVICE))
    out = linear_result(linear_grpo_loss, case, backend=backend)
    assert out.output.metrics["num_gradient_rows"] == 10
    assert (out.gradients["hidden"][1] == 0).all()
    close_to(out, linear_result(reference.linear_grpo_loss, case))


def test_mask_and_advantages_may_be_on_the_cpu(backend: str) -> None:
    case = make_case().to(torch.float32)
    there = replace(case.having(completion_mask=case.mask.cpu()), advantages=case.advantages.cpu())
    expected = linear_result(linear_grpo_loss, case, backend=backend)
    assert_same(linear_result(linear_grpo_loss, there, backend=backend), expected, rtol=0, atol=0)


@pytest.mark.parametrize("skip_rows", [True, False])
@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "bnpo", "dr_grpo"])
def test_an_all_masked_call_is_a_differentiable_0(
    loss_type: str, skip_rows: bool, backend: str
) -> None:
    case = make_case(loss_type=loss_type, beta=0.1).to(torch.float32)
    case = case.having(completion_mask=torch.zeros_like(case.mask))
    case.hidden[:] = torch.nan
    out = linear_result(linear_grpo_loss, case, backend=backend, skip_rows=skip_rows)
    assert out.output.loss.item() == 0
    for gradient in out.gradients.values():
        assert (gradient == 0).all()
    assert all(v == 0 for k, v in out.output.metrics.items() if k[:3] != "num")


def test_no_tokens_at_all(backend: str) -> None:
    case = packed(make_case(per_token=True, masked=False).to(torch.float32), (), [0, 0, 0])
    out = linear_result(linear_grpo_loss, case, backend=backend)
    assert out.output.loss.item() == 0 and out.output.logps.shape == (0,)
    assert (out.gradients["weight"] == 0).all()


# ---------------------------------------------------------------- autograd


@pytest.mark.parametrize("frozen", [("weight", "bias"), ("hidden",), ("hidden", "weight")])
def test_only_what_is_trained_gets_a_gradient(frozen: tuple[str, ...], backend: str) -> None:
    case = make_case().to(torch.float32)
    expected = linear_result(linear_grpo_loss, case, backend=backend)
    actual = linear_result(linear_grpo_loss, case, backend=backend, frozen=frozen)
    for name, gradient in actual.gradients.items():
        if name in frozen:
            assert gradient is None
        else:
            torch.testing.assert_close(gradient, expected.gradients[name], rtol=0, atol=0)


def test_without_grad_the_loss_is_a_number(backend: str) -> None:
    case = make_case().to(torch.float32)
    expected = linear_result(linear_grpo_loss, case, backend=backend)
    case.hidden.requires_grad_()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            out = linear_grpo_loss(
                case.hidden,
                case.weight,
                case.ids,
                case.advantages,
                bias=case.bias,
                backend=backend,
                **case.arguments,
            )
        assert not out.loss.requires_grad
        assert out.metrics["num_gradient_rows"] == 0
        # Rows come in another order: the sum may round differently, the log-probs may not.
        torch.testing.assert_close(out.loss, expected.output.loss.detach())
        assert torch.equal(out.logps, expected.output.logps)


def test_upstream_gradient_is_honoured(backend: str) -> None:
    case = make_case(loss_type="grpo").to(torch.float32)
    expected = linear_result(linear_grpo_loss, case, backend=backend)
    actual = linear_result(linear_grpo_loss, case, backend=backend, upstream=1 / 3)
    for name, gradient in actual.gradients.items():
        torch.testing.assert_close(gradient * 3, expected.gradients[name])


def test_backward_twice_adds_up(backend: str) -> None:
    case = make_case().to(torch.float32)
    expected = linear_result(linear_grpo_loss, case, backend=backend)
    hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_()
    out = linear_grpo_loss(
        hidden,
        weight,
        case.ids,
        case.advantages,
        bias=case.bias,
        backend=backend,
        **case.arguments,
    )
    out.loss.backward(retain_graph=True)
    (out.loss * 2).backward()
    torch.testing.assert_close(hidden.grad, expected.gradients["hidden"] * 3)
    torch.testing.assert_close(weight.grad, expected.gradients["weight"] * 3)


def test_hidden_states_used_twice_in_one_graph(backend: str) -> None:
    case = make_case().to(torch.float32)
    expected = linear_result(linear_grpo_loss, case, backend=backend)
    leaf = case.hidden.requires_grad_()
    hidden = leaf * 1
    arguments = {"bias": case.bias, "backend": backend, **case.arguments}
    once = linear_grpo_loss(hidden, case.weight, case.ids, case.advantages, **arguments)
    twice = linear_grpo_loss(hidden, case.weight, case.ids, case.advantages * -2, **arguments)
    (once.loss + twice.loss + hidden.square().sum()).backward()
    other = replace(case, advantages=case.advantages * -2)
    other_gradient = linear_result(linear_grpo_loss, other, backend=backend).gradients["hidden"]
    torch.testing.assert_close(
        leaf.grad, expected.gradients["hidden"] + other_gradient + 2 * leaf.detach()
    )


def test_under_autocast_it_is_what_linear_is(backend: str) -> None:
    case = make_case().to(torch.float32)
    expected = linear_result(linear_grpo_loss, case.to(torch.bfloat16), backend=backend)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        actual = linear_result(linear_grpo_loss, case, backend=backend)
        logps, _ = linear_logps(
            case.hidden, case.weight, case.ids, bias=case.bias, backend=backend, mask=case.mask
        )
    assert actual.output.loss.dtype == torch.float32
    assert torch.equal(logps, actual.output.logps)
    for gradient in actual.gradients.values():
        assert gradient.dtype == torch.float32
    rounded = {k: v.bfloat16() for k, v in actual.gradients.items()}
    assert_same(Result(actual.output, rounded), expected, rtol=0, atol=0)
    # Unlike linear's, the fp32 sum of the weight's gradient reaches the fp32 weight unrounded.
    assert not torch.equal(actual.gradients["weight"], rounded["weight"].float())


def test_under_gradient_checkpointing(backend: str) -> None:
    case = make_case().to(torch.float32)
    expected = linear_result(linear_grpo_loss, case, backend=backend)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_grpo_loss(
            hidden.sin(),
            weight,
            case.ids,
            case.advantages,
            bias=case.bias,
            backend=backend,
            **case.arguments,
        ).loss

    hidden, weight = case.hidden.clamp(-1, 1).asin().requires_grad_(), case.weight.requires_grad_()
    plain = torch.autograd.grad(loss(hidden, weight), [hidden, weight])
    value = checkpoint(loss, hidden, weight, use_reentrant=False)
    kept = torch.autograd.grad(value, [hidden, weight])
    assert expected.output.loss.item() != value.item()  # hidden states were clamped
    assert torch.equal(plain[0], kept[0]) and torch.equal(plain[1], kept[1])


def test_under_torch_compile() -> None:
    case = make_case().to(torch.float32)
    expected = linear_result(linear_grpo_loss, case, backend="torch")

    @torch.compile(backend="eager")
    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        out = linear_grpo_loss(
            hidden * 1,
            weight,
            case.ids,
            case.advantages,
            bias=case.bias,
            backend="torch",
            **case.arguments,
        )
        return out.loss * 2

    hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.compile about torch's own modules
        loss(hidden, weight).backward()
    torch.testing.assert_close(hidden.grad, 2 * expected.gradients["hidden"])
    torch.testing.assert_close(weight.grad, 2 * expected.gradients["weight"])


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_runs_repeat_bit_for_bit(dtype: torch.dtype, backend: str) -> None:
    case = factors(make_case(loss_type="grpo", beta=0.1)).to(dtype)
    options = {"backend": backend, "chunk_rows": 4}
    first = linear_result(linear_grpo_loss, case, **options)
    assert_same(linear_result(linear_grpo_loss, case, **options), first, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_policy_the_ratio_is_exactly_1(dtype: torch.dtype, backend: str) -> None:
    # The smallest interval: any other ratio would clip.
    config = GRPOLossConfig(epsilon_low=0.0, epsilon_high=0.0)
    case = make_case(per_token=True, masked=False).to(dtype).having(config=config)
    old, entropy = linear_logps(
        case.hidden, case.weight, case.ids, bias=case.bias, chunk_rows=4, backend=backend
    )
    out = linear_result(
        linear_grpo_loss, case.having(old_logps=old), chunk_rows=4, backend=backend
    ).output
    assert torch.equal(out.logps, old) and torch.equal(out.entropy, entropy)
    assert out.metrics["clip_ratio/region_mean"] == 0
    values = (case.advantages.reshape(-1), out.metrics["policy_loss"])
    assert torch.equal(-values[0].sum() / 15, values[1])


@pytest.mark.parametrize("kind", ["peaked", "very negative", "padded vocabulary"])
def test_extreme_logits(kind: str, backend: str) -> None:
    case = make_case(per_token=True, beta=0.1, off_policy=False)
    assert case.bias is not None
    if kind == "peaked":
        case = replace(case, weight=case.weight * 16)
    elif kind == "very negative":
        case.bias[:] = -1e4
    else:
        # Two padded columns, one of them in a block of its own kind: 32 to 37 is the last.
        case.bias[[3, 33]] = -torch.inf
        case = replace(case, ids=case.ids.masked_fill((case.ids == 3) | (case.ids == 33), 4))
    exact = linear_result(reference.linear_grpo_loss, case)
    naive = linear_result(reference.linear_grpo_loss, case.to(torch.float32))
    actual = linear_result(linear_grpo_loss, case.to(torch.float32), backend=backend)
    for value in actual.everything().values():
        assert value.isfinite().all()
    for name in ("logps", "entropy"):
        values = (getattr(r.output, name) for r in (actual, naive, exact))
        assert_as_exact(*values, factor=1.5, what=name)
    for name, gradient in actual.gradients.items():
        assert_as_exact(
            gradient, naive.gradients[name], exact.gradients[name], factor=1.5, what=name
        )
    if kind == "padded vocabulary":
        assert (actual.gradients["bias"][[3, 33]] == 0).all()
        assert (actual.gradients["weight"][[3, 33]] == 0).all()


# ---------------------------------------------------------------- linear_logps


def logps_gradients(function: Any, case: Case, **options: Any) -> list[Tensor]:
    """Log-probs, entropies, and the gradient of a sum of both with different weights."""
    leaves = [x.detach().clone().requires_grad_() for x in (case.hidden, case.weight, case.bias)]
    temperature = case.arguments["config"].temperature
    logps, entropy = function(
        *leaves[:2],
        case.ids,
        bias=leaves[2],
        mask=case.arguments.get("completion_mask"),
        temperature=temperature,
        **options,
    )
    upstream = torch.linspace(-1, 2, case.ids.numel(), device=DEVICE).view(case.ids.shape)
    ((logps * upstream).sum() + (entropy * upstream.flip(0)).sum()).backward(retain_graph=True)
    first = [leaf.grad.clone() for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    ((logps * upstream).sum() + (entropy * upstream.flip(0)).sum()).backward()
    assert all(torch.equal(g, leaf.grad) for g, leaf in zip(first, leaves, strict=True))
    return [logps.detach(), entropy.detach(), *first]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_log_probs_and_entropies_and_both_gradients(dtype: torch.dtype, backend: str) -> None:
    case = make_case(temperature=0.7)
    exact = logps_gradients(reference.linear_logps, case)
    naive = logps_gradients(reference.linear_logps, case.to(dtype))
    actual = logps_gradients(linear_logps, case.to(dtype), backend=backend, chunk_rows=4)
    factor = 1.5 * rounding_allowance(backend, dtype)
    names = ("logps", "entropy", "dhidden", "dweight", "dbias")
    for name, *values in zip(names, actual, naive, exact, strict=True):
        assert_as_exact(*values, factor=factor, what=name)
    assert actual[0].dtype == torch.float32 and actual[3].dtype == dtype


def test_log_probs_alone_have_the_right_gradient(backend: str) -> None:
    case = make_case(masked=False).to(torch.float32)
    found = []
    for function, options in ((linear_logps, {"backend": backend}), (reference.linear_logps, {})):
        leaf = case.hidden.detach().clone().requires_grad_()
        logps, _ = function(leaf, case.weight, case.ids, bias=case.bias, **options)
        (gradient,) = torch.autograd.grad(logps.sum(), leaf)
        found.append(gradient)
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_log_probs_do_not_read_behind_the_mask(backend: str) -> None:
    clean = make_case().to(torch.float32)
    masked = ~clean.mask
    dirty = replace(
        clean,
        hidden=clean.hidden.masked_fill(masked[..., None], torch.nan),
        ids=clean.ids.masked_fill(masked, -100),
    )
    expected = logps_gradients(linear_logps, clean, backend=backend)
    actual = logps_gradients(linear_logps, dirty, backend=backend)
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)
    assert (actual[2][masked] == 0).all()
    nothing = dirty.having(completion_mask=torch.zeros_like(clean.mask))
    assert all((x == 0).all() for x in logps_gradients(linear_logps, nothing, backend=backend))


def test_fp16_gradients_survive_a_large_denominator_and_a_scaled_loss(backend: str) -> None:
    """1e6 tokens a step put the gradient below fp16's smallest number; a loss scale undoes that."""
    case = make_case().to(torch.float16)
    arguments: dict[str, Any] = {"num_items_in_batch": 10**6, "upstream": 2.0**16}
    exact = linear_result(reference.linear_grpo_loss, case.to(torch.float64), **arguments)
    naive = linear_result(reference.linear_grpo_loss, case, **arguments)
    actual = linear_result(linear_grpo_loss, case, backend=backend, **arguments)
    for name in ("hidden", "weight"):
        values = (result.gradients[name] for result in (actual, naive, exact))
        assert_as_exact(*values, factor=1.5, what=name)


def test_an_advantage_of_0_makes_an_infinite_ratio_harmless(backend: str) -> None:
    case = make_case(masked=False).to(torch.float32)
    first = torch.arange(len(case.advantages), device=DEVICE) == 0
    case = replace(case, advantages=torch.where(first, 0, case.advantages))
    ratio = torch.ones(case.ids.shape, device=DEVICE)
    results = []
    for value in (1.0, torch.inf):
        ratio[0, 0] = value
        results.append(
            linear_result(
                linear_grpo_loss, case, backend=backend, importance_sampling_ratio=ratio.clone()
            )
        )
    assert_same(*results, rtol=0, atol=0)
