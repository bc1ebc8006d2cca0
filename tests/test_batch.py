import pytest
import torch
from small_models import small_model, small_tokenizer

from fastgrpo.batch import make_batch
from fastgrpo.loss import batch_logps, batch_loss, sampling_difference
from fastgrpo.model import Policy
from fastgrpo.rollout import Completions, SamplingParams
from fastgrpo.rollout.static import StaticCacheRollout
from fastgrpo_kernels import GRPOLossConfig

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]


def completions(lengths: list[int]) -> Completions:
    width = max(lengths)
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    ids = torch.where(mask, torch.arange(20, 20 + len(lengths) * width).view(-1, width), 0)
    logps = torch.where(mask, -ids / 10, 0.0)
    return Completions(ids, mask, logps, torch.ones(len(lengths), dtype=torch.bool))


def test_prompts_end_and_completions_start_at_the_same_column():
    batch = make_batch(PROMPTS, completions([2, 4, 1, 3, 2, 1]), torch.arange(6.0), pad_token_id=0)
    assert batch.input_ids[0].tolist() == [0, 0, 5, 6, 7, 20, 21, 0, 0]
    assert batch.attention_mask[0].tolist() == [0, 0, 1, 1, 1, 1, 1, 0, 0]
    assert batch.input_ids[3].tolist() == [0, 0, 0, 0, 8, 32, 33, 34, 0]
    assert batch.prompt_lengths == [3, 3, 1, 1, 5, 5]
    assert batch.completion_lengths == [2, 4, 1, 3, 2, 1]
    assert batch.num_completion_tokens == 13


def test_micro_batches_are_cut_to_their_own_length_and_hold_everything():
    batch = make_batch(PROMPTS, completions([2, 4, 1, 3, 2, 1]), torch.arange(6.0), pad_token_id=0)
    batch.old_logps = batch.sampling_logps - 1
    micros = list(batch.split(2))
    assert [tuple(m.input_ids.shape) for m in micros] == [(2, 7), (2, 4), (2, 7)]
    assert micros[1].input_ids.tolist() == [[8, 28, 0, 0], [8, 32, 33, 34]]
    assert micros[1].completion_mask.tolist() == [[True, False, False], [True, True, True]]
    assert torch.cat([m.advantages for m in micros]).tolist() == list(range(6))
    for micro in micros:
        assert torch.equal(micro.old_logps, micro.sampling_logps - 1)
        assert micro.ref_logps is None


@pytest.fixture(scope="module")
def sampled():
    model = small_model("llama", initializer_range=0.3)
    tokenizer = small_tokenizer()
    policy = Policy(model, tokenizer, bf16=False)
    rollout = StaticCacheRollout(
        model, eos_token_ids=policy.eos_token_ids, pad_token_id=policy.pad_token_id
    )
    generator = torch.Generator().manual_seed(0)
    done = rollout.generate(
        PROMPTS, 4, SamplingParams(max_completion_length=9, temperature=0.8), generator
    )
    advantages = torch.randn(12, generator=generator)
    return policy, make_batch(PROMPTS, done, advantages, policy.pad_token_id)


def test_training_sees_the_log_probs_the_sampler_saw(sampled):
    policy, batch = sampled
    logps = batch_logps(policy, batch, 5, temperature=0.8)
    torch.testing.assert_close(logps, batch.sampling_logps, atol=2e-5, rtol=0)
    difference = sampling_difference(logps + batch.completion_mask, batch)
    assert difference["sampling/sampling_logp_difference/mean"].item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(
    "loss", ["dapo", "grpo", "dr_grpo", "luspo", "cispo", "sapo", "vespo", "gmpo", "gspo"]
)
@pytest.mark.parametrize("tie", [True, False])
def test_micro_batches_add_up_to_the_loss_and_gradient_of_the_whole_batch(sampled, loss, tie):
    _, batch = sampled
    config = GRPOLossConfig(
        loss_type="grpo" if loss == "gspo" else loss,
        importance_sampling_level="sequence" if loss == "gspo" else "token",
        epsilon_high=5.0,
        entropy_coef=0.1,
        temperature=0.8,
        max_completion_length=9,
    )
    results = []
    for size in (12, 5, 1):
        policy = Policy(small_model("qwen3", tie), small_tokenizer(), bf16=False)
        total = 0.0
        for micro in batch.split(size):
            output = batch_loss(policy, micro, config, step=batch)
            output.loss.backward()
            total += output.loss.item()
        gradients = {n: p.grad for n, p in policy.model.named_parameters()}
        results.append((total, gradients))
    for total, gradients in results[1:]:
        assert total == pytest.approx(results[0][0], rel=1e-5, abs=1e-7)
        for name, gradient in gradients.items():
            expected = results[0][1][name]
            # A sum in another order: small entries carry the rounding of large ones.
            atol = 3e-6 * expected.abs().max().item()
            torch.testing.assert_close(gradient, expected, atol=atol, rtol=2e-4)


def test_the_head_is_tied_or_not_and_its_gradient_is_that_of_the_logits(sampled):
    _, batch = sampled
    for tie in (True, False):
        policy = Policy(small_model("qwen3", tie), small_tokenizer(), bf16=False)
        config = GRPOLossConfig(loss_type="dapo")
        output = batch_loss(policy, batch, config, step=batch)
        output.loss.backward()
        ours = policy.model.get_input_embeddings().weight.grad.clone()
        policy.model.zero_grad()
        positions = (batch.attention_mask.cumsum(1) - 1).clamp(min=0)
        logits = policy.model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=positions,
            use_cache=False,
        ).logits[:, -batch.completion_ids.shape[1] - 1 : -1]
        logps = logits.log_softmax(-1).gather(2, batch.completion_ids[..., None])[..., 0]
        ratio = (logps - logps.detach()).exp()
        (
            -(ratio * batch.advantages[:, None] * batch.completion_mask).sum()
            / batch.num_completion_tokens
        ).backward()
        theirs = policy.model.get_input_embeddings().weight.grad
        torch.testing.assert_close(ours, theirs, atol=1e-7, rtol=1e-4)
