"""The decoder: what a step may do, and dropping rows that have ended."""

import pytest
import torch
from tiny_models import NO_EOS, PAD, PROMPTS, forward_logps, generate_greedily, greedy, tiny
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Gemma2Config, Gemma3TextConfig, GPT2Config, Qwen3Config

from fastgrpo.rollout import SamplingParams
from fastgrpo.rollout.cache import FullLayer
from fastgrpo.rollout.decoder import Decoder
from fastgrpo.rollout.static import StaticCacheRollout


def uniforms(B, T, seed=0):
    return torch.rand(B, T, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "config_class, overrides, attention",
    [
        (Qwen3Config, {}, "sdpa"),
        (Qwen3Config, {"num_key_value_heads": 4}, "eager"),
        (Gemma3TextConfig, {"sliding_window": 4}, "sdpa"),
        (Gemma2Config, {"sliding_window": 4, "attn_logit_softcapping": 0.5}, "eager"),
    ],
)
def test_a_cpu_attends_to_the_positions_in_use(config_class, overrides, attention, monkeypatch):
    model = tiny(config_class, attention=attention, **overrides)
    free = [generate_greedily(model, prompt, 40) for prompt in PROMPTS]
    lengths, update = [], FullLayer.update

    def note(*args, **kwargs):
        keys, values = update(*args, **kwargs)
        lengths.append(keys.shape[2])
        assert keys.shape == values.shape
        return keys, values

    with monkeypatch.context() as patch:
        patch.setattr(FullLayer, "update", note)
        result = StaticCacheRollout(model, **NO_EOS).generate(PROMPTS, 1, greedy(40))
    assert result.ids.tolist() == free
    for prompt, ids, logps_T in zip(PROMPTS, free, result.logps, strict=True):
        expected_T = forward_logps(model, prompt, ids, 1.0).max(-1).values
        torch.testing.assert_close(logps_T, expected_T, atol=5e-5, rtol=1e-5)
    # The prompt of 7 in its own cache, then in that of 47; steps fill 8 to 46 of it.
    read = [7, 16] + [16] * 9 + [32] * 16 + [47] * 14
    assert sorted(lengths) == sorted(read * model.config.num_hidden_layers)


class Spy(TorchDispatchMode):
    """Note every operation that makes the host wait for a device."""

    SYNCS = (
        "_local_scalar_dense", "item", "nonzero", "is_nonzero", "masked_select", "multinomial",
        "lift_fresh",  # torch.tensor(...), which copies from the host
    )  # fmt: skip

    def __init__(self):
        super().__init__()
        self.seen, self.syncs = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen += 1
        if func.overloadpacket.__name__ in self.SYNCS:
            self.syncs.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "options",
    [{"temperature": 0}, {}, {"top_p": 0.9, "top_k": 7}, {"min_p": 0.1, "stop_token_ids": (7, 8)}],
)
@pytest.mark.parametrize("config_class", [Qwen3Config, Gemma3TextConfig])
@torch.no_grad()
def test_a_step_waits_for_nothing_and_writes_in_place(config_class, options):
    model = tiny(config_class, sliding_window=4)
    static = StaticCacheRollout(model, **NO_EOS)._model
    sampling = SamplingParams(max_completion_length=6, **options)
    prompts = static.prefill(PROMPTS)
    decoder = Decoder(static, prompts, 2, sampling, uniforms(8, 6), max_lengths=[2, 3, 6, 6])

    def addresses():
        state = vars(decoder) | vars(decoder.rows)
        tensors = {k: v for k, v in state.items() if isinstance(v, torch.Tensor)}
        layers = {(i, k): getattr(layer, k) for i, layer in enumerate(decoder.cache.layers)
                  for k in ("keys", "values", "cumulative_length")}  # fmt: skip
        return {k: v.data_ptr() for k, v in (tensors | layers).items()}

    before = addresses()
    assert len(before) > 15
    with Spy() as spy:
        for _ in range(3):
            decoder.step()
    assert spy.seen > 100
    assert spy.syncs == []
    assert addresses() == before
    assert decoder.written_1.item() == 4


def decoded(model, eos, sampling, share, *, steps_between_checks=1, grows=False):
    """Return what a decoder makes of the prompts, and how many rows each of its steps had."""
    static = StaticCacheRollout(model, eos_token_ids=eos, pad_token_id=PAD)._model
    batches = []

    def make_step(step):
        return lambda: (batches.append(len(decoder.rows)), step())

    with torch.no_grad():
        prompts = static.prefill(PROMPTS)
        decoder = Decoder(static, prompts, 3, sampling, uniforms(12, 24), grows=grows)
        result = decoder.run(
            make_step=make_step, steps_between_checks=steps_between_checks, share_to_go_on=share
        )
    return result, batches


def until(ids, eos):
    return next((ids[: t + 1] for t in range(len(ids)) if ids[t] in eos), ids)


def ends_of_many_lengths(completions):
    """Return up to seven tokens such that completions end at as many times as possible."""

    def times(eos):
        return len({len(until(ids, eos)) for ids in completions})

    tokens, eos = sorted({token for ids in completions for token in ids[2:15]}), []
    for _ in range(7):
        eos = max(([*eos, token] for token in tokens), key=times)
    return eos


@pytest.mark.parametrize("config_class", [Qwen3Config, Gemma3TextConfig])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("share, checks", [(0.9, 1), (0.5, 1), (0.5, 5)])
def test_dropping_rows_that_ended_changes_no_token(config_class, temperature, share, checks):
    model = tiny(config_class, sliding_window=4)
    sampling = SamplingParams(max_completion_length=24, temperature=temperature)
    free, _ = decoded(model, [], sampling, 0.0)
    eos = ends_of_many_lengths(free.ids.tolist())
    kept, all_rows = decoded(model, eos, sampling, 0.0)
    dropped, fewer_rows = decoded(
        model, eos, sampling, share, steps_between_checks=checks, grows=True
    )

    lengths = kept.mask.sum(1)
    assert len(set(lengths.tolist())) >= 3
    assert torch.equal(dropped.ids, kept.ids)
    assert torch.equal(dropped.mask, kept.mask)
    assert torch.equal(dropped.finished, kept.finished)
    # Products of fewer rows, and of fewer positions, sum in another order.
    torch.testing.assert_close(dropped.logps, kept.logps, atol=5e-5, rtol=1e-5)
    assert dropped.token_lists() == [until(ids, eos) for ids in free.ids.tolist()]

    # A step is due for each token but the first; rows go when `share` of a batch is left.
    expected, batch = [], 12
    for step in range(23):
        going_on = int((lengths > step + 1).sum())
        if step % checks == 0:
            if going_on == 0:
                break
            batch = going_on if going_on <= share * batch else batch
        expected.append(batch)
    assert fewer_rows == expected
    assert set(all_rows) == {12}
    assert sum(fewer_rows) < sum(all_rows)


@torch.no_grad()
def test_rows_at_their_own_length_need_no_further_positions():
    """GPT-2 has a table of them, and a row may stay until others have ended."""
    static = StaticCacheRollout(tiny(GPT2Config, max_position_embeddings=24), **NO_EOS)._model
    sampling, lengths = SamplingParams(max_completion_length=20), [20, 17, 3, 1]
    prompts = static.prefill(PROMPTS)
    decoder = Decoder(static, prompts, 2, sampling, uniforms(8, 20), max_lengths=lengths)
    result = decoder.run(steps_between_checks=1, share_to_go_on=0.0)
    assert result.mask.sum(1).tolist() == [20, 20, 17, 17, 3, 3, 1, 1]
    # The last token of a completion is not fed.
    ends = [len(prompt) + n - 1 for prompt, n in zip(PROMPTS, lengths, strict=True)]
    assert decoder.rows.position_B1[::2, 0].tolist() == ends


def test_steps_are_made_anew_for_fewer_rows_and_run_as_made():
    """A CUDA graph takes the place of a step: it must see each batch, and each step once."""
    model, made = tiny(), []
    free = [generate_greedily(model, prompt, 12) for prompt in PROMPTS]
    eos = [free[0][2]]
    static = StaticCacheRollout(model, eos_token_ids=eos, pad_token_id=PAD)._model

    def make_step(step):
        made.append(0)

        def counted():
            made[-1] += 1
            step()

        return counted

    with torch.no_grad():
        decoder = Decoder(static, static.prefill(PROMPTS), 1, greedy(12), uniforms(4, 12))
        result = decoder.run(make_step=make_step, steps_between_checks=1, share_to_go_on=0.9)
    ends = sorted(ids.index(eos[0]) + 1 if eos[0] in ids else 12 for ids in free)
    assert result.mask.sum(1).sort().values.tolist() == ends
    assert len(made) == len({end for end in ends if end < 12}) + 1
    assert sum(made) == ends[-1] - 1
