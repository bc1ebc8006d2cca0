"""Recipes written for TRL: they run as they are, or all that is not ours is named with a remedy."""

import json
import re
from pathlib import Path

import pytest
import yaml

from fastgrpo.config import ConfigError, TrainConfig, config_from, load_config
from fastgrpo.config.trl_refused import INSTEAD

FOLDER = Path(__file__).parent / "trl_recipes"
OPTIONS = json.loads((FOLDER / "options.json").read_text())
"""TRL's options and their defaults, by the class that has them; see peers/test_trl_options.py."""
DEFAULTS = {name: x for options in OPTIONS["defaults"].values() for name, x in options.items()}
OURS = TrainConfig().flat()

# What a value that is not TRL's default becomes, of options that are translated; those of ours that
# take further values among them.
TRANSLATED = {
    "epsilon": (0.1, {"epsilon_low": 0.1, "epsilon_high": 0.1}),
    "scale_rewards": (False, {"scale_rewards": "none"}),
    "optim": ("adamw_torch", {"optim": "adamw_torch_fused"}),
    "top_k": (-1, {"top_k": 0}),
    "report_to": ("wandb", {"report_to": ["wandb"]}),
    "reward_funcs": ("format", {"reward_funcs": ["format"]}),
    "lora_target_modules": ("all-linear", {"lora_target_modules": None}),
    "logging_steps": (3.0, {"logging_steps": 3}),
    "save_steps": (3.0, {"save_steps": 3}),
    "generation_batch_size": (16, {"steps_per_generation": 2}),
    "reward_model_name_or_path": ("o/m", {"reward_funcs": ["o/m"]}),
    "log_completions": (False, {"num_completions_to_log": 0}),
    "activation_checkpointing": (False, {"gradient_checkpointing": False}),
    "gradient_checkpointing_kwargs": ({"offload": True}, {"activation_offloading": True}),
    "activation_checkpointing_kwargs": ({"offload": True}, {"activation_offloading": True}),
    "model_init_kwargs": ({"revision": "v2"}, {"model_revision": "v2"}),
    "data_seed": (42, {"seed": 42}),
    "vllm_importance_sampling_cap": (2, {"vllm_importance_sampling_clip_max": 2.0}),
}
OLDER = {
    "vllm_max_model_len": (900, {"vllm_max_model_length": 900}),
    "torch_dtype": ("float32", {"dtype": "float32"}),
    "evaluation_strategy": ("epoch", {"eval_strategy": "epoch"}),
    "warmup_ratio": (0.1, {"warmup_steps": 0.1}),
    "dataset_prompt_column": ("problem", {"prompt_column": "problem"}),
    "max_completion_len": (512, {"max_completion_length": 512}),
    "wandb_project": ("p", {"project": "p"}),
}
# Whatever these say, the same is trained and kept, by TRL on one GPU too: they are about several
# processes, about how rows are loaded, about the Hub and a server (push_to_hub and vllm_mode:
# server are refused), and about what is printed.
NO_BEARING = set(
    """average_tokens_across_devices dataloader_drop_last dataloader_in_order
    dataloader_multiprocessing_context dataloader_num_workers dataloader_persistent_workers
    dataloader_pin_memory dataloader_prefetch_factor ddp_backend ddp_broadcast_buffers
    ddp_bucket_cap_mb ddp_find_unused_parameters ddp_static_graph ddp_timeout disable_tqdm do_train
    ds3_gather_for_generation eval_do_concat_batches eval_use_gather_object hub_always_push
    hub_model_id hub_private_repo hub_revision hub_strategy hub_token ignore_bias_buffers
    include_num_input_tokens_seen length_column_name local_rank log_level log_level_replica
    log_multimodal log_on_each_node logging_first_step logging_nan_inf_filter save_on_each_node
    skip_memory_metrics use_cache vllm_group_port vllm_server_host
    vllm_server_port vllm_server_timeout""".split()  # noqa: SIM905
)


def other_than(default):
    """Return a value that is not the default, of its type."""
    if isinstance(default, bool):
        return not default
    return default + 7 if isinstance(default, int | float) else "something"


def check_that_nothing_is_dropped(defaults):
    """Hold every option of TRL's to being ours, translated, without a bearing, or refused."""
    for name, default in defaults.items():
        if name in TRANSLATED:
            continue  # tested with values of their own
        value = other_than(default)
        try:
            config = config_from({name: value})
        except ConfigError as error:
            key, _, instead = str(error).partition(": ")
            named = name in str(error) if name in OURS else key == name
            assert named and len(instead.split()) > 3 and "unknown" not in instead, str(error)
        else:
            kept = name in OURS and config.flat()[name] == value
            assert kept or (name in NO_BEARING and config == TrainConfig()), name


def test_no_option_of_trl_is_dropped():
    assert len(DEFAULTS) > 200
    check_that_nothing_is_dropped(DEFAULTS)
    assert NO_BEARING | TRANSLATED.keys() <= DEFAULTS.keys()
    assert not NO_BEARING & OURS.keys()


def test_what_is_refused_is_no_option_of_ours_and_is_named():
    assert not INSTEAD.keys() & OURS.keys()
    for name in INSTEAD:
        with pytest.raises(ConfigError, match=f"^{name}: "):
            config_from({name: "something"})


def test_advice_names_options_that_there_are():
    """Words with an underscore are options of ours, or what else has such a name."""
    others = {"rollout_fn", "num_completions_to_log", "vllm_mode", "path.py"}
    for name, instead in INSTEAD.items():
        words = set(re.findall(r"[a-z]+(?:_[a-z0-9]+)+", instead))
        assert words <= OURS.keys() | others, (name, words - OURS.keys())


@pytest.mark.parametrize("name", sorted(TRANSLATED | OLDER))
def test_what_has_another_name_or_other_values_is_translated(name):
    value, becomes = (TRANSLATED | OLDER)[name]
    needed = {"use_vllm": True} if name.startswith("vllm_") else {}
    needed |= {"report_to": ["wandb"]} if name == "wandb_project" else {}
    config = config_from({name: value, **needed})
    assert config == config_from(becomes | needed)
    flat = config.flat()
    assert all(flat[key] == x for key, x in becomes.items())


@pytest.mark.parametrize("classes", [["GRPOConfig"], list(OPTIONS["defaults"])])
def test_the_defaults_of_trl_written_out_run(classes, tmp_path):
    path = tmp_path / "defaults.yaml"
    values = {k: x for name in classes for k, x in OPTIONS["defaults"][name].items()}
    path.write_text(yaml.safe_dump(values))
    config = load_config(path)
    # TRL's default of use_bias_correction_kl, true, says nothing at its beta of 0.
    expected = {"per_device_eval_batch_size": 8}
    expected |= {"num_completions_to_log": 0}  # log_completions: false
    if len(classes) > 1:
        expected |= {"dataset_test_split": "test"}
    assert config == config_from(expected)


def test_what_is_written_in_another_way_is_not_translated_twice():
    config = config_from({"epsilon": 0.1, "scale_rewards": False, "generation_batch_size": 16})
    assert config_from(config.flat()) == config


# Recipes.


def test_a_recipe_for_all_parameters_runs_as_it_is():
    config = load_config(FOLDER / "gsm8k_full.yaml")
    changed = {k: x for k, x in config.flat().items() if x != OURS[k]}
    assert changed == {
        "model_name_or_path": "Qwen/Qwen2.5-0.5B-Instruct",
        "attn_implementation": "flash_attention_2",
        "dataset_name": "trl-lib/gsm8k",
        "reward_funcs": ["my_rewards.correct"],
        "output_dir": "qwen-0.5b-gsm8k",
        "bf16": True,
        "per_device_train_batch_size": 16,
        "gradient_accumulation_steps": 2,
        "max_completion_length": 256,
        "learning_rate": 2e-6,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,
        "weight_decay": 0.01,
        "max_grad_norm": 0.5,
        "num_train_epochs": 1,
        "beta": 0.02,
        "loss_type": "grpo",
        "save_steps": 200,
        "save_total_limit": 2,
        "logging_steps": 5,
        "report_to": ["wandb"],
        "run_name": "qwen-gsm8k",
        "seed": 7,
    }


def test_a_recipe_for_adapters_and_vllm_runs_as_it_is():
    config = load_config(FOLDER / "lora_vllm.yaml")
    assert config.reward_funcs == [
        "Skywork/Skywork-Reward-V2-Qwen3-0.6B",
        "trl.rewards.think_format_reward",
    ]
    assert (config.lora_r, config.lora_dropout, config.lora_target_modules) == (32, 0.05, None)
    assert config.steps_per_generation == 8 and config.optimizer_steps_per_generation == 2
    assert config.vllm_importance_sampling_clip_max == 2.0
    assert (config.top_k, config.min_p, config.num_completions_to_log) == (0, 0.05, 0)
    assert (config.report_to, config.logging_steps, config.gradient_checkpointing) == ([], 1, True)
    assert (config.eval_strategy, config.test_split) == ("steps", "test")


def test_a_recipe_for_dapo_runs_as_it_is():
    config = load_config(FOLDER / "dapo.yaml")
    assert (config.loss.loss_type, config.loss.beta) == ("dapo", 0.0)
    assert (config.loss.epsilon_low, config.loss.epsilon_high) == (0.2, 0.28)
    assert config.mask_truncated_completions and config.warmup_steps == 0.02
    assert (config.dtype, config.attn_implementation) == ("float32", "flash_attention_2")
    assert config.reward_funcs == ["accuracy_reward", "get_soft_overlong_punishment"]
    assert config.optimizer_steps_per_generation == 4 and config.report_to == ["tensorboard"]


def test_a_recipe_of_open_r1_is_told_all_that_is_not_ours_at_once():
    path = FOLDER / "dr_grpo_open_r1.yaml"
    with pytest.raises(ConfigError) as error:
        load_config(path)
    first, *found = str(error.value).splitlines()
    assert first == f"{path}:"
    assert sorted(found) == [
        "chat_template: the tokenizer's own is used; save a tokenizer that has yours",
        "cosine_max_len: this reward is not built in; write its function into a file and name it "
        "in reward_funcs, path.py:function",
        "dtype: in bfloat16 updates at RL learning rates are below one unit in the last place and "
        "vanish; add bf16_updates: master_weights, or stochastic_rounding",
        "max_prompt_length: prompts are never cut; leave it out, and leave long prompts out of the "
        "dataset",
        "push_to_hub: nothing is uploaded; run `hf upload` on the directory `final` afterwards",
        "save_steps: write the number of steps; 0.1 would be a share of all steps",
        "use_liger_kernel: the loss is fused in any case; leave it out",
        "vllm_mode: vLLM runs in this process; write vllm_mode: colocate",
        "wandb_entity: set WANDB_ENTITY in the environment instead",
    ]


def test_that_recipe_runs_once_it_is_overridden(tmp_path):
    path = tmp_path / "run.yaml"
    refused = ("chat_template", "cosine_max_len", "max_prompt_length", "use_liger_kernel")
    values = yaml.safe_load((FOLDER / "dr_grpo_open_r1.yaml").read_text())
    path.write_text(yaml.safe_dump({k: x for k, x in values.items() if k not in refused}))
    overrides = ["push_to_hub=false", "save_steps=50", "vllm_mode=colocate", "wandb_entity="]
    config = load_config(path, [*overrides, "dtype=float32"])
    assert (config.dtype, config.scale_rewards, config.prompt_column) == (
        "float32", "none", "problem",
    )  # fmt: skip
    assert (config.lr_scheduler_kwargs, config.warmup_steps) == ({"min_lr_rate": 0.1}, 0.1)
    assert (config.project, config.save_steps, config.eval_strategy) == ("open-r1", 50, "no")


# Overrides win over both spellings of what a file says.


@pytest.mark.parametrize(
    ("written", "override", "expected"),
    [
        ("epsilon_low: 0.1\nepsilon_high: 0.28", "epsilon=0.3", (0.3, 0.28)),
        ("epsilon: 0.1\nepsilon_high: 0.28", "epsilon=0.2", (0.2, 0.28)),
        ("epsilon: 0.1", "epsilon_high=0.28", (0.1, 0.28)),
        ("epsilon_low: 0.1", "epsilon=0.3", (0.3, 0.3)),
        ("epsilon: 0.1", "epsilon_low=0.3", (0.3, 0.1)),
        ("epsilon: 0.1\nepsilon_high: 0.28", "epsilon_high=null", (0.1, 0.1)),
        ("epsilon: x", "epsilon=0.3", (0.3, 0.3)),
    ],
)
def test_overrides_of_the_bounds(tmp_path, written, override, expected):
    path = tmp_path / "run.yaml"
    path.write_text(written)
    loss = load_config(path, [override]).loss
    assert (loss.epsilon_low, loss.epsilon_high) == expected


@pytest.mark.parametrize(
    ("written", "overrides", "passes"),
    [
        ("generation_batch_size: 64", [], 8),
        ("generation_batch_size: 64", ["per_device_train_batch_size=16"], 4),
        ("generation_batch_size: 64", ["steps_per_generation=2"], 2),
        ("steps_per_generation: 2", ["generation_batch_size=32"], 4),
        ("per_device_train_batch_size: 16", ["generation_batch_size=32"], 2),
        ("per_device_train_batch_size: 16\ngeneration_batch_size: 32",
         ["generation_batch_size=null"], None),
    ],
)  # fmt: skip
def test_overrides_of_the_batch_of_completions(tmp_path, written, overrides, passes):
    path = tmp_path / "run.yaml"
    path.write_text(written)
    assert load_config(path, overrides).steps_per_generation == passes


def test_overrides_of_names_that_are_translated(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("warmup_ratio: 0.1\ntorch_dtype: auto\nreward_model_name_or_path: o/m\n")
    config = load_config(
        path, ["warmup_steps=5", "dtype=float32", "reward_funcs=[format]", "report_to=all"]
    )
    assert (config.warmup_steps, config.dtype) == (5, "float32")
    assert (config.reward_funcs, config.report_to) == (["o/m", "format"], ["all"])
    config = load_config(path, ["torch_dtype=float32", "reward_model_name_or_path=o/n"])
    assert (config.dtype, config.reward_funcs) == ("float32", ["o/n"])


@pytest.mark.parametrize(
    ("written", "overrides", "functions"),
    [
        ("reward_model_name_or_path: o/m\nreward_funcs: [accuracy]", [], ["o/m", "accuracy"]),
        ("reward_model_name_or_path: o/m\nreward_funcs: [accuracy]",
         ["reward_funcs=[format]"], ["o/m", "format"]),
        ("reward_model_name_or_path: o/m\nreward_funcs: [accuracy]",
         ["reward_model_name_or_path=o/n"], ["o/n", "accuracy"]),
        ("reward_model_name_or_path: o/m\nreward_funcs: [accuracy]",
         ["reward_model_name_or_path=null"], ["accuracy"]),
        ("reward_model_name_or_path: o/m\nreward_funcs: accuracy",
         ["reward_funcs=null"], ["o/m"]),
        ("reward_funcs: [accuracy]",
         ["reward_funcs=format", "reward_model_name_or_path=o/n"], ["o/n", "format"]),
    ],
)  # fmt: skip
def test_overrides_of_the_rewards(tmp_path, written, overrides, functions):
    path = tmp_path / "run.yaml"
    path.write_text(written)
    assert load_config(path, overrides).reward_funcs == functions


def test_adapters_can_be_as_strong_as_those_of_rslora():
    """The advice on `use_rslora`: alpha / sqrt(r) is (alpha * sqrt(r)) / r."""
    assert "multiply lora_alpha by the square root of lora_r" in INSTEAD["use_rslora"]
    alpha = 32 * 8**0.5
    config = config_from({"use_peft": True, "lora_r": 8, "lora_alpha": alpha})
    assert config.lora_alpha / config.lora_r == pytest.approx(32 / 8**0.5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epsilon": 0.1, "epsilon_low": 0.2}, "epsilon: is TRL's name of epsilon_low, which is"),
        ({"generation_batch_size": 12}, "must be a multiple of per_device_train_batch_size = 8"),
        (
            {"generation_batch_size": 16, "steps_per_generation": 2},
            "generation_batch_size: and steps_per_generation say the same; leave one out",
        ),
        ({"log_completions": False, "num_completions_to_log": 3}, "contradict each other"),
        ({"warmup_ratio": 0.1, "warmup_steps": 3}, "warmup_ratio: and warmup_steps are both given"),
        ({"warmup_ratio": 1.0}, "no step at the full learning rate"),
        ({"do_eval": True}, "do_eval: name a dataset_test_split"),
        ({"data_seed": 3}, "data_seed: is seed = 42 here"),
        ({"gradient_checkpointing_kwargs": {"every_n_layers": 2}}, "every layer is computed again"),
        ({"model_init_kwargs": {"device_map": "auto"}}, "model_init_kwargs: may hold dtype"),
        ({"logging_strategy": False}, "logging_strategy: metrics.jsonl has every step"),
        ({"lora_dropout": 0.1}, "lora_dropout: has no effect without use_peft: true"),
        ({"eval_steps": 0.25, "eval_strategy": "steps"}, "eval_steps: write the number of steps"),
        ({"dtype": "auto"}, "dtype: must be one of float32, bfloat16, got 'auto'"),
        ({"optim": "sgd"}, "optim: must be one of adamw_torch_fused"),
        ({"reward_model_name_or_path": 3}, "reward_funcs: must be text, got 3"),
    ],
)
def test_what_cannot_be_translated_is_named(values, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        config_from(values)
