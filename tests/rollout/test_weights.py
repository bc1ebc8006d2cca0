"""The weights given to another engine against what `save_pretrained` writes."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from small_models import small_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, MixtralConfig

from fastgrpo.rollout.weights import check_weights, checkpoint_weights

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


def saved(model, path):
    model.save_pretrained(path)
    return load_file(path / "model.safetensors")


def pushed(model):
    pairs = list(checkpoint_weights(model))
    weights = dict(pairs)
    assert len(weights) == len(pairs)
    return weights


def assert_same(weights, expected, **tolerance):
    assert sorted(weights) == sorted(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, **(tolerance or {"rtol": 0, "atol": 0}))


def adapted(model, **options):
    """Put adapters on a model whose second matrices are not 0, so that they say something."""
    options = {"target_modules": "all-linear", "r": 4, "lora_alpha": 8} | options
    peft_model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    return peft_model


def mixture():
    return AutoModelForCausalLM.from_config(
        MixtralConfig(
            vocab_size=40,
            hidden_size=32,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=3,
            max_position_embeddings=64,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=1,
        )
    )


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_names_and_values_are_those_of_a_checkpoint(tmp_path, family, tie):
    model = small_model(family, tie)
    weights = pushed(model)
    assert_same(weights, saved(model, tmp_path))
    assert ("lm_head.weight" in weights) != tie
    own = {p.data_ptr() for p in model.parameters()}
    assert {tensor.data_ptr() for tensor in weights.values()} == own  # no copy
    assert not any(tensor.requires_grad for tensor in weights.values())


def test_experts_are_split_as_in_a_checkpoint(tmp_path):
    model = mixture()
    weights = pushed(model)
    assert_same(weights, saved(model, tmp_path))
    assert len(weights) == len(list(model.parameters())) + 2 * (3 * 3 - 2)


def test_weights_are_read_layer_after_layer():
    model = adapted(small_model())
    read = checkpoint_weights(model)
    first = next(name for name, _ in read if ".layers.0." in name)
    with torch.no_grad():
        for layer in model.get_base_model().model.layers:
            layer.mlp.up_proj.base_layer.weight.zero_()
            layer.mlp.up_proj.lora_B["default"].weight.zero_()
    rest = dict(read)
    assert first not in rest
    assert rest["model.layers.0.mlp.up_proj.weight"].abs().max() > 0
    assert rest["model.layers.1.mlp.up_proj.weight"].abs().max() == 0


@pytest.mark.parametrize("family", ["qwen2", "llama"])  # with biases and without
def test_active_adapters_are_merged_and_the_model_is_not_changed(tmp_path, family):
    model = small_model(family)
    plain = saved(model, tmp_path / "plain")
    model = adapted(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights = pushed(model)
    after = model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    with model.disable_adapter():
        assert_same(pushed(model), plain)

    moved = [n for n, tensor in plain.items() if (weights[n] - tensor).abs().max() > 0.1]
    assert len(moved) == 2 * 7
    merged = saved(model.merge_and_unload(), tmp_path / "merged")
    assert_same(weights, merged, rtol=0, atol=1e-6)


def test_merged_adapters_are_not_added_again(tmp_path):
    model = adapted(small_model())
    weights = pushed(model)
    model.merge_adapter()
    assert_same(pushed(model), weights, rtol=0, atol=1e-6)


def test_adapters_on_bfloat16_are_added_in_fp32():
    model = adapted(small_model().bfloat16(), r=2)
    layer = model.get_base_model().model.layers[1].mlp.up_proj
    for part in (layer.lora_A, layer.lora_B):
        part["default"].float()
    weight = pushed(model)["model.layers.1.mlp.up_proj.weight"]
    delta = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * 4
    assert weight.dtype == torch.float32
    torch.testing.assert_close(weight, layer.base_layer.weight + delta, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"lora_bias": True, "target_modules": ["q_proj"]},
        {"modules_to_save": ["lm_head"]},
    ],
)
def test_other_adapters_are_refused_by_name(options):
    model = adapted(small_model("qwen2", tie=False), **options)
    with pytest.raises(ValueError, match=r"use_vllm: the adapter on \S+ is not plain LoRA"):
        check_weights(model)
    check_weights(adapted(small_model("qwen2", tie=False)))


def test_4_bit_weights_are_refused(tmp_path):
    pytest.importorskip("bitsandbytes")
    small_model().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=BitsAndBytesConfig(load_in_4bit=True)
    )
    for quantised in (model, adapted(model)):
        with pytest.raises(ValueError, match=r"quantised.*leave out load_in_4bit, or use_vllm"):
            check_weights(quantised)
