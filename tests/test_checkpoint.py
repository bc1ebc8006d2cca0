import json

import pytest
import torch
from four_bits import load_in_4bit
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from small_models import save_small_model, small_model, small_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastgrpo.adapters import add_adapters
from fastgrpo.checkpoint import save_checkpoint
from fastgrpo.config import TrainConfig
from fastgrpo.durable import WriteError
from fastgrpo.loading import load_model

IDS = torch.tensor([[5, 6, 7, 8]])

# Of transformers 5.23, when peft itself loads adapters.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")


def adapt(model):
    torch.manual_seed(0)
    adapted = add_adapters(model, TrainConfig(use_peft=True, lora_r=4))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return adapted.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tie", [False, True])
def test_a_checkpoint_has_every_bit_of_the_model(tmp_path, dtype, tie):
    model = small_model("qwen2", tie).to(dtype)
    save_checkpoint(tmp_path / "step-1", model, small_tokenizer())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "step-1", dtype="auto")
    saved = model.state_dict()
    assert again.state_dict().keys() == saved.keys()
    for name, value in again.state_dict().items():
        assert value.dtype == dtype
        assert torch.equal(value, saved[name])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "step-1")
    assert tokenizer("ab")["input_ids"] == small_tokenizer()("ab")["input_ids"]


def test_adapters_are_saved_alone_and_find_their_base(tmp_path, monkeypatch):
    save_small_model(tmp_path / "base", "llama")
    monkeypatch.chdir(tmp_path)
    base = load_model(TrainConfig(model_name_or_path="./base"))
    model = adapt(base)
    save_checkpoint(tmp_path / "final", model, small_tokenizer())
    monkeypatch.chdir("/")  # the base was named from elsewhere
    described = json.loads((tmp_path / "final" / "adapter_config.json").read_text())
    assert described["base_model_name_or_path"] == str(tmp_path / "base")
    assert (described["r"], described["lora_alpha"]) == (4, 32)
    weights = load_file(tmp_path / "final" / "adapter_model.safetensors")
    assert {x.dtype for x in weights.values()} == {torch.float32}
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(x.numel() for x in weights.values()) == trained
    assert not (tmp_path / "final" / "model.safetensors").exists()
    expected = model(input_ids=IDS).logits
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")(input_ids=IDS).logits
    assert (expected - plain).abs().max() > 0.1
    for auto_class in (AutoModelForCausalLM, AutoPeftModelForCausalLM):
        again = auto_class.from_pretrained(tmp_path / "final").eval()
        assert torch.equal(again(input_ids=IDS).logits, expected)
    assert AutoTokenizer.from_pretrained(tmp_path / "final")("ab")["input_ids"]
    assert all(config.inference_mode is False for config in model.peft_config.values())


def test_adapters_on_4_bits_are_saved_without_these(tmp_path):
    base = load_in_4bit(tmp_path / "base", dtype="bfloat16")
    model = adapt(base)
    save_checkpoint(tmp_path / "final", model, small_tokenizer())
    assert not (tmp_path / "final" / "model.safetensors").exists()
    again = AutoPeftModelForCausalLM.from_pretrained(
        tmp_path / "final", dtype="bfloat16", quantization_config=base.config.quantization_config
    )
    for (name, found), saved in zip(again.named_parameters(), model.parameters(), strict=True):
        assert found.dtype == saved.dtype
        assert torch.equal(found, saved), name


class FullDisk:
    def save_pretrained(self, path):
        raise OSError("no space left on device")


@pytest.mark.parametrize("adapters", [False, True])
def test_a_checkpoint_is_there_whole_or_not_at_all(tmp_path, adapters):
    model = small_model("llama")
    if adapters:
        model = adapt(model)
    with pytest.raises(WriteError, match="final could not be written: no space left"):
        save_checkpoint(tmp_path / "final", model, FullDisk())
    assert not list(tmp_path.iterdir())
    left = tmp_path / ".final.partial"
    left.mkdir()
    (left / "of-a-run-that-died").write_text("x")
    save_checkpoint(tmp_path / "final", model, small_tokenizer())
    assert [path.name for path in tmp_path.iterdir()] == ["final"]
    assert not (tmp_path / "final" / "of-a-run-that-died").exists()
