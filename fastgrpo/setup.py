"""From a configuration to the parts of a trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedTokenizerBase, set_seed
from transformers.utils import logging
from transformers.utils.import_utils import is_kernels_available

from .activations import enable_gradient_checkpointing
from .adapters import add_adapters
from .assets import Assets
from .config import ConfigError, TrainConfig, resolve_parallel
from .data import check_prompts
from .distributed import World, joined_world, processes_per_machine
from .loading import computes_in_bf16
from .model import Policy
from .output_dir import check_free
from .rewards import Judges
from .rollout import Rollout
from .rollout.static import StaticCacheRollout
from .rollout_fn import RolloutFunction, load_rollout_fn, taken_columns
from .samples import Sampler
from .trackers import check_trackers

if TYPE_CHECKING:
    from datasets import Dataset


def prepare(config: TrainConfig, world: World, *, resume: bool) -> TrainConfig:
    """Set threads and the seed; refuse what would fail only after a large model is loaded.

    Args:
        config: the run, as it was written.
        world: its processes.
        resume: it may have begun.

    Returns:
        The run with `parallel` as numbers, if it has several processes or asks for sharding.

    Raises:
        ValueError: a package is missing, the run directory is occupied, or an option is not made
            for so many processes.
    """
    if config.cpu_threads is not None:
        torch.set_num_threads(config.cpu_threads)
    if config.parallel is not None and not world.joined:
        raise ConfigError(
            f"parallel: {config.parallel} is for the processes that torchrun starts; put torchrun "
            "--nproc-per-node N -m in front of fastgrpo, or leave parallel out"
        )
    if world.size > 1 or config.parallel is not None:
        sizes = resolve_parallel(config.parallel, world.size, processes_per_machine(world))
        config = replace(config, parallel=sizes)
    if not world.is_main:  # those of the first process are enough
        import datasets

        datasets.disable_progress_bars()
        logging.disable_progress_bar()
    set_seed(config.seed)
    check_installed(config)
    world.on_main(lambda: check_free(config.output_dir, resume=resume))
    return config


def check_installed(config: TrainConfig) -> None:
    """Refuse a configuration that needs a package which is not there, before anything is loaded.

    Raises:
        ValueError: names the key, the package and the extra that brings it.
    """
    check_trackers(config.report_to)
    attention, optim = config.attn_implementation, config.optim
    states = ("torchao", "torchao") if optim == "adamw_torch_8bit" else ("bitsandbytes", "8bit")
    # Without flash-attn itself transformers takes it from the package `kernels`.
    flash_attn = attention == "flash_attention_2" and not is_kernels_available()
    needs = {
        "use_peft": (config.use_peft, "peft", "lora"),
        "load_in_4bit": (config.load_in_4bit, "bitsandbytes", "8bit"),
        f"optim: {optim}": ("8bit" in optim, *states),
        "use_vllm": (config.use_vllm, "vllm", "vllm"),
        f"attn_implementation: {attention}": (flash_attn, "flash_attn", "flash-attn"),
    }
    for key, (needed, package, extra) in needs.items():
        if needed and find_spec(package) is None:
            raise ValueError(
                f"{key}: needs {package}, which is not installed; pip install 'fastgrpo[{extra}]'"
            )


def load_policy(config: TrainConfig, assets: Assets) -> Policy:
    """Put the model on the device, or its part of it, with its adapters and switches.

    Raises:
        ValueError: the model cannot do what the configuration asks for; says what and what to do.
    """
    model: Any = on_device(config, assets.model)
    if config.load_in_4bit and not getattr(model, "is_quantized", False):
        raise ValueError(
            "load_in_4bit: the model you brought is not in 4 bits; load it so, or leave it out"
        )
    if config.use_peft:
        model = add_adapters(model, config)
    return make_policy(config, model, assets.tokenizer)


def on_device(config: TrainConfig, model: Any) -> Any:
    """Put a model where it computes, unless that is for sharding to do."""
    device = training_device()
    if config.parallel is None and next(model.parameters()).device.type != device.type:
        model.to(device)
    return model


def training_device() -> torch.device:
    """Return what models are trained on: the GPU, if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def make_policy(config: TrainConfig, model: Any, tokenizer: PreTrainedTokenizerBase) -> Policy:
    """Make a model, with its adapters if it has some, ready to be trained.

    Raises:
        ValueError: it cannot do what the configuration asks for; says what and what to do.
    """
    if config.disable_dropout:
        disable_dropout(model)
    bf16, sharding = computes_in_bf16(config, training_device()), None
    if config.parallel is not None:
        from .sharding import Sharding, build_mesh

        check_same_model(model)
        sharding = Sharding(model, build_mesh(config.data_size, config.shard_size), bf16=bf16)
    with nullcontext() if sharding is None else sharding.whole():
        policy = Policy(
            model,
            tokenizer,
            bf16=bf16,
            padding_free=False if _names_a_padded_attention(config) else config.padding_free,
            sharding=sharding,
        )
    if config.gradient_checkpointing:
        enable_gradient_checkpointing(model, offload=config.activation_offloading)
    if config.torch_compile:
        policy.compile()
    return policy


def check_same_model(model: torch.nn.Module) -> None:
    """Refuse models that differ between processes, each of which keeps a part of its own.

    Raises:
        ValueError: says what to do.
    """
    sums = [parameter.detach().double().sum().item() for parameter in model.parameters()]
    if any(other != sums for other in joined_world().gather(sums)):
        raise ValueError(
            "the processes have brought different models: call torch.manual_seed before you make "
            "yours, or load it from one checkpoint"
        )


def disable_dropout(model: Any) -> None:
    """Set every dropout of a model to 0: modules, and the numbers that layers and configs keep."""
    for part in (*model.modules(), model.config):
        for name, value in list(vars(part).items()):
            kept = isinstance(part, torch.nn.Dropout) and name == "p"
            if isinstance(value, float) and (kept or "dropout" in name or "layerdrop" in name):
                setattr(part, name, 0.0)


def build_judges(config: TrainConfig, reward_funcs: Any = None) -> Judges:
    """Make the judges of a run, from objects in place of the configuration's names if there are.

    Raises:
        ValueError: a reward function cannot be found, or does not fit; says which.
    """
    if callable(reward_funcs):
        reward_funcs = [reward_funcs]
    if reward_funcs is not None and not reward_funcs:
        raise ConfigError("reward_funcs: at least one is required, for example [accuracy]")
    return Judges(
        config.reward_funcs if reward_funcs is None else reward_funcs,
        config.reward_weights,
        reward_timeout=config.reward_timeout,
        reward_errors=config.reward_errors,
        soft_punish_cache=config.soft_punish_cache,
        max_completion_length=config.max_completion_length,
        chat_template_kwargs=config.chat_template_kwargs,
        trust_remote_code=config.trust_remote_code,
        batch_size=config.per_device_train_batch_size,
        seed=config.seed,
    )


def build_rollout_fn(
    config: TrainConfig, rollout_fn: RolloutFunction | None = None
) -> RolloutFunction | None:
    """Return the function that samples in the engine's place, if there is one.

    Raises:
        ValueError: there is no such function.
    """
    name_or_function = rollout_fn or config.rollout_fn
    return None if name_or_function is None else load_rollout_fn(name_or_function)


def check_datasets(config: TrainConfig, assets: Assets, sampler: Sampler) -> None:
    """Refuse datasets that do not go with the rest; see `check_dataset`.

    Raises:
        ValueError: says which, and what to do.
    """
    if assets.test_dataset is None and config.eval_strategy != "no":
        raise ConfigError("eval_strategy: needs prompts to measure; give a test_dataset")
    for dataset in (assets.train_dataset, assets.test_dataset):
        if dataset is not None:
            check_dataset(config, dataset, sampler)


def check_dataset(config: TrainConfig, dataset: Dataset, sampler: Sampler) -> None:
    """Refuse prompts that leave no room for completions, and columns that cannot be taken.

    Raises:
        ValueError: says which, and what to do.
    """
    if sampler.rollout_fn is None:
        sampler.judges.check_columns(dataset.column_names)
    else:  # it may add columns for them
        taken_columns(sampler.rollout_fn, set(dataset.column_names) - {"prompt"})
    check_prompts(
        dataset,
        sampler.encode,
        max_completion_length=config.max_completion_length,
        limits=config.limits(sampler.policy.positions),
        vocabulary=sampler.policy.vocabulary,
    )


def build_rollout(config: TrainConfig, policy: Policy, say: Callable[[str], None]) -> Rollout:
    """Make the engine that samples.

    Args:
        config: which one, and its bounds.
        policy: what it samples from.
        say: told, once, when a fast path is not taken.

    Raises:
        ValueError: the model or the machine cannot do it.
    """
    if config.use_vllm:
        from .rollout.vllm import VLLMRollout

        return VLLMRollout(
            policy.model,
            eos_token_ids=policy.eos_token_ids,
            pad_token_id=policy.pad_token_id,
            dtype=policy.product_dtype,
            gpu_memory_utilization=config.vllm_gpu_memory_utilization,
            max_model_length=config.vllm_max_model_length,
            max_batch=config.max_generation_batch_size,
            enable_sleep_mode=config.vllm_enable_sleep_mode,
            cuda_graph=config.cuda_graph,
            seed=config.seed,
        )
    return StaticCacheRollout(
        policy.model,
        eos_token_ids=policy.eos_token_ids,
        pad_token_id=policy.pad_token_id,
        max_batch=config.max_generation_batch_size,
        cuda_graph=config.cuda_graph,
        on_message=say,
    )


def notes(config: TrainConfig, policy: Policy) -> Iterator[str]:
    """Yield what of a run is not as one would expect, and how several processes share it."""
    if config.parallel is not None:
        copies, pieces = config.data_size, config.shard_size
        yield (
            f"note: {config.num_processes} processes, {copies} "
            f"cop{'y' if copies == 1 else 'ies'} of the model in {pieces} "
            f"piece{'' if pieces == 1 else 's'}; a step has {config.completions_per_step} "
            "completions of them all"
        )
    if config.trust_remote_code:
        yield (
            "note: trust_remote_code: Python files that come with models and tokenizers run with "
            "your rights"
        )
    if config.top_p < 1 or config.top_k > 0 or config.min_p:
        truncation = f"top_p={config.top_p} and top_k={config.top_k}"
        truncation += f" and min_p={config.min_p}" if config.min_p else ""
        yield (
            f"note: {truncation} truncate what is sampled; "
            "log-probs, ratios and KL are those of the whole distribution"
        )
    if config.padding_free is None and policy.why_padded and not _names_a_padded_attention(config):
        yield f"note: sequences are padded: {policy.why_padded}"
    if config.use_peft and policy.bf16 and config.dtype == "float32":
        yield (
            "note: frozen parameters are float32 and are converted to bfloat16 for every token; "
            "dtype: bfloat16 halves their memory and computes the same products"
        )


def _names_a_padded_attention(config: TrainConfig) -> bool:
    """Say whether the attention asked for would mask a matrix of all packed tokens squared."""
    return config.attn_implementation in ("sdpa", "eager")
