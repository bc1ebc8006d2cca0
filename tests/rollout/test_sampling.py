"""Drawing by inversion against the plain inversion of one cumulative sum in fp64."""

from dataclasses import replace

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from fastgrpo.rollout import SamplingParams
from fastgrpo.rollout.sampling import _blocks, draw, sample

ONE = SamplingParams(max_completion_length=1)
ALMOST_ONE = 1 - 2**-53  # the largest fp64 below 1


def uniforms(*shape, seed=0):
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def normal(*shape, scale=1.0, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize("V", [1, 15, 128, 129, 257, 5000, 151_936])
def test_a_draw_inverts_the_cumulative_distribution(V):
    B = 400 if V < 10_000 else 20
    weights_BV = normal(B, V, scale=3.0).softmax(-1)
    uniform_B1 = uniforms(B, 1, seed=V)
    drawn_B1 = draw(*_blocks(weights_BV), uniform_B1)

    cumulative_BV = weights_BV.double().cumsum(-1)
    cumulative_BV /= cumulative_BV[:, -1:].clone()
    expected_B1 = torch.searchsorted(cumulative_BV, uniform_B1, right=True)
    # Sums of 128 fp32 numbers are off by 1e-7: a uniform number nearer to an edge may fall off it.
    edge_B1 = (cumulative_BV - uniform_B1).abs().amin(-1, keepdim=True) < 1e-6
    assert torch.equal(drawn_B1[~edge_B1], expected_B1[~edge_B1])
    assert V == 151_936 or edge_B1.sum() < 0.05 * B


@pytest.mark.parametrize("V", [15, 300, 1000])
def test_exact_weights_are_inverted_exactly(V):
    """Multiples of 1/1024 have exact sums, so each token gets exactly its share of a fine grid."""
    generator = torch.Generator().manual_seed(V)
    weights_V = torch.randint(0, 4, (V,), generator=generator).float() / 1024
    total = int(weights_V.sum() * 1024)
    grid = ((torch.arange(4 * total, dtype=torch.float64) + 0.5) / (4 * total))[:, None]
    tokens = draw(*_blocks(weights_V.expand(len(grid), V)), grid)
    assert torch.equal(torch.bincount(tokens[:, 0], minlength=V), (weights_V * 4096).long())


@pytest.mark.parametrize("u", [0.0, 1e-300, 0.5, ALMOST_ONE, 1.0])
@pytest.mark.parametrize("V", [4, 300, 700])
def test_what_has_no_probability_is_never_drawn(u, V, device):
    """Padded vocabularies and forbidden tokens, in blocks of their own too, at both ends."""
    for seed in range(20):
        weights_BV = normal(64, V, scale=8.0, seed=seed).exp()
        generator = torch.Generator().manual_seed(seed)
        weights_BV[torch.rand(64, V, generator=generator) < 0.5] = 0
        weights_BV[:, : V // 3], weights_BV[:, -(V // 3) :] = 0, 0
        weights_BV[:, V // 2] += 1e-30  # a row needs something
        weights_BV = weights_BV.to(device)
        uniform_B1 = torch.full((64, 1), u, dtype=torch.float64, device=device)
        token_B1 = draw(*_blocks(weights_BV), uniform_B1)
        assert (weights_BV.gather(-1, token_B1) > 0).all()


def test_the_largest_uniform_number_draws_the_last_token_that_has_a_probability():
    logits_BV = torch.zeros(3, 1000)
    logits_BV[:, 650:] = float("-inf")
    for u, expected in ((0.0, 0), (ALMOST_ONE, 649)):
        token_B1, logp_B1 = sample(
            logits_BV.clone(), ONE, torch.full((3, 1), u, dtype=torch.float64)
        )
        assert token_B1.tolist() == [[expected]] * 3
        torch.testing.assert_close(logp_B1, torch.full((3, 1), 1 / 650).log(), atol=1e-6, rtol=0)


def test_frequencies_are_the_probabilities():
    """Chi-square within four standard deviations: 1 seed in 16,000 is outside."""
    draws, V = 100_000, 300
    probs_V = normal(V, scale=1.5, seed=3).softmax(-1)
    tokens = draw(*_blocks(probs_V.expand(draws, V)), uniforms(draws, 1, seed=4))
    counts = torch.bincount(tokens[:, 0], minlength=V).double()
    expected = probs_V.double() * draws
    often = expected > 5
    assert often.sum() > 250
    chi_square = ((counts - expected) ** 2 / expected)[often].sum().item()
    freedom = int(often.sum())
    assert abs(chi_square - freedom) < 4 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.5])
@pytest.mark.parametrize("V", [1, 15, 257, 151_936])
def test_log_probs_are_those_of_fp64(V, temperature, dtype):
    B = 8
    logits_BV = (normal(B, V, scale=4.0, seed=V) + 20).to(dtype)
    sampling = SamplingParams(max_completion_length=1, temperature=temperature)
    token_B1, logp_B1 = sample(logits_BV.clone(), sampling, uniforms(B, 1))
    expected_B1 = (logits_BV.double() / temperature).log_softmax(-1).gather(-1, token_B1)
    assert logp_B1.dtype == torch.float32
    # Logits near 20 / temperature are rounded to 2e-6 before their differences are taken.
    torch.testing.assert_close(logp_B1.double(), expected_B1, atol=4e-6, rtol=0)


@pytest.mark.parametrize("top_p, top_k", [(1.0, 7), (0.6, 0), (0.6, 200), (0.6, 3), (1e-9, 0)])
def test_candidates_are_drawn_with_their_own_shares(top_p, top_k):
    V, B = 257, 2000
    logits_V = normal(V, scale=2.0, seed=1)
    sampling = SamplingParams(max_completion_length=1, top_p=top_p, top_k=top_k)
    uniform_B1 = uniforms(B, 1, seed=2)
    token_B1, logp_B1 = sample(logits_V.repeat(B, 1), sampling, uniform_B1)

    logps_V = logits_V.double().log_softmax(-1)
    probs_K, order_K = logps_V.exp().sort(descending=True)
    probs_K = probs_K[: top_k or V] / probs_K[: top_k or V].sum()
    probs_K = probs_K[probs_K.cumsum(0) - probs_K < top_p]
    cumulative_K = probs_K.cumsum(0) / probs_K.sum()
    rank_B1 = torch.searchsorted(cumulative_K, uniform_B1, right=True)
    edge_B1 = (cumulative_K - uniform_B1).abs().amin(-1, keepdim=True) < 1e-6
    assert edge_B1.sum() < 5
    assert torch.equal(token_B1[~edge_B1], order_K[rank_B1][~edge_B1])
    torch.testing.assert_close(logp_B1, logps_V[token_B1].float(), atol=2e-6, rtol=0)


@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize(
    "min_p, top_p, top_k",
    [(0.05, 1.0, 0), (0.3, 1.0, 0), (1.0, 1.0, 0), (0.05, 0.9, 0), (0.2, 0.9, 12), (0.02, 0.5, 9)],
)
def test_min_p_comes_last_and_is_what_transformers_takes_it_for(min_p, top_p, top_k, temperature):
    V, B = 257, 2000
    logits_V = normal(V, scale=2.0, seed=1)
    sampling = SamplingParams(
        max_completion_length=1, temperature=temperature, min_p=min_p, top_p=top_p, top_k=top_k
    )
    uniform_B1 = uniforms(B, 1, seed=2)
    token_B1, logp_B1 = sample(logits_V.repeat(B, 1), sampling, uniform_B1)

    warpers = [TemperatureLogitsWarper(temperature)]
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p), MinPLogitsWarper(min_p)]
    scores_1V = LogitsProcessorList(warpers)(None, logits_V[None])
    # Candidates that were sorted are drawn in their order, else in that of the vocabulary.
    sort = bool(top_k) or top_p < 1
    probs_V = scores_1V[0].double().softmax(-1)
    order_V = probs_V.argsort(descending=True) if sort else torch.arange(V)
    cumulative_V = probs_V[order_V].cumsum(0)
    rank_B1 = torch.searchsorted(cumulative_V, uniform_B1, right=True)
    edge_B1 = (cumulative_V - uniform_B1).abs().amin(-1, keepdim=True) < 1e-6
    edge_B1 &= rank_B1 < (probs_V > 0).sum() - 1 if sort else True
    assert edge_B1.sum() < 5
    assert torch.equal(token_B1[~edge_B1], order_V[rank_B1][~edge_B1])
    expected_V = (logits_V.double() / temperature).log_softmax(-1).float()
    torch.testing.assert_close(logp_B1, expected_V[token_B1], atol=2e-6, rtol=0)


def test_no_min_p_draws_as_before_and_one_draws_the_likeliest():
    logits_BV, uniform_B1 = normal(50, 300, scale=2.0, seed=4), uniforms(50, 1)
    plain = sample(logits_BV.clone(), ONE, uniform_B1)
    zero = sample(logits_BV.clone(), replace(ONE, min_p=0.0), uniform_B1)
    assert torch.equal(torch.cat(plain), torch.cat(zero))
    for others in ({}, {"top_p": 0.9}):
        token_B1, _ = sample(logits_BV.clone(), replace(ONE, min_p=1.0, **others), uniform_B1)
        assert torch.equal(token_B1, logits_BV.argmax(-1, keepdim=True))


@pytest.mark.parametrize(
    "option, value, match",
    [
        ("min_p", 1.5, r"min_p must be in \[0, 1\], or None for no bound, got 1.5"),
        ("min_p", -0.1, "got -0.1"),
        ("stop_token_ids", (3, -1), r"stop_token_ids must be token ids, got \(3, -1\)"),
    ],
)
def test_impossible_parameters_are_refused(option, value, match):
    with pytest.raises(ValueError, match=match):
        replace(ONE, **{option: value})


def test_greedy_needs_no_random_numbers():
    logits_BV = normal(5, 1000, seed=2)
    sampling = SamplingParams(max_completion_length=1, temperature=0)
    token_B1, logp_B1 = sample(logits_BV.clone(), sampling, torch.full((5, 1), float("nan")))
    logps_BV = logits_BV.double().log_softmax(-1)
    assert torch.equal(token_B1, logits_BV.argmax(-1, keepdim=True))
    torch.testing.assert_close(logp_B1.double(), logps_BV.amax(-1, keepdim=True), atol=2e-6, rtol=0)
