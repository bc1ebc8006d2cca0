import pytest
import torch
from small_models import small_model, small_tokenizer

from fastgrpo.batch import make_batch
from fastgrpo.model import Policy


def some_batch():
    prompts, completions = [[5, 6, 7], [8], [9, 10, 11, 12]], [[13, 14], [15] * 9, [16]]
    return make_batch(
        prompts,
        completions,
        [torch.zeros(len(c)) for c in completions],
        torch.ones(3),
        device="cpu",
    )


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "gemma3"])
@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("padding_free", [True, False])
def test_hidden_states_are_those_of_each_sequence_alone(family, tie, padding_free):
    model = small_model(family, tie)
    policy = Policy(model, small_tokenizer(), bf16=False, padding_free=padding_free)
    batch = some_batch()
    with policy.packing():
        hidden = policy.hidden_states(batch)
    assert (policy.head.weight is model.get_input_embeddings().weight) == tie
    for i, found in enumerate(hidden.split(batch.lengths)):
        ids = batch.select([i]).input_ids[None]
        alone = model.get_decoder()(input_ids=ids).last_hidden_state[0]
        torch.testing.assert_close(found, alone, atol=1e-5, rtol=0)


def test_outside_of_training_a_packed_model_is_any_model_and_packing_is_refused():
    policy = Policy(small_model(), small_tokenizer(), bf16=False)
    ids = torch.tensor([[5, 6, 7, 0, 0], [8, 9, 10, 11, 12]])
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    padded = policy.model(input_ids=ids, attention_mask=mask).logits[0, :3]
    torch.testing.assert_close(padded, policy.model(ids[:1, :3]).logits[0], atol=1e-5, rtol=0)
    with pytest.raises(AssertionError, match=r"policy\.packing\(\)"):
        policy.hidden_states(some_batch())


def test_both_sources_of_end_tokens_count():
    model, tokenizer = small_model(), small_tokenizer()
    model.generation_config.eos_token_id = [7, 3]
    assert Policy(model, tokenizer, bf16=False).eos_token_ids == [1, 3, 7]
    tokenizer.eos_token = None
    model.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match=r"set tokenizer\.eos_token"):
        Policy(model, tokenizer, bf16=False)


def test_a_model_that_cannot_be_packed_is_padded_and_says_why():
    model = small_model("llama")
    model.config.layer_types = ["linear_attention", "full_attention"]
    with pytest.raises(
        ValueError, match=r"padding_free: .*linear_attention.*leave padding_free out"
    ):
        Policy(model, small_tokenizer(), bf16=False, padding_free=True)
    policy = Policy(model, small_tokenizer(), bf16=False)
    assert not policy.packed
    assert "linear_attention" in policy.why_padded
    assert model.config._attn_implementation == "sdpa"
    with policy.packing():
        assert policy.hidden_states(some_batch()).shape == (20, 32)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler looks at things that warn when looked at
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_layers_have_the_same_gradients_at_every_length(checkpointing):
    from fastgrpo.activations import enable_gradient_checkpointing

    gradients = []
    for compiled in (False, True):
        policy = Policy(small_model("qwen3"), small_tokenizer(), bf16=False)
        if checkpointing:
            enable_gradient_checkpointing(policy.model, offload=False)
        if compiled:
            policy.compile()
        policy.model.train()
        for rows in ([0, 1, 2], [0, 2], [1]):
            with policy.packing():
                policy.hidden_states(some_batch().select(rows)).square().mean().backward()
        gradients.append([p.grad for p in policy.model.parameters() if p.grad is not None])
        with policy.sampling():
            assert policy.model(input_ids=torch.tensor([[5, 6]])).logits.shape == (1, 2, 99)
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
