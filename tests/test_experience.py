"""What is sampled: groups with signal, log-probs of the time, samplers that are not the policy."""

import pickle
from dataclasses import replace
from itertools import groupby

import pytest
import torch
from small_models import small_model
from small_runs import assert_same_weights, lines, rows_seen, weights_of

from fastgrpo.distributed import World
from fastgrpo.experience import Collector
from fastgrpo.rollout import Drawn
from fastgrpo.samples import Sample


def test_groups_without_signal_make_place_for_further_prompts(start):
    trainer = start(dynamic_sampling=True, max_resample_rounds=20, max_steps=2)
    (batch,), metrics = trainer.collect(1, {})
    assert metrics["dynamic_sampling/frac_without_signal"] == 0
    assert metrics["dynamic_sampling/rounds"] >= 1
    assert metrics["dynamic_sampling/num_prompts"] > 8
    assert metrics["frac_reward_zero_std"] > 0.2  # of all that was sampled
    assert len(batch) == 32
    assert batch.contributing(trainer.config.loss) == list(range(32))
    prompts = set()
    for i in range(0, 32, 4):
        group = [batch.select([j]) for j in range(i, i + 4)]
        texts = {
            trainer.policy.tokenizer.decode(b.input_ids[: int(b.mask.nonzero()[0]) + 1])
            for b in group
        }
        assert len(texts) == 1  # a group is whole
        advantages = [b.advantages[b.mask][0].item() for b in group]
        assert sum(advantages) == pytest.approx(0, abs=1e-4)
        assert int(next(iter(texts)).split()[2]) % 2 == 1
        prompts |= texts
    assert len(prompts) == 8


def test_resampling_gives_up_after_its_rounds_and_says_so(start):
    trainer = start(reward="silent", dynamic_sampling=True, max_resample_rounds=2, max_steps=1)
    before = weights_of(trainer)
    trainer.train()
    (metrics,) = lines(trainer.run.path / "metrics.jsonl")
    assert metrics["dynamic_sampling/rounds"] == 2
    assert metrics["dynamic_sampling/num_prompts"] == 24
    assert metrics["dynamic_sampling/frac_without_signal"] == 1
    assert metrics["num_computed_sequences"] == 0
    assert metrics["loss"] == 0
    assert_same_weights(weights_of(trainer), before, atol=0)


def test_tokens_of_a_tool_are_counted_apart():
    drawn = Drawn(
        prompt_ids=[1, 2],
        completion_ids=[3, 4, 5, 6],
        logps=torch.zeros(4),
        finished=True,
        counted=[True, False, False, True],
    )
    one = Sample(prompt="p", text="t", drawn=drawn, rewards_K=torch.tensor([0.5, torch.nan]))
    assert one.line(["a", "b"]) == {
        "prompt": "p",
        "completion": "t",
        "rewards": {"a": 0.5, "b": None},
        "num_tokens": 2,  # as lengths in metrics.jsonl, which are TRL's
        "num_tool_tokens": 2,
        "finished": True,
    }
    plain = replace(one, drawn=replace(drawn, counted=None)).line(["a", "b"])
    assert plain["num_tokens"] == 4
    assert "num_tool_tokens" not in plain


def test_old_log_probs_cost_a_forward_pass_only_where_no_step_has_them(start):
    for values, passes in (
        ({"num_iterations": 1}, 0),
        ({"num_iterations": 3}, 0),  # those of the first iteration
        ({"steps_per_generation": 4}, 1),
    ):
        trainer = start("-".join(map(str, values.items())), **values)
        seen = rows_seen(trainer)
        times = {}
        batches, _ = trainer.collect(1, times)
        tokens = sum(len(b.select(b.contributing(trainer.config.loss)).input_ids) for b in batches)
        assert seen[False] == passes * tokens
        assert all((b.old_logps is not None) == bool(passes) for b in batches)
        assert set(times) == {"generate", "reward", "logps"}


def test_the_log_probs_of_the_first_iteration_are_the_old_ones_of_the_second(start):
    from fastgrpo.loss import batch_logps

    trainer = start(num_iterations=2)
    (batch,), _ = trainer.collect(1, {})
    expected = batch_logps(trainer.policy, batch, trainer.learner.passes(batch).of(0), 1.0)
    trainer.optimise(batch, {})
    torch.testing.assert_close(batch.old_logps, expected, atol=1e-6, rtol=0)


def test_completions_may_serve_several_steps(start):
    trainer = start(steps_per_generation=4, num_iterations=2, max_steps=8, logging_steps=1)
    trainer.train()
    metrics = lines(trainer.run.path / "metrics.jsonl")
    rewards = [m["reward"] for m in metrics]
    assert len(set(rewards[:4])) == len(set(rewards[4:])) == 1
    assert rewards[0] != rewards[4]
    difference = [m["sampling/sampling_logp_difference/mean"] for m in metrics]
    assert difference[0] < 1e-5 < 1e-2 < min(difference[1:4])
    assert difference[4] < 1e-5
    assert metrics[0]["clip_ratio/region_mean"] == 0 < metrics[1]["clip_ratio/region_mean"]
    assert "time/generate" in metrics[0]
    assert "time/generate" not in metrics[1]


def test_a_sampler_with_other_weights_is_noticed(start, capsys):
    trainer = start(max_steps=2)
    stale = small_model(seed=1, initializer_range=0.3)
    generate = trainer.sampler.rollout.generate

    def generate_from_stale(*args):
        mine = {name: p.detach().clone() for name, p in trainer.policy.model.named_parameters()}
        trainer.policy.model.load_state_dict(stale.state_dict())
        try:
            return generate(*args)
        finally:
            trainer.policy.model.load_state_dict(mine, strict=False)

    trainer.sampler.rollout.generate = generate_from_stale
    trainer.train()
    (metrics, _) = lines(trainer.run.path / "metrics.jsonl")
    assert metrics["sampling/sampling_logp_difference/mean"] > 0.1
    assert capsys.readouterr().out.count("warning: log-probs in training are") == 1


def as_if_by_vllm(trainer, shift, **values):
    """Let another sampler draw, with options that are for vLLM, which need not be installed."""
    trainer.config = replace(trainer.config, use_vllm=True, **values)
    trainer.learner.config = trainer.config
    trainer.sampler.rollout = Elsewhere(trainer.sampler.rollout, shift)


class Elsewhere:
    """A sampler that is not the policy: its log-probs are off by what is asked for."""

    is_policy = False

    def __init__(self, rollout, shift):
        self.rollout, self.shift = rollout, shift
        self.update_weights, self.sleep = rollout.update_weights, rollout.sleep
        self.take_problems = rollout.take_problems

    def generate(self, *args):
        found = self.rollout.generate(*args)
        logps = found.logps + self.shift * torch.arange(len(found.logps))[:, None] * found.mask
        return replace(found, logps=logps)


@pytest.mark.parametrize(
    ("mode", "bounds"),
    [("token_truncate", (0.5, 2.0)), ("token_mask", (0.5, 2.0)), ("sequence_mask", (0.0, 1.5))],
)
def test_what_another_sampler_drew_is_weighed_by_how_likely_the_policy_finds_it(
    start, mode, bounds
):
    low, high = bounds
    trainer = start(seed=1)  # its first group has signal, and a sequence that is kept
    as_if_by_vllm(
        trainer,
        shift=-0.05,
        vllm_importance_sampling_mode=mode,
        vllm_importance_sampling_clip_min=low,
        vllm_importance_sampling_clip_max=high,
    )
    (batch,), metrics = trainer.collect(1, {})
    for i in range(32):
        one = batch.select([i])
        if one.old_logps[one.mask].abs().sum() == 0:
            continue  # without signal: not run, and not asked for
        ratio = torch.full((int(one.mask.sum()),), 0.05 * i).exp()
        if mode.startswith("sequence"):
            ratio = ratio.prod().expand_as(ratio)
        expected = ratio.clamp(low, high)
        if mode.endswith("mask"):
            expected = torch.where((ratio >= low) & (ratio <= high), ratio, 0)
        torch.testing.assert_close(one.importance_weights[one.mask], expected, rtol=2e-3, atol=0)
    name = "sampling/importance_sampling_ratio"
    assert metrics[f"{name}/min"] <= metrics[f"{name}/mean"] <= metrics[f"{name}/max"] <= high
    assert trainer.optimise(batch, {})["grad_norm"] > 0


def test_the_correction_can_be_left_out(start):
    trainer = start()
    as_if_by_vllm(trainer, shift=-0.05, vllm_importance_sampling_correction=False)
    (batch,), _ = trainer.collect(1, {})
    assert batch.old_logps is not None
    assert batch.importance_weights is None


def test_the_importance_of_what_the_policy_itself_would_sample_is_1(start):
    trainer = start()
    as_if_by_vllm(trainer, shift=0.0, vllm_importance_sampling_mode="token_truncate")
    _, metrics = trainer.collect(1, {})
    assert metrics["frac_reward_zero_std"] > 0  # whose completions are not run
    for what in ("min", "mean", "max"):
        found = metrics[f"sampling/importance_sampling_ratio/{what}"]
        assert found == pytest.approx(1, abs=1e-4)


def test_a_sampler_so_far_off_that_all_its_weights_are_0_is_noticed(start, capsys):
    trainer = start(max_steps=1)
    rollout = Elsewhere(trainer.sampler.rollout, shift=-0.5)
    trainer.sampler.rollout = rollout
    trainer.train()
    (metrics,) = lines(trainer.run.path / "metrics.jsonl")
    assert metrics["sampling/sampling_logp_difference/mean"] > 1
    assert "warning: log-probs in training are" in capsys.readouterr().out


def test_weights_are_pushed_and_memory_given_back_around_every_sampling(start, monkeypatch):
    trainer = start(max_steps=2, dynamic_sampling=True, max_resample_rounds=2)
    calls = []
    for name in ("update_weights", "generate", "sleep"):
        method = getattr(trainer.sampler.rollout, name)

        def spy(*args, name=name, method=method):
            calls.append(name)
            return method(*args)

        monkeypatch.setattr(trainer.sampler.rollout, name, spy)
    trainer.train()
    assert [name for name, _ in groupby(calls)] == ["update_weights", "generate", "sleep"] * 2


def test_a_prompt_draws_its_own_random_numbers_however_the_steps_are_cut(start):
    """And a run that begins later draws what a whole one does, with the position alone."""
    first, second, later = (start(name) for name in ("a", "b", "c"))
    samples = first.collector.collect(8, {}).samples
    some = [second.collector.collect(n, {}).samples for n in (3, 1, 4)]
    later.collector.prompts.load_state_dict({"epoch": 0, "index": 3})
    rest = later.collector.collect(5, {}).samples

    def ids(samples):
        return [(one.drawn.prompt_ids, one.drawn.completion_ids) for one in samples]

    assert ids(samples) == ids(one for part in some for one in part)
    assert ids(samples)[12:] == ids(rest)
    assert len({str(x) for x in ids(samples)}) == 32
    again = start("d")
    again.collector.prompts.load_state_dict({"epoch": 1, "index": 0})
    visited = {str(p): c for p, c in ids(again.collector.collect(32, {}).samples)}
    assert all(visited[str(p)] != c for p, c in ids(samples))  # in another epoch others


def test_the_collector_is_reproducible(start):
    first, second = (start(name) for name in ("a", "b"))
    assert isinstance(first.collector, Collector)
    (a,), _ = first.collect(1, {})
    (b,), _ = second.collect(1, {})
    assert torch.equal(a.input_ids, b.input_ids)
    assert torch.equal(a.sampling_logps, b.sampling_logps)


def test_what_a_rank_sends_is_its_samples_and_not_what_they_are_views_of(start):
    trainer = start()
    trainer.sampler.world = World(rank=0, size=2)
    rows = trainer.train_dataset[:16]
    samples, _, _ = trainer.sampler._sample(
        rows,
        4,
        list(range(16)),
        times={},
        sampling=trainer.sampler.sampling,
        evaluation=False,
    )
    assert len(samples) == 64
    alone = sum(len(pickle.dumps(sample)) for sample in samples)
    assert max(len(pickle.dumps(sample)) for sample in samples) < 1200
    assert len(pickle.dumps(samples)) < alone
