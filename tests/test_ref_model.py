import gc

import pytest
import torch
from four_bits import load_in_4bit
from small_models import small_model, small_tokenizer
from torch import nn

from benchmarks.measure import LiveBytes
from fastgrpo.adapters import add_adapters
from fastgrpo.batch import make_batch
from fastgrpo.config import config_from
from fastgrpo.loss import batch_logps
from fastgrpo.model import Policy
from fastgrpo.ref_model import Reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def policy_of(model):
    return Policy(model.to(DEVICE), small_tokenizer(), bf16=False)


def reference_of(policy, **options):
    return Reference(policy, config_from({"beta": 0.1, **options}))


def with_adapters(model):
    torch.manual_seed(0)
    model = add_adapters(model, config_from({"use_peft": True}))
    move(model)
    return model


def move(model):
    """Change every trained parameter, as an optimizer does, in place."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter += 0.1 * noise.to(parameter)


def logps(policy):
    prompts, completions = [[5, 6, 7], [8]], [[13, 14], [15, 3, 4]]
    some = [torch.zeros(len(c)) for c in completions]
    batch = make_batch(prompts, completions, some, torch.ones(2), device=DEVICE)
    return batch_logps(policy, batch, [[0, 1]], 1.0)


def reference_logps(reference):
    with reference.ready() as policy:
        return logps(policy)


def live_parameters():
    gc.collect()
    return sum(x.nbytes for x in gc.get_objects() if type(x) is nn.Parameter)


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tie", [False, True])
def test_a_copy_stays_where_the_policy_was(offload, dtype, tie):
    policy = policy_of(small_model("llama", tie).to(dtype))
    start, before = logps(policy), [p.detach().clone() for p in policy.model.parameters()]
    with LiveBytes(*policy.model.parameters()) as live:
        reference = reference_of(policy, offload_ref_model=offload)
    size = sum(p.nbytes for p in policy.model.parameters())  # tied weights once
    assert size <= live.peak <= size + 100  # the frequencies of rotary embeddings
    move(policy.model)
    found = reference_logps(reference)
    assert torch.equal(found, start)
    assert (logps(policy) - start).abs().max() > 0.1
    copy = reference.frozen
    for now, then in zip(copy.model.parameters(), before, strict=True):
        assert now.dtype == dtype
        assert not now.requires_grad
        assert torch.equal(now.to(DEVICE), then)
    assert (copy.head.weight is copy.model.get_input_embeddings().weight) == tie
    assert copy.head.weight is copy.model.get_output_embeddings().weight
    assert copy.tokenizer is policy.tokenizer
    assert policy.model.training or not copy.model.training


def test_without_adapters_the_model_is_its_own_reference():
    base = policy_of(small_model("llama"))
    expected = logps(base)
    policy = policy_of(with_adapters(small_model("llama")))
    alive, trained = live_parameters(), [p.requires_grad for p in policy.model.parameters()]
    with LiveBytes() as live:
        reference = reference_of(policy, use_peft=True)
    assert live.peak == 0
    before = logps(policy)
    assert torch.equal(reference_logps(reference), expected)
    assert live_parameters() == alive
    assert torch.equal(logps(policy), before)
    assert (before - expected).abs().max() > 0.1
    assert [p.requires_grad for p in policy.model.parameters()] == trained


def test_adapters_are_on_again_after_an_error():
    policy = policy_of(with_adapters(small_model("llama")))
    before = logps(policy)
    with pytest.raises(KeyError), reference_of(policy, use_peft=True).ready():
        raise KeyError
    assert torch.equal(logps(policy), before)


def test_a_model_in_4_bits_is_its_own_reference(tmp_path):
    base = load_in_4bit(tmp_path, dtype="bfloat16")
    expected = logps(policy_of(base))
    policy = policy_of(with_adapters(base))
    options = {"use_peft": True, "load_in_4bit": True}
    assert torch.equal(reference_logps(reference_of(policy, **options)), expected)
    assert (logps(policy) - expected).abs().max() > 0.1


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_reference_follows_the_policy_as_the_formula_says(offload, dtype):
    policy = policy_of(small_model("llama").to(dtype))
    reference = reference_of(
        policy,
        offload_ref_model=offload,
        sync_ref_model=True,
        ref_model_sync_steps=3,
        ref_model_mixup_alpha=0.3,
    )
    parameters = list(reference.frozen.model.parameters())
    before = [p.double() for p in parameters]
    places = [p.data_ptr() for p in parameters]
    move(policy.model)
    for step in (1, 2):
        reference.sync(step)
        assert all(torch.equal(p.double(), b) for p, b in zip(parameters, before, strict=True))
    with LiveBytes(*parameters, *policy.model.parameters()) as live:
        reference.sync(3)
    largest = max(p.nbytes for p in parameters)
    assert live.peak <= (largest if DEVICE == "cuda" and offload else 0)  # on its way to the CPU
    assert [p.data_ptr() for p in parameters] == places
    rounding = 2 * torch.finfo(dtype).eps  # of a difference, a product, a sum and 0.3
    for p, old, new in zip(parameters, before, policy.model.parameters(), strict=True):
        expected = 0.3 * new.double().to(old.device) + 0.7 * old
        size = 0.3 * new.double().to(old.device).abs() + 0.7 * old.abs()
        assert ((p.double() - expected).abs() <= rounding * size).all()
        assert not torch.equal(p.double(), old)


def test_a_run_without_sync_never_moves_its_reference():
    policy = policy_of(small_model("llama"))
    reference = reference_of(policy)
    start = reference_logps(reference)
    move(policy.model)
    reference.sync(512)
    assert torch.equal(reference_logps(reference), start)


@pytest.mark.parametrize("offload", [False, True])
def test_a_renewed_reference_is_the_policy_in_the_memory_of_the_old(offload):
    policy = policy_of(small_model("llama"))
    reference = reference_of(policy, offload_ref_model=offload)
    places = [p.data_ptr() for p in reference.frozen.model.parameters()]
    move(policy.model)
    reference.renew()
    assert torch.equal(reference_logps(reference), logps(policy))
    assert [p.data_ptr() for p in reference.frozen.model.parameters()] == places


def test_a_reference_of_adapters_that_were_there_has_them():
    """Without use_peft a model may come with adapters; where it began is with them."""
    policy = policy_of(with_adapters(small_model("llama")))
    start = logps(policy)
    reference = reference_of(policy)
    move(policy.model)
    assert torch.equal(reference_logps(reference), start)


@pytest.mark.gpu
def test_on_a_gpu_an_offloaded_reference_takes_memory_only_when_asked():
    policy = policy_of(small_model("llama"))
    reference_logps(reference_of(policy))  # what is allocated once
    size = sum(p.nbytes for p in policy.model.parameters())
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    reference = reference_of(policy, offload_ref_model=True)
    assert torch.cuda.max_memory_allocated() - before < 0.1 * size  # buffers
    parameters = list(reference.frozen.model.parameters())
    assert all(p.device.type == "cpu" and p.is_pinned() for p in parameters)
    for _ in range(2):
        held = torch.cuda.memory_allocated()
        with reference.ready():
            assert torch.cuda.memory_allocated() - held >= size
            assert all(p.is_cuda for p in parameters)
        assert torch.cuda.memory_allocated() == held
    assert all(p.device.type == "cpu" for p in parameters)
