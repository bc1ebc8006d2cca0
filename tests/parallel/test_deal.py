"""Who runs what: shares of prompts, hands of sequences, and metrics that ranks add up."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from step_cases import completions

from fastgrpo.config import ConfigError, config_from
from fastgrpo.distributed import World, deal
from fastgrpo.gradient import Passes
from fastgrpo.metrics import StepMetrics
from fastgrpo.token_budget import TokenBudget

QUICK = settings(deadline=None, max_examples=40)
SIZES = st.integers(1, 9)
LENGTHS = st.lists(st.integers(1, 2000), max_size=60)


@QUICK
@given(st.integers(0, 100), SIZES)
def test_shares_cover_everything_once_in_order(count: int, size: int) -> None:
    parts = [World(rank, size).share(count) for rank in range(size)]
    assert [i for part in parts for i in part] == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@QUICK
@given(LENGTHS, SIZES)
def test_each_sequence_is_dealt_once_and_hands_are_as_large_as_each_other(
    lengths: list[int], size: int
) -> None:
    hands = deal(lengths, size)
    assert len(hands) == size
    assert sorted(i for hand in hands for i in hand) == list(range(len(lengths)))
    assert max(map(len, hands)) - min(map(len, hands)) <= 1
    assert all(hand == sorted(hand) for hand in hands)  # groups stay together in fixed passes


@QUICK
@given(LENGTHS, SIZES)
def test_hands_differ_by_less_than_the_longest_sequence(lengths: list[int], size: int) -> None:
    """Each turn to and fro gives back what the last one took: differences do not add up."""
    loads = [sum(lengths[i] for i in hand) for hand in deal(lengths, size)]
    assert max(loads) - min(loads) <= max(lengths, default=0)


def test_the_longest_go_to_and_fro() -> None:
    assert deal([10, 70, 30, 50, 20, 60, 40], 3) == [[0, 1, 4], [2, 5], [3, 6]]


def passes_of(size: int, kind: str = "unequal", **options: Any) -> Passes:
    """Divide 16 completions among so many ranks, as a learner does."""
    config = config_from(
        {"per_device_train_batch_size": 4, "max_completion_length": 41, "num_generations": 4}
        | options
    )
    return TokenBudget(config, World(0, size), packed=True).passes(completions(kind, 1, 100))


@pytest.mark.parametrize("size", [2, 3, 20])
@pytest.mark.parametrize("kind", ["unequal", "one", "silent", "one long"])
@pytest.mark.parametrize(
    "options",
    [{}, {"max_tokens_per_microbatch": 48}, {"filter_zero_advantages": False}, {"loss": "bnpo"}],
)
def test_every_rank_has_as_many_passes_and_every_sequence_one(
    size: int, kind: str, options: dict[str, Any]
) -> None:
    if "loss" in options:
        options = {"loss_type": "bnpo"}
    passes, alone = passes_of(size, kind, **options), passes_of(1, kind, **options)
    batch = completions(kind, 1, 100)
    each = [passes.of(rank) for rank in range(size)]
    assert {len(own) for own in each} == {passes.rounds}
    rows = [row for own in each for some in own for row in some]
    assert sorted(rows) == sorted(passes.rows) == sorted(alone.rows)
    assert passes.num == sum(bool(some) for own in each for some in own)
    loads = [sum(batch.lengths[row] for some in own for row in some) for own in each]
    mean = sum(loads) / size
    assert passes.imbalance == pytest.approx(max(loads) / mean if mean else 1.0, rel=1e-12)
    if "max_tokens_per_microbatch" in options:
        tokens = [[batch.lengths[row] for row in some] for own in each for some in own]
        assert all(sum(some) <= 48 or len(some) == 1 for some in tokens)
    if options == {"loss_type": "bnpo"}:
        one = [some for own in alone.of_ranks for some in own]
        assert sorted(some for own in each for some in own if some) == sorted(one)


def test_the_imbalance_is_the_longest_over_the_mean() -> None:
    """A rank that has a sequence of 66 tokens beside ranks with 10 or so waits for none of them."""
    lengths = completions("one long", 1, 100).lengths
    passes = passes_of(4, "one long")
    loads = [sum(lengths[row] for some in own for row in some) for own in passes.of_ranks]
    assert sum(loads) == sum(lengths[4:]) and max(loads) >= 60
    assert passes.imbalance == max(loads) / (sum(loads) / 4) > 1.5
    assert passes_of(2, "silent").imbalance == 1.0


NAMES = ("loss", "num_tokens", "entropy", "ratio/max", "ratio/min", "clip_ratio/low_mean")
NUMBERS = st.floats(-100, 100, width=32)


@QUICK
@given(
    st.lists(
        st.tuples(
            st.fixed_dictionaries(dict.fromkeys(NAMES, NUMBERS)),
            st.integers(0, 5),
            st.integers(0, 3),
            st.integers(0, 2),
        ),
        min_size=1,
        max_size=8,
    )
)
def test_metrics_of_ranks_together_are_those_of_all_micro_batches(reports: list[Any]) -> None:
    """A rank may have none, and then it knows no name of them."""
    by_sequence = frozenset({"clip_ratio/low_mean"})
    alone, ranks = StepMetrics(by_sequence), [StepMetrics(by_sequence) for _ in range(3)]
    for metrics, weight, count, rank in reports:
        given = metrics | {"num_sequences": float(count)}
        if weight == 0:
            given |= {"entropy": math.nan}
        for totals in (alone, ranks[rank]):
            totals.add({name: torch.tensor(value) for name, value in given.items()}, weight)
    totals: list[Any] = []
    for one in ranks:  # what each would send

        def send(own: Any) -> list[Any]:
            totals.append(own)
            return [own]

        one.result(send)
    wanted = alone.result()
    for one in ranks:
        found = one.result(lambda _: totals)
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            assert found[name] == pytest.approx(value, rel=1e-9, abs=1e-9, nan_ok=True)


def test_failures_of_judges_are_counted_also_where_there_was_no_prompt(launch: Any) -> None:
    """A rank that has none this time has failed before: the count of all ranks does not fall."""
    sampler = launch("fails", reward_errors="none").sampler
    sampler.state.global_step = 1  # it fails then
    rows = {"prompt": ["a", "b"], "answer": ["", ""]}
    for count in (2, 0):
        columns = {name: values[:count] for name, values in rows.items()}
        sampler.sample(columns, 4, [1, 2][:count], times={})
        assert sampler.take_logged() == {"rewards/fails/exceptions": 1}


def test_groups_may_be_shared_by_processes_before_parallel_is_resolved(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values = {"per_device_train_batch_size": 1, "num_generations": 8}
    with pytest.raises(ConfigError, match="is 1 completions, which num_generations = 8"):
        config_from(values)
    monkeypatch.setenv("WORLD_SIZE", "8")  # as torchrun does
    for parallel in ({}, {"parallel": "ddp"}, {"parallel": {"data": 2, "shard": 4}}):
        config = config_from(values | parallel)
        assert (config.num_processes, config.completions_per_step) == (8, 8)
    with pytest.raises(ConfigError, match="and 3 processes is 3 completions"):
        config_from(values | {"parallel": {"data": 3, "shard": 1}})
