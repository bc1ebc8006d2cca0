"""Sampled log-probs are the model's own, whatever it wears: adapters, 4 bits, scaled logits."""

import pytest
import torch
from four_bits import load_in_4bit
from peft import LoraConfig, get_peft_model
from tiny_models import NO_EOS, PROMPTS, tiny
from transformers import CohereConfig, Gemma2Config, GraniteConfig

from fastgrpo.rollout import SamplingParams
from fastgrpo.rollout.static import StaticCacheRollout

SOFTCAPS = {"final_logit_softcapping": 1.5, "attn_logit_softcapping": 0.5}
SAMPLING = SamplingParams(max_completion_length=8, temperature=0.7)


@torch.no_grad()
def assert_logps_of(model, result, *, atol):
    """Compare with a pass over each completion."""
    for i, completion in enumerate(result.token_lists()):
        prompt = PROMPTS[i // 2]
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        logps = (logits.float() / 0.7).log_softmax(-1)
        expected = logps.gather(-1, torch.tensor(completion)[:, None])[:, 0]
        torch.testing.assert_close(result.logps[i], expected, atol=atol, rtol=1e-5)


def sampled(model):
    return StaticCacheRollout(model, **NO_EOS).generate(PROMPTS, 2, SAMPLING, range(4))


def adapted(model, **options):
    """Add adapters that matter and drop out in training."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = LoraConfig(
            r=4, target_modules="all-linear", init_lora_weights=False, lora_dropout=0.5,
            task_type="CAUSAL_LM", **options,
        )  # fmt: skip
        return get_peft_model(model, config)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")  # in PEFT
def test_adapters_sample():
    model = adapted(tiny(initializer_range=0.1)).train()
    modes = [module.training for module in model.modules()]
    result = sampled(model)
    assert [module.training for module in model.modules()] == modes
    model.eval()
    assert_logps_of(model, result, atol=5e-5)
    with model.disable_adapter():
        base = sampled(model)
        assert_logps_of(model, base, atol=5e-5)
    assert not torch.equal(base.ids, result.ids)


@pytest.mark.parametrize(
    "config_class, overrides, attention",
    [
        (Gemma2Config, {"sliding_window": 4} | SOFTCAPS, "eager"),
        (Gemma2Config, {"sliding_window": 4} | SOFTCAPS, "flex_attention"),
        (CohereConfig, {"logit_scale": 0.25}, "sdpa"),
        (GraniteConfig, {"logits_scaling": 3.0}, "sdpa"),
    ],
)
def test_what_a_model_does_to_its_logits_is_in_the_log_probs(config_class, overrides, attention):
    model = tiny(config_class, attention=attention, **overrides)
    result = sampled(model)
    assert model.config._attn_implementation == attention
    model.set_attn_implementation("eager")  # sdpa refuses a softcap
    assert_logps_of(model, result, atol=5e-5)
    for name in overrides.keys() - {"sliding_window"}:
        setattr(model.config, name, 7.0)
        setattr(model, name, 7.0)  # Cohere reads it when it is made
    with pytest.raises(AssertionError):
        assert_logps_of(model, result, atol=5e-5)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")  # in PEFT
def test_adapters_on_4_bits_sample(tmp_path):
    model = adapted(load_in_4bit(tmp_path)).eval()
    prompts = [[5, 9, 2], [7, 1, 8, 2, 8, 1, 8]]
    result = StaticCacheRollout(model, **NO_EOS).generate(prompts, 4, SAMPLING, [0, 1])
    logits = torch.cat([
        model(torch.tensor([prompts[i // 4] + ids], device=model.device)).logits[:, -9:-1].detach()
        for i, ids in enumerate(result.token_lists())
    ])  # fmt: skip
    logps = (logits.float() / 0.7).log_softmax(-1).gather(-1, result.ids[..., None])[..., 0]
    torch.testing.assert_close(result.logps, logps, atol=5e-5, rtol=0)


def test_16_bit_parameters_need_no_autocast():
    model = tiny(initializer_range=0.1).bfloat16()
    # bfloat16 logits of about 1 have steps of 2**-8, here over the temperature of 0.7.
    assert_logps_of(model, sampled(model), atol=0.03)
