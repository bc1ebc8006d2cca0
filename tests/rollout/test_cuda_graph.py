"""Steps as CUDA graphs against the same steps run eagerly, and what is left of them."""

import gc
from dataclasses import replace

import pytest
import torch
from tiny_models import NO_EOS, PAD, PROMPTS, generate_greedily, greedy, tiny
from transformers import Gemma3TextConfig, Qwen2Config, Qwen3Config

from fastgrpo.rollout import SamplingParams
from fastgrpo.rollout.static import StaticCacheRollout

SAMPLING = SamplingParams(max_completion_length=40, temperature=0.9)


def generate(model, cuda_graph, sampling=SAMPLING, eos=(), max_lengths=None, **options):
    messages = []
    rollout = StaticCacheRollout(
        model, eos_token_ids=eos, pad_token_id=PAD, cuda_graph=cuda_graph,
        on_message=messages.append, **options,
    )  # fmt: skip
    return rollout.generate(PROMPTS, 4, sampling, range(4), max_lengths=max_lengths), messages


@pytest.fixture
def replays(monkeypatch):
    """Count the replays of CUDA graphs."""
    counted, replay = [], torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(
        torch.cuda.CUDAGraph, "replay", lambda graph: (counted.append(graph), replay(graph))
    )
    return counted


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0}, {"top_p": 0.9, "top_k": 7}, {"min_p": 0.05}]
)
@pytest.mark.parametrize("config_class", [Qwen2Config, Qwen3Config, Gemma3TextConfig])
@pytest.mark.parametrize("bf16", [False, True])
def test_replayed_steps_sample_what_eager_steps_sample(replays, config_class, options, bf16):
    model = tiny(config_class, sliding_window=4).cuda()
    sampling = SamplingParams(**{"max_completion_length": 40, "temperature": 0.9} | options)
    free, _ = generate(model, False, sampling)
    eos = free.ids[:8, 12].tolist()  # so that rows are dropped, and another graph is captured
    with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
        eager, _ = generate(model, False, sampling, eos)
        assert not replays
        graphed, messages = generate(model, True, sampling, eos)
    assert messages == []
    assert len(replays) >= 20
    for name in ("ids", "mask", "finished"):
        assert torch.equal(getattr(graphed, name), getattr(eager, name)), name
    torch.testing.assert_close(graphed.logps, eager.logps, atol=1e-5, rtol=0)


@pytest.mark.gpu
def test_replayed_steps_stop_at_further_tokens_and_at_the_length_of_each(replays):
    model = tiny().cuda()
    free, _ = generate(model, False)
    stop = tuple(free.ids[:4, 12].tolist())
    sampling, lengths = replace(SAMPLING, stop_token_ids=stop), [40, 9, 33, 25]
    eager, _ = generate(model, False, sampling, max_lengths=lengths)
    graphed, _ = generate(model, True, sampling, max_lengths=lengths)
    assert len(replays) >= 10
    assert 0 < eager.finished.sum() < 16
    for name in ("ids", "mask", "finished"):
        assert torch.equal(getattr(graphed, name), getattr(eager, name)), name


@pytest.mark.gpu
def test_replayed_greedy_steps_are_what_generate_gives(replays):
    model = tiny().cuda()
    result = StaticCacheRollout(model, **NO_EOS).generate(PROMPTS, 2, greedy(20))
    model.cpu()
    expected = [generate_greedily(model, prompt, 20) for prompt in PROMPTS for _ in range(2)]
    assert result.token_lists() == expected
    assert len(replays) == 20 - 1 - 2  # the first token is the prefill's; two eager steps


@pytest.mark.gpu
def test_training_finds_the_memory_it_left():
    model = tiny().cuda()
    rollout = StaticCacheRollout(model, **NO_EOS)
    rollout.generate(PROMPTS, 2, SAMPLING)  # libraries keep workspaces from here on
    rollout.sleep()
    gc.disable()  # nothing may wait for the garbage collector
    try:
        allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        result = rollout.generate(PROMPTS, 64, SAMPLING)
        del result
        assert torch.cuda.memory_allocated() == allocated
        rollout.sleep()
        assert torch.cuda.memory_reserved() <= reserved
        rollout.sleep()
    finally:
        gc.enable()


@pytest.mark.gpu
def test_a_model_that_waits_decodes_eagerly_and_says_so_once(replays):
    model = tiny().cuda()
    expected, _ = generate(model, False)
    model.lm_head.register_forward_hook(lambda module, args, output: output.sum().item() and None)
    result, messages = generate(model, True, max_batch=8)
    assert torch.equal(result.ids, expected.ids)
    assert messages == [
        "cuda_graph: decoding steps run one kernel at a time, since the model waits for the GPU "
        "inside a step"
    ]
    assert not replays


@pytest.mark.gpu
def test_a_capture_that_fails_is_said_once_and_leaves_the_gpu_usable(replays):
    model = tiny().cuda()
    expected, _ = generate(model, False)

    def fail(module, args, output):
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("not here\nnor there")

    model.lm_head.register_forward_hook(fail)
    stream = torch.cuda.current_stream()
    result, messages = generate(model, True, max_batch=8)
    assert torch.equal(result.ids, expected.ids)
    assert messages == [
        "cuda_graph: decoding steps run one kernel at a time, since they cannot be captured as a "
        "CUDA graph (not here)"
    ]
    assert torch.cuda.current_stream() == stream
    torch.cuda.empty_cache()
    assert not replays


def test_a_cpu_needs_no_message():
    _, messages = generate(tiny(), True)
    assert messages == []


def test_this_engine_is_the_policy_and_leaves_nothing_to_push_or_free():
    model = tiny()
    rollout = StaticCacheRollout(model, **NO_EOS)
    assert rollout.is_policy
    before = rollout.generate(PROMPTS, 1, greedy(6))
    for _ in range(2):
        rollout.update_weights(model)
        rollout.sleep()
    assert torch.equal(rollout.generate(PROMPTS, 1, greedy(6)).ids, before.ids)
    with torch.no_grad():
        model.lm_head.weight.neg_()
    after = rollout.generate(PROMPTS, 1, greedy(6))
    assert after.token_lists() == [generate_greedily(model, prompt, 6) for prompt in PROMPTS]
    assert not torch.equal(after.ids, before.ids)
