"""`FastGRPOTrainer` as a user meets it: what it refuses, adapters, models of other kinds."""

from __future__ import annotations

import copy
import gc
import inspect
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from trl_pairs import (
    Pair,
    assert_same,
    drifted,
    make_trainer,
    micro_batch,
    policy_logps,
    result_of,
    saved_model,
    trl,
)

from fastgrpo.head import read_head
from fastgrpo.integrations.fused_head import add_fused_head
from fastgrpo.integrations.trl import FastGRPOTrainer, accelerate_trl

pytestmark = [
    pytest.mark.peers,
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),  # TRL's own
]


def test_it_takes_the_arguments_of_grpo_trainer() -> None:
    assert inspect.signature(FastGRPOTrainer) == inspect.signature(trl.GRPOTrainer)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"epsilon": 0.2, "delta": 1.1},
            r"delta must be .* above 1 \+ epsilon_high = 1.2, got 1.1",
        ),
        ({"epsilon": 1.5}, "epsilon must be at most 1"),
        ({"sapo_temperature_pos": 0.0, "loss_type": "sapo"}, "sapo_temperature_pos must be"),
        (
            {"loss_type": "vespo", "importance_sampling_level": "sequence", "beta": 0.1},
            "importance_sampling_level='sequence' with loss_type='vespo' .*use_bias_correction_kl",
        ),
        ({"loss_type": "gspo"}, "loss_type must be one of .*, got 'gspo'"),
    ],
)
def test_what_our_loss_lacks_is_refused_before_a_model_is_loaded(
    tmp_path: Path, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        FastGRPOTrainer(
            str(tmp_path / "no such model"),
            lambda completions, **_: [0.0] * len(completions),
            args=trl.GRPOConfig(str(tmp_path), use_cpu=True, bf16=False, **options),
        )


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "cispo", "epsilon": 5.0},
        {"loss_type": "sapo", "epsilon": 2.0},
        {"loss_type": "vespo", "epsilon": 1.5, "vespo_lambda_pos": 0.0},
        {"vespo_lambda_pos": 0.0, "sapo_temperature_neg": -1.0},
        {"loss_type": "vespo", "delta": 0.1},
    ],
)
def test_what_the_loss_does_not_read_may_be_anything(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    assert_same(Pair.make(tmp_path, **options), dict(micro_batch()))


def test_zero_stage_3_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fastgrpo.integrations.trl as module

    # DeepSpeed itself is not needed to say no to it.
    monkeypatch.setattr(module, "is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ValueError, match="deepspeed: ZeRO stage 3"):
        make_trainer(FastGRPOTrainer, saved_model(tmp_path), tmp_path)


def test_a_head_that_cannot_be_expressed_is_refused(tmp_path: Path) -> None:
    model = saved_model(tmp_path)
    model.lm_head.register_forward_hook(lambda _module, _args, logits: logits.sin())
    with pytest.raises(ValueError, match="cannot express the LM head of Qwen3ForCausalLM"):
        make_trainer(FastGRPOTrainer, model, tmp_path)


def test_cispo_with_a_cap_below_one_is_warned_of(tmp_path: Path) -> None:
    from fastgrpo.integrations.trl_options import loss_config

    with pytest.warns(UserWarning, match="caps ratios at epsilon_high itself, and 0.2"):
        loss_config(trl.GRPOConfig(str(tmp_path), use_cpu=True, bf16=False, loss_type="cispo"))
    pair = Pair.make(tmp_path, loss_type="cispo")
    assert_same(pair, dict(micro_batch()))


# Adapters


def lora(**options: Any) -> Any:
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(
        r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, **options
    )


def test_lora_with_the_bare_model_as_reference(tmp_path: Path) -> None:
    pair = Pair.make(tmp_path, peft_config=lora(), beta=0.2)
    inputs: dict[str, Any] = dict(micro_batch())
    assert pair.ours.ref_model is None
    for trainer in (pair.theirs, pair.ours):
        with trainer.model.disable_adapter():
            inputs["ref_per_token_logps"] = policy_logps(trainer, inputs)
    theirs = assert_same(pair, inputs)
    assert theirs.metrics["kl"][0] > 0.01
    assert all("lora" in name for name in theirs.grads)


def test_lora_beside_a_head_that_is_trained_whole(tmp_path: Path) -> None:
    model = saved_model(tmp_path, tie=False)
    pair = Pair.make(tmp_path, model, peft_config=lora(modules_to_save=["lm_head"]))
    theirs = assert_same(pair, dict(micro_batch()))
    heads = [x for name, x in theirs.grads.items() if "lm_head" in name]
    assert len(heads) == 1 and heads[0].abs().sum() > 0


def test_virtual_tokens_before_the_prompt(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    pair = Pair.make(tmp_path, peft_config=config)
    theirs = assert_same(pair, dict(micro_batch()))
    assert len(theirs.grads) == 1


def test_an_adapter_on_the_head_is_refused_as_by_trl(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["lm_head"])
    for trainer_class in (trl.GRPOTrainer, FastGRPOTrainer):
        with pytest.raises(ValueError, match="lm_head"):
            model = saved_model(tmp_path, tie=False)
            make_trainer(trainer_class, model, tmp_path, peft_config=config)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(tmp_path: Path, reentrant: bool) -> None:
    pair = Pair.make(
        tmp_path,
        peft_config=lora(),
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": reentrant},
    )
    for trainer in (pair.theirs, pair.ours):  # as the training loop begins
        trainer.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:
            trainer.model.enable_input_require_grads()
    assert_same(pair, dict(micro_batch()))


def test_experts_are_kept_in_balance(tmp_path: Path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=100, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
        output_router_logits=True,
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    pair = Pair.make(tmp_path, model, router_aux_loss_coef=0.5, gradient_accumulation_steps=2)
    assert pair.ours.aux_loss_enabled
    theirs = assert_same(pair, dict(micro_batch()))
    assert theirs.metrics["aux_loss"][0] > 1


def test_images(tmp_path: Path) -> None:
    """The loss of a micro-batch with images; a trainer of such a model needs a real processor."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    from trl.trainer.utils import add_fused_lm_head

    torch.manual_seed(0)
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 120, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "rope_parameters": rope,
            "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0,
        },
        vision_config={
            "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4,
            "out_hidden_size": 32, "patch_size": 4, "spatial_merge_size": 2,
            "temporal_patch_size": 1, "window_size": 16, "fullatt_block_indexes": [1],
        },
        image_token_id=100, vision_start_token_id=101, vision_end_token_id=102, video_token_id=103,
    )  # fmt: skip
    model = Qwen2_5_VLForConditionalGeneration(config)
    assert read_head(model).module is model.lm_head
    pair = Pair.make(tmp_path)
    pair.theirs.model, pair.ours.model = copy.deepcopy(model), copy.deepcopy(model)
    add_fused_lm_head(pair.theirs.model, temperature=0.8, outputs=("log_probs", "entropy"))
    add_fused_head(pair.ours.model, lambda labels: pytest.fail("not asked for"))

    inputs: dict[str, Any] = dict(micro_batch())
    image = torch.tensor([101, 100, 100, 100, 100, 102])  # 4 x 4 patches, merged two by two
    inputs["prompt_ids"] = torch.cat([inputs["prompt_ids"], image.expand(6, -1)], 1)
    inputs["prompt_mask"] = torch.nn.functional.pad(inputs["prompt_mask"], (0, 6), value=1)
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    inputs |= {
        "pixel_values": torch.randn(6 * 16, 3 * 4 * 4),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * 6),
        "num_images": [1] * 6,
        "mm_token_type_ids": (ids == 100).long(),
    }
    theirs = assert_same(pair, inputs)
    assert theirs.grads["model.visual.patch_embed.proj.weight"].abs().sum() > 0


# An existing trainer


def test_a_trainer_that_exists_gets_the_loss(tmp_path: Path) -> None:
    model = saved_model(tmp_path)
    pair = Pair.make(tmp_path, model, beta=0.1, entropy_coef=0.1)
    made = make_trainer(trl.GRPOTrainer, model, tmp_path, beta=0.1, entropy_coef=0.1)
    assert accelerate_trl(made) is made and type(made) is FastGRPOTrainer
    inputs: dict[str, Any] = dict(micro_batch())
    inputs["ref_per_token_logps"] = drifted(policy_logps(made, inputs), 2)
    assert_same(Pair(pair.theirs, made), inputs)
    ours, its = result_of(pair.ours, inputs), result_of(made, inputs)
    assert torch.equal(ours.loss, its.loss) and ours.metrics == its.metrics


def test_a_subclass_keeps_what_it_adds(tmp_path: Path) -> None:
    class Mine(trl.GRPOTrainer):
        def _generate_and_score_completions(self, inputs: Any) -> Any:
            return "mine"

    made = accelerate_trl(make_trainer(Mine, saved_model(tmp_path), tmp_path))
    assert isinstance(made, Mine) and type(made).__name__ == "FastMine"
    assert made._generate_and_score_completions(None) == "mine"
    assert_same(
        Pair(make_trainer(Mine, saved_model(tmp_path), tmp_path), made), dict(micro_batch())
    )


def test_a_loss_of_its_own_is_refused(tmp_path: Path) -> None:
    from trl.experimental.gmpo import GMPOTrainer

    class Weighs(trl.GRPOTrainer):
        @staticmethod
        def get_gamma_weights(advantages: Any, **_: Any) -> Any:
            return advantages

    made = make_trainer(trl.GRPOTrainer, saved_model(tmp_path), tmp_path)
    for cls, name in ((GMPOTrainer, "_compute_loss"), (Weighs, "get_gamma_weights")):
        made.__class__ = cls
        with pytest.raises(TypeError, match=f"{cls.__name__} has a {name} of its own"):
            accelerate_trl(made)
        assert type(made) is cls
    made.__class__ = trl.GRPOTrainer
    made._compute_loss = lambda model, inputs: None
    with pytest.raises(TypeError, match="GRPOTrainer has a _compute_loss of its own"):
        accelerate_trl(made)
    with pytest.raises(TypeError, match=r"takes a trl.GRPOTrainer, got Linear"):
        accelerate_trl(nn.Linear(1, 1))


def test_one_that_is_fast_already_stays_as_it_is(tmp_path: Path) -> None:
    made = make_trainer(FastGRPOTrainer, saved_model(tmp_path), tmp_path)
    forward = made.model.forward
    assert accelerate_trl(made) is made and made.model.forward == forward


def test_a_trainer_that_is_refused_is_what_it_was(tmp_path: Path) -> None:
    model = saved_model(tmp_path)
    model.lm_head.register_forward_hook(lambda _module, _args, logits: logits.sin())
    made = make_trainer(trl.GRPOTrainer, model, tmp_path)
    wanted = result_of(made, micro_batch())
    with pytest.raises(ValueError, match="cannot express the LM head"):
        accelerate_trl(made)
    assert type(made) is trl.GRPOTrainer
    assert torch.equal(result_of(made, micro_batch()).loss, wanted.loss)
    made.model_wrapped = nn.parallel.DataParallel(made.model)
    with pytest.raises(ValueError, match="call accelerate_trl before train"):
        accelerate_trl(made)


def test_a_model_does_not_keep_its_trainer(tmp_path: Path) -> None:
    made = make_trainer(FastGRPOTrainer, saved_model(tmp_path), tmp_path, beta=0.1)
    inputs = {**micro_batch(), "ref_per_token_logps": torch.full((6, 7), -3.0)}
    result_of(made, inputs)
    model, trainer = made.model, weakref.ref(made)
    made.accelerator.free_memory()
    del made
    gc.collect()
    assert trainer() is None
    assert model(input_ids=inputs["prompt_ids"]).logits.shape == (6, 5, 99)


def test_all_that_a_model_may_take_reaches_it(tmp_path: Path) -> None:
    pair, seen = Pair.make(tmp_path), []
    names = [
        *("pixel_values", "image_grid_thw", "image_position_ids", "pixel_attention_mask"),
        *("spatial_shapes", "image_sizes", "token_type_ids", "mm_token_type_ids"),
    ]
    own = inspect.signature(trl.GRPOTrainer._get_per_token_logps_and_entropies).parameters
    assert {*names} == {*own} - {
        *("self", "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size"),
        *("compute_entropy", "compute_aux_loss", "num_images", "num_tiles"),
    }

    def model(**inputs: Any) -> Any:
        seen.append(inputs)
        passed = {n: inputs[n] for n in ("input_ids", "attention_mask", "fused_head")}
        return pair.ours.model(**passed)

    inputs = {**micro_batch(), **{name: torch.full((6,), i) for i, name in enumerate(names)}}
    pair.ours._compute_loss(model, inputs)
    assert [int(seen[0][name][0]) for name in names] == list(range(len(names)))
