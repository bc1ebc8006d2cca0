"""Each option of the fast and lean trainer, as one line of a configuration in a real run."""

from itertools import groupby

import pytest
import torch
from small_models import save_small_model, small_model
from small_runs import lines, run_config

from fastgrpo.assets import load_assets
from fastgrpo.experience import Collector
from fastgrpo.trainer import Trainer

HALF_SILENT = """
def half_silent(prompts, completions, **columns):
    # Of prompts with an even number of eggs every completion is as good as the others.
    return [
        0.5 if int(prompt.split()[2]) % 2 == 0 else text.count("e") + 0.1 * len(text)
        for prompt, text in zip(prompts, completions)
    ]

def silent(completions, **columns):
    return [1.0] * len(completions)
"""


@pytest.fixture
def start(tmp_path, word_problems):
    """Make a trainer on a model, with a reward that has no signal on half of the prompts."""
    (tmp_path / "silence.py").write_text(HALF_SILENT)
    model = save_small_model(tmp_path / "model")

    def make(name="run", reward="half_silent", **values):
        values = {
            "reward_funcs": [f"{tmp_path}/silence.py:{reward}"],
            "output_dir": str(tmp_path / name),
            "max_steps": 3,
            "save_steps": 0,
            **values,
        }
        return Trainer(run_config(tmp_path, word_problems, model, **values))

    return make


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.policy.model.named_parameters()}


def assert_same_weights(found, expected, atol=2e-5):
    """Compare after a few steps at a learning rate of 1e-2, of which AdamW makes 1e-2 each."""
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], atol=atol, rtol=0)


def rows_seen(trainer):
    """Count the tokens the body runs on with gradients, and without."""
    seen = {True: 0, False: 0}

    def count(module, args, kwargs):
        if kwargs.get("past_key_values") is None:  # sampling has a cache
            seen[torch.is_grad_enabled()] += kwargs["input_ids"].numel()

    trainer.policy.model.get_decoder().register_forward_pre_hook(count, with_kwargs=True)
    return seen


# SGD would show differences as they are; AdamW turns rounding of tiny gradients into whole steps,
# so these runs have an epsilon above rounding.
STEADY = {"adam_epsilon": 1e-3, "learning_rate": 1e-2}


@pytest.mark.parametrize("loss", ["dapo", "grpo", "vespo"])
def test_completions_without_signal_are_not_run_and_the_run_is_the_same(start, loss):
    results = []
    for keep in (False, True):
        trainer = start(str(keep), filter_zero_advantages=not keep, loss_type=loss, **STEADY)
        seen = rows_seen(trainer)
        trainer.train()
        metrics = lines(trainer.run.path / "metrics.jsonl")
        results.append((weights(trainer), seen, metrics))
    (dropped, few, some), (kept, all_tokens, everything) = results
    assert_same_weights(dropped, kept)
    silent = [m["frac_reward_zero_std"] for m in everything]
    assert 0.2 < sum(silent) / 3 < 0.8
    for m, n in zip(some, everything, strict=True):
        assert m["loss"] == pytest.approx(n["loss"], abs=1e-6)
        assert m["num_sequences"] == n["num_sequences"] == n["num_computed_sequences"] == 32
        assert m["num_computed_sequences"] == round(32 * (1 - m["frac_reward_zero_std"]))
    assert few[True] == pytest.approx(all_tokens[True] * (1 - sum(silent) / 3), rel=0.1)


def test_a_batch_without_any_signal_moves_the_weights_by_momentum_alone(start):
    results = []
    for keep in (False, True):
        trainer = start(str(keep), filter_zero_advantages=not keep, max_steps=2, **STEADY)
        (batch,), _ = trainer.collect(1, {})
        first = trainer.optimise(batch, {})
        assert first["grad_norm"] > 0
        batch.advantages.zero_()
        before = weights(trainer)
        second = trainer.optimise(batch, {})
        assert (second["loss"], second["grad_norm"]) == (0, 0)
        assert second["num_computed_sequences"] == (32 if keep else 0)
        after = weights(trainer)
        assert max((after[n] - before[n]).abs().max() for n in after) > 1e-3
        results.append(after)
    assert_same_weights(*results)


def test_a_kl_term_or_an_entropy_bonus_needs_every_completion(start):
    for option in ({"beta": 0.01}, {"entropy_coef": 0.01}):
        trainer = start(next(iter(option)), max_steps=1, **option)
        trainer.train()
        (metrics,) = lines(trainer.run.path / "metrics.jsonl")
        assert metrics["frac_reward_zero_std"] > 0
        assert metrics["num_computed_sequences"] == 32


def test_passes_are_packed_to_their_budget_and_the_run_is_the_same(start):
    whole = start("whole", per_device_train_batch_size=32, gradient_accumulation_steps=1, **STEADY)
    packed = start("packed", max_tokens_per_microbatch=300, **STEADY)
    padded = start("padded", max_tokens_per_microbatch=300, padding_free=False, **STEADY)
    results = []
    for trainer in (whole, packed, padded):
        sizes = []

        def measure(module, args, kwargs, sizes=sizes):
            if torch.is_grad_enabled():
                sizes.append(kwargs["input_ids"].numel())

        trainer.policy.model.model.register_forward_pre_hook(measure, with_kwargs=True)
        trainer.train()
        results.append((weights(trainer), sizes))
    assert_same_weights(results[1][0], results[0][0])
    assert_same_weights(results[2][0], results[0][0])
    assert len(results[0][1]) == 3
    for _, sizes in results[1:]:
        assert max(sizes) <= 300
        assert len(sizes) > 6
    # 32 or fewer sequences of 57 to 60 tokens: five in a pass, and a rest.
    assert sum(size > 220 for size in results[1][1]) >= len(results[1][1]) - 3


def test_a_prompt_that_leaves_no_room_in_the_budget_is_refused_at_the_start(start):
    with pytest.raises(ValueError, match="tokens"):
        start(max_tokens_per_microbatch=50)


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
    before = weights(trainer)
    trainer.train()
    (metrics,) = lines(trainer.run.path / "metrics.jsonl")
    assert metrics["dynamic_sampling/rounds"] == 2
    assert metrics["dynamic_sampling/num_prompts"] == 24
    assert metrics["dynamic_sampling/frac_without_signal"] == 1
    assert metrics["num_computed_sequences"] == 0
    assert metrics["loss"] == 0
    assert_same_weights(weights(trainer), before, atol=0)


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
    expected = batch_logps(trainer.policy, batch, trainer.passes(batch), 1.0)
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
    generate = trainer.rollout.generate

    def generate_from_stale(*args):
        mine = {name: p.detach().clone() for name, p in trainer.policy.model.named_parameters()}
        trainer.policy.model.load_state_dict(stale.state_dict())
        try:
            return generate(*args)
        finally:
            trainer.policy.model.load_state_dict(mine, strict=False)

    trainer.rollout.generate = generate_from_stale
    trainer.train()
    (metrics, _) = lines(trainer.run.path / "metrics.jsonl")
    assert metrics["sampling/sampling_logp_difference/mean"] > 0.1
    assert capsys.readouterr().out.count("warning: log-probs in training are") == 1


class Elsewhere:
    """A sampler that is not the policy: its log-probs are off by what is asked for."""

    is_policy = False

    def __init__(self, rollout, shift):
        self.rollout, self.shift = rollout, shift
        self.update_weights, self.sleep = rollout.update_weights, rollout.sleep

    def generate(self, *args):
        from dataclasses import replace

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
    trainer = start(
        vllm_importance_sampling_mode=mode,
        vllm_importance_sampling_clip_min=low,
        vllm_importance_sampling_clip_max=high,
    )
    rollout = Elsewhere(trainer.rollout, shift=-0.05)
    trainer.rollout = trainer.collector.rollout = rollout
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


def test_the_importance_of_what_the_policy_itself_would_sample_is_1(start):
    trainer = start(vllm_importance_sampling_mode="token_truncate")
    rollout = Elsewhere(trainer.rollout, shift=0.0)
    trainer.rollout = trainer.collector.rollout = rollout
    _, metrics = trainer.collect(1, {})
    assert metrics["frac_reward_zero_std"] > 0  # whose completions are not run
    for what in ("min", "mean", "max"):
        found = metrics[f"sampling/importance_sampling_ratio/{what}"]
        assert found == pytest.approx(1, abs=1e-4)


def test_a_sampler_so_far_off_that_all_its_weights_are_0_is_noticed(start, capsys):
    trainer = start(max_steps=1)
    rollout = Elsewhere(trainer.rollout, shift=-0.5)
    trainer.rollout = trainer.collector.rollout = rollout
    trainer.train()
    (metrics,) = lines(trainer.run.path / "metrics.jsonl")
    assert metrics["sampling/sampling_logp_difference/mean"] > 1
    assert "warning: log-probs in training are" in capsys.readouterr().out


@pytest.mark.parametrize(
    "option",
    [
        {"padding_free": False},
        {"attn_implementation": "sdpa"},
        {"gradient_checkpointing": False},
        {"activation_offloading": True},
        {"offload_optimizer": True},
        {"max_generation_batch_size": 8},
        {"beta": 0.01, "offload_ref_model": True},
    ],
    ids=lambda option: "-".join(option),
)
def test_what_saves_memory_or_time_does_not_change_the_run(start, option):
    plain = {"beta": option["beta"]} if "beta" in option else {}
    expected, found = start("plain", **STEADY, **plain), start("with", **STEADY, **option)
    expected.train()
    found.train()
    assert_same_weights(weights(found), weights(expected))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler looks at things that warn when looked at
def test_a_compiled_run_is_the_same_run(start):
    plain, compiled = start("plain", **STEADY), start("compiled", torch_compile=True, **STEADY)
    plain.train()
    compiled.train()
    assert_same_weights(weights(compiled), weights(plain), atol=1e-4)


@pytest.mark.parametrize(
    ("option", "optimizer", "dtype"),
    [
        ({}, "AdamW", torch.float32),
        ({"optim": "adamw_8bit"}, "AdamW8bit", torch.float32),
        ({"offload_optimizer": True}, "MasterWeights", torch.float32),
        ({"dtype": "bfloat16", "bf16_updates": "master_weights"}, "MasterWeights", torch.bfloat16),
        (
            {"dtype": "bfloat16", "bf16_updates": "stochastic_rounding"},
            "StochasticRoundingAdamW",
            torch.bfloat16,
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:.*CPU.*:UserWarning:bitsandbytes")
def test_one_line_chooses_how_parameters_are_held_and_updated_and_all_learn(
    tmp_path, start, option, optimizer, dtype
):
    letter_e = [f"{tmp_path}/my_rewards.py:letter_e"]
    trainer = start(reward_funcs=letter_e, learning_rate=1e-2, max_steps=24, **option)
    assert type(trainer.optimizer).__name__ == optimizer
    assert {p.dtype for p in trainer.policy.model.parameters()} == {dtype}
    trainer.train()
    rewards = [m["reward"] for m in lines(trainer.run.path / "metrics.jsonl")]
    assert rewards[0] < 0.1
    assert sum(rewards[-3:]) / 3 > 0.3


def test_a_reference_that_follows_is_where_its_formula_says(start):
    trainer = start(
        beta=0.05, sync_ref_model=True, ref_model_sync_steps=2, ref_model_mixup_alpha=0.25
    )
    first = weights(trainer)
    policies = []
    optimise = trainer.optimise

    def remember(*args):
        metrics = optimise(*args)
        policies.append(weights(trainer))
        return metrics

    trainer.optimise = remember
    trainer.train()
    for name, value in trainer.reference.frozen.model.named_parameters():
        expected = 0.25 * policies[1][name] + 0.75 * first[name]
        torch.testing.assert_close(value, expected, atol=1e-6, rtol=0)


def test_weights_are_pushed_and_memory_given_back_around_every_sampling(start, monkeypatch):
    trainer = start(max_steps=2, dynamic_sampling=True, max_resample_rounds=2)
    calls = []
    for name in ("update_weights", "generate", "sleep"):
        method = getattr(trainer.rollout, name)

        def spy(*args, name=name, method=method):
            calls.append(name)
            return method(*args)

        monkeypatch.setattr(trainer.rollout, name, spy)
    trainer.train()
    assert [name for name, _ in groupby(calls)] == ["update_weights", "generate", "sleep"] * 2


def test_16_bit_models_of_the_callers_are_refused_without_a_way_to_update_them(
    tmp_path, word_problems
):
    model = save_small_model(tmp_path / "model")
    config = run_config(tmp_path, word_problems, model)
    assets = load_assets(config)
    assets.model.bfloat16()
    with pytest.raises(ValueError, match="bfloat16"):
        Trainer(config, assets)


def test_the_collector_is_reproducible(start):
    first, second = (start(name) for name in ("a", "b"))
    assert isinstance(first.collector, Collector)
    (a,), _ = first.collect(1, {})
    (b,), _ = second.collect(1, {})
    assert torch.equal(a.input_ids, b.input_ids)
    assert torch.equal(a.sampling_logps, b.sampling_logps)
