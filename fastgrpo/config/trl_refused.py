"""Options of TRL's that are not ours: those without a bearing on a run, and what to do instead."""

from __future__ import annotations

from typing import Any


def asks_for_nothing(key: str, value: Any) -> bool:
    """Say whether an option that is not ours asks only for what is done in any case."""
    return value in _ACCEPTED.get(key, _NOTHING)


def _keys(names: str) -> frozenset[str]:
    return frozenset(names.split())


INSTEAD: dict[str, str] = {
    key: instead
    for keys, instead in (
        # The machine.
        (
            "fsdp fsdp_config deepspeed accelerator_config parallelism_config num_processes",
            "start the run with torchrun, and write parallel: {data: N, shard: M} or leave it out",
        ),
        ("use_cpu no_cuda", "put CUDA_VISIBLE_DEVICES= in front of the command instead"),
        ("env", "set these variables in front of the command"),
        ("fp16 fp16_full_eval bf16_full_eval", "write bf16: true, which holds in evaluations too"),
        ("tf32", "leave it out; bf16: true is faster than TF32"),
        ("torch_compile_backend torch_compile_mode", "write torch_compile: true alone"),
        ("use_liger_kernel liger_kernel_config", "the loss is fused in any case; leave it out"),
        ("torch_empty_cache_steps", "memory is kept between steps; leave it out"),
        (
            "auto_find_batch_size",
            "`fastgrpo plan` says what fits; max_tokens_per_microbatch bounds every pass",
        ),
        ("full_determinism", "seed decides whatever is random; leave it out"),
        ("debug", "there is no such switch; leave it out"),
        # The model.
        ("lora_target_parameters", "adapters are for linear layers; write lora_target_modules"),
        ("lora_modules_to_save", "only adapters are trained; leave it out, or use_peft"),
        ("lora_task_type", "the model is a causal LM; leave it out"),
        (
            "use_rslora",
            "multiply lora_alpha by the square root of lora_r instead; it need not be whole",
        ),
        ("use_dora", "adapters are plain LoRA; leave it out"),
        ("load_in_8bit", "write load_in_4bit: true, or dtype: bfloat16"),
        ("bnb_4bit_quant_storage", "4 bits are stored in uint8; leave it out"),
        ("cast_lm_head_to_fp32", "bf16: false computes in fp32 throughout; leave it out"),
        ("router_aux_loss_coef", "no balancing loss is added; leave it out"),
        ("neftune_noise_alpha", "no noise is added; leave it out"),
        ("label_smoothing_factor label_names", "there are no labels in GRPO; leave it out"),
        ("optim_args", "write adam_beta1, adam_beta2, adam_epsilon"),
        ("optim_target_modules", "all that is trainable is trained; write use_peft for less"),
        # The prompts.
        (
            "max_prompt_length",
            "prompts are never cut; leave it out, and leave long prompts out of the dataset",
        ),
        ("chat_template", "the tokenizer's own is used; save a tokenizer that has yours"),
        ("dataset_streaming streaming", "the dataset is loaded as a whole; leave it out"),
        (
            "datasets dataset_mixture dataset_configs",
            "there is one dataset; write dataset_name, dataset_config and dataset_train_split",
        ),
        ("test_split_size", "split the dataset yourself and name dataset_test_split"),
        (
            "train_sampling_strategy group_by_length",
            "prompts come shuffled; write shuffle_dataset: false for the order of the dataset",
        ),
        ("remove_unused_columns", "reward functions are given all columns; leave it out"),
        ("pad_to_multiple_of", "no lengths are rounded up; leave it out"),
        # Sampling.
        ("vllm_mode vllm_server_base_url", "vLLM runs in this process; write vllm_mode: colocate"),
        ("vllm_tensor_parallel_size vllm_device", "vLLM shares the GPU of training; leave it out"),
        ("vllm_dtype vllm_model_impl", "vLLM has the model that is trained; leave it out"),
        (
            "generation_kwargs",
            "sampling has temperature, top_p, top_k and min_p; write those as keys",
        ),
        (
            "repetition_penalty vllm_structured_outputs_regex vllm_guided_decoding_regex",
            "tokens are those of the policy; leave it out, or write a rollout_fn",
        ),
        (
            "cache_implementation use_transformers_paged use_transformers_continuous_batching "
            "transformers_continuous_batching_config",
            "the engine is ours, with a static cache, or that of use_vllm; leave it out",
        ),
        (
            "max_tool_calling_iterations",
            "a rollout_fn calls tools, as often as it likes; leave it out",
        ),
        # Rewards of open-r1.
        (
            "cosine_min_value_wrong cosine_max_value_wrong cosine_min_value_correct "
            "cosine_max_value_correct cosine_max_len repetition_n_grams repetition_max_penalty "
            "code_language code_eval_test_batch_size code_provider parallel_code_exec_per_proc "
            "e2b_router_url morph_router_url ioi_provider",
            "this reward is not built in; write its function into a file and name it in "
            "reward_funcs, path.py:function",
        ),
        # Evaluations, logs, checkpoints.
        ("eval_delay", "the first evaluation is after eval_steps; leave it out"),
        (
            "prediction_loss_only include_for_metrics batch_eval_metrics eval_accumulation_steps "
            "do_predict benchmarks",
            "evaluations measure the rewards on dataset_test_split; leave it out",
        ),
        (
            "logging_strategy",
            "metrics.jsonl has every step; logging_steps is about the lines that are printed",
        ),
        (
            "num_completions_to_print log_unique_prompts wandb_log_unique_prompts "
            "log_completions_hub_repo",
            "completions.jsonl has them; num_completions_to_log says how many",
        ),
        ("trackio_space_id", "set TRACKIO_SPACE_ID in the environment instead"),
        ("trackio_bucket_id trackio_static_space_id", "trackio chooses these; leave it out"),
        ("wandb_entity", "set WANDB_ENTITY in the environment instead"),
        ("wandb_run_group", "set WANDB_RUN_GROUP in the environment instead"),
        ("logging_dir", "everything is written to output_dir; leave it out"),
        ("callbacks", "there are none; leave it out"),
        (
            "load_best_model_at_end",
            "`final` holds the last weights; write metric_for_best_model for the best in `best`",
        ),
        ("enable_jit_checkpoint", "checkpoints are written at save_steps; leave it out"),
        (
            "resume_from_checkpoint ignore_data_skip restore_callback_states_from_checkpoint",
            "write --resume auto after the command, which goes on in output_dir; leave it out",
        ),
        (
            "push_to_hub push_to_hub_revision overwrite_hub_revision",
            "nothing is uploaded; run `hf upload` on the directory `final` afterwards",
        ),
    )
    for key in _keys(keys)
}
"""What to do in place of an option that is not ours."""

_NOTHING = (None, False, "", [], {})
_ACCEPTED: dict[str, tuple[Any, ...]] = {
    "num_processes": (None, 1),
    "lora_task_type": (None, "CAUSAL_LM"),
    "bnb_4bit_quant_storage": (None, "uint8"),
    "pad_to_multiple_of": (None, "auto"),
    "train_sampling_strategy": (None, "random"),
    "vllm_mode": (None, "colocate"),
    "vllm_tensor_parallel_size": (None, 1),
    "vllm_device": (None, "auto"),
    "vllm_dtype": (None, "auto"),
    "vllm_model_impl": (None, "auto", "vllm"),
    "repetition_penalty": (None, 1),
    "cache_implementation": (None, "static"),
    "logging_strategy": (None, "steps"),
}
"""Values that ask for what is done in any case, where these are not the usual ones for nothing."""

NO_BEARING = _keys(
    # How processes and the loader of data work together, of which there is one and none.
    "average_tokens_across_devices ddp_find_unused_parameters ddp_bucket_cap_mb "
    "ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout ds3_gather_for_generation "
    "local_rank ignore_bias_buffers log_on_each_node log_level_replica save_on_each_node "
    "eval_use_gather_object eval_do_concat_batches dataloader_drop_last dataloader_num_workers "
    "dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor "
    "dataloader_multiprocessing_context dataloader_in_order length_column_name "
    # Of the server that vllm_mode refuses; of the upload that push_to_hub refuses.
    "vllm_server_host vllm_server_port vllm_server_timeout vllm_group_port "
    "hub_token hub_private_repo hub_model_id hub_model_revision hub_strategy hub_always_push "
    "hub_revision "
    # What is told and written in any case.
    "log_level logging_first_step logging_nan_inf_filter log_multimodal disable_tqdm "
    "skip_memory_metrics include_num_input_tokens_seen save_safetensors "
    # A fused loss there is in any case; a directory in use is refused in any case.
    "use_liger_loss overwrite_output_dir do_train use_cache"
)
"""Options of which no value would make a run on one GPU another one."""
