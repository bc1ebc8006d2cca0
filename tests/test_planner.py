"""The planner against what real steps allocate, and what it finds out."""

import dataclasses
import functools
import gc

import pytest
import torch
from datasets import Dataset
from small_models import small_tokenizer
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from benchmarks.measure import CpuAllocations
from fastgrpo.assets import Assets
from fastgrpo.batch import make_batch
from fastgrpo.config import config_from
from fastgrpo.memory import Device, Planner, largest_values, switches
from fastgrpo.memory.passes import Footprint, LossKind, Pass
from fastgrpo.memory.plan import GIB
from fastgrpo.trainer import Trainer

PROMPT, COMPLETION, BATCH = 24, 104, 8
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "vocab_size": 100,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
ARCHITECTURES = {
    "qwen3": Qwen3Config(**SIZES, tie_word_embeddings=True),
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=False),
    "gemma3": Gemma3TextConfig(
        **SIZES, sliding_window=64, layer_types=["sliding_attention"] * 3 + ["full_attention"]
    ),
}
CPU = Device("the CPU", 64 * GIB, on_gpu=False)


def run_config(**values):
    return config_from(
        {
            "model_name_or_path": "given",
            "dataset_name": "given",
            "reward_funcs": ["accuracy"],
            "num_generations": 4,
            "max_completion_length": COMPLETION,
            "per_device_train_batch_size": BATCH,
            "max_steps": 4,
            "save_strategy": "no",
            "cpu_threads": 1,
            **values,
        }
    )


def make_trainer(tmp_path, architecture, **values):
    config = run_config(output_dir=str(tmp_path / "run"), **values)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(architecture, dtype=getattr(torch, config.dtype))
    rows = [{"prompt": "a" * PROMPT, "answer": "1"}] * 4
    assets = Assets(model=model, tokenizer=small_tokenizer(), train_dataset=Dataset.from_list(rows))
    return Trainer(config, assets)


def allocated(action):
    """Return the bytes at the peak beyond those there were."""
    gc.collect()
    allocations = CpuAllocations()
    action()
    return allocations.stop()


def train_step(trainer):
    """Return an optimisation step on completions that are as long as they can be."""
    count = trainer.config.completions_per_step
    batch = make_batch(
        [[5] * PROMPT] * count,
        [[7] * (COMPLETION - 1), *[[7] * COMPLETION] * (count - 1)],  # padding needs a mask
        [torch.zeros(COMPLETION - 1), *[torch.zeros(COMPLETION)] * (count - 1)],
        torch.ones(count),
        device="cpu",
    )
    if trainer.learner.reference is not None:
        batch.ref_logps = torch.zeros_like(batch.sampling_logps)
    return lambda: trainer.optimise(batch, {})


@functools.cache
def planner(family):
    """Return a planner of a CPU, which keeps what it finds for later tests."""
    return Planner(ARCHITECTURES[family], CPU, PROMPT)


def beyond(plan, phase, *parts):
    """Return what a phase takes beside some parts."""
    return sum(size for part, size in plan.phases[phase].items() if part not in parts)


TRAINING = {
    "qwen3": ("qwen3", {}),
    "qwen3 bf16 autocast": ("qwen3", {"bf16": True}),
    "qwen3 budget": ("qwen3", {"max_tokens_per_microbatch": 512}),
    "qwen3 padded": ("qwen3", {"padding_free": False, "gradient_checkpointing": False}),
    "llama kept": ("llama", {"gradient_checkpointing": False}),
    "llama 8-bit, reference": ("llama", {"optim": "adamw_8bit", "beta": 0.1}),
    "llama master weights": ("llama", {"dtype": "bfloat16", "bf16_updates": "master_weights"}),
    "gemma3": ("gemma3", {"gradient_checkpointing": False}),
    "lora kept": ("qwen3", {"use_peft": True, "gradient_checkpointing": False, "bf16": True}),
    "lora on bf16": ("llama", {"use_peft": True, "dtype": "bfloat16"}),
}
SLOW = ("qwen3 budget", "gemma3", "llama kept", "llama master weights", "lora kept")


@pytest.mark.parametrize(
    "case",
    [pytest.param(x, marks=[pytest.mark.slow] if x in SLOW else []) for x in TRAINING],
)
def test_training_takes_what_was_planned(tmp_path, case):
    family, values = TRAINING[case]
    trainer = make_trainer(tmp_path, ARCHITECTURES[family], **values)
    step = train_step(trainer)
    step()  # makes the optimizer's states
    measured = allocated(step)
    plan = planner(family).plan(trainer.config, like=run_config())
    training = beyond(plan, "training", "weights", "optimizer", "reference")
    stepping = beyond(plan, "optimizer step", "weights", "reference")
    stepping -= plan.phases["training"]["optimizer"]
    # Inside an operation on fp32 adapters and bf16 states, a CPU converts a whole tensor.
    mixed = {"use_peft", "dtype"} <= values.keys()
    assert max(training, stepping) == pytest.approx(measured, rel=0.12 if mixed else 0.02)
    parameters = list(trainer.policy.model.parameters())
    assert plan.num_parameters == sum(p.numel() for p in parameters)
    assert plan.num_trainable == sum(p.numel() for p in parameters if p.requires_grad)


@pytest.mark.parametrize(
    ("family", "values"),
    [
        ("qwen3", {}),
        pytest.param("llama", {"bf16": True}, marks=pytest.mark.slow),
        ("gemma3", {"top_p": 0.9, "max_generation_batch_size": 16}),
    ],
)
def test_sampling_takes_what_was_planned(tmp_path, family, values):
    values = {"gradient_accumulation_steps": 4, "max_completion_length": 40, **values}
    trainer = make_trainer(tmp_path, ARCHITECTURES[family], **values)
    prompts = [[5] * PROMPT] * trainer.config.prompts_per_step
    sampling = trainer.sampler.sampling

    def sample():
        with trainer.policy.sampling():
            trainer.sampler.rollout.generate(prompts, trainer.config.num_generations, sampling)

    measured = allocated(sample)
    plan = planner(family).plan(trainer.config)
    # Rows that end are dropped at some step, and then a layer is held twice, in part.
    planned = beyond(plan, "sampling", "weights", "optimizer", "reference")
    assert planned == pytest.approx(measured, rel=0.06)
    assert plan.rows_decoded == values.get("max_generation_batch_size", 32)


@pytest.mark.slow
@pytest.mark.parametrize("values", [{"bf16": True}, {"use_peft": True}])
def test_log_probs_take_what_was_planned(tmp_path, values):
    family = "llama"
    trainer = make_trainer(tmp_path, ARCHITECTURES[family], beta=0.1, **values)
    count = trainer.config.completions_per_step
    batch = make_batch(
        [[5] * PROMPT] * count,
        [[7] * COMPLETION] * count,
        [torch.zeros(COMPLETION)] * count,
        torch.ones(count),
        device="cpu",
    )
    measured = allocated(lambda: trainer.learner.add_logps(batch))
    plan = planner(family).plan(trainer.config)
    planned = beyond(plan, "log-probs", "weights", "optimizer", "reference")
    assert planned == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize(
    ("values", "options"),
    [
        ({}, {"bf16": True}),
        ({"gradient_checkpointing": False}, {"padded_length": 40, "gradients_exist": True}),
        ({"use_peft": True, "load_in_4bit": True}, {"bf16": True}),
    ],
)
def test_two_layers_tell_what_all_do(values, options):
    """Of a model whose layers are equal no other is looked at: here all are."""
    options = {"bf16": False, "loss": LossKind(torch.float32), "on_gpu": True, **options}
    this = Pass(config=run_config(**values), **options)
    few, all_ = (
        Footprint(ARCHITECTURES["qwen3"], this, equal_layers=equal) for equal in (True, False)
    )
    assert len(few.base_EK) < len(all_.base_EK)
    for tokens in (1, 1000, 10**6):
        for workspaces in ((0, 0), (10**9, 0), (0, 10**9)):
            assert few.peak(tokens, *workspaces) == all_.peak(tokens, *workspaces)


QWEN = {"vocab_size": 151936, "max_position_embeddings": 32768}
SHAPES = {  # those of Qwen2.5, whose model cards count the parameters
    "0.5B": (494_032_768, (896, 4864, 24, 14, 2), True),
    "1.5B": (1_543_714_304, (1536, 8960, 28, 12, 2), True),
    "7B": (7_615_616_512, (3584, 18944, 28, 28, 4), False),
}
GPU = Device("a GPU", 24 * GIB)


def qwen(size):
    _, (hidden, inner, layers, heads, kv_heads), tied = SHAPES[size]
    return Qwen2Config(
        **QWEN | {"vocab_size": 152064} if size == "7B" else QWEN,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=tied,
    )


def test_a_real_shape_on_a_card_of_24_gib():
    count, config = SHAPES["0.5B"][0], run_config(max_completion_length=512)
    plan = Planner(qwen("0.5B"), GPU, 512).plan(config)
    assert plan.num_parameters == plan.num_trainable == count
    always = plan.phases["training"]
    assert always["weights"] == pytest.approx(4 * count, rel=1e-3)  # and a few frequencies
    assert always["optimizer"] == 8 * count
    assert plan.phases["optimizer step"]["gradients"] == 4 * count
    assert plan.fits
    assert 16 * count < plan.peak < 24 * GIB
    assert plan.microbatch_tokens == 8 * 1024


@pytest.mark.parametrize("size", SHAPES)
def test_parameters_of_real_shapes(size):
    sizes = Planner(qwen(size), GPU, 512).sizes(run_config())
    assert sizes.parameters == sizes.trainable == SHAPES[size][0]
    assert sizes.gradients == 4 * SHAPES[size][0]


@pytest.mark.slow
def test_seven_billion_parameters_in_four_bits():
    config = run_config(use_peft=True, load_in_4bit=True, dtype="bfloat16")
    plan = Planner(qwen("7B"), GPU, 512).plan(config)
    outside = 2 * 152064 * 3584  # embedding and head
    inside = SHAPES["7B"][0] - outside
    rank = 16 * 28 * (2 * (3584 + 3584) + 2 * (3584 + 512) + 3 * (3584 + 18944))
    assert plan.num_trainable == rank
    # Half a byte and a scale of 4 bytes for every 64; biases, gains and the rest in bf16.
    expected = 2 * outside + inside * (1 / 2 + 4 / 64) + 4 * rank
    assert plan.phases["training"]["weights"] == pytest.approx(expected, rel=1e-3)
    assert plan.fits


def test_the_largest_values_fit_and_larger_ones_do_not():
    planner = Planner(qwen("0.5B"), Device("a GPU", 12 * GIB), 512)
    config = run_config(max_completion_length=512, num_generations=8)
    found = {x.key: x for x in largest_values(planner, config)}
    for key in ("max_completion_length", "max_tokens_per_microbatch"):
        value = found[key].value
        assert value > 64
        assert planner.plan(dataclasses.replace(config, **{key: value})).fits
        if found[key].limit is None:
            assert not planner.plan(dataclasses.replace(config, **{key: value * 21 // 20})).fits
    assert found["max_completion_length"].limit is None
    assert found["num_generations"].now == 8


def test_the_largest_completion_is_what_training_starts_with():
    """Of a microbatch of 2048 and a prompt of 520, whatever the configuration has now."""
    planner = Planner(LlamaConfig(**SIZES | {"max_position_embeddings": 4096}), GPU, 520)
    for now in (1528, 1536):
        config = run_config(max_completion_length=now, max_tokens_per_microbatch=2048)
        found = {x.key: x for x in largest_values(planner, config)}["max_completion_length"]
        assert (found.value, found.limit) == (1528, "max_tokens_per_microbatch")
    for length, starts in ((1528, True), (1529, False)):
        changed = dataclasses.replace(config, max_completion_length=length)
        assert (planner.refusal(changed) is None) == planner.plan(changed).fits == starts


def test_what_bounds_a_value_is_named():
    planner = Planner(ARCHITECTURES["llama"], GPU, PROMPT)
    config = run_config(loss_type="bnpo", max_completion_length=8)
    found = {x.key: (x.value, x.limit) for x in largest_values(planner, config)}
    assert found["max_completion_length"] == (512 - PROMPT, "the model")
    assert found["max_tokens_per_microbatch"] == (None, "the configuration")  # it is of the loss
    assert found["num_generations"] == (1024, "this search")
    config = run_config(use_vllm=True, vllm_max_model_length=PROMPT)
    assert [(x.value, x.limit) for x in largest_values(planner, config)] == [
        (None, "vllm_max_model_length")
    ] * 3


@pytest.mark.slow
def test_switches_are_plans_of_other_configurations():
    planner = Planner(ARCHITECTURES["llama"], Device("a GPU", GIB), PROMPT)
    config = run_config(beta=0.1, gradient_checkpointing=False)
    now = planner.plan(config)
    found = switches(planner, config, now)
    assert [x.saved for x in found] == sorted((x.saved for x in found), reverse=True)
    assert {"gradient_checkpointing": True} in [x.changes for x in found]
    assert all("activation_offloading" not in x.changes for x in found)  # needs another switch
    by_name = {next(iter(x.changes)): x for x in found}
    for name in ("offload_ref_model", "optim", "gradient_checkpointing"):
        switch = by_name[name]
        plan = planner.plan(dataclasses.replace(config, **switch.changes))
        assert (switch.peak, switch.saved) == (plan.peak, now.peak - plan.peak)
    assert by_name["offload_ref_model"].saved == now.phases["training"]["reference"]


def test_a_model_that_needs_values_is_refused():
    experts = Qwen3MoeConfig(**SIZES, num_experts=4, moe_intermediate_size=64)  # in fp32
    with pytest.raises(ValueError, match="a qwen3_moe model does not run on tensors without"):
        Planner(experts, GPU, PROMPT).plan(run_config())


@pytest.mark.gpu
@pytest.mark.parametrize(
    "values",
    [{}, {"gradient_checkpointing": False}, {"use_peft": True}, {"beta": 0.1}],
    ids=str,
)
def test_a_gpu_takes_what_was_planned(tmp_path, values):
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8}
    sizes |= {"num_attention_heads": 8, "head_dim": 128, "max_position_embeddings": 4096}
    architecture = Qwen3Config(**SIZES | sizes)
    trainer = make_trainer(
        tmp_path, architecture, per_device_train_batch_size=64, gradient_accumulation_steps=2,
        **values,
    )  # fmt: skip
    step = train_step(trainer)
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step()
    measured = torch.cuda.max_memory_allocated()
    total = torch.cuda.get_device_properties(0).total_memory
    plan = Planner(architecture, Device("this", total), PROMPT).plan(trainer.config)
    planned = max(beyond(plan, phase) for phase in ("training", "optimizer step"))
    assert planned == pytest.approx(measured, rel=0.15)
