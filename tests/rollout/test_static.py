"""The static-cache rollout against `generate` and against plain forward passes."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from tiny_models import (
    NO_EOS,
    PAD,
    PROMPTS,
    count_embedded,
    forward_logps,
    generate_greedily,
    greedy,
    tiny,
)
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    RwkvConfig,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.cache_utils import StaticLayer

from fastgrpo.rollout import Completions, SamplingParams
from fastgrpo.rollout.static import StaticCacheRollout

SEEDS = [3, 1, 4, 2**61]
FAMILIES = {"qwen2": Qwen2Config, "qwen3": Qwen3Config, "llama": LlamaConfig}


def rows(result: Completions, num_generations):
    """Return each completion with the prompt it belongs to."""
    for i, completion in enumerate(result.token_lists()):
        yield i, PROMPTS[i // num_generations], completion


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_what_generate_gives(family, tied):
    model = tiny(FAMILIES[family], tie_word_embeddings=tied)
    result = StaticCacheRollout(model, **NO_EOS).generate(PROMPTS, 2, greedy(10))
    expected = [generate_greedily(model, prompt, 10) for prompt in PROMPTS for _ in range(2)]
    assert result.token_lists() == expected
    assert not result.finished.any()
    for i, prompt, completion in rows(result, 2):
        logps = forward_logps(model, prompt, completion, 1.0)
        torch.testing.assert_close(result.logps[i], logps.max(-1).values, atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize("pad_is_eos", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_completion_ends_with_its_first_eos(family, pad_is_eos):
    model = tiny(FAMILIES[family])
    free = [generate_greedily(model, prompt, 10) for prompt in PROMPTS]
    eos = [free[0][3], free[1][5]]
    pad = eos[0] if pad_is_eos else PAD
    result = StaticCacheRollout(model, eos_token_ids=eos, pad_token_id=pad).generate(
        PROMPTS, 1, greedy(10)
    )
    expected = [generate_greedily(model, prompt, 10, eos) for prompt in PROMPTS]
    ended = [[t for t in range(10) if ids[t] in eos] for ids in free]
    lengths = [hits[0] + 1 if hits else 10 for hits in ended]
    assert result.token_lists() == [ids[:n] for ids, n in zip(free, lengths, strict=True)]
    assert [ids[:n] for ids, n in zip(expected, lengths, strict=True)] == result.token_lists()
    assert result.finished.tolist() == [bool(hits) for hits in ended]
    assert result.mask.sum(1).tolist() == lengths
    assert result.ids.shape[1] == max(lengths)
    assert (result.ids[~result.mask] == pad).all()
    assert (result.logps[~result.mask] == 0).all()
    assert (result.logps[result.mask] < 0).all()


def test_further_tokens_end_a_completion_too():
    model = tiny()
    free = [generate_greedily(model, prompt, 10) for prompt in PROMPTS]
    eos, stop = free[0][3], free[1][5]
    rollout = StaticCacheRollout(model, eos_token_ids=[eos], pad_token_id=PAD)
    result = rollout.generate(PROMPTS, 1, replace(greedy(10), stop_token_ids=(stop, 299)))
    expected = [generate_greedily(model, prompt, 10, [eos, stop, 299]) for prompt in PROMPTS]
    ended = [bool({eos, stop, 299} & set(ids)) for ids in free]
    assert [
        ids[: len(found)] for ids, found in zip(expected, result.token_lists(), strict=True)
    ] == result.token_lists()
    assert result.finished.tolist() == ended
    assert True in ended and False in ended
    assert result.token_lists()[1][-1] == stop
    # The next call knows nothing of it.
    again = rollout.generate(PROMPTS, 1, greedy(10))
    assert again.token_lists()[1] == generate_greedily(model, PROMPTS[1], 10, [eos])


@pytest.mark.parametrize("max_batch", [None, 4, 1])
def test_prompts_may_have_lengths_of_their_own(max_batch):
    """Also where another's would need positions that the model has not: GPT-2 has a table."""
    model = tiny(GPT2Config, max_position_embeddings=24)
    sampling, lengths = SamplingParams(max_completion_length=20, temperature=0.9), [20, 17, 3, 1]
    rollout = StaticCacheRollout(model, **NO_EOS, max_batch=max_batch)

    def sample(limits):
        return rollout.generate(PROMPTS, 2, sampling, SEEDS, max_lengths=limits)

    cut = sample(lengths)
    assert cut.mask.sum(1).tolist() == [20, 20, 17, 17, 3, 3, 1, 1]
    assert not cut.finished.any()
    with pytest.raises(ValueError, match=r"7 tokens.* 20 .* 24: shorten"):
        sample(None)
    roomy = tiny(GPT2Config, max_position_embeddings=24)
    table = torch.nn.Embedding(64, 32)
    table.weight.data[:24] = roomy.transformer.wpe.weight.data
    roomy.transformer.wpe, roomy.config.max_position_embeddings = table, 64
    rollout = StaticCacheRollout(roomy, **NO_EOS)
    free = sample(None)
    assert cut.token_lists() == [ids[: lengths[i // 2]] for i, ids in enumerate(free.token_lists())]
    # A completion that reaches its length with an end is finished.
    ends = [free.ids[0, 19].item(), free.ids[2, 16].item()]
    rollout = StaticCacheRollout(roomy, eos_token_ids=ends, pad_token_id=PAD)
    result = sample(lengths)
    assert result.finished.tolist() == [ids[-1] in ends for ids in result.token_lists()]
    assert result.finished[[0, 2]].all()


def test_decoding_stops_when_all_have_ended():
    model = tiny()
    ids = generate_greedily(model, PROMPTS[0], 4)
    fed = count_embedded(model)
    rollout = StaticCacheRollout(model, eos_token_ids=[ids[2]], pad_token_id=PAD)
    result = rollout.generate(PROMPTS[:1], 3, greedy(40))
    length = ids.index(ids[2]) + 1
    assert result.token_lists() == [ids[:length]] * 3
    for tensor in (result.ids, result.mask, result.logps):
        assert tensor.shape == (3, length)
    assert sum(fed) == len(PROMPTS[0]) + 3 * (length - 1)


@pytest.mark.parametrize(
    "config_class, overrides",
    [
        (Gemma3TextConfig, {"sliding_window": 4}),
        (MistralConfig, {"sliding_window": 4}),
    ],
    ids=["mixed", "every layer"],
)
def test_windows_shorter_than_the_sequence(config_class, overrides):
    model = tiny(config_class, **overrides)
    result = StaticCacheRollout(model, **NO_EOS).generate(PROMPTS, 1, greedy(10))
    assert result.token_lists() == [generate_greedily(model, prompt, 10) for prompt in PROMPTS]


@pytest.mark.parametrize("attention", ["eager", "flex_attention"])
def test_other_attentions_decode_the_same_and_come_back(attention):
    expected = StaticCacheRollout(tiny(), **NO_EOS).generate(PROMPTS, 1, greedy(10))
    model = tiny(attention=attention)
    result = StaticCacheRollout(model, **NO_EOS).generate(PROMPTS, 1, greedy(10))
    assert result.token_lists() == expected.token_lists()
    torch.testing.assert_close(result.logps, expected.logps, atol=5e-5, rtol=1e-5)
    assert model.config._attn_implementation == attention


def test_autocast_keeps_the_cache_in_bf16():
    model = tiny(initializer_range=0.05)
    kinds = []
    hook = model.register_forward_hook(
        lambda module, args, kwargs, output: kinds.append(
            kwargs["past_key_values"].layers[0].dtype
        ),
        with_kwargs=True,
    )
    sampling = SamplingParams(max_completion_length=6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = StaticCacheRollout(model, **NO_EOS).generate(PROMPTS, 2, sampling)
        assert kinds == [torch.bfloat16] * 6
        hook.remove()
        for i, prompt, completion in rows(result, 2):
            logps = forward_logps(model, prompt, completion, 1.0)
            expected = logps.gather(-1, torch.tensor(completion)[:, None])[:, 0]
            torch.testing.assert_close(result.logps[i], expected, atol=0.02, rtol=0)


@pytest.mark.parametrize("top_p, top_k", [(1.0, 0), (0.9, 0), (1.0, 5), (0.9, 5), (0.3, 300)])
def test_logps_cover_the_vocabulary_and_tokens_stay_in_the_set(top_p, top_k):
    model, temperature = tiny(), 0.7
    sampling = SamplingParams(
        max_completion_length=8, temperature=temperature, top_p=top_p, top_k=top_k
    )
    result = StaticCacheRollout(model, **NO_EOS).generate(PROMPTS, 8, sampling, SEEDS)
    outside = 0
    for i, prompt, completion in rows(result, 8):
        logps_TV = forward_logps(model, prompt, completion, temperature)
        drawn_T = logps_TV.gather(-1, torch.tensor(completion)[:, None])[:, 0]
        torch.testing.assert_close(result.logps[i], drawn_T, atol=5e-5, rtol=1e-5)
        for logps_V, drawn in zip(logps_TV, drawn_T, strict=True):
            likelier_V = logps_V > drawn + 1e-4
            kept_V = logps_V.topk(top_k or len(logps_V)).values.exp()
            mass = logps_V[likelier_V].exp().sum() / kept_V.sum()
            outside += int(mass >= top_p + 1e-4 or (top_k and likelier_V.sum() >= top_k))
    assert outside == 0


def test_one_candidate_is_greedy():
    rollout = StaticCacheRollout(tiny(), **NO_EOS)
    expected = rollout.generate(PROMPTS, 2, greedy(8)).token_lists()
    for truncated in ({"top_k": 1}, {"top_p": 1e-6}):
        sampling = SamplingParams(max_completion_length=8, temperature=1.5, **truncated)
        assert rollout.generate(PROMPTS, 2, sampling).token_lists() == expected


@pytest.mark.parametrize("top_p, top_k", [(1.0, 0), (1.0, 6), (0.8, 0), (0.8, 6)])
def test_frequencies_are_the_probabilities(top_p, top_k):
    model = tiny(vocab_size=16, initializer_range=0.15)
    draws, prompt = 20_000, [3, 1, 4]
    sampling = SamplingParams(max_completion_length=1, temperature=1.3, top_p=top_p, top_k=top_k)
    result = StaticCacheRollout(model, **NO_EOS).generate([prompt], draws, sampling, [0])
    probs = forward_logps(model, prompt, [0], 1.3)[0].exp().double()
    order = probs.argsort(descending=True)[: top_k or None]
    kept = probs[order] / probs[order].sum()
    before = torch.cat([torch.zeros(1).double(), kept.cumsum(0)[:-1]])
    order, kept = order[before < top_p], kept[before < top_p] / kept[before < top_p].sum()
    assert len(order) > 3
    counts = torch.bincount(result.ids[:, 0], minlength=16)[order]
    assert counts.sum() == draws
    expected = kept * draws
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    freedom = len(order) - 1
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5


@pytest.mark.parametrize(
    "max_batch, prefills, decoded",
    [(None, [4 * 7], [12]), (6, [2 * 7, 2 * 5], [6, 6]), (2, [3, 7, 1, 5], [2, 1] * 4)],
)
def test_each_prompt_is_prefilled_once_within_the_bound(max_batch, prefills, decoded):
    model = tiny()
    expected = StaticCacheRollout(model, **NO_EOS).generate(PROMPTS, 3, greedy(5))
    fed, projected = count_embedded(model), []
    model.lm_head.register_forward_pre_hook(lambda head, args: projected.append(args[0].shape[1]))
    result = StaticCacheRollout(model, **NO_EOS, max_batch=max_batch).generate(
        PROMPTS, 3, greedy(5)
    )
    assert torch.equal(result.ids, expected.ids)
    torch.testing.assert_close(result.logps, expected.logps, atol=5e-5, rtol=1e-5)
    assert sum(fed) == sum(prefills) + 4 * sum(decoded)
    assert set(projected) == {1}
    assert [n for n in fed if n in prefills and n not in decoded] == [
        n for n in prefills if n not in decoded
    ]
    assert max(n for n in fed if n not in prefills) <= (max_batch or 12)


def test_a_batch_shorter_than_another_is_padded():
    model = tiny()
    free = [generate_greedily(model, prompt, 6) for prompt in PROMPTS[:2]]
    eos = free[0][1]
    rollout = StaticCacheRollout(model, eos_token_ids=[eos], pad_token_id=PAD, max_batch=1)
    result = rollout.generate(PROMPTS[:2], 1, greedy(6))
    lengths = [ids.index(eos) + 1 if eos in ids else 6 for ids in free]
    assert lengths[0] < lengths[1]
    assert result.ids.tolist() == [free[0][: lengths[0]] + [PAD] * (6 - lengths[0]), free[1]]


def test_modes_come_back_and_checkpointing_does_not_matter():
    model = tiny()
    expected = StaticCacheRollout(model, **NO_EOS).generate(PROMPTS, 1, greedy(6))
    enable = getattr(model, "activation_checkpointing_enable", None)  # its name from 5.23 on
    (enable or model.gradient_checkpointing_enable)()
    model.config.use_cache = False
    model.train()
    model.model.norm.eval()  # frozen by the caller
    modes = [module.training for module in model.modules()]
    seen = []
    hook = model.register_forward_hook(lambda module, args, output: seen.append(module.training))
    result = StaticCacheRollout(model, **NO_EOS).generate(PROMPTS, 1, greedy(6))
    assert torch.equal(result.ids, expected.ids)
    assert seen == [False] * 6
    assert [module.training for module in model.modules()] == modes
    assert not result.logps.requires_grad

    hook.remove()
    model.register_forward_hook(lambda module, args, output: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        StaticCacheRollout(model, **NO_EOS).generate(PROMPTS, 1, greedy(6))
    assert [module.training for module in model.modules()] == modes


def test_one_decoding_cache_at_a_time_and_none_afterwards(monkeypatch):
    allocated, alive = [], []
    allocate = StaticLayer.lazy_initialization

    def note(self, key_states, value_states):
        allocate(self, key_states, value_states)
        allocated.append(weakref.ref(self.keys))
        alive.append(sum(ref() is not None for ref in allocated))

    monkeypatch.setattr(StaticLayer, "lazy_initialization", note)
    gc.disable()
    try:
        StaticCacheRollout(tiny(), **NO_EOS, max_batch=2).generate(PROMPTS, 4, greedy(4))
    finally:
        gc.enable()
    layers, prefills, decodings = 2, 4, 8
    assert len(allocated) == layers * (prefills + decodings)
    assert max(alive) == layers * 2  # the prompt's and the completions'
    assert all(ref() is None for ref in allocated)


def test_bad_requests_name_the_value_and_the_remedy():
    rollout = StaticCacheRollout(tiny(), **NO_EOS)
    with pytest.raises(ValueError, match="prompt_ids is empty"):
        rollout.generate([], 1, greedy(4))
    with pytest.raises(ValueError, match="prompt 2 is empty"):
        rollout.generate([[1], [2], []], 1, greedy(4))
    with pytest.raises(ValueError, match="num_generations must be at least 1, got 0"):
        rollout.generate(PROMPTS, 0, greedy(4))
    with pytest.raises(ValueError, match="3 seeds for 4 prompts: give one for each"):
        rollout.generate(PROMPTS, 1, greedy(4), [1, 2, 3])
    with pytest.raises(ValueError, match="max_lengths has 1 entries for 4 prompts"):
        rollout.generate(PROMPTS, 1, greedy(4), max_lengths=[4])
    with pytest.raises(ValueError, match=r"from 1 to max_completion_length 4: \[4, 0, 5, 1\]"):
        rollout.generate(PROMPTS, 1, greedy(4), max_lengths=[4, 0, 5, 1])
    with pytest.raises(ValueError, match=r"7 tokens.* 58 .* 64: shorten the prompt or max_comp"):
        rollout.generate(PROMPTS, 1, greedy(58))
    assert rollout.generate(PROMPTS, 1, greedy(57)).ids.shape == (4, 57)
    with pytest.raises(ValueError, match=r"max_batch must be at least 1.* got 0"):
        StaticCacheRollout(tiny(), **NO_EOS, max_batch=0)


def test_models_without_a_static_cache_are_refused():
    mamba = AutoModelForCausalLM.from_config(
        MambaConfig(vocab_size=30, hidden_size=16, num_hidden_layers=1, state_size=4)
    )
    with pytest.raises(ValueError, match=r"MambaForCausalLM \(layers: linear_attention\)"):
        StaticCacheRollout(mamba, **NO_EOS)
    rwkv = AutoModelForCausalLM.from_config(
        RwkvConfig(vocab_size=30, hidden_size=16, num_hidden_layers=2)
    )
    with pytest.raises(ValueError, match="RwkvForCausalLM"):
        StaticCacheRollout(rwkv, **NO_EOS)
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=30, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    )
    with pytest.raises(ValueError, match=r"T5ForConditionalGeneration .* decoder-only"):
        StaticCacheRollout(t5, **NO_EOS)
