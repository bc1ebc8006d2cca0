import sys

import pytest
import torch
from four_bits import load_in_4bit, wide_model
from small_models import save_small_model, small_model, small_tokenizer
from torch import nn

from fastgrpo.adapters import add_adapters
from fastgrpo.config import TrainConfig
from fastgrpo.loading import load_model, load_tokenizer

# Of the QLoRA paper, appendix E: quantiles of a normal distribution, one of them 0.
NF4 = torch.tensor(
    [
        [-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0],
        [0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0],
    ]
).flatten()


def load(name, **options):
    return load_model(TrainConfig(model_name_or_path=str(name), **options))


def nf4(x):
    return NF4[(x[..., None] - NF4).abs().argmin(-1)]


def linear_layers(model):
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    }


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_saved_model_loads_in_the_type_asked_for(tmp_path, family):
    name = save_small_model(tmp_path / "model", family, tie=family == "qwen2")
    saved = small_model(family, tie=family == "qwen2").state_dict()
    for options, dtype in (
        ({}, torch.float32),
        ({"dtype": "bfloat16", "bf16_updates": "master_weights"}, torch.bfloat16),
    ):
        model = load(name, **options)
        assert model.config._attn_implementation == "sdpa"
        for key, value in model.state_dict().items():
            assert value.dtype == dtype
            assert torch.equal(value, saved[key].to(dtype))
    assert load(name, attn_implementation="eager").config._attn_implementation == "eager"
    assert (
        load_tokenizer(TrainConfig(model_name_or_path=name))("ab")["input_ids"]
        == small_tokenizer()("ab")["input_ids"]
    )


@pytest.mark.parametrize("nested", [False, True])
def test_4_bits_are_the_nearest_of_16_values_in_every_block(tmp_path, nested):
    model = load_in_4bit(tmp_path, dtype="bfloat16", use_bnb_nested_quant=nested)
    saved = wide_model()
    originals = linear_layers(saved)
    from bitsandbytes.functional import dequantize_4bit

    for key, layer in linear_layers(model).items():
        weight, original = layer.weight, originals[key].weight.detach().bfloat16()
        assert weight.dtype == torch.uint8
        assert weight.nbytes * 4 == original.nbytes
        assert weight.quant_state.nested == nested
        found = dequantize_4bit(weight, weight.quant_state).cpu().float().view(-1, 64)
        blocks = original.float().view(-1, 64)
        largest = blocks.abs().amax(1, keepdim=True)
        # The same code in every place, or its neighbour where two are equally near; then the type
        # rounds (half a unit of bf16 is 2^-9), and nested `largest` itself is one of 256 values.
        nearest = (blocks / largest - nf4(blocks / largest)).abs()
        error = (blocks - found).abs() / largest
        assert (error <= nearest + (0.02 if nested else 2**-8)).all()
    for key in ("lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"):
        assert torch.equal(model.state_dict()[key].cpu(), saved.state_dict()[key].bfloat16())
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_4_bits_are_computed_with_in_bf16_where_that_is_asked_for_or_there(tmp_path, device):
    here = torch.bfloat16 if device == "cuda" else torch.float32
    for bf16, dtype in ((None, here), (True, torch.bfloat16), (False, torch.float32)):
        model = load_in_4bit(tmp_path, bnb_4bit_quant_type="fp4", bf16=bf16)
        assert model.device.type == device
        for layer in linear_layers(model).values():
            assert layer.compute_dtype == dtype
            assert layer.weight.quant_type == "fp4"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a bug on CPUs")
def test_layers_that_bitsandbytes_gets_wrong_are_refused(tmp_path):
    name = save_small_model(tmp_path / "model", "llama")  # rows of 32, in blocks of 64
    with pytest.raises(ValueError, match=r"q_proj has 32 inputs, .* multiples of 64 only"):
        load(name, load_in_4bit=True, use_peft=True)


def test_without_bitsandbytes_its_extra_is_named(tmp_path, monkeypatch):
    name = save_small_model(tmp_path / "model")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match=r"load_in_4bit: .* pip install 'fastgrpo\[8bit\]'"):
        load(name, load_in_4bit=True, use_peft=True)


def test_what_is_no_model_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"has no config\.json"):
        load(tmp_path)
    with pytest.raises(ValueError, match=r"has no config\.json"):
        load_tokenizer(TrainConfig(model_name_or_path=str(tmp_path / "missing")))
    small_model().save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="holds no tokenizer"):
        load_tokenizer(TrainConfig(model_name_or_path=str(tmp_path / "model")))
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model cannot be loaded: .*no file named"):
        load(tmp_path / "model")
    adapted = add_adapters(small_model(), TrainConfig(use_peft=True))
    adapted.save_pretrained(tmp_path / "adapters", save_embedding_layers=False)
    with pytest.raises(ValueError, match="adapters without their model; merge them"):
        load(tmp_path / "adapters")
