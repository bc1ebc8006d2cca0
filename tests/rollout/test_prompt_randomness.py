"""What is sampled for a prompt belongs to its seed, whatever is sampled with it."""

import pytest
import torch
from tiny_models import NO_EOS, PROMPTS, greedy, tiny

from fastgrpo.rollout import SamplingParams
from fastgrpo.rollout.static import StaticCacheRollout

SEEDS = [3, 1, 4, 2**61]


def test_seeds_fix_the_completions_of_their_prompts():
    rollout = StaticCacheRollout(tiny(), **NO_EOS)
    sampling = SamplingParams(max_completion_length=8)
    state = torch.get_rng_state()
    first, again, other = (
        rollout.generate(PROMPTS, 4, sampling, seeds).token_lists()
        for seeds in (SEEDS, SEEDS, [*SEEDS[:3], 8])
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert first == again
    assert first[:12] == other[:12]
    assert not {tuple(ids) for ids in first[12:]} & {tuple(ids) for ids in other[12:]}
    assert len({tuple(ids) for ids in first}) == 16


@pytest.mark.parametrize("num_generations", [1, 3, 4])
@pytest.mark.parametrize("max_batch", [None, 3, 1])
def test_a_prompt_draws_the_same_tokens_alone_and_among_others(num_generations, max_batch):
    model, sampling = tiny(), SamplingParams(max_completion_length=8, temperature=0.9)

    def sample(prompts, max_batch=None):
        rollout = StaticCacheRollout(model, **NO_EOS, max_batch=max_batch)
        seeds = [SEEDS[i] for i in prompts]
        prompt_ids = [PROMPTS[i] for i in prompts]
        ids = rollout.generate(prompt_ids, num_generations, sampling, seeds).token_lists()
        firsts = range(0, len(ids), num_generations)
        return [ids[first : first + num_generations] for first in firsts]

    alone = [sample([i])[0] for i in range(4)]
    assert len({tuple(ids) for group in alone for ids in group}) == 4 * num_generations
    for prompts in ([0, 1, 2, 3], [3, 1], [2, 2, 0]):
        assert sample(prompts, max_batch) == [alone[i] for i in prompts]


def test_without_seeds_they_come_from_torch_and_greedy_decoding_needs_none():
    rollout = StaticCacheRollout(tiny(), **NO_EOS)
    sampling = SamplingParams(max_completion_length=8)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        first, second = (rollout.generate(PROMPTS, 2, sampling).token_lists() for _ in range(2))
        torch.manual_seed(5)
        assert rollout.generate(PROMPTS, 2, sampling).token_lists() == first
        assert first != second
        state = torch.get_rng_state()
        rollout.generate(PROMPTS, 2, greedy(4))
        assert torch.equal(torch.get_rng_state(), state)


def test_a_row_draws_the_same_tokens_in_any_batch():
    sampling = SamplingParams(max_completion_length=10, temperature=0.9)
    results = [
        StaticCacheRollout(tiny(), **NO_EOS, max_batch=max_batch).generate(
            PROMPTS, 4, sampling, SEEDS
        )
        for max_batch in (None, 8, 3, 1)
    ]
    for other in results[1:]:
        assert torch.equal(other.ids, results[0].ids)
        torch.testing.assert_close(other.logps, results[0].logps, atol=5e-5, rtol=1e-5)
