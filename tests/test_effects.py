"""No option is ignored: without effect beside others it is refused, but at its default."""

import pytest

from fastgrpo.config import ConfigError, EvalConfig, TrainConfig, config_from, load_config
from fastgrpo.config.effects import NEEDS, OF_TRAINING

DEFAULTS = TrainConfig().flat()

# For each option that can be without effect: a value, what it is refused beside, and what it takes.
EFFECTS = {
    "model_name_or_path": ("m", {"task": "arithmetic"}, {}),
    "model_revision": ("v2", {"task": "arithmetic"}, {}),
    "attn_implementation": ("eager", {"task": "arithmetic"}, {}),
    "dtype": ("bfloat16", {"task": "arithmetic", "use_peft": True}, {"use_peft": True}),
    "load_in_4bit": (True, {"task": "arithmetic", "use_peft": True}, {"use_peft": True}),
    "dataset_name": ("d", {"task": "arithmetic"}, {}),
    "dataset_config": ("main", {"task": "arithmetic"}, {}),
    "dataset_train_split": ("all", {"task": "arithmetic"}, {}),
    "dataset_test_split": ("test", {"task": "arithmetic"}, {}),
    "prompt_column": ("question", {"task": "arithmetic"}, {}),
    "warm_start_accuracy": (0.5, {}, {"task": "arithmetic"}),
    "system_prompt": ("Count.", {"task": "arithmetic"}, {}),
    "chat_template_kwargs": ({"a": 1}, {"task": "arithmetic"}, {}),
    "lora_r": (8, {}, {"use_peft": True}),
    "lora_alpha": (8.5, {}, {"use_peft": True}),
    "lora_dropout": (0.1, {}, {"use_peft": True}),
    "lora_target_modules": (["q_proj"], {}, {"use_peft": True}),
    "bnb_4bit_quant_type": ("fp4", {"use_peft": True}, {"use_peft": True, "load_in_4bit": True}),
    "use_bnb_nested_quant": (True, {"use_peft": True}, {"use_peft": True, "load_in_4bit": True}),
    "kl_estimator": ("k1", {}, {"beta": 0.1}),
    "use_bias_correction_kl": (True, {}, {"beta": 0.1}),
    "offload_ref_model": (True, {"beta": 0.1, "use_peft": True}, {"beta": 0.1}),
    "sync_ref_model": (True, {}, {"beta": 0.1}),
    "ref_model_mixup_alpha": (0.7, {"beta": 0.1}, {"beta": 0.1, "sync_ref_model": True}),
    "ref_model_sync_steps": (7, {"beta": 0.1}, {"beta": 0.1, "sync_ref_model": True}),
    "max_resample_rounds": (7, {}, {"dynamic_sampling": True}),
    "vllm_gpu_memory_utilization": (0.7, {}, {"use_vllm": True}),
    "vllm_max_model_length": (700, {}, {"use_vllm": True}),
    "vllm_enable_sleep_mode": (True, {}, {"use_vllm": True}),
    "vllm_importance_sampling_correction": (False, {}, {"use_vllm": True}),
    "vllm_importance_sampling_mode": (
        "token_mask",
        {"use_vllm": True, "vllm_importance_sampling_correction": False},
        {"use_vllm": True},
    ),
    "vllm_importance_sampling_clip_max": (2.0, {}, {"use_vllm": True}),
    "vllm_importance_sampling_clip_min": (0.5, {}, {"use_vllm": True}),
    "scale_rewards": ("batch", {"multi_objective_aggregation": "normalize_then_sum"}, {}),
    "advantage_baseline": (
        "leave_one_out",
        {"multi_objective_aggregation": "normalize_then_sum"},
        {},
    ),
    "advantage_std": ("population", {"scale_rewards": "none"}, {}),
    "advantage_eps": (0.1, {"scale_rewards": "none"}, {}),
    "epsilon_low": (
        0.1,
        {"loss_type": "cispo", "epsilon_high": 5.0},
        {"loss_type": "cispo", "cispo_bounds": "verl"},
    ),
    "epsilon_high": (0.3, {"loss_type": "gmpo"}, {}),
    "delta": (2.0, {"loss_type": "sapo"}, {"loss_type": "luspo"}),
    "cispo_bounds": ("verl", {}, {"loss_type": "cispo"}),
    "sapo_temperature_pos": (0.7, {}, {"loss_type": "sapo"}),
    "sapo_temperature_neg": (0.7, {"loss_type": "gmpo"}, {"loss_type": "sapo"}),
    "vespo_k_pos": (0.7, {}, {"loss_type": "vespo"}),
    "vespo_lambda_pos": (0.7, {}, {"loss_type": "vespo"}),
    "vespo_k_neg": (0.7, {}, {"loss_type": "vespo"}),
    "vespo_lambda_neg": (0.7, {}, {"loss_type": "vespo"}),
    "gmpo_clip": (0.7, {}, {"loss_type": "gmpo"}),
    "skip_empty_sequences": (True, {}, {"loss_type": "vespo"}),
    "entropy_coef_min": (0.1, {}, {"use_adaptive_entropy": True, "entropy_coef": 0.5}),
    "entropy_coef_max": (0.9, {}, {"use_adaptive_entropy": True}),
    "entropy_coef_delta": (0.1, {}, {"use_adaptive_entropy": True}),
    "entropy_target": (0.7, {"entropy_coef": 0.1}, {"use_adaptive_entropy": True}),
    "warmup_steps": (7, {"lr_scheduler_type": "constant"}, {}),
    "lr_scheduler_kwargs": (
        {"min_lr_rate": 0.1},
        {"lr_scheduler_type": "constant_with_warmup"},
        {"lr_scheduler_type": "cosine_with_min_lr"},
    ),
    "num_train_epochs": (1, {"max_steps": 9}, {}),
    "eval_on_start": (True, {"dataset_test_split": "test"}, {"eval_strategy": "epoch"}),
    "grad_norm_window": (7, {}, {"max_grad_norm_ratio": 10.0}),
    "num_generations_eval": (2, {}, {"eval_strategy": "steps"}),
    "eval_steps": (7, {"eval_strategy": "epoch"}, {"eval_strategy": "steps"}),
    "max_eval_samples": (7, {"dataset_name": "d"}, {"dataset_test_split": "test"}),
    "save_steps": (7, {"save_strategy": "epoch"}, {}),
    "save_only_model": (True, {"save_strategy": "no"}, {"save_strategy": "epoch"}),
    "save_total_limit": (7, {"save_strategy": "no"}, {"save_strategy": "epoch"}),
    "save_errors": (
        "none",
        {"save_strategy": "no"},
        {"save_strategy": "no", "eval_strategy": "steps", "metric_for_best_model": "reward"},
    ),
    "metric_for_best_model": ("reward", {}, {"eval_strategy": "epoch"}),
    "greater_is_better": (
        False,
        {"eval_strategy": "steps"},
        {"eval_strategy": "steps", "metric_for_best_model": "reward"},
    ),
    "project": ("p", {"report_to": ["tensorboard"]}, {"report_to": ["tensorboard", "trackio"]}),
}
# Those that always have one, as far as a configuration can tell.
EFFECTIVE = {
    *("bf16", "padding_free", "torch_compile", "disable_dropout", "gradient_checkpointing"),
    *("activation_offloading", "use_peft", "task"),
    "trust_remote_code",  # reward models have code, too, beside a task
    "soft_punish_cache",  # `Trainer` may be given its reward; `Judges` refuses it without
    *("shuffle_dataset", "num_generations", "max_completion_length", "temperature", "top_p"),
    *("top_k", "min_p", "rollout_fn", "max_generation_batch_size", "cuda_graph", "use_vllm"),
    *("dynamic_sampling", "reward_funcs", "reward_weights", "reward_timeout", "reward_errors"),
    *("multi_objective_aggregation", "mask_truncated_completions", "top_entropy_quantile"),
    *("off_policy_mask_threshold", "use_adaptive_entropy", "loss_type", "beta", "entropy_coef"),
    *("importance_sampling_level", "learning_rate", "optim", "bf16_updates", "offload_optimizer"),
    *("lr_scheduler_type", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"),
    *("max_grad_norm_ratio", "max_bad_steps"),
    *("max_grad_norm", "output_dir", "report_to", "logging_steps", "num_completions_to_log"),
    "run_name",  # the report is called by it, whatever trackers there are
    "per_device_eval_batch_size",  # `fastgrpo eval` reads it, whatever is measured in training
    *("eval_strategy", "save_strategy", "per_device_train_batch_size", "cpu_threads", "seed"),
    *("gradient_accumulation_steps", "max_tokens_per_microbatch", "filter_zero_advantages"),
    *("parallel", "steps_per_generation", "num_iterations", "max_steps"),
}


def build(values):
    """Build as from Python, where TRL's defaults are no excuse."""
    flat = dict(values)
    loss = {k: flat.pop(k) for k in values if k in config_from({}).loss.__dataclass_fields__}
    return TrainConfig(**flat, loss=type(config_from({}).loss)(**loss))


def test_of_every_option_it_is_decided_whether_it_can_be_without_effect():
    assert {key for need in NEEDS if not need.refused_later for key in need.keys} == EFFECTS.keys()
    assert EFFECTS.keys() | EFFECTIVE == DEFAULTS.keys()
    assert not EFFECTS.keys() & EFFECTIVE
    assert set(OF_TRAINING) <= DEFAULTS.keys()
    assert EFFECTS.keys() - set(OF_TRAINING) >= EvalConfig.EFFECTIVE
    assert {switch for need in NEEDS for switch in need.switches} <= DEFAULTS.keys()


def test_a_need_names_every_key_that_decides():
    for need in NEEDS:
        assert DEFAULTS.keys() & set(need.met.__code__.co_names) <= set(need.switches)


@pytest.mark.filterwarnings("ignore:loss_type='cispo' caps")
@pytest.mark.parametrize("key", EFFECTS)
def test_an_option_is_refused_only_where_it_would_be_ignored(key):
    value, without, needed = EFFECTS[key]
    with pytest.raises(ConfigError, match=rf"^{key}: has no effect with.*, got .*{key} out$"):
        build({key: value, **without})
    build({key: DEFAULTS[key], **without})
    assert build({key: value, **needed}).flat()[key] == value


def test_a_refusal_says_what_is_set_and_why_it_does_nothing_and_what_to_write():
    for values, sentence in (
        (
            {"lora_r": 8},
            "lora_r: has no effect without use_peft: true, got 8; write use_peft: true, or leave "
            "lora_r out",
        ),
        (
            {"max_steps": 3, "num_train_epochs": 1},
            "num_train_epochs: has no effect with max_steps: 3, got 1.0; write max_steps: -1, or "
            "leave num_train_epochs out",
        ),
        (
            {"kl_estimator": "k1"},
            "kl_estimator: has no effect with beta: 0.0, got k1; there is no reference: write a "
            "beta above 0, or leave kl_estimator out",
        ),
    ):
        with pytest.raises(ConfigError) as error:
            config_from(values)
        assert str(error.value) == sentence


FILE = """
beta: 0.1
kl_estimator: k1
sync_ref_model: true
ref_model_sync_steps: 9
num_train_epochs: 1
lora_r: 8
use_peft: {use_peft}
"""


def test_what_an_override_switches_off_needs_no_override_of_its_own(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(FILE.format(use_peft="false").replace("lora_r: 8\n", ""))
    config = load_config(path, ["beta=0", "max_steps=3"])
    assert (config.loss.beta, config.loss.kl_estimator, config.sync_ref_model) == (0, "k3", False)
    assert (config.ref_model_sync_steps, config.max_steps, config.num_train_epochs) == (512, 3, 3.0)
    assert load_config(path).ref_model_sync_steps == 9


def test_what_a_file_itself_or_an_override_leaves_without_effect_is_refused(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(FILE.format(use_peft="false").replace("sync_ref_model: true\n", ""))
    with pytest.raises(ConfigError) as error:
        load_config(path, ["beta=0", "use_bias_correction_kl=true", "max_steps=3", "delta=3"])
    assert [line.split(",")[0] for line in str(error.value).splitlines()[1:]] == [
        "ref_model_sync_steps: has no effect without sync_ref_model: true",
        "lora_r: has no effect without use_peft: true",
    ]
    path.write_text("max_steps: 9\n")
    with pytest.raises(ConfigError, match="num_train_epochs: has no effect with max_steps: 9"):
        load_config(path, ["num_train_epochs=2"])


@pytest.mark.filterwarnings("ignore:loss_type='cispo' caps")
@pytest.mark.parametrize(
    ("text", "override", "keys"),
    [
        ("epsilon_low: 0.3", "loss_type=cispo", ["epsilon_low"]),
        ("epsilon_low: 0.3\nepsilon_high: 0.4", "loss_type=sapo", ["epsilon_low", "epsilon_high"]),
        (
            "loss_type: dapo\nimportance_sampling_level: sequence\nskip_empty_sequences: true",
            "importance_sampling_level=token",
            ["skip_empty_sequences"],
        ),
        ("eval_strategy: steps\nmax_eval_samples: 3", "eval_strategy=no", ["max_eval_samples"]),
        (
            "dataset_name: null\nmax_eval_samples: 3",
            "dataset_name=d",
            ["max_eval_samples"],
        ),
        (
            "reward_funcs: [soft_overlong_punishment]\nsoft_punish_cache: 4",
            "reward_funcs=[accuracy]",
            ["soft_punish_cache"],
        ),
        ("task: arithmetic\nwarm_start_accuracy: 0.5", "task=null", ["warm_start_accuracy"]),
    ],
)
def test_an_override_is_never_refused_for_what_the_file_says(tmp_path, text, override, keys):
    path = tmp_path / "run.yaml"
    path.write_text(
        ("" if "dataset_name" in text else "dataset_name: d\n") * ("task" not in text) + text
    )
    before, after = load_config(path).flat(), load_config(path, [override]).flat()
    for key in keys:
        assert before[key] != DEFAULTS[key] == after[key]


def test_what_only_an_evaluation_reads_is_taken_where_nothing_is_trained(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("dataset_name: d\nmax_eval_samples: 3\nnum_generations_eval: 2\n")
    with pytest.raises(ConfigError) as error:
        load_config(path)
    refused = [line.split(":")[0] for line in str(error.value).splitlines()[1:]]
    assert refused == ["max_eval_samples", "num_generations_eval"]
    for overrides in ([], ["dataset_name=e"], ["eval_strategy=no"]):
        config = load_config(path, overrides, EvalConfig)
        assert (config.max_eval_samples, config.num_generations_eval) == (3, 2)
    with pytest.raises(ConfigError, match="eval_steps: has no effect"):
        load_config(path, ["eval_steps=3"], EvalConfig)


def test_defaults_of_trl_that_are_not_ours_say_nothing_where_they_do_nothing():
    values = {"use_bias_correction_kl": True, "lora_dropout": 0.05, "kl_estimator": "k3"}
    values |= {"vllm_gpu_memory_utilization": 0.3, "save_strategy": "no", "save_steps": 500}
    assert config_from(values) == config_from({"save_strategy": "no"})
    assert config_from({**values, "beta": 0.1}).loss.use_bias_correction_kl
