"""The order of prompts, and the seeds of their random numbers."""

import hashlib
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgrpo.prompt_order import PromptSampler, prompt_seeds


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 20), st.integers(0, 3), st.lists(st.integers(0, 25), max_size=6))
def test_every_epoch_visits_every_row_once_however_it_is_taken(num_rows, seed, sizes):
    sampler = PromptSampler(num_rows, seed)
    taken = [row for size in sizes for row in sampler.take(size)]
    assert taken == PromptSampler(num_rows, seed).take(sum(sizes))
    assert sampler.epoch == pytest.approx(sum(sizes) / num_rows)
    for start in range(0, len(taken) - num_rows + 1, num_rows):
        assert sorted(taken[start : start + num_rows]) == list(range(num_rows))


def test_orders_differ_between_epochs_and_seeds_and_do_not_move():
    orders = [PromptSampler(50, seed).take(150) for seed in range(3)]
    epochs = [tuple(order[i : i + 50]) for order in orders for i in (0, 50, 100)]
    assert len(set(epochs)) == 9
    assert PromptSampler(5, 0).take(10) == [3, 0, 1, 4, 2, 1, 2, 0, 4, 3]
    assert PromptSampler(3, 0, shuffle=False).take(7) == [0, 1, 2, 0, 1, 2, 0]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(0, 30), st.integers(0, 30))
def test_a_resumed_sampler_goes_on_where_it_was(num_rows, before, after):
    sampler = PromptSampler(num_rows, 7)
    sampler.take(before)
    resumed = PromptSampler(num_rows, 7)
    resumed.load_state_dict(json.loads(json.dumps(sampler.state_dict())))
    assert resumed.epoch == sampler.epoch
    assert resumed.num_taken == sampler.num_taken == before
    assert resumed.take(after) == sampler.take(after)


def test_sampler_refusals():
    with pytest.raises(ValueError, match="num_rows must be at least 1, got 0"):
        PromptSampler(0, 0)
    with pytest.raises(ValueError, match="row 6 but there are 5 rows"):
        PromptSampler(5, 0).load_state_dict({"epoch": 0, "index": 6})


def test_every_prompt_of_every_purpose_and_seed_has_a_seed_of_its_own():
    count, runs = 100_000, [(0, "train"), (0, "eval"), (1, "train"), (11, "train")]
    seeds = [seed for run, purpose in runs for seed in prompt_seeds(run, 0, count, purpose)]
    assert len(set(seeds)) == len(runs) * count
    assert 0 <= min(seeds) < 2**50 and 2**61 < max(seeds) < 2**62
    # A generator on a CPU takes the lower 32 bits, of which a pair or so may meet by chance.
    assert len({seed % 2**32 for seed in seeds[:count]}) >= count - 10


def test_seeds_depend_on_the_number_of_the_prompt_alone_and_do_not_move():
    seeds = prompt_seeds(42, 0, 12, "train")
    parts = [(0, 1), (1, 4), (5, 0), (5, 7)]
    assert [x for first, n in parts for x in prompt_seeds(42, first, n, "train")] == seeds
    digest = hashlib.sha256(b"train 42 11").hexdigest()
    assert seeds[11] == int(digest[:16], 16) // 4
