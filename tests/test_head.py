"""What is read of a head, against the model's own logits; and the heads that are refused."""

import bitsandbytes
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    BertModel,
    Cohere2Config,
    CohereConfig,
    FalconH1Config,
    Gemma2Config,
    Gemma3TextConfig,
    GraniteConfig,
    HyperCLOVAXConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MiniCPM3Config,
    MptConfig,
    OPTConfig,
    PhiConfig,
    Qwen3Config,
    RecurrentGemmaConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from fastgrpo.head import read_head
from fastgrpo_kernels import GRPOLossConfig, linear_grpo_loss, policy_loss

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_ssm": 64, "mamba_d_state": 8}
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}

# The configuration, and the scale and cap that are to be found.
HEADS = {
    "gemma2": (Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=4.0), 1.0, 4.0),
    "gemma3": (Gemma3TextConfig(**SIZES, head_dim=8, final_logit_softcapping=4.0), 1.0, 4.0),
    "gemma3, no cap": (Gemma3TextConfig(**SIZES, head_dim=8), 1.0, None),
    "recurrent gemma": (RecurrentGemmaConfig(**SIZES, logits_soft_cap=4.0), 1.0, 4.0),
    "cohere": (CohereConfig(**SIZES, logit_scale=0.0625), 0.0625, None),
    "cohere2": (Cohere2Config(**SIZES, head_dim=8, logit_scale=0.3), 0.3, None),
    "granite divides": (GraniteConfig(**SIZES, logits_scaling=8.0), 0.125, None),
    "hyperclova multiplies": (HyperCLOVAXConfig(**SIZES, logits_scaling=8.0), 8.0, None),
    "minicpm divides hidden": (MiniCPM3Config(**SIZES | LATENT, dim_model_base=8), 0.25, None),
    "mpt ignores": (
        MptConfig(vocab_size=61, d_model=32, n_heads=4, n_layers=1, logit_scale=0.5),
        1.0,
        None,
    ),
    "falcon h1": (FalconH1Config(**SIZES, **MAMBA, lm_head_multiplier=0.04), 0.04, None),
    "phi": (PhiConfig(**SIZES), 1.0, None),
    "opt": (
        OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=16, do_layer_norm_before=False),
        1.0,
        None,
    ),
    "llama, tied": (LlamaConfig(**SIZES, **TIED), 1.0, None),
    "llama, untied": (LlamaConfig(**SIZES, **UNTIED), 1.0, None),
    "qwen3, tied": (Qwen3Config(**SIZES, head_dim=8, **TIED), 1.0, None),
    "qwen3, untied": (Qwen3Config(**SIZES, head_dim=8, **UNTIED), 1.0, None),
    "qwen3, padded": (Qwen3Config(**SIZES | {"vocab_size": 64}, head_dim=8), 1.0, None),
}


def make(config, dtype=torch.float32, cls=None):
    torch.manual_seed(0)
    create = AutoModelForCausalLM.from_config if cls is None else cls._from_config
    model = create(config, dtype=dtype, attn_implementation="eager")
    head = model.get_output_embeddings()
    with torch.no_grad():  # logits of some units, so that caps and temperatures are felt
        head.weight.normal_(0, 1)
        if head.bias is not None:
            head.bias.normal_(0, 1)
    return model


@pytest.mark.parametrize("name", HEADS)
def test_the_head_gives_the_models_own_logits(name):
    config, scale, softcap = HEADS[name]
    model = make(config).eval()
    head = read_head(model)
    assert head.logit_scale == pytest.approx(scale)
    assert head.logit_softcap == softcap
    assert (head.bias is not None) == (name == "phi")
    tied = head.weight is model.get_input_embeddings().weight
    assert tied == model.config.tie_word_embeddings
    ids = torch.arange(3, 15).view(2, 6)
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits
        hidden = model.get_decoder()(ids, use_cache=False).last_hidden_state
        plain = F.linear(hidden, head.weight, head.bias)
    torch.testing.assert_close(head.finish(plain), logits, rtol=1e-5, atol=1e-5)
    if scale != 1 or softcap is not None:  # which this test would notice
        assert (plain - logits).norm() > 0.1 * logits.norm()


@pytest.mark.parametrize("name", HEADS)
def test_the_loss_through_the_head_has_the_models_gradients(name):
    model = make(HEADS[name][0]).eval()
    head = read_head(model)
    ids = torch.randint(3, 61, (2, 7), generator=torch.Generator().manual_seed(1))
    completion_ids, advantages = ids[:, 1:], torch.tensor([1.0, -0.5])
    options = {"temperature": 0.7, "loss_type": "grpo"}
    parameters = list(model.parameters())

    logps = (model(ids, use_cache=False).logits[:, :-1] / 0.7).log_softmax(-1)
    logps = logps.gather(-1, completion_ids[..., None])[..., 0]
    expected = policy_loss(logps, advantages, config=GRPOLossConfig(**options)).loss
    expected_gradients = torch.autograd.grad(expected, parameters, allow_unused=True)

    config = GRPOLossConfig(
        **options, logit_scale=head.logit_scale, logit_softcap=head.logit_softcap
    )
    hidden = model.get_decoder()(ids, use_cache=False).last_hidden_state[:, :-1]
    output = linear_grpo_loss(
        hidden, head.weight, completion_ids, advantages, bias=head.bias, config=config
    )
    torch.testing.assert_close(output.loss, expected, rtol=1e-5, atol=1e-6)
    gradients = torch.autograd.grad(output.loss, parameters, allow_unused=True)
    size = torch.stack([g.norm() for g in expected_gradients if g is not None]).norm()
    assert size > 0.01
    for a, b in zip(gradients, expected_gradients, strict=True):
        if b is not None:
            assert (a - b).norm() <= 1e-5 * size


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", HEADS)
def test_rounding_is_not_taken_for_another_head(name, dtype):
    config, scale, softcap = HEADS[name]
    head = read_head(make(config, dtype))
    assert head.logit_scale == pytest.approx(scale)
    assert head.logit_softcap == softcap


def test_reading_leaves_no_trace():
    model = make(LlamaConfig(**SIZES)).train()
    model.set_attn_implementation("sdpa")
    state = torch.get_rng_state()
    read_head(model)
    assert model.training
    assert model.config._attn_implementation == "sdpa"
    assert not model.model._forward_hooks
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


class Altered(LlamaForCausalLM):
    """A model that finishes its logits in a way of its own."""

    def finish(self, logits):
        return logits

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = self.finish(output.logits)
        return output


class ScaledAfterCap(Altered):
    def finish(self, logits):
        return 2 * 5 * torch.tanh(logits / 5)


class SlightlyScaled(Altered):
    def finish(self, logits):
        return logits * 1.001


class Capped(Altered):
    def finish(self, logits):
        return 300 * torch.tanh(logits / 300)


class Shifted(Altered):
    def finish(self, logits):
        return logits + torch.arange(61) / 1e3


class Masked(Altered):
    def finish(self, logits):
        return logits.index_fill(-1, torch.tensor([5]), -torch.inf)


class Shorter(Altered):
    def finish(self, logits):
        return logits[..., :50]


@pytest.mark.parametrize(
    ("cls", "options", "says"),
    [
        (ScaledAfterCap, {"final_logit_softcapping": 5.0, "logit_scale": 2.0}, "differ by"),
        (SlightlyScaled, {}, "differ by 0.1%"),
        (Capped, {}, "whose config says nothing"),
        (Shifted, {}, "differ by"),
        (Masked, {}, "differ by inf"),
        (Shorter, {}, "50 logits come from 61 rows"),
    ],
)
def test_what_the_loss_cannot_express_is_refused_by_name(cls, options, says):
    # Logits of 0.1, in which nobody would notice a cap of 300.
    model = make(LlamaConfig(**SIZES, **options), cls=cls)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.01)
    with pytest.raises(ValueError, match=rf"LM head of {cls.__name__}.*{says}") as error:
        read_head(model)
    for name, value in options.items():
        assert f"{name} = {value}" in str(error.value)


def test_two_percent_show_in_bf16():
    class Scaled(Altered):
        def finish(self, logits):
            return logits * 1.02

    with pytest.raises(ValueError, match="LM head of Scaled"):
        read_head(make(LlamaConfig(**SIZES), torch.bfloat16, Scaled))


def test_work_outside_the_decoder_is_refused():
    class Doubling(LlamaForCausalLM):
        def forward(self, input_ids, **kwargs):
            embeds = 2 + self.get_input_embeddings()(input_ids)
            return super().forward(inputs_embeds=embeds, **kwargs)

    with pytest.raises(ValueError, match="Doubling does more in its forward pass"):
        read_head(make(LlamaConfig(**SIZES), cls=Doubling))


def test_what_has_no_head_of_a_decoder_is_refused():
    bert = BertConfig(
        **{k: v for k, v in SIZES.items() if k != "num_key_value_heads"}, is_decoder=True
    )
    with pytest.raises(ValueError, match="BertModel has no LM head"):
        read_head(BertModel(bert))
    with pytest.raises(ValueError, match="cannot express the LM head of BertLMHeadModel"):
        read_head(BertLMHeadModel(bert))
    t5 = T5Config(vocab_size=61, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    with pytest.raises(ValueError, match="T5ForConditionalGeneration has no LM head on a decoder"):
        read_head(T5ForConditionalGeneration(t5))


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # in PEFT
def test_adapters_are_seen_around_a_head_but_not_in_it():
    model = make(CohereConfig(**SIZES, logit_scale=0.0625))
    peft = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    head = read_head(peft)
    assert head.logit_scale == 0.0625
    assert head.weight is model.lm_head.weight

    model = make(LlamaConfig(**SIZES, **UNTIED))
    kept = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    peft = get_peft_model(model, kept)
    head = read_head(peft)
    assert head.weight.requires_grad
    with peft.disable_adapter():  # the reference has its own
        assert not head.weight.requires_grad

    model = make(LlamaConfig(**SIZES, **UNTIED))
    peft = get_peft_model(model, LoraConfig(target_modules=["q_proj", "lm_head"]))
    with pytest.raises(ValueError, match=r"the LM head of LlamaForCausalLM has an adapter"):
        read_head(peft)


def test_a_quantised_body_is_read_and_a_quantised_head_refused():
    model = make(LlamaConfig(**SIZES | {"hidden_size": 64, "intermediate_size": 64}, **UNTIED))

    def quantise(parent, name):
        linear = getattr(parent, name)
        four = bitsandbytes.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=False,
            compute_dtype=torch.float32,
            quant_type="nf4",
        )
        four.load_state_dict(linear.state_dict())
        setattr(parent, name, four.to("cpu"))

    for layer in model.model.layers:
        quantise(layer.self_attn, "q_proj")
        quantise(layer.mlp, "down_proj")
    assert model.model.layers[0].mlp.down_proj.weight.dtype == torch.uint8
    assert read_head(model).weight is model.lm_head.weight
    quantise(model, "lm_head")
    with pytest.raises(ValueError, match=r"quantised to torch\.uint8"):
        read_head(model)


def test_the_weight_is_read_when_asked_for():
    model = make(LlamaConfig(**SIZES, **UNTIED))
    head = read_head(model)
    model.lm_head.weight = nn.Parameter(torch.zeros(61, 32))
    assert head.weight is model.lm_head.weight
