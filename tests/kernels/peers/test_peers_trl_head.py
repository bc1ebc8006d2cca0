"""TRL's fused LM head against ours, and a whole micro-batch from token ids to gradients."""

from __future__ import annotations

import math
from typing import Any, Literal

import pytest
import torch
from peers_trl import assert_close, config_of, make_trainer
from small_models import small_model
from torch import Tensor

from fastgrpo_kernels import linear_grpo_loss, linear_logps, selective_logps

pytestmark = pytest.mark.peers

chunked: Any = pytest.importorskip("trl.kernels.chunked_logprob")
BACKENDS: tuple[Literal["torch", "triton"], ...] = ("torch", "triton")
# fp32 on both sides. Measured, relative to the largest value: 4e-7.
TOLERANCE = 2e-6


@pytest.fixture(params=["torch", "triton"])
def their_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Fold tiles with TRL's torch code, or with its Triton kernels in the interpreter."""
    monkeypatch.setattr(chunked, "_use_triton", lambda device: request.param == "triton")
    monkeypatch.setattr(chunked, "_BLOCK_SIZE", 16)
    return request.param


def leaves(*tensors: Tensor | None) -> list[Any]:
    return [None if x is None else x.detach().clone().requires_grad_() for x in tensors]


def head(tokens: int = 9, hidden: int = 8, vocabulary: int = 37) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    return (
        torch.randn(tokens, hidden, generator=g),
        torch.randn(vocabulary, hidden, generator=g) / 2,
        torch.randn(vocabulary, generator=g),
        torch.randint(vocabulary, (tokens,), generator=g),
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("temperature", "softcap", "scale", "with_bias", "gradient_of"),
    [
        (1.0, None, 1.0, True, "both"),
        (0.7, None, 1.0, False, "logps"),
        (1.3, 5.0, 0.5, True, "entropy"),
    ],
)
def test_fused_head_is_that_of_trl(
    their_way: str,
    backend: Literal["torch", "triton"],
    temperature: float,
    softcap: float | None,
    scale: float,
    with_bias: bool,
    gradient_of: str,
) -> None:
    hidden, weight, bias, ids = head()
    tensors = (hidden, weight, bias if with_bias else None)
    g = torch.Generator().manual_seed(1)
    upstream = [torch.randn(len(ids), generator=g) for _ in range(2)]

    def gradients(logps: Tensor, entropy: Tensor, inputs: list[Any]) -> list[Tensor]:
        total = torch.zeros(())
        if gradient_of != "entropy":
            total = total + (logps * upstream[0]).sum()
        if gradient_of != "logps":
            total = total + (entropy * upstream[1]).sum()
        return list(torch.autograd.grad(total, [x for x in inputs if x is not None]))

    its = leaves(*tensors)
    its_logps, its_entropy, *_ = chunked.ChunkedLogProbFunction.apply(
        *its, ids, temperature, 20, softcap, scale, ("entropy",)
    )
    mine = leaves(*tensors)
    logps, entropy = linear_logps(
        mine[0],
        mine[1],
        ids,
        bias=mine[2],
        temperature=temperature,
        logit_softcap=softcap,
        logit_scale=scale,
        chunk_rows=4,
        backend=backend,
    )
    assert_close(logps, its_logps, "logps", TOLERANCE)
    assert_close(entropy, its_entropy, "entropy", TOLERANCE)
    pairs = zip(
        gradients(logps, entropy, mine), gradients(its_logps, its_entropy, its), strict=True
    )
    for name, (actual, wanted) in zip(("hidden", "weight", "bias"), pairs, strict=False):
        assert_close(actual, wanted, name, TOLERANCE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("masked", [False, True])
def test_selective_logps_are_those_of_the_kernel_of_trl(
    backend: Literal["torch", "triton"], masked: bool
) -> None:
    theirs: Any = pytest.importorskip("trl.kernels.logprob_entropy")
    hidden, weight, bias, ids = head()
    logits = hidden @ weight.T + bias
    mask = (torch.arange(len(ids)) % 3 > 0) if masked else None
    mine, its = leaves(logits, logits)
    found = selective_logps(mine * 1, ids, mask=mask, temperature=0.7, backend=backend)
    wanted = theirs.selective_log_softmax_and_entropy(its, ids, 0.7, mask)
    for name, actual, expected in zip(("logps", "entropy"), found, wanted, strict=True):
        assert_close(actual, expected, name, TOLERANCE)
    weights = torch.linspace(-1, 1, len(ids))
    for logps, entropy in (found, wanted):
        (logps * weights - entropy * weights.flip(0)).sum().backward()
    assert_close(mine.grad, its.grad, "logits", TOLERANCE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gradient_of_a_confident_token_is_lost_in_trl_and_right_here(
    their_way: str, backend: Literal["torch", "triton"]
) -> None:
    margin = 28.0
    weight = torch.tensor([[margin], [0.0], [0.5]])
    hidden, ids = torch.ones(1, 1), torch.tensor([0])
    its, mine = leaves(weight, weight)
    chunked.ChunkedLogProbFunction.apply(hidden, its, None, ids, 1.0, 3, None, 1.0, ())[
        0
    ].backward()
    linear_logps(hidden, mine, ids, backend=backend)[0].backward()
    rest = math.exp(-margin) + math.exp(0.5 - margin)
    exact = rest / (1 + rest)  # 1 - p without the cancellation
    assert abs(mine.grad[0] / exact - 1) < 1e-6
    assert abs(its.grad[0] / exact - 1) > 0.5


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_column_of_probability_0_makes_the_entropy_of_trl_a_nan(
    their_way: str, backend: Literal["torch", "triton"]
) -> None:
    hidden, weight, bias, _ = head()
    ids = torch.arange(len(hidden))
    bias[-1] = -torch.inf
    arguments = (1.0, 40, None, 1.0, ("entropy",))
    its = chunked.ChunkedLogProbFunction.apply(hidden, weight, bias, ids, *arguments)[1]
    without = chunked.ChunkedLogProbFunction.apply(hidden, weight[:-1], bias[:-1], ids, *arguments)
    assert its.isnan().all()
    logps, entropy = linear_logps(hidden, weight, ids, bias=bias, backend=backend)
    assert_close(logps, without[0], "logps", TOLERANCE)
    assert_close(entropy, without[1], "entropy", TOLERANCE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("loss_type", "level", "tie"),
    [
        ("dapo", "token", True),
        ("grpo", "sequence", False),
        ("cispo", "token", False),
        ("vespo", "token", True),
    ],
)
def test_a_micro_batch_of_trl_from_token_ids_to_the_gradient_of_every_parameter(
    loss_type: str, level: str, tie: bool, backend: Literal["torch", "triton"]
) -> None:
    model = small_model(tie=tie)
    trainer = make_trainer(
        loss_type,
        level=level,
        model=model,
        beta=0.2,
        entropy_coef=0.1,
        temperature=0.8,
        max_completion_length=5,
    )
    g = torch.Generator().manual_seed(0)
    prompts = torch.randint(2, 60, (4, 3), generator=g)
    prompt_mask = torch.ones_like(prompts)
    prompts[0, 0] = prompt_mask[0, 0] = 0
    ids = torch.randint(2, 60, (4, 5), generator=g)
    mask = (torch.arange(5) < torch.tensor([[5], [3], [0], [4]])).long()
    whole, attention = torch.cat([prompts, ids], 1), torch.cat([prompt_mask, mask], 1)
    with torch.no_grad():
        logps = trainer._get_per_token_logps_and_entropies(model, whole, attention, 5)[0]
    old = logps + 0.4 * torch.randn(4, 5, generator=g)
    ref = logps + 0.4 * torch.randn(4, 5, generator=g)
    advantages = torch.tensor([1.0, -0.7, 0.3, -1.2])
    loss = trainer._compute_loss(
        model,
        {
            "prompt_ids": prompts,
            "prompt_mask": prompt_mask,
            "completion_ids": ids,
            "completion_mask": mask,
            "advantages": advantages,
            "num_items_in_batch": mask.sum(),
            "old_per_token_logps": old,
            "ref_per_token_logps": ref,
        },
    )
    loss.backward()
    wanted = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    model.zero_grad()

    hidden = model.model(whole, attention_mask=attention).last_hidden_state[:, -6:-1]
    out = linear_grpo_loss(
        hidden,
        model.lm_head.weight,
        ids,
        advantages,
        completion_mask=mask,
        old_logps=old,
        ref_logps=ref,
        chunk_rows=7,
        backend=backend,
        config=config_of(trainer, temperature=trainer.temperature),
    )
    out.loss.backward()
    assert_close(out.loss, loss, "loss", TOLERANCE)
    for name, parameter in model.named_parameters():
        size = wanted[name].abs().max()
        assert size > 0, name
        assert_close(parameter.grad / size, wanted[name] / size, name, 10 * TOLERANCE)
    for name, value in metrics.items():
        if name != "policy_loss":
            assert_close(out.metrics[name], value, name, TOLERANCE)
