"""vLLM itself against the model whose weights it was given."""

import copy
import json
import random
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from small_models import small_model, small_tokenizer

from fastgrpo.config import config_from
from fastgrpo.rollout import SamplingParams
from fastgrpo.rollout.vllm import VLLMRollout
from fastgrpo.trainer import Trainer

INSTALLED = find_spec("vllm") is not None
pytestmark = pytest.mark.filterwarnings("default")  # vLLM and what it imports warn of themselves
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROMPTS = [[5, 9, 2], [7, 1, 8, 2, 8, 1, 8] * 6, [3]]
SEEDS = [100, 200, 300]  # apart: vLLM adds the number of the completion
# Two sums of the same products in fp32, in another order; on a GPU through bf16.
ROUNDING = 2e-5 if DEVICE == "cpu" else 0.2
DTYPE = torch.float32 if DEVICE == "cpu" else torch.bfloat16


def new_model(family="qwen3", **options):
    # Far from uniform, so that a mistake shows; 64 is the least that vLLM's attention on CPUs has.
    options = {"head_dim": 64, "initializer_range": 0.3} | options
    return small_model(family, **options).eval().to(DEVICE)


def start(model, **options):
    options = {"eos_token_ids": [], "pad_token_id": 0, "dtype": DTYPE, "max_batch": 16} | options
    return VLLMRollout(model, gpu_memory_utilization=0.05, **options)


@pytest.fixture(scope="module", autouse=True)
def without_compiler():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_COMPILE_DISABLE", "1")  # one small function, for many seconds
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")  # GB; read on a CPU alone
        yield


@pytest.fixture(scope="module")
def engine(without_compiler):
    """One engine for all: it takes seconds to start."""
    engine = start(new_model(), enable_sleep_mode=DEVICE == "cuda")
    engine._sleeps = True  # vLLM refuses the option on a CPU, where its sleep frees no memory
    return engine


@pytest.fixture
def policy(engine):
    model = new_model()
    engine.update_weights(model)
    return model


@torch.no_grad()
def policy_logps(model, prompt, completion, temperature):
    ids = torch.tensor([prompt + completion], device=DEVICE)
    logits = model(ids).logits[0, len(prompt) - 1 : -1].float() / temperature
    return logits.log_softmax(-1).gather(-1, ids[0, len(prompt) :, None])[:, 0]


def differences(model, result, temperature=1.0):
    """Return by how much the sampler's log-probs are off, completion by completion."""
    G = len(result.ids) // len(PROMPTS)
    return [
        (policy_logps(model, PROMPTS[i // G], ids, temperature) - logps[: len(ids)]).abs().max()
        for i, (ids, logps) in enumerate(zip(result.token_lists(), result.logps, strict=True))
    ]


def generate(engine, *, num_generations=3, **sampling):
    sampling = SamplingParams(**{"max_completion_length": 6} | sampling)
    return engine.generate(PROMPTS, num_generations, sampling, SEEDS)


@pytest.mark.vllm
@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"temperature": 0.6},
        {"temperature": 1.7, "top_p": 0.7, "top_k": 9},
        {"top_p": 0.5},
        {"temperature": 0},
        {"temperature": 0.6, "min_p": 0.1},
    ],
)
def test_logps_are_the_policys_over_the_whole_vocabulary(engine, policy, sampling):
    result = generate(engine, **sampling)
    assert result.ids.shape == result.logps.shape == (9, 6)
    assert result.ids.device.type == result.logps.device.type == DEVICE
    assert (result.ids.dtype, result.logps.dtype) == (torch.int64, torch.float32)
    assert result.mask.all()
    assert not result.finished.any()  # all were cut
    temperature = sampling.get("temperature") or 1.0
    assert max(differences(policy, result, temperature)) < ROUNDING
    assert max(differences(policy, result, 1.3)) > 0.05  # and the comparison would tell
    distinct = [len(set(map(tuple, result.token_lists()[i : i + 3]))) for i in (0, 3, 6)]
    assert distinct == ([1, 1, 1] if sampling.get("temperature") == 0 else [3, 3, 3])


@pytest.mark.vllm
def test_sampling_follows_the_distribution(engine, policy):
    draws = 3000
    result = engine.generate(
        [PROMPTS[0]],
        draws,
        SamplingParams(max_completion_length=1, temperature=1.5, top_k=8),
        [0],
    )
    ids = torch.tensor([PROMPTS[0]], device=DEVICE)
    with torch.no_grad():
        kept = (policy(ids).logits[0, -1].float() / 1.5).topk(8)
    expected = kept.values.softmax(-1).cpu() * draws
    counts = torch.bincount(result.ids[:, 0].cpu(), minlength=200)[kept.indices.cpu()]
    assert counts.sum() == draws
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    assert chi_square < 7 + 4 * (2 * 7) ** 0.5


@pytest.mark.vllm
def test_min_p_keeps_the_likely(engine, policy):
    draws, min_p = 3000, 0.3
    sampling = SamplingParams(max_completion_length=1, temperature=1.5, min_p=min_p)
    result = engine.generate([PROMPTS[0]], draws, sampling, [0])
    with torch.no_grad():
        logits = policy(torch.tensor([PROMPTS[0]], device=DEVICE)).logits[0, -1].float() / 1.5
    probs = logits.softmax(-1).double().cpu()
    kept = probs >= min_p * probs.max()
    assert 2 < kept.sum() < 50
    expected = probs[kept] / probs[kept].sum() * draws
    counts = torch.bincount(result.ids[:, 0].cpu(), minlength=len(probs))[kept]
    assert counts.sum() == draws
    chi_square, freedom = ((counts - expected) ** 2 / expected).sum().item(), len(counts) - 1
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5


@pytest.mark.vllm
def test_further_tokens_end_and_prompts_have_lengths_of_their_own(engine, policy):
    free = generate(engine, temperature=0, max_completion_length=12)
    stop, lengths = free.ids[0, 3].item(), [12, 7, 2]
    sampling = SamplingParams(max_completion_length=12, temperature=0, stop_token_ids=(stop,))
    result = engine.generate(PROMPTS, 3, sampling, max_lengths=lengths)
    for i, ids in enumerate(free.ids.tolist()):
        length = min(lengths[i // 3], ids.index(stop) + 1 if stop in ids else 12)
        assert result.token_lists()[i] == ids[:length]
        assert result.finished[i].item() == (ids[length - 1] == stop)
    assert result.finished[0]
    fits = [1, 1, 256 - 3]
    assert engine.generate(PROMPTS, 1, SamplingParams(max_completion_length=253), max_lengths=fits)


@pytest.mark.vllm
def test_weights_are_stale_until_they_are_pushed(engine, policy):
    assert max(differences(policy, generate(engine))) < ROUNDING
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.1)
    assert max(differences(policy, generate(engine))) > 0.05
    engine.update_weights(policy)
    assert max(differences(policy, generate(engine))) < ROUNDING


@pytest.mark.vllm
def test_tokens_read_under_earlier_weights_are_forgotten(engine, policy):
    long = [(3 * i) % 90 + 5 for i in range(200)]  # more than a block of the prefix cache

    def first_logp(model):
        engine.update_weights(model)
        sampling = SamplingParams(max_completion_length=1, temperature=0)
        result = engine.generate([long], 1, sampling)
        return policy_logps(model, long, result.ids[0].tolist(), 1.0) - result.logps[0]

    assert first_logp(policy).abs() < ROUNDING
    assert first_logp(new_model(seed=1)).abs() < ROUNDING


@pytest.mark.vllm
def test_adapters_are_pushed_merged(engine, policy):
    from peft import LoraConfig, get_peft_model

    plain = generate(engine, temperature=0)
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    model = get_peft_model(copy.deepcopy(policy), lora)
    generator = torch.Generator(DEVICE).manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    engine.update_weights(model)
    result = generate(engine)
    assert max(differences(model, result)) < ROUNDING
    assert max(differences(policy, result)) > 0.05
    with model.disable_adapter():
        engine.update_weights(model)
        again = generate(engine, temperature=0)
    assert torch.equal(again.ids, plain.ids)
    assert torch.equal(again.logps, plain.logps)


@pytest.mark.vllm
def test_sleep_drops_the_weights_and_generate_brings_them_back(engine, policy):
    expected = generate(engine, temperature=0)
    engine.sleep()
    engine.sleep()
    assert engine._llm.llm_engine.is_sleeping()
    # On a CPU vLLM leaves the memory as it is: do what a GPU's sleep does to it.
    engine._llm.apply_model(lambda m: [p.data.fill_(torch.nan) for p in m.parameters()] and None)
    result = generate(engine, temperature=0)
    assert not engine._llm.llm_engine.is_sleeping()
    assert torch.equal(result.ids, expected.ids)
    assert torch.equal(result.logps, expected.logps)

    engine.sleep()
    with torch.no_grad():
        policy.lm_head.weight.mul_(1.1)
    engine.update_weights(policy)
    assert engine._llm.llm_engine.is_sleeping()
    assert max(differences(policy, generate(engine))) < ROUNDING


@pytest.mark.vllm
def test_any_eos_ends_a_completion(engine, policy, monkeypatch):
    free = generate(engine, max_completion_length=12, temperature=0)
    eos = [free.ids[0, 3].item(), free.ids[4, 5].item()]
    monkeypatch.setattr(engine, "_eos_token_ids", eos)
    result = generate(engine, max_completion_length=12, temperature=0)
    for i, ids in enumerate(free.ids.tolist()):
        hits = [t for t, token in enumerate(ids) if token in eos]
        length = hits[0] + 1 if hits else 12
        assert result.ids[i].tolist() == (ids[:length] + [0] * 12)[: result.ids.shape[1]]
        assert result.mask[i].tolist() == [t < length for t in range(result.ids.shape[1])]
        assert result.logps[i, length:].abs().sum() == 0
        assert result.finished[i].item() == bool(hits)
    assert 0 < result.finished.sum() < 9
    assert max(differences(policy, result)) < ROUNDING


@pytest.mark.vllm
@pytest.mark.skipif(DEVICE == "cuda", reason="vLLM's randomness is its own on a GPU")
def test_seeds_fix_the_completions_of_their_prompts(engine, policy):
    sampling, seeds = SamplingParams(max_completion_length=6), [3, 2**61, 5]
    first = engine.generate(PROMPTS, 4, sampling, seeds)
    other = engine.generate(PROMPTS, 4, sampling, [3, 4, 5])
    engine.update_weights(policy)
    again = engine.generate(PROMPTS, 4, sampling, seeds)
    assert torch.equal(first.ids, again.ids)
    assert torch.equal(first.logps, again.logps)
    changed = (first.ids != other.ids).any(1).tolist()
    assert changed == [False] * 4 + [True] * 4 + [False] * 4
    alone = engine.generate(PROMPTS[1:2], 4, sampling, seeds[1:2])
    assert torch.equal(alone.ids, first.ids[4:8])
    state = torch.get_rng_state()
    engine.generate(PROMPTS, 1, SamplingParams(max_completion_length=6, temperature=0))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.vllm
def test_autocast_around_it_changes_nothing(engine, policy):
    expected = generate(engine, temperature=0)
    engine.update_weights(policy)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        result = generate(engine, temperature=0)
    assert torch.equal(result.logps, expected.logps)


@pytest.mark.vllm
def test_bad_requests_name_the_value_and_the_remedy(engine):
    sampling = SamplingParams(max_completion_length=4)
    with pytest.raises(ValueError, match="prompt_ids is empty"):
        engine.generate([], 1, sampling)
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        engine.generate([[1], []], 1, sampling)
    with pytest.raises(ValueError, match="num_generations must be at least 1, got 0"):
        engine.generate(PROMPTS, 0, sampling)
    with pytest.raises(ValueError, match="1 seeds for 3 prompts: give one for each"):
        engine.generate(PROMPTS, 1, sampling, [0])
    with pytest.raises(ValueError, match=r"253 tokens.* 4 .* 256 .* raise vllm_max_model_length"):
        engine.generate([[5] * 253], 1, sampling)


@pytest.mark.vllm
def test_an_untied_model_in_bfloat16_and_a_start_that_leaves_no_trace():
    model = new_model("llama", tie=False)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    rollout = start(model, max_model_length=64, dtype=torch.bfloat16)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()
    rounded = copy.deepcopy(model).bfloat16().float()
    assert max(differences(rounded, generate(rollout))) < 0.2
    with pytest.raises(ValueError, match="exceeds the 64 that vLLM makes room for"):
        generate(rollout, max_completion_length=60)
    rollout.sleep()  # not enabled
    assert not rollout._llm.llm_engine.is_sleeping()


@pytest.mark.vllm
def test_what_vllm_refuses_is_said_with_the_remedy():
    with pytest.raises(
        ValueError, match=r"vLLM cannot start: .*\(1000\).*; .* vllm_max_model_length"
    ):
        start(new_model(), max_model_length=1000)


@pytest.mark.skipif(INSTALLED, reason="vLLM is installed")
def test_without_vllm_the_extra_is_named():
    with pytest.raises(ValueError, match=r"use_vllm: .* pip install 'fastgrpo\[vllm\]'"):
        start(new_model())


def letter_e(completions, **columns):
    return [text.count("e") / max(len(text), 1) for text in completions]


@pytest.mark.vllm
@pytest.mark.parametrize("use_peft", [False, True])
def test_a_run_samples_from_the_weights_it_has_just_trained(tmp_path, use_peft):
    before = new_model()
    before.save_pretrained(tmp_path / "model")
    small_tokenizer().save_pretrained(tmp_path / "model")
    rows = [json.dumps({"prompt": f"{n} and {n}?"}) + "\n" for n in range(16)]
    (tmp_path / "prompts.jsonl").write_text("".join(rows))
    config = config_from(
        {
            "model_name_or_path": str(tmp_path / "model"),
            "dataset_name": str(tmp_path / "prompts.jsonl"),
            "output_dir": str(tmp_path / "run"),
            "reward_funcs": [f"{__file__}:letter_e"],
            "use_vllm": True,
            "use_peft": use_peft,
            "vllm_gpu_memory_utilization": 0.1,
            "num_generations": 8,
            "per_device_train_batch_size": 32,
            "max_completion_length": 12,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "max_steps": 4,
            "cpu_threads": 1,
        }
    )
    trainer = Trainer(config)
    trainer.train()
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    differences = [json.loads(line)["sampling/sampling_logp_difference/max"] for line in lines]
    assert len(differences) == 4
    assert max(differences) < ROUNDING
    ids = PROMPTS[1][:9]
    model = trainer.policy.model.eval()
    model.set_attn_implementation("sdpa")  # that of training takes packed sequences alone
    after = policy_logps(model, ids, ids, 1.0)
    assert (after - policy_logps(before, ids, ids, 1.0)).abs().max() > 0.05  # it was trained
