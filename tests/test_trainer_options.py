"""Each option of the fast and lean trainer, as one line of a configuration in a real run."""

import pytest
import torch
from small_models import save_small_model
from small_runs import STEADY, assert_same_weights, lines, rows_seen, run_config, weights_of

from fastgrpo.assets import load_assets
from fastgrpo.trainer import Trainer


@pytest.mark.parametrize("loss", ["dapo", "vespo"])
def test_completions_without_signal_are_not_run_and_the_run_is_the_same(start, loss):
    results = []
    for keep in (False, True):
        trainer = start(str(keep), filter_zero_advantages=not keep, loss_type=loss, **STEADY)
        seen = rows_seen(trainer)
        trainer.train()
        metrics = lines(trainer.run.path / "metrics.jsonl")
        results.append((weights_of(trainer), seen, metrics))
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
        before = weights_of(trainer)
        second = trainer.optimise(batch, {})
        assert (second["loss"], second["grad_norm"]) == (0, 0)
        assert second["num_computed_sequences"] == (32 if keep else 0)
        after = weights_of(trainer)
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
        results.append((weights_of(trainer), sizes))
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
    assert_same_weights(weights_of(found), weights_of(expected))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler looks at things that warn when looked at
def test_a_compiled_run_is_the_same_run(start):
    plain, compiled = start("plain", **STEADY), start("compiled", torch_compile=True, **STEADY)
    plain.train()
    compiled.train()
    assert_same_weights(weights_of(compiled), weights_of(plain), atol=1e-4)


@pytest.mark.parametrize(
    ("option", "optimizer", "dtype"),
    [
        ({}, "AdamW", torch.float32),
        ({"optim": "adamw_8bit"}, "AdamW8bit", torch.float32),
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
    trainer = start(reward_funcs=letter_e, learning_rate=1e-2, max_steps=14, **option)
    assert type(trainer.learner.optimizer).__name__ == optimizer
    assert {p.dtype for p in trainer.policy.model.parameters()} == {dtype}
    trainer.train()
    rewards = [m["reward"] for m in lines(trainer.run.path / "metrics.jsonl")]
    assert rewards[0] < 0.02
    assert sum(rewards[-3:]) / 3 > 0.1


def test_a_reference_that_follows_is_where_its_formula_says(start):
    trainer = start(
        beta=0.05, sync_ref_model=True, ref_model_sync_steps=2, ref_model_mixup_alpha=0.25
    )
    first = weights_of(trainer)
    policies = []
    optimise = trainer.optimise

    def remember(*args):
        metrics = optimise(*args)
        policies.append(weights_of(trainer))
        return metrics

    trainer.optimise = remember
    trainer.train()
    for name, value in trainer.learner.reference.frozen.model.named_parameters():
        expected = 0.25 * policies[1][name] + 0.75 * first[name]
        torch.testing.assert_close(value, expected, atol=1e-6, rtol=0)


def test_16_bit_models_of_the_callers_are_refused_without_a_way_to_update_them(
    tmp_path, word_problems
):
    model = save_small_model(tmp_path / "model")
    config = run_config(tmp_path, word_problems, model)
    assets = load_assets(config)
    assets.model.bfloat16()
    with pytest.raises(ValueError, match="bfloat16"):
        Trainer(config, assets)
