import ast
import dataclasses
import inspect
import pickle

import pytest
import yaml

from fastgrpo.config import ConfigError, TrainConfig, config_from, load_config
from fastgrpo_kernels import GRPOLossConfig

NAMES = {"model_name_or_path": "m", "dataset_name": "d"}


def test_yaml_values_overrides_and_defaults_meet_in_one_configuration(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("task: arithmetic\nlearning_rate: 1e-6\nnum_generations: 4\nbeta: 0.1\n")
    config = load_config(path, ["num_generations=2", "reward_funcs=[format, accuracy]", "delta=2"])
    assert config.learning_rate == 1e-6  # YAML reads 1e-6 as text
    assert config.num_generations == 2
    assert config.reward_funcs == ["format", "accuracy"]
    assert (config.loss.beta, config.loss.delta) == (0.1, 2.0)
    assert config.max_completion_length == 512


def test_the_loss_takes_temperature_and_length_from_the_run():
    config = config_from({**NAMES, "temperature": 0.7, "max_completion_length": 33})
    assert config.loss.temperature == 0.7
    assert config.loss.max_completion_length == 33


def test_trl_epsilon_is_both_bounds_unless_epsilon_high_is_given():
    assert config_from({**NAMES, "epsilon": 0.1}).loss == dataclasses.replace(
        GRPOLossConfig(max_completion_length=512), epsilon_low=0.1, epsilon_high=0.1
    )
    config = config_from({**NAMES, "epsilon": 0.1, "epsilon_high": 0.28})
    assert (config.loss.epsilon_low, config.loss.epsilon_high) == (0.1, 0.28)


def test_an_override_of_epsilon_leaves_the_file_its_upper_bound(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("task: arithmetic\nepsilon_low: 0.2\nepsilon_high: 0.28\n")
    loss = load_config(path, ["epsilon=0.1"]).loss
    assert (loss.epsilon_low, loss.epsilon_high) == (0.1, 0.28)


def test_what_is_written_to_the_run_directory_reads_back_as_the_same_configuration(tmp_path):
    config = config_from({**NAMES, "loss_type": "dr_grpo", "beta": 0.04, "top_p": 0.9})
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.flat()))
    assert load_config(path) == config


def test_unknown_keys_name_the_nearest_and_all_problems_come_together():
    with pytest.raises(ConfigError) as error:
        config_from({**NAMES, "num_generation": 4, "epsilonlow": 0.1, "seed": "x", "bf16": 1})
    message = str(error.value)
    assert "num_generation: unknown key; did you mean num_generations?" in message
    assert "epsilonlow: unknown key; did you mean epsilon_low?" in message
    assert "seed: must be a whole number, got 'x'" in message
    assert "bf16: must be true or false, got 1" in message


def test_all_problems_come_in_one_message_in_the_order_of_the_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "top_p: 2\ngmpo_clip: 0\nlora_r: 8\nepsilon_high: -1\nsave_step: 5\nseed: x\n"
        "per_device_train_batch_size: 12\nbeta: high\nsync_ref_model: true\nnum_generation: 4\n"
        "chat_template: mine\nmax_steps: 0\n"
    )
    with pytest.raises(ConfigError) as error:
        load_config(path, ["delta=1.1", "top_p=3", "max_grad_norm=-1"])
    first, *problems = str(error.value).splitlines()
    assert first == f"{path}:"
    # That 8 generations do not divide 12, that beta is 0 and delta below 1.2 nobody has said.
    assert [problem.partition(", got")[0] for problem in problems] == [
        "top_p: must be above 0 and at most 1",
        "gmpo_clip: must be a finite number above 0",
        "lora_r: has no effect without use_peft: true",
        "epsilon_high: must be a finite number, 0 or more",
        "save_step: unknown key; did you mean save_steps?",
        "seed: must be a whole number",
        "beta: must be a number",
        "num_generation: unknown key; did you mean num_generations?",
        "chat_template: the tokenizer's own is used; save a tokenizer that has yours",
        "max_steps: must be 1 or more, or -1",
        "max_grad_norm: must be 0 or more",
    ]


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("lr", "learning_rate"),
        ("batch_size", "per_device_train_batch_size"),
        ("model", "model_name_or_path"),
        ("dataset", "dataset_name"),
        ("Max-Steps", "max_steps"),
    ],
)
def test_everyday_names_lead_to_the_key(written, meant):
    with pytest.raises(ConfigError, match=f"^{written}: unknown key; did you mean {meant}\\?$"):
        config_from({written: 3})


def test_a_key_of_the_loss_given_to_the_class_leads_to_where_it_is_taken():
    with pytest.raises(TypeError, match=r"no argument 'epsilon_high'; config_from\(\{'epsilon_h"):
        TrainConfig(epsilon_high=0.28)
    assert pickle.loads(pickle.dumps(TrainConfig(seed=3))).seed == 3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_generations": 1}, "num_generations: must be at least 2, got 1"),
        ({"num_generations": 3}, "num_generations = 3 does not divide"),
        ({"reward_funcs": []}, "reward_funcs: at least one"),
        ({"max_steps": 0}, "max_steps: must be 1 or more, or -1, got 0"),
        ({"temperature": 0.0}, "temperature: must be above 0, got 0.0"),
        ({"top_p": 1.5}, "top_p: must be above 0 and at most 1, got 1.5"),
        ({"max_completion_length": 0}, "max_completion_length"),
        ({"save_steps": 0}, "save_steps: must be at least 1, got 0"),
        ({"loss_type": "gppo"}, "loss_type"),
        (
            {"loss_type": "gmpo", "importance_sampling_level": "sequence"},
            "importance_sampling_level='sequence' is not defined for loss_type='gmpo'",
        ),
        ({"scale_rewards": "groups"}, "must be one of group, batch, none, got 'groups'"),
        ({"reward_funcs": 1}, "reward_funcs: must be a list, got 1"),
        (
            {"task": "arithmetic"},
            "model_name_or_path: has no effect with task: arithmetic, got m; a task makes its own",
        ),
        (
            {"lr_scheduler_type": "constant", "warmup_steps": 5},
            "warmup_steps: has no effect with lr_scheduler_type: constant, got 5.0; write lr_sch",
        ),
        (
            {"lr_scheduler_type": "constant_with_warmup", "lr_scheduler_kwargs": {"min_lr": 0.1}},
            "lr_scheduler_kwargs: has no effect with lr_scheduler_type: constant_with_warmup",
        ),
        (
            {"multi_objective_aggregation": "normalize_then_sum", "scale_rewards": "none"},
            "scale_rewards: has no effect with multi_objective_aggregation: normalize_then_sum",
        ),
        (
            {
                "multi_objective_aggregation": "normalize_then_sum",
                "advantage_baseline": "leave_one_out",
            },
            "advantage_baseline: has no effect with multi_objective_aggregation",
        ),
        ({"scale_rewards": "none", "advantage_eps": 0.1}, "advantage_eps: has no effect with"),
        ({"max_eval_samples": 5}, "max_eval_samples: has no effect without dataset_test_split"),
        (
            {"vllm_enable_sleep_mode": True},
            "vllm_enable_sleep_mode: has no effect without use_vllm",
        ),
        ({"off_policy_mask_threshold": -1}, "off_policy_mask_threshold: must be 0 or more, got -1"),
        (
            {"chat_template_kwargs": {"tokenize": False}},
            "chat_template_kwargs: tokenize is set for every prompt; leave it out",
        ),
        ({"use_peft": True, "disable_dropout": True, "lora_dropout": 0.1}, "disable_dropout: lora"),
        ({"delta": 1.1}, "delta: must be a finite number above 1 + epsilon_high"),
    ],
)
def test_wrong_values_are_named(values, message):
    with pytest.raises(ConfigError, match=message.replace("(", r"\(").replace("+", r"\+")):
        config_from({**NAMES, **values})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "cannot be read as YAML"),
        ("- 1\n", "must hold `key: value` lines, got \\[1\\]"),
    ],
)
def test_files_that_are_no_configuration_are_named(tmp_path, text, message):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        load_config(path)
    assert str(path) in str(error.value)


def test_a_missing_file_and_a_torn_override_are_named(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        load_config(tmp_path / "none.yaml")
    path = tmp_path / "run.yaml"
    path.write_text("task: arithmetic\n")
    with pytest.raises(ConfigError, match="'seed 3': overrides look like key=value"):
        load_config(path, ["seed 3"])


@pytest.mark.parametrize("options", [TrainConfig, GRPOLossConfig])
def test_every_field_says_what_it_means(options):
    (definition,) = ast.parse(inspect.getsource(options)).body
    for i, node in enumerate(definition.body):
        if isinstance(node, ast.AnnAssign):
            following = definition.body[i + 1]
            assert isinstance(following, ast.Expr), ast.unparse(node)
            assert isinstance(following.value, ast.Constant), ast.unparse(node)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dtype": "bfloat16"}, "dtype: in bfloat16 updates .* vanish; add bf16_updates"),
        ({"bf16_updates": "master_weights"}, "bf16_updates: is for parameters trained in bfloat16"),
        (
            {"bf16_updates": "stochastic_rounding", "dtype": "bfloat16", "optim": "adamw_8bit"},
            "bf16_updates: stochastic_rounding is an optimizer of its own",
        ),
        ({"offload_optimizer": True, "optim": "adamw_8bit"}, "offload_optimizer: steps on the CPU"),
        ({"load_in_4bit": True}, "load_in_4bit: .* add use_peft: true"),
        ({"lora_r": 0}, "lora_r: must be at least 1, got 0"),
        ({"lora_alpha": 64}, "lora_alpha: has no effect without use_peft: true"),
        ({"max_resample_rounds": 5}, "max_resample_rounds: has no effect without dynamic_sampling"),
        ({"vllm_max_model_length": 9}, "vllm_max_model_length: has no effect without use_vllm"),
        ({"lora_dropout": 1.0}, "lora_dropout: must be 0 or more and below 1"),
        ({"lora_target_modules": []}, "lora_target_modules: is empty"),
        (
            {"activation_offloading": True, "gradient_checkpointing": False},
            "needs gradient_checkpointing: true",
        ),
        ({"padding_free": True, "attn_implementation": "sdpa"}, "padding_free: sdpa attention"),
        ({"attn_implementation": "flex"}, "attn_implementation: must be one of flash_attention_2"),
        ({"sync_ref_model": True}, "sync_ref_model: has no effect with beta: 0.0, got true"),
        ({"offload_ref_model": True}, "offload_ref_model: has no effect with beta: 0.0"),
        (
            {"sync_ref_model": True, "beta": 0.1, "use_peft": True},
            "with use_peft: true, got true; the reference is the model without its adapters",
        ),
        (
            {
                "sync_ref_model": True, "beta": 0.1, "ref_model_mixup_alpha": 0.4,
                "dtype": "bfloat16", "bf16_updates": "master_weights",
            },
            "ref_model_mixup_alpha: below 0.5",
        ),
        ({"steps_per_generation": 3, "gradient_accumulation_steps": 2}, "must be a multiple of"),
        ({"max_tokens_per_microbatch": 512}, "must be above max_completion_length = 512"),
        (
            {"max_tokens_per_microbatch": 1000, "loss_type": "bnpo"},
            "the loss bnpo is a mean over micro-batches",
        ),
        ({"max_resample_rounds": 0}, "max_resample_rounds: must be at least 1, got 0"),
        (
            {"vllm_importance_sampling_clip_max": 0.0},
            "vllm_importance_sampling_clip_min: must be 0 or more and below",
        ),
        (
            {
                "vllm_importance_sampling_mode": "token_truncate",
                "vllm_importance_sampling_clip_max": None,
            },
            "token_truncate needs",
        ),
        ({"use_vllm": True, "load_in_4bit": True, "use_peft": True}, "use_vllm: .*4-bit"),
        ({"use_vllm": True, "loss_type": "vespo"}, "vespo weighs whole sequences by itself"),
        ({"vllm_gpu_memory_utilization": 1.5}, "vllm_gpu_memory_utilization: must be above 0"),
        ({"lr_scheduler_type": "greedy"}, "lr_scheduler_type: must be one of linear"),
        ({"warm_start_accuracy": 1.5}, "warm_start_accuracy: must be above 0 and below 1"),
        ({"task": "arithmetic", "attn_implementation": "eager"}, "attn_implementation: has no"),
    ],
)  # fmt: skip
def test_options_that_cannot_work_are_refused_with_the_remedy(values, message):
    with pytest.raises(ConfigError, match=message):
        config_from(values)


def test_what_limits_a_sequence_is_known_by_its_key():
    config = config_from({"max_tokens_per_microbatch": 2000})
    assert config.limits(512) == {"the model": 512, "max_tokens_per_microbatch": 2000}
    config = config_from({"use_vllm": True, "vllm_max_model_length": 1000})
    assert config.limits(512) == {"the model": 512, "vllm_max_model_length": 1000}


def test_steps_of_an_epoch_count_those_that_share_completions():
    config = config_from(
        {"steps_per_generation": 6, "gradient_accumulation_steps": 2, "num_train_epochs": 1}
    )
    assert config.prompts_per_step == 2
    assert config.num_steps(100) == 3 * 17  # 17 times completions of 6 prompts, for 3 steps each
