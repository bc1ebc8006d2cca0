import pytest
import torch
from small_models import save_small_model, small_model, small_tokenizer
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config

from fastgrpo.model import Policy, check_head, load_model, load_tokenizer

SIZES = {
    "vocab_size": 102,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("tie", [True, False])
def test_hidden_states_times_head_are_the_models_logits(family, tie):
    policy = Policy(small_model(family, tie), small_tokenizer(), bf16=False)
    ids = torch.tensor([[0, 0, 5, 6, 7], [8, 9, 10, 11, 12]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    hidden = policy.hidden_states(ids, mask)
    logits = hidden @ policy.head_weight.T
    alone = policy.model(ids[:1, 2:]).logits
    torch.testing.assert_close(logits[0, 2:], alone[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(logits[1], policy.model(ids[1:]).logits[0], atol=1e-5, rtol=0)
    assert policy.head_bias is None
    tied = policy.head_weight is policy.model.get_input_embeddings().weight
    assert tied == tie


@pytest.mark.parametrize(
    ("config", "option"),
    [
        (Gemma2Config(**SIZES, final_logit_softcapping=0.1), "final_logit_softcapping = 0.1"),
        (CohereConfig(**SIZES, logit_scale=0.0625), "logit_scale = 0.0625"),
    ],
)
def test_heads_the_loss_cannot_express_are_refused_by_name(config, option):
    config.initializer_range = 1.0
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=option):
        check_head(AutoModelForCausalLM.from_config(config))


def test_gradient_checkpointing_changes_memory_not_gradients():
    gradients, runs = [], []
    for checkpointing in (False, True):
        policy = Policy(small_model("llama"), small_tokenizer(), bf16=False)
        if checkpointing:
            policy.enable_gradient_checkpointing()
        calls = []
        policy.model.model.layers[0].mlp.register_forward_pre_hook(
            lambda *_, calls=calls: calls.append(1)
        )
        policy.model.train()
        ids = torch.arange(2, 22).view(2, 10)
        policy.hidden_states(ids, torch.ones_like(ids)).square().mean().backward()
        gradients.append([p.grad for p in policy.model.parameters() if p.grad is not None])
        runs.append(len(calls))
    assert runs == [1, 2]
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


def test_the_frozen_copy_stays_when_the_policy_moves():
    policy = Policy(small_model(), small_tokenizer(), bf16=False)
    reference = policy.frozen_copy()
    before = reference.head_weight.clone()
    with torch.no_grad():
        policy.head_weight.add_(1.0)
    assert torch.equal(reference.head_weight, before)
    assert not any(p.requires_grad for p in reference.model.parameters())


def test_both_sources_of_end_tokens_count():
    model, tokenizer = small_model(), small_tokenizer()
    model.generation_config.eos_token_id = [7, 3]
    assert Policy(model, tokenizer, bf16=False).eos_token_ids == [1, 3, 7]
    tokenizer.eos_token = None
    model.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match=r"set tokenizer\.eos_token"):
        Policy(model, tokenizer, bf16=False)


def test_a_saved_model_loads_in_fp32(tmp_path):
    name = save_small_model(tmp_path / "model", "llama", tie=False)
    model = load_model(name, attn_implementation="sdpa")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert load_tokenizer(name)("ab")["input_ids"] == small_tokenizer()("ab")["input_ids"]


def test_what_is_no_model_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"has no config\.json"):
        load_model(str(tmp_path), attn_implementation="sdpa")
    with pytest.raises(ValueError, match=r"has no config\.json"):
        load_tokenizer(str(tmp_path / "missing"))
