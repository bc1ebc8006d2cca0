"""What the fused head for verl refuses, without verl; its values are in test_verl.py."""

from __future__ import annotations

import pytest
import torch
from small_models import small_model
from torch import nn
from transformers import (
    CLIPVisionConfig,
    CohereConfig,
    CohereForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from fastgrpo.integrations.verl_head import forward_with_fastgrpo_backend, use_fused_head

SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}


@pytest.fixture
def ids():
    return torch.arange(6)[None]


def with_adapter(model):
    peft = pytest.importorskip("peft")
    return peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["lm_head"]), model)


def of_gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2))


def of_cohere(scale):
    return CohereForCausalLM(CohereConfig(**SIZES, logit_scale=scale))


def of_llava():
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    config = LlavaConfig(vision_config=vision, text_config=LlamaConfig(**SIZES))
    return LlavaForConditionalGeneration(config)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: small_model("gemma3"), "Gemma3ForCausalLM .* final_logit_softcapping = 5.0"),
        (lambda: of_cohere(0.25), "CohereForCausalLM .* logit_scale = 0.25"),
        (of_gpt2, "GPT2LMHeadModel has no decoder called `model`"),
        (of_llava, "text alone, not for LlavaForConditionalGeneration"),
        (lambda: with_adapter(small_model("llama", tie=False)), "lm_head of LlamaForCausalLM"),
    ],
    ids=["softcap", "scale", "names", "images", "adapter"],
)
def test_models_whose_logits_are_more_are_refused(make, words):
    model = make()
    own = type(model).forward
    with pytest.raises(ValueError, match=f"{words}.*use_fused_kernels=False"):
        use_fused_head(model)
    assert type(model).forward is own


def test_the_class_of_a_plain_model_gets_the_forward(monkeypatch):
    model = of_cohere(1.0)
    monkeypatch.setattr(type(model), "forward", type(model).forward)
    use_fused_head(model)
    assert type(model).forward is forward_with_fastgrpo_backend


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"return_dict": False}, "return_dict=False"),
        ({"logits_to_keep": 1}, "logits_to_keep=1: the fused head returns no logits"),
        ({"input_ids": None}, "tokens to predict are missing"),
    ],
)
def test_what_the_forward_cannot_return_raises(ids, arguments, words):
    model = small_model("llama")
    with pytest.raises(ValueError, match=words):
        forward_with_fastgrpo_backend(model, **{"input_ids": ids, **arguments})


def test_an_adapter_that_comes_later_is_seen(ids):
    model = with_adapter(small_model("llama", tie=False))
    assert not isinstance(model.lm_head, nn.Linear)
    with pytest.raises(ValueError, match="leave lm_head out of adapters"):
        forward_with_fastgrpo_backend(model, ids)
