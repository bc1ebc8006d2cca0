"""What the trainer leaves out of the loss, against plain PyTorch on the model's own logits."""

import pytest
import torch
from small_models import small_model
from small_runs import lines
from transformers import AutoModelForCausalLM, OPTConfig

from fastgrpo import policy_loss
from fastgrpo.config import ConfigError, TrainConfig, config_from
from fastgrpo.entropy_bonus import EntropyBonus
from fastgrpo_kernels import GRPOLossConfig, off_policy_mask, top_entropy_mask


def logits_of(model, batch):
    return [
        model(part[None]).logits[0, :-1].double() for part in batch.input_ids.split(batch.lengths)
    ]


def statistics(model, batch, temperature=1.0):
    """Return log-probs and entropies at the positions of the batch, the last of a sequence 0."""
    logps, entropies = [], []
    for logits, ids in zip(
        logits_of(model, batch), batch.input_ids.split(batch.lengths), strict=True
    ):
        table = (logits / temperature).log_softmax(-1)
        zero = table.new_zeros(1)
        logps.append(torch.cat([table.gather(1, ids[1:, None])[:, 0], zero]))
        entropies.append(torch.cat([-(table.exp() * table).sum(1), zero]))
    return torch.cat(logps), torch.cat(entropies)


def gradient(loss, model):
    return dict(
        zip(
            dict(model.named_parameters()),
            torch.autograd.grad(loss, list(model.parameters())),
            strict=True,
        )
    )


def compare(trainer, batch, loss):
    """Hold the trainer's loss and gradient to those of a loss in plain PyTorch."""
    model = trainer.policy.model
    expected = gradient(loss, model)
    grads = {}
    trainer.learner.optimizer.register_step_pre_hook(
        lambda *_: grads.update({n: p.grad.clone() for n, p in model.named_parameters()})
    )
    found = trainer.optimise(batch, {})
    assert found["loss"] == pytest.approx(float(loss.detach()), abs=1e-6)
    for name, value in expected.items():
        torch.testing.assert_close(grads[name], value.float(), atol=2e-6, rtol=1e-4)


def test_truncated_completions_are_left_out_of_loss_and_denominators(start):
    trainer = start(mask_truncated_completions=True, max_grad_norm=0.0, beta=0.0)
    generate = trainer.sampler.rollout.generate

    def half_finished(*args):
        completions = generate(*args)
        completions.finished[:] = torch.arange(len(completions.finished)) % 2 == 0
        return completions

    trainer.sampler.rollout.generate = half_finished
    (batch,), metrics = trainer.collect(1, {})
    assert metrics["completions/clipped_ratio"] == 0.5
    counted = [bool(part.any()) for part in batch.mask.split(batch.lengths)]
    assert counted == [i % 2 == 0 for i in range(32)]
    logps, _ = statistics(trainer.policy.model, batch)
    mask = batch.mask.double()
    loss = -(mask * batch.advantages * (logps - logps.detach()).exp()).sum() / mask.sum()
    compare(trainer, batch, loss)
    assert trainer.learner.passes(batch).of(0)
    assert all(i % 2 == 0 for rows in trainer.learner.passes(batch).of(0) for i in rows)


def test_sequences_far_off_the_policy_are_left_out_of_the_policy_term(start):
    trainer = start(off_policy_mask_threshold=0.05, beta=0.1, max_grad_norm=0.0)
    (batch,), _ = trainer.collect(1, {})
    batch.sampling_logps += 0.1 * torch.randn(32).repeat_interleave(torch.tensor(batch.lengths))
    logps, _ = statistics(trainer.policy.model, batch)
    by_sequence = batch.sequence_advantages
    firsts = [float(part[m][0]) for part, m in zip(
        batch.advantages.split(batch.lengths), batch.mask.split(batch.lengths), strict=True
    )]  # fmt: skip
    assert by_sequence.tolist() == pytest.approx(firsts, abs=1e-6)
    kept = off_policy_mask(
        logps.detach(),
        batch.sampling_logps.double(),
        torch.tensor(firsts),
        threshold=0.05,
        completion_mask=batch.mask,
        cu_seqlens=batch.cu_seqlens,
    )
    assert 2 <= int((kept == 0).sum()) < 16  # of those below the mean, a quarter of 32
    config = GRPOLossConfig(beta=0.1)
    loss = policy_loss(
        logps[None],
        batch.advantages[None],
        completion_mask=batch.mask[None],
        ref_logps=batch.ref_logps[None],
        policy_weight=kept.repeat_interleave(torch.tensor(batch.lengths))[None],
        config=config,
    ).loss
    compare(trainer, batch, loss)


def test_only_tokens_of_the_highest_entropy_have_a_policy_term_and_a_bonus(start):
    trainer = start(top_entropy_quantile=0.3, entropy_coef=0.2, max_grad_norm=0.0)
    (batch,), _ = trainer.collect(1, {})
    passes = trainer.learner.passes(batch).of(0)
    assert sorted(row for rows in passes for row in rows) == list(range(32))  # none is left out
    losses, kept = [], 0
    for rows in passes:
        micro = batch.select(rows)
        logps, entropy = statistics(trainer.policy.model, micro)
        mask = top_entropy_mask(entropy.detach().float(), quantile=0.3, completion_mask=micro.mask)
        kept += int(mask.sum())
        ratio = (logps - logps.detach()).exp()
        policy = -(mask * micro.advantages * ratio).sum() / batch.num_completion_tokens
        losses.append(policy - 0.2 * (entropy * mask).sum() / mask.sum() / len(passes))
    assert 0.25 < kept / batch.num_completion_tokens < 0.35
    compare(trainer, batch, sum(losses))


def test_the_coefficient_follows_the_entropy():
    options = {"use_adaptive_entropy": True, "entropy_coef_delta": 0.25, "entropy_coef_max": 0.6}
    bonus = EntropyBonus(config_from({**options, "entropy_coef": 0.3, "entropy_target": 1.0}))
    applied = []
    for entropy in (0.9, 0.8, 1.2, 1.1, 1.0, 0.5):
        applied.append(bonus.loss.entropy_coef)
        bonus.update(entropy)
    # A step later than the entropy that calls for it, within the bounds.
    assert applied == pytest.approx([0.0, 0.55, 0.6, 0.0, 0.0, 0.35])
    assert bonus.loss.entropy_coef == pytest.approx(0.6)
    for _ in range(5):
        bonus.update(3.0)
    assert bonus.coefficient == 0
    floor = EntropyBonus(config_from({**options, "entropy_coef": 0.3, "entropy_coef_min": 0.2}))
    floor.update(3.0)
    assert floor.coefficient == 0.2
    coefficient = bonus.coefficient
    bonus.update(float("nan"))  # nothing was counted in that step
    assert bonus.coefficient == coefficient
    fixed = EntropyBonus(config_from({"entropy_coef": 0.3}))
    fixed.update(0.1)
    assert fixed.loss.entropy_coef == 0.3


def test_a_run_with_an_adaptive_bonus_reports_its_coefficient(start):
    trainer = start(
        use_adaptive_entropy=True, entropy_coef=0.1, entropy_target=10.0, entropy_coef_delta=0.1
    )
    trainer.train()
    metrics = lines(trainer.run.path / "metrics.jsonl")
    assert [m["entropy_coef"] for m in metrics] == pytest.approx([0.2, 0.3, 0.4])
    assert all(m["num_computed_sequences"] == 32 for m in metrics)


def test_dropout_can_be_switched_off(start):
    from fastgrpo.setup import disable_dropout

    drops = small_model("llama", attention_dropout=0.5)
    drops.model.layers[0].mlp.add_module("drop", torch.nn.Dropout(0.3))
    opt = AutoModelForCausalLM.from_config(
        OPTConfig(
            vocab_size=64, hidden_size=32, ffn_dim=32, num_hidden_layers=1, word_embed_proj_dim=32,
            num_attention_heads=2, max_position_embeddings=32, dropout=0.5, attention_dropout=0.5,
        )
    )  # fmt: skip
    ids = torch.arange(10)[None]
    for model in (drops, opt):
        model.train()
        assert not torch.equal(model(ids).logits, model(ids).logits)
        disable_dropout(model)
        assert torch.equal(model(ids).logits, model(ids).logits)
    assert drops.model.layers[0].mlp.drop.p == 0


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"top_entropy_quantile": 0.0}, "top_entropy_quantile: must be above 0 and at most 1"),
        (
            {"top_entropy_quantile": 0.5, "max_tokens_per_microbatch": 4096},
            "max_tokens_per_microbatch: top_entropy_quantile takes quantiles of micro-batches",
        ),
        (
            {"top_entropy_quantile": 0.5, "use_adaptive_entropy": True},
            "use_adaptive_entropy: follows the entropy of all tokens",
        ),
        ({"entropy_target": 1.0}, "entropy_target: has no effect without use_adaptive_entropy"),
        (
            {"use_adaptive_entropy": True, "entropy_coef": 2.0},
            "entropy_coef: must be between entropy_coef_min and entropy_coef_max, 0.0 and 1.0",
        ),
    ],
)
def test_options_of_masks_that_do_not_go_together_are_named(values, sentence):
    with pytest.raises(ConfigError, match=sentence):
        config_from(values)
    assert isinstance(TrainConfig(), TrainConfig)
