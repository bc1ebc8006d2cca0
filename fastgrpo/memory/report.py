"""`fastgrpo plan`: from a configuration file to tables a person can decide by."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import AutoConfig, PreTrainedConfig

from fastgrpo.assets import load_assets
from fastgrpo.config import ConfigError, TrainConfig
from fastgrpo.console import Console
from fastgrpo.data import encode_prompt, load_prompts
from fastgrpo.loading import hub_options, load_from, load_tokenizer

from .plan import CONTEXT_BYTES, GIB, SLACK, Device, Plan, Planner
from .search import Largest, Switch, largest_values, switches

ASSUMED_PROMPT_LENGTH = 512
"""Tokens of the longest prompt, where nothing is known of the prompts."""
_SECONDS = 10.0  # for the Hub to answer, whose client would go on trying

T = TypeVar("T")


def print_plan(
    config: TrainConfig,
    *,
    gpu_memory: str | None = None,
    prompt_length: int | None = None,
    console: Console | None = None,
) -> Plan:
    """Plan a run and print what it will take, what else would fit and what would help.

    Args:
        config: the run.
        gpu_memory: of the GPU to plan for, for example "24GiB"; None: this machine's.
        prompt_length: tokens of the longest prompt; None: from the dataset, if it is a local one.
        console: where to print.

    Raises:
        ValueError: there is no GPU to plan for, or no such model; the message says what to do.
    """
    if prompt_length is not None and prompt_length < 1:
        raise ValueError(f"--prompt-length: must be at least 1, got {prompt_length}")
    console = console or Console()
    if config.parallel is not None:
        console.message(
            "note: planned as for one process; what parallel changes is in fastgrpo/PARALLEL.md"
        )
        config = replace(config, parallel=None)
    device = planned_device(gpu_memory)
    architecture, length, told = _load_inputs(config, prompt_length)
    planner = Planner(architecture, device, length)
    plan = planner.plan(config)
    for line in (verdict(plan), *facts(planner, config, plan, told)):
        console.message(line)
    console.table("GiB by phase", *phase_table(plan))
    found = switches(planner, config, plan)
    if found:
        console.table("What would save most, each alone", *switch_table(found))
    console.table("Largest that fits, each alone", *largest_table(largest_values(planner, config)))
    return plan


def planned_device(gpu_memory: str | None) -> Device:
    """Return the GPU to plan for.

    Args:
        gpu_memory: "24GiB", "24GB" (10^9 bytes), "800MiB" or "24" (GiB); None: this machine's.

    Raises:
        ValueError: it is no such size, or there is no GPU.
    """
    if gpu_memory is None:
        if not torch.cuda.is_available():
            raise ValueError(
                "this machine has no GPU: say which to plan for, for example --gpu-memory 24GiB"
            )
        facts: Any = torch.cuda.get_device_properties(0)
        return Device(facts.name, facts.total_memory)
    units = {"": GIB, "gib": GIB, "gb": 10**9, "mib": 2**20}
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(GiB|GB|MiB|)", gpu_memory.strip(), re.IGNORECASE)
    size = float(match[1]) * units[match[2].lower()] if match else 0.0
    if size <= 0:
        raise ValueError(f"--gpu-memory: must be like 24GiB, 24GB or 800MiB, got {gpu_memory!r}")
    return Device("a GPU", round(size))


def verdict(plan: Plan) -> str:
    """Return in one sentence whether a run starts and fits."""
    if plan.refusal is not None:
        return f"It does not start: {plan.refusal}."
    room = plan.device.total_memory - plan.allowance - plan.peak
    peak = f"the peak of {gib(plan.peak)} GiB, in {plan.peak_phase},"
    card = f"the {gib(plan.device.total_memory)} GiB of {plan.device.name}"
    kept = f"after {gib(plan.allowance)} GiB for CUDA itself"
    if plan.fits:
        return f"It fits: {peak} leaves {gib(room)} GiB free of {card}, {kept}."
    return f"It does not fit: {peak} is {gib(-room)} GiB too much for {card}, {kept}."


def facts(planner: Planner, config: TrainConfig, plan: Plan, told: str) -> list[str]:
    """Return what the plan is based on, a line each."""
    layout = "packed" if planner.packed(config) else "padded"
    name = config.model_name_or_path or f"task {config.task}"
    passes = "1 pass" if plan.microbatches == 1 else f"{plan.microbatches} passes"
    rows = "vLLM decodes" if config.use_vllm else f"{plan.rows_decoded:,} completions are decoded"
    return [
        f"{name}: {plan.num_parameters:,} parameters, {plan.num_trainable:,} of them trained",
        f"prompts of {planner.prompt_length:,} tokens ({told}), completions of "
        f"{config.max_completion_length:,}; all are taken to be as long",
        f"a step is {passes} of {plan.microbatch_tokens:,} {layout} tokens; {rows} at once",
        f"for CUDA itself: {gib(CONTEXT_BYTES)} GiB of context and workspaces, and {SLACK:.0%} of "
        "the peak that the allocator holds and cannot use",
    ]


def phase_table(plan: Plan) -> tuple[list[str], list[list[str]]]:
    """Return the bytes of each part in each phase."""
    parts = list(dict.fromkeys(part for phase in plan.phases.values() for part in phase))
    rows = [
        [_PARTS.get(part, part), *(_cell(phase.get(part, 0)) for phase in plan.phases.values())]
        for part in parts
        if any(phase.get(part, 0) for phase in plan.phases.values())
    ]
    sums = [gib(sum(phase.values())) for phase in plan.phases.values()]
    names = [f"{phase} (peak)" if phase == plan.peak_phase else phase for phase in plan.phases]
    return ["", *names], [*rows, ["sum", *sums]]


def largest_table(found: list[Largest]) -> tuple[list[str], list[list[str]]]:
    """Return the largest values that fit, and what allows no larger ones."""

    def text(value: int | None, nothing: str) -> str:
        return nothing if value is None else f"{value:,}"

    rows = [[x.key, text(x.now, "-"), text(x.value, "none"), x.limit or "memory"] for x in found]
    return ["key", "now", "largest", "limit"], rows


def switch_table(found: list[Switch]) -> tuple[list[str], list[list[str]]]:
    """Return what saves memory."""
    rows = [
        [_change(switch), gib(switch.saved), gib(switch.peak), "yes" if switch.fits else "no"]
        for switch in found
    ]
    return ["change", "saves GiB", "peak GiB", "fits"], rows


def gib(size: int) -> str:
    """Return bytes as GiB with two digits."""
    return f"{size / GIB:.2f}"


_PARTS = {"copies": "bf16 copies", "loss": "loss"}


def _cell(size: int) -> str:
    return gib(size) if size else "-"


def _change(switch: Switch) -> str:
    """Return a change as it is written in YAML, without what is only switched off by it."""
    said = {key: value for key, value in switch.changes.items() if value not in (None, False)}
    return "\n+ ".join(f"{key}: {str(value).lower()}" for key, value in said.items())


def _load_inputs(
    config: TrainConfig, prompt_length: int | None
) -> tuple[PreTrainedConfig, int, str]:
    """Return the architecture, the tokens of the longest prompt, and how these are known."""
    if config.task is not None:
        assets = load_assets(config)
        lengths = [len(encode_prompt(p, assets.tokenizer)) for p in assets.train_dataset["prompt"]]
        told = "the longest of the task" if prompt_length is None else "as given"
        return assets.model.config, prompt_length or max(lengths), told
    name = config.model_name_or_path
    if not name:
        raise ConfigError("model_name_or_path: required (or set task: arithmetic)")
    options = hub_options(config)
    if config.attn_implementation is not None:
        options["attn_implementation"] = config.attn_implementation
    architecture = _in_time(
        lambda: load_from(AutoConfig, name, **options), f"model_name_or_path: {name}"
    )
    if prompt_length is not None:
        return architecture, prompt_length, "as given"
    dataset = config.dataset_name
    if dataset is None or not Path(dataset).expanduser().exists():
        return architecture, ASSUMED_PROMPT_LENGTH, "an assumption; --prompt-length says otherwise"
    splits = (config.dataset_train_split, config.test_split)
    prompts = [
        prompt
        for split in dict.fromkeys(filter(None, splits))
        for prompt in load_prompts(
            dataset,
            split,
            config_name=config.dataset_config,
            prompt_column=config.prompt_column,
        )["prompt"]
    ]
    tokenizer = _in_time(lambda: load_tokenizer(config), f"model_name_or_path: {name}")
    encoded = (
        encode_prompt(
            prompt,
            tokenizer,
            system_prompt=config.system_prompt,
            chat_template_kwargs=config.chat_template_kwargs,
        )
        for prompt in prompts
    )
    return architecture, max(map(len, encoded)), "the longest of the dataset"


def _in_time(load: Callable[[], T], what: str) -> T:
    """Return what `load` does, or give up on a Hub that does not answer.

    Raises:
        ValueError: it failed, or took too long.
    """
    found: list[T] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            found.append(load())
        except Exception as error:
            errors.append(error)

    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it tells of every attempt
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(_SECONDS)
    logger.setLevel(level)
    if errors:
        raise errors[0]
    if not found:
        raise ValueError(
            f"{what} did not load within {_SECONDS:.0f} seconds: the Hub does not answer; give a "
            "local directory, or try again when it does"
        )
    return found[0]
