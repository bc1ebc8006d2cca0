"""L layers, N tokens, H hidden; fp32, 4 bytes."""

import pytest
import torch
from small_models import small_model
from torch.autograd.graph import saved_tensors_hooks
from transformers import MambaConfig, MambaForCausalLM

from benchmarks.measure import LiveBytes
from fastgrpo.activations import enable_gradient_checkpointing
from fastgrpo.adapters import add_adapters
from fastgrpo.config import TrainConfig

WAYS = ["all", "checkpoints", "offloaded"]
LAYERS, TOKENS, HIDDEN = 2, 320, 32


def model_that_keeps(way, adapters=False):
    model = small_model("llama").to("cuda" if torch.cuda.is_available() else "cpu")
    if adapters:
        torch.manual_seed(0)
        model = add_adapters(model, TrainConfig(use_peft=True, lora_dropout=0.1))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # else those of lora_A would all be 0
                torch.nn.init.normal_(parameter, std=0.1)
    if way != "all":
        enable_gradient_checkpointing(model, offload=way == "offloaded")
    return model.train()


def forward(model):
    ids = torch.arange(TOKENS, device=model.device).view(2, -1) % 97 + 2
    torch.manual_seed(1)  # of the dropout
    return model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state.square().mean()


def step(model):
    forward(model).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def bytes_kept(model):
    """What autograd keeps after a forward pass, but for parameters and what goes to the CPU.

    Hooks see what no inner hooks, those of the offload, have taken away before.
    """
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        loss = forward(model)
    assert loss.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("adapters", [False, True])
def test_gradients_do_not_depend_on_what_is_kept(adapters):
    expected = step(model_that_keeps("all", adapters))
    assert all(grad.abs().max() > 0 for grad in expected.values())
    for way in WAYS[1:]:
        model = model_that_keeps(way, adapters)
        runs = []
        mlp = model.get_decoder().layers[0].mlp
        mlp.register_forward_pre_hook(lambda *_, runs=runs: runs.append(1))
        found = step(model)
        assert len(runs) == 2  # forward, and again in backward
        assert found.keys() == expected.keys()
        for name, grad in found.items():
            assert torch.equal(grad, expected[name]), name


def test_checkpointing_keeps_the_inputs_of_layers_and_offloading_not_even_those():
    kept = {way: bytes_kept(model_that_keeps(way)) for way in WAYS}
    inputs = LAYERS * TOKENS * HIDDEN * 4
    # Three times a layer's input is kept beside: around the last norm and by the loss.
    rest = kept["offloaded"]
    assert rest <= 4 * TOKENS * HIDDEN * 4
    assert kept["checkpoints"] == rest + inputs
    assert kept["all"] > 10 * inputs


def test_the_peak_is_lower_with_checkpointing():
    peaks = {}
    for way in WAYS:
        model = model_that_keeps(way)
        forward(model)  # whatever is made once
        with LiveBytes(*model.parameters()) as live:
            forward(model).backward()
        peaks[way] = live.peak
    gradients = sum(p.nbytes for p in model.parameters())
    one_layer = bytes_kept(model_that_keeps("all")) / LAYERS
    assert peaks["all"] - peaks["checkpoints"] > 0.5 * one_layer
    assert peaks["checkpoints"] < gradients + 2.5 * one_layer


@pytest.mark.parametrize("way", WAYS[1:])
def test_evaluation_computes_nothing_twice_and_samples_with_a_cache(way):
    model = model_that_keeps(way).eval()
    with torch.no_grad():
        ids = torch.tensor([[5, 6, 7]], device=model.device)
        assert model(input_ids=ids, use_cache=True).past_key_values.get_seq_length() == 3
    assert bytes_kept(model) == bytes_kept(model_that_keeps("all").eval())


def test_frozen_embeddings_get_no_gradient_of_their_output():
    model = model_that_keeps("checkpoints", adapters=True)
    outputs = []
    model.get_input_embeddings().register_forward_hook(lambda *call: outputs.append(call[-1]))
    forward(model).backward()
    assert not outputs[0].requires_grad


def test_a_model_that_cannot_is_refused():
    config = MambaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, state_size=2)
    model = MambaForCausalLM(config)
    model.supports_gradient_checkpointing = False
    with pytest.raises(ValueError, match="MambaForCausalLM does not support it; set"):
        enable_gradient_checkpointing(model)


@pytest.mark.gpu
def test_on_a_gpu_offloading_frees_the_inputs_of_the_layers():
    model = {way: model_that_keeps(way) for way in WAYS}
    held = {}
    for way in WAYS:
        forward(model[way]).backward()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        loss = forward(model[way])
        torch.cuda.synchronize()
        held[way] = torch.cuda.memory_allocated() - before
        loss.backward()
    assert held["checkpoints"] - held["offloaded"] == pytest.approx(
        LAYERS * TOKENS * HIDDEN * 4, rel=0.05
    )
    assert held["checkpoints"] < 0.2 * held["all"]
