import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import small_model, small_tokenizer

from fastgrpo.batch import make_batch, micro_batches
from fastgrpo.config.rollout import RolloutOptions
from fastgrpo.loss import batch_logps, batch_loss, sampler_correction, sampling_difference
from fastgrpo.model import Policy
from fastgrpo.rollout import SamplingParams
from fastgrpo.rollout.static import StaticCacheRollout
from fastgrpo_kernels import GRPOLossConfig

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]


def by_hand():
    """Three sequences: 2, 0 and 1 completion tokens."""
    completions, logps = [[20, 21], [], [22]], [torch.tensor([-2.0, -2.1]), torch.zeros(0)]
    return make_batch(
        PROMPTS,
        completions,
        [*logps, torch.tensor([-2.2])],
        torch.tensor([1.0, 2, 3]),
        device="cpu",
    )


def test_sequences_stand_one_after_the_other_and_values_where_they_are_predicted():
    batch = by_hand()
    assert batch.input_ids.tolist() == [5, 6, 7, 20, 21, 8, 9, 10, 11, 12, 13, 22]
    assert batch.lengths == [5, 1, 6]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 0, 0, 1, 2, 3, 4, 5]
    assert batch.cu_seqlens.tolist() == [0, 5, 6, 12]
    counted = batch.mask.nonzero()[:, 0].tolist()
    assert counted == [2, 3, 10]
    assert batch.targets[counted].tolist() == [20, 21, 22]
    assert batch.advantages.tolist() == [0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 3, 0]
    assert batch.sampling_logps[counted].tolist() == pytest.approx([-2.0, -2.1, -2.2])
    assert batch.sampling_logps.count_nonzero() == 3
    assert (batch.num_completion_tokens, batch.num_nonempty, len(batch)) == (3, 2, 3)


def test_a_selection_is_the_batch_of_its_sequences():
    batch = by_hand()
    batch.old_logps = batch.sampling_logps - 1
    part = batch.select([2, 0])
    assert part.input_ids.tolist() == [9, 10, 11, 12, 13, 22, 5, 6, 7, 20, 21]
    assert part.lengths == [6, 5]
    assert part.advantages.tolist() == [0, 0, 0, 0, 3, 0, 0, 0, 1, 1, 0]
    assert torch.equal(part.old_logps, part.sampling_logps - 1)
    assert part.ref_logps is None
    index, real = part.padded_index()
    assert part.input_ids[index].tolist() == [[9, 10, 11, 12, 13, 22], [5, 6, 7, 20, 21, 21]]
    assert real.tolist() == [[True] * 6, [True] * 5 + [False]]


def test_what_contributes_depends_on_the_loss():
    batch = by_hand()
    batch.advantages[2:4] = 0
    assert batch.contributing(GRPOLossConfig()) == [2]
    assert batch.contributing(GRPOLossConfig(beta=0.1)) == [0, 2]
    assert batch.contributing(GRPOLossConfig(entropy_coef=0.1)) == [0, 2]
    batch.mask[10] = False  # as of a truncated completion
    assert batch.contributing(GRPOLossConfig()) == []
    batch = by_hand()
    batch.importance_weights = torch.zeros(12)  # what tells of a sampler gone wrong must be seen
    assert batch.contributing(GRPOLossConfig()) == [0, 2]
    batch.advantages[10] = torch.nan  # must reach the loss, not vanish
    assert batch.contributing(GRPOLossConfig()) == [0, 2]


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 40), max_size=30),
    st.integers(1, 7),
    st.one_of(st.none(), st.integers(10, 100)),
    st.booleans(),
)
def test_every_sequence_is_in_one_pass_and_no_pass_is_over_budget(lengths, size, budget, padded):
    passes = micro_batches(lengths, size=size, max_tokens=budget, padded=padded)
    assert sorted(i for rows in passes for i in rows) == list(range(len(lengths)))
    if budget is None:
        assert [len(rows) for rows in passes[:-1]] == [size] * (len(passes) - 1)
        return
    for rows in passes:
        each = [lengths[i] for i in rows]
        cost = max(each) * len(each) if padded else sum(each)
        assert cost <= budget or len(rows) == 1
    if not padded and sum(lengths):
        assert len(passes) <= max(1, sum(lengths) // (budget // 2 + 1) + 1) + sum(
            length > budget // 2 for length in lengths
        )


def test_passes_are_few():
    lengths = [60, 40, 50, 50, 30, 30, 40]
    assert len(micro_batches(lengths, size=1, max_tokens=100, padded=False)) == 3
    assert len(micro_batches(lengths, size=1, max_tokens=100, padded=True)) == 4


def sample(model, temperature=0.8):
    policy = Policy(model, small_tokenizer(), bf16=False)
    rollout = StaticCacheRollout(
        model, eos_token_ids=policy.eos_token_ids, pad_token_id=policy.pad_token_id
    )
    generator = torch.Generator().manual_seed(0)
    sampling = SamplingParams(max_completion_length=9, temperature=temperature)
    done = rollout.generate(PROMPTS, 4, sampling, range(3))
    ids = done.token_lists()
    logps = [x[: len(i)] for x, i in zip(done.logps, ids, strict=True)]
    prompts = [ids for ids in PROMPTS for _ in range(4)]
    advantages = torch.randn(12, generator=generator)
    return policy, make_batch(prompts, ids, logps, advantages, device=policy.device)


@pytest.fixture(scope="module")
def sampled():
    return sample(small_model("llama", initializer_range=0.3))


def test_training_sees_the_log_probs_the_sampler_saw(sampled):
    policy, batch = sampled
    logps = batch_logps(policy, batch, [[0, 7, 3], [1, 2, 4, 5, 6], [8, 9, 10, 11]], 0.8)
    torch.testing.assert_close(logps, batch.sampling_logps, atol=2e-5, rtol=0)
    difference = sampling_difference(logps + batch.mask, batch)
    assert difference["sampling/sampling_logp_difference/mean"].item() == pytest.approx(1, abs=1e-4)
    some = batch_logps(policy, batch, [[2, 5]], 0.8)
    index = batch.tokens_of([2, 5])
    assert torch.equal(some.nonzero(), (logps * 0).index_copy(0, index, logps[index]).nonzero())


def test_the_correction_of_another_sampler_is_one_weight_a_token_or_a_sequence(sampled):
    _, batch = sampled
    batch = replace(batch, old_logps=batch.sampling_logps + 0.3 * batch.mask)
    by_token = sampler_correction(
        batch, RolloutOptions(vllm_importance_sampling_mode="token_truncate")
    )
    expected = torch.full((batch.num_completion_tokens,), 0.3).exp()
    torch.testing.assert_close(by_token[batch.mask], expected)
    options = RolloutOptions(
        vllm_importance_sampling_mode="sequence_truncate", vllm_importance_sampling_clip_max=4.0
    )
    by_sequence = sampler_correction(batch, options)
    for part, mask in zip(
        by_sequence.split(batch.lengths), batch.mask.split(batch.lengths), strict=True
    ):
        expected = min(4.0, math.exp(0.3 * int(mask.sum())))
        torch.testing.assert_close(part, torch.full_like(part, expected), rtol=1e-5, atol=0)


LOSSES = ["dapo", "grpo", "dr_grpo", "luspo", "cispo", "sapo", "vespo", "gmpo", "gspo"]


def gradients_of(policy, batch, config, passes):
    policy.model.zero_grad()
    total = 0.0
    for rows in passes:
        with policy.packing():
            output = batch_loss(policy, batch.select(rows), config, step=batch)
            output.loss.backward()
        total += output.loss.item()
    return total, {name: p.grad for name, p in policy.model.named_parameters()}


def assert_same(found, expected):
    assert found[0] == pytest.approx(expected[0], rel=1e-5, abs=1e-7)
    for name, gradient in found[1].items():
        # A sum in another order: small entries carry the rounding of large ones.
        atol = 3e-6 * expected[1][name].abs().max().item()
        torch.testing.assert_close(gradient, expected[1][name], atol=atol, rtol=2e-4)


def loss_config(loss, **options):
    return GRPOLossConfig(
        loss_type="grpo" if loss == "gspo" else loss,
        importance_sampling_level="sequence" if loss == "gspo" else "token",
        epsilon_high=5.0,
        temperature=0.8,
        max_completion_length=9,
        **options,
    )


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("tie", [True, False])
def test_micro_batches_add_up_to_the_loss_and_gradient_of_the_whole_batch(sampled, loss, tie):
    _, batch = sampled
    config = loss_config(loss, entropy_coef=0.1)
    policy = Policy(small_model("qwen3", tie), small_tokenizer(), bf16=False)
    assert policy.packed
    whole = gradients_of(policy, batch, config, [list(range(12))])
    for passes in ([[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11]], [[i] for i in range(12)]):
        assert_same(gradients_of(policy, batch, config, passes), whole)


@pytest.mark.parametrize("family", ["qwen3", "llama", "gemma3"])
@pytest.mark.parametrize("loss", LOSSES)
def test_packed_equals_padded(sampled, family, loss):
    _, batch = sampled
    config = loss_config(loss, beta=0.1)
    batch = replace(
        batch, ref_logps=batch.sampling_logps - 0.1, old_logps=batch.sampling_logps + 0.05
    )
    results = []
    for padding_free in (True, False):
        policy = Policy(
            small_model(family), small_tokenizer(), bf16=False, padding_free=padding_free
        )
        assert policy.packed is padding_free
        passes = [[0, 5, 9, 11, 2], [1, 3, 4, 6, 7, 8, 10]]
        results.append(gradients_of(policy, batch, config, passes))
    assert_same(*results)


@pytest.mark.parametrize("loss", LOSSES)
def test_dropped_equals_kept(sampled, loss):
    _, batch = sampled
    config = loss_config(loss)
    batch = replace(batch, advantages=batch.advantages.clone(), mask=batch.mask.clone())
    silent = batch.tokens_of([4, 5, 6, 7])
    batch.advantages[silent] = 0  # a group without signal
    batch.mask[batch.tokens_of([9])] = False  # a completion that is masked whole
    kept = batch.contributing(config)
    assert kept == [0, 1, 2, 3, 8, 10, 11]
    policy = Policy(small_model("qwen3"), small_tokenizer(), bf16=False)
    assert_same(
        gradients_of(policy, batch, config, [kept]),
        gradients_of(policy, batch, config, [list(range(12))]),
    )


def test_the_head_is_tied_or_not_and_its_gradient_is_that_of_the_logits(sampled):
    _, batch = sampled
    for tie in (True, False):
        policy = Policy(small_model("qwen3", tie), small_tokenizer(), bf16=False)
        _, gradients = gradients_of(policy, batch, GRPOLossConfig(), [list(range(12))])
        ours = {name: gradient.clone() for name, gradient in gradients.items()}
        policy.model.zero_grad()
        total = 0.0
        for i in range(len(batch)):
            one = batch.select([i])
            logps = policy.model(input_ids=one.input_ids[None]).logits[0].log_softmax(-1)
            logps = logps.gather(1, one.targets[:, None])[:, 0]
            total -= ((logps - logps.detach()).exp() * one.advantages * one.mask).sum()
        (total / batch.num_completion_tokens).backward()
        for name, parameter in policy.model.named_parameters():
            torch.testing.assert_close(ours[name], parameter.grad, atol=1e-7, rtol=1e-4)


def test_completions_without_tokens_make_a_batch_in_which_nothing_counts():
    empty = torch.zeros(0)
    batch = make_batch(
        [[1, 2], [3]], [[], []], [empty, empty], [empty, empty], [None, []], device="cpu"
    )
    assert batch.mask.tolist() == [False] * 3
    assert batch.num_completion_tokens == 0
