"""L layers of 7 linear layers, H hidden, V vocabulary, R rank."""

import json
import math
import sys

import pytest
import torch
from bitsandbytes.functional import has_avx512bf16
from four_bits import load_in_4bit, save_wide_model, wide_model
from small_models import small_model, small_tokenizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from fastgrpo import linear_grpo_loss, reference
from fastgrpo.adapters import add_adapters, base_trained
from fastgrpo.checkpoint import name_base, save_checkpoint
from fastgrpo.config import TrainConfig, config_from
from fastgrpo.head import read_head
from fastgrpo.trainer import Trainer

IDS = torch.arange(40).view(2, 20) % 97 + 2
PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def adapted_model(model=None, *, trained=True, **options):
    torch.manual_seed(0)
    model = add_adapters(model or small_model("llama"), TrainConfig(use_peft=True, **options))
    if trained:
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    return model


def merged(base, adapted):
    """Return a plain model with W + alpha / r * B @ A, computed by hand."""
    with torch.no_grad():
        for name, module in adapted.get_base_model().named_modules():
            if hasattr(module, "lora_A"):
                a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
                weight = base.get_submodule(name).weight
                weight.copy_(weight.double() + 32 / 16 * (b.double() @ a.double()))
    return base


@pytest.mark.parametrize("tie", [True, False])
def test_adapters_are_all_that_is_trained_and_they_are_fp32(tie):
    base = small_model("llama", tie).bfloat16()
    size = sum(p.numel() for p in base.parameters())
    expected = sum(
        8 * sum(module.weight.shape)
        for name, module in base.named_modules()
        if name.rpartition(".")[-1] in PROJECTIONS
    )
    assert expected == 2 * 8 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 64))
    model = adapted_model(base, trained=False, lora_r=8)
    assert model.get_nb_trainable_parameters() == (expected, size + expected)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert {name.split(".")[-4] for name in trained} == PROJECTIONS
    assert not model.get_output_embeddings().weight.requires_grad
    logits = model(input_ids=IDS).logits
    assert torch.equal(logits, small_model("llama", tie).bfloat16()(input_ids=IDS).logits)


def test_named_modules_alone_get_adapters():
    model = adapted_model(lora_target_modules=["q_proj", "layers.1.mlp.up_proj"])
    names = {name.split(".lora_")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split("model.layers.")[1] for name in names} == {
        "0.self_attn.q_proj", "1.self_attn.q_proj", "1.mlp.up_proj"
    }  # fmt: skip


def test_the_base_can_be_trained_without_its_adapters_for_a_while():
    plain, adapted = small_model("llama"), adapted_model()
    adapters = {n: p.detach().clone() for n, p in adapted.named_parameters() if p.requires_grad}
    for model in (plain, adapted):
        with base_trained(model):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            model(input_ids=IDS).logits.square().mean().backward()
            optimizer.step()
    assert {n for n, p in adapted.named_parameters() if p.requires_grad} == adapters.keys()
    for name, parameter in adapted.named_parameters():
        if name in adapters:
            assert torch.equal(parameter, adapters[name])
    with adapted.disable_adapter():
        found = adapted(input_ids=IDS).logits
    torch.testing.assert_close(found, plain(input_ids=IDS).logits, atol=1e-6, rtol=0)
    start = small_model("llama")(input_ids=IDS).logits
    assert (found - start).abs().max() > 1e-4
    assert all(p.requires_grad for p in plain.parameters())


def test_adapters_add_a_scaled_product_to_each_weight():
    adapted = adapted_model()
    found = adapted(input_ids=IDS).logits
    expected = merged(small_model("llama"), adapted)(input_ids=IDS).logits
    plain = small_model("llama")(input_ids=IDS).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (found - plain).abs().max() > 0.1


class LikeIt(TorchDispatchMode):
    """Whether anything of a tensor's shape is computed, views of itself apart."""

    def __init__(self, tensor):
        super().__init__()
        self.tensor, self.seen = tensor, False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            like = isinstance(x, torch.Tensor) and x.shape == self.tensor.shape
            self.seen |= like and x.data_ptr() != self.tensor.data_ptr()
        return result


def grpo_gradients(model, fused):
    inputs, targets = IDS[:, :-1], IDS[:, 1:]
    options = {"old_logps": torch.full(targets.shape, -4.0), "num_items_in_batch": 38}
    advantages = torch.tensor([1.0, -0.7])
    head = model.get_output_embeddings().weight
    with LikeIt(head) as of_the_head:
        if fused:
            hidden = model.get_decoder()(input_ids=inputs, use_cache=False).last_hidden_state
            output = linear_grpo_loss(hidden, head, targets, advantages, **options)
        else:
            logits = model(input_ids=inputs, use_cache=False).logits
            output = reference.grpo_loss(logits, targets, advantages, **options)
        output.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return gradients, of_the_head.seen


@pytest.mark.parametrize("tie", [True, False])
def test_gradients_are_those_through_the_logits_and_the_frozen_head_costs_nothing(tie):
    found, head_gradient = grpo_gradients(adapted_model(small_model("llama", tie)), True)
    expected, _ = grpo_gradients(adapted_model(small_model("llama", tie)), False)
    assert not head_gradient
    assert found.keys() == expected.keys()
    assert all("lora_" in name for name in found)
    assert len(found) == 2 * 2 * 7
    for name, gradient in found.items():
        assert gradient.abs().max() > 1e-6
        torch.testing.assert_close(gradient, expected[name], atol=1e-7, rtol=1e-4)
    _, head_gradient = grpo_gradients(small_model("llama", tie), True)
    assert head_gradient


def test_adapters_on_4_bits_train_and_leave_the_bits_alone(tmp_path):
    base = load_in_4bit(tmp_path, dtype="bfloat16", use_bnb_nested_quant=True)
    model = adapted_model(base, trained=False)
    head = model.get_output_embeddings().weight
    assert head.dtype == torch.bfloat16  # not the fp32 of prepare_model_for_kbit_training
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    ids = IDS.to(model.device)
    losses = []
    for _ in range(12):
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits.float()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] > math.log(99)  # it begins by knowing nothing of 99 tokens
    assert losses[-1] < losses[0] - 1
    for name, parameter in model.named_parameters():
        assert name not in frozen or torch.equal(parameter, frozen[name])


def test_adapters_on_4_bits_have_the_same_gradients_before_and_after_an_evaluation(tmp_path):
    """Bitsandbytes may repack weights of a CPU when it evaluates, which lost gradients."""
    model = adapted_model(load_in_4bit(tmp_path, dtype="bfloat16"))
    ids = IDS.to(model.device)
    gradients = []
    for _ in range(2):
        model.train()
        model(input_ids=ids).logits.float().square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
        model.zero_grad()
        with torch.no_grad():
            model.eval()(input_ids=ids)
    assert len(gradients[0]) == 2 * 2 * 7
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def four_bits_of_transformers(path):
    """Return a 4-bit model as a user loads it and hands it over, in fp32."""
    bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    return AutoModelForCausalLM.from_pretrained(
        save_wide_model(path), dtype=torch.float32, quantization_config=bits
    )


def test_adapters_on_4_bits_given_as_an_object_have_the_gradients_of_the_dequantised_model(
    tmp_path,
):
    """Also after the head was read, and after an evaluation: both are passes in eval mode."""
    from bitsandbytes.functional import dequantize_4bit

    base, plain = four_bits_of_transformers(tmp_path), wide_model()
    for name, module in base.named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            plain.get_submodule(name).weight.data = dequantize_4bit(module.weight, state).cpu()
    model, expected = adapted_model(base), {}
    for each in (adapted_model(plain), model, model, model):
        ids = IDS.to(each.device)
        each.train()
        each(input_ids=ids).logits.float().square().mean().backward()
        for name, p in each.named_parameters():
            if p.requires_grad:
                found = p.grad.cpu()
                assert found.norm() > 1e-4
                # Products in fp32 of the same weights, added up in another order.
                error = (found - expected.setdefault(name, found)).norm() / found.norm()
                assert error < 1e-4, name
        each.zero_grad()
        read_head(each)
        with torch.no_grad():
            each.eval()(input_ids=ids)
    assert len(expected) == 2 * 2 * 7


@pytest.mark.skipif(not has_avx512bf16(), reason="a bug on some CPUs")
def test_4_bits_that_an_evaluation_has_packed_are_refused(tmp_path):
    model = four_bits_of_transformers(tmp_path).to("cpu").eval()
    with torch.no_grad():
        model(input_ids=IDS)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM was evaluated .* load it again"):
        read_head(model)


def test_targets_that_are_not_there_are_named_with_those_that_are():
    message = r"below the LM head is called 'query'; there are down_proj, gate_proj, k_proj, o_proj"
    with pytest.raises(ValueError, match=message):
        adapted_model(lora_target_modules=["q_proj", "query"])
    # Its adapter would be passed over by the loss, which multiplies by the head's own weight.
    with pytest.raises(ValueError, match="is called 'lm_head'"):
        adapted_model(lora_target_modules=["lm_head"])


def test_a_model_that_has_adapters_is_refused():
    with pytest.raises(ValueError, match="has adapters already; leave use_peft out"):
        adapted_model(adapted_model())


def test_without_peft_its_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"use_peft: .* pip install 'fastgrpo\[lora\]'"):
        adapted_model()


def run(tmp_path, model, **values):
    (tmp_path / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": f"{n} eggs:"}) + "\n" for n in range(16))
    )
    (tmp_path / "letters.py").write_text(
        "def letter_e(completions, **columns):\n"
        "    return [text.count('e') / max(len(text), 1) for text in completions]\n"
    )
    config = config_from(
        {
            "model_name_or_path": model,
            "dataset_name": str(tmp_path / "prompts.jsonl"),
            "output_dir": str(tmp_path / "run"),
            "reward_funcs": [f"{tmp_path}/letters.py:letter_e"],
            "num_generations": 8,
            "per_device_train_batch_size": 32,
            "max_completion_length": 10,
            "learning_rate": 2e-2,
            "lr_scheduler_type": "constant",
            "use_peft": True,
            "bf16": False,
            "beta": 1e-3,
            "save_strategy": "no",
            **values,
        }
    )
    trainer = Trainer(config)
    trainer.train()
    metrics = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    return trainer, metrics


def test_a_run_with_adapters_learns_beside_its_base(tmp_path):
    # Wide enough that its frozen head can say e with a probability of nearly 1.
    small_model("llama", initializer_range=0.2).save_pretrained(tmp_path / "model")
    small_tokenizer().save_pretrained(tmp_path / "model")
    trainer, metrics = run(
        tmp_path, str(tmp_path / "model"), max_steps=16, activation_offloading=True
    )
    assert metrics[0]["reward"] < 0.1
    assert sum(m["reward"] for m in metrics[-3:]) / 3 > 0.3
    assert metrics[0]["kl"] == pytest.approx(0, abs=1e-9)  # both are the base
    assert metrics[-1]["kl"] > 0.1
    for m in metrics:
        assert m["sampling/sampling_logp_difference/max"] < 1e-4
    final = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final")
    policy = trainer.policy.model.eval()
    policy.set_attn_implementation("sdpa")  # it was trained on packed sequences
    torch.testing.assert_close(
        final(input_ids=IDS).logits,
        policy(input_ids=IDS.to(policy.device)).logits.cpu(),
        atol=1e-5,
        rtol=1e-5,
    )


def test_a_run_on_4_bits_learns(tmp_path):
    load_in_4bit(tmp_path / "model")
    options = {"load_in_4bit": True, "dtype": "bfloat16", "max_steps": 16}
    _, metrics = run(tmp_path, str(tmp_path / "model"), **options)
    assert metrics[0]["kl"] == pytest.approx(0, abs=1e-9)
    assert metrics[0]["reward"] < 0.1
    assert sum(m["reward"] for m in metrics[-3:]) / 3 > 0.2


def test_adapters_on_a_model_without_a_name_bring_it_along(tmp_path):
    model = adapted_model()
    expected = model(input_ids=IDS).logits
    name_base(tmp_path / "base", model, small_tokenizer())
    save_checkpoint(tmp_path / "final", model, small_tokenizer())
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")(input_ids=IDS).logits
    assert torch.equal(plain, small_model("llama")(input_ids=IDS).logits)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "final")(input_ids=IDS).logits
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
