"""The bytes of a KV cache, as allocated, and how many completions are decoded at once."""

import pytest
import torch
from tiny_models import NO_EOS, PROMPTS, greedy, tiny
from transformers import Gemma3TextConfig, LlamaConfig, MistralConfig, Qwen2Config

from fastgrpo.rollout import SamplingParams
from fastgrpo.rollout.cache import (
    budget_bytes,
    cache_bytes,
    filled_layers,
    fitting_rows,
    keep_rows,
    row_bytes,
)
from fastgrpo.rollout.decoder import Decoder
from fastgrpo.rollout.static import StaticCacheRollout


def decoder_of(model, length):
    static = StaticCacheRollout(model, **NO_EOS)._model
    with torch.no_grad():
        prompts = static.prefill(PROMPTS)
        return Decoder(static, prompts, 3, greedy(length), torch.zeros(12, length).double())


def held(decoder):
    layers = [layer for _, layer in filled_layers(decoder.cache)]
    assert len(layers) == 2
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "config_class, overrides",
    [
        (Qwen2Config, {"num_key_value_heads": 1}),
        (LlamaConfig, {"num_key_value_heads": None}),
        (Gemma3TextConfig, {"sliding_window": 4, "head_dim": 6}),
        (MistralConfig, {"sliding_window": 4}),
    ],
)
def test_cache_bytes_are_those_allocated(config_class, overrides, dtype):
    model = tiny(config_class, **overrides).to(dtype)
    decoder = decoder_of(model, length=5)
    assert held(decoder) == cache_bytes(model.config, 12, 7 + 5, dtype)
    keep_rows(decoder.cache, torch.tensor([0, 3, 4, 9, 11]))
    assert held(decoder) == cache_bytes(model.config, 5, 7 + 5, dtype)


def test_cache_bytes_of_a_model_by_hand():
    qwen = Qwen2Config(
        hidden_size=1536, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2,
        vocab_size=151_936,
    )  # fmt: skip
    # 28 layers of 2 heads of 128 numbers of 2 bytes, keys and values, for each token
    token = 28 * 2 * 128 * 2 * 2
    assert cache_bytes(qwen, 64, 640, torch.bfloat16) == 64 * 640 * token
    assert row_bytes(qwen, 640, torch.bfloat16) == 640 * token + 16 * 151_936 + 22 * 640
    assert (
        row_bytes(qwen, 640, torch.bfloat16, truncated=True)
        == 640 * token + 40 * 151_936 + 22 * 640
    )


@pytest.mark.parametrize(
    "fit, num_generations, expected",
    [
        (0, 8, 1), (1, 8, 1), (7, 8, 4), (8, 8, 8), (15, 8, 8), (16, 8, 16), (31, 8, 16),
        (40, 12, 24), (47, 12, 24), (48, 12, 48), (11, 12, 8), (1000, 1, 512), (5, 3, 3),
    ],
)  # fmt: skip
def test_rows_are_groups_by_powers_of_two(fit, num_generations, expected):
    for remainder in (0, 999):
        assert fitting_rows(1000 * fit + remainder, 1000, num_generations) == expected


def test_the_budget_of_a_cpu_is_the_same_every_time():
    first = budget_bytes(torch.device("cpu"))
    ballast = torch.ones(2**22)
    assert budget_bytes(torch.device("cpu")) == first > ballast.nbytes


@pytest.mark.gpu
def test_the_budget_of_a_gpu_counts_what_the_allocator_holds_idle():
    device = torch.device("cuda")
    torch.cuda.empty_cache()
    before = budget_bytes(device)
    ballast = torch.empty(2**28, dtype=torch.uint8, device=device)
    assert budget_bytes(device) == pytest.approx(before - 2**27, abs=2**22)
    del ballast  # idle in the allocator, not free for the driver
    assert budget_bytes(device) == pytest.approx(before, abs=2**22)
    torch.cuda.empty_cache()


@pytest.mark.parametrize(
    "room_for, batches", [(12, [12]), (9, [6, 6]), (5, [3] * 4), (2, [2, 1] * 4)]
)
def test_without_a_bound_memory_decides(monkeypatch, room_for, batches):
    model, sampling = tiny(), SamplingParams(max_completion_length=3)
    each, seen = row_bytes(model.config, 7 + 3, torch.float32), []
    room = room_for * each + each // 2
    monkeypatch.setattr("fastgrpo.rollout.static.budget_bytes", lambda device: room)

    def note(module, args, kwargs, output):
        rows, queries = kwargs["input_ids"].shape
        if queries < kwargs["past_key_values"].layers[0].max_cache_len:  # not a prefill
            seen.append(rows)

    model.register_forward_hook(note, with_kwargs=True)
    StaticCacheRollout(model, **NO_EOS).generate(PROMPTS, 3, sampling)
    assert seen == [rows for rows in batches for _ in range(2)]
