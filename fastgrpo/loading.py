"""From a name in the configuration to a model and its tokenizer."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .attention import keep_differentiable
from .config import TrainConfig
from .readable import shown
from .trust import Untrusted, check_brings_no_code, check_weights, not_safe

# As it is imported bitsandbytes misses a kernel for CPUs that is not needed.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def load_model(config: TrainConfig) -> PreTrainedModel:
    """Load the causal LM a configuration names, from a directory or the Hub.

    It is in `config.dtype`, on the CPU; with `load_in_4bit` its linear layers, the LM head apart,
    are in 4 bits, and it is where it will compute, since it is quantised there.

    Raises:
        ValueError: it cannot be loaded; says why.
    """
    options = hub_options(config) | {"dtype": getattr(torch, config.dtype)}
    if config.attn_implementation is not None:
        options["attn_implementation"] = config.attn_implementation
    if config.load_in_4bit:
        device = _device()
        options["device_map"] = {"": device}
        options["quantization_config"] = _four_bits(config, device)
    name = str(config.model_name_or_path)
    model, report = load_from(
        AutoModelForCausalLM,
        name,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # told below
        **options,
    )
    _check_complete(name, report)
    if config.load_in_4bit and model.device.type == "cpu":
        _mend_on_cpu(model)
    return model


def load_tokenizer(config: TrainConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer of the configuration's model, from a directory or the Hub.

    Raises:
        ValueError: it cannot be loaded; says why.
    """
    return load_from(AutoTokenizer, str(config.model_name_or_path), **hub_options(config))


def hub_options(config: TrainConfig) -> dict[str, Any]:
    """Return what transformers is told about where a model comes from."""
    return {"revision": config.model_revision, "trust_remote_code": config.trust_remote_code}


def computes_in_bf16(config: TrainConfig, device: torch.device) -> bool:
    """Say whether products are computed in bf16: as configured, else on a GPU that has it."""
    if config.bf16 is not None:
        return config.bf16
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def _device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _four_bits(config: TrainConfig, device: torch.device) -> BitsAndBytesConfig:
    if find_spec("bitsandbytes") is None:
        raise ValueError(
            "load_in_4bit: needs bitsandbytes, which is not installed; pip install 'fastgrpo[8bit]'"
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=config.use_bnb_nested_quant,
        bnb_4bit_compute_dtype=(
            torch.bfloat16 if computes_in_bf16(config, device) else torch.float32
        ),
    )


def _mend_on_cpu(model: PreTrainedModel) -> None:
    """Keep off what bitsandbytes (0.50) gets wrong on CPUs.

    Raises:
        ValueError: the rows of a layer end within a block; it would be dequantised wrongly.
    """
    module: Any
    for name, module in model.named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None and state.shape[-1] % state.blocksize:
            raise ValueError(
                f"load_in_4bit: {name} has {state.shape[-1]} inputs, and on a CPU bitsandbytes is "
                f"right for multiples of {state.blocksize} only; run on a GPU, or leave it out"
            )
    keep_differentiable(model)


def load_from(auto_class: Any, name: str, **options: Any) -> Any:
    """Load with an Auto class of transformers, from a directory or the Hub.

    Raises:
        ValueError: it cannot be loaded; says why.
    """
    local = name.startswith((".", "/", "~")) or Path(name).exists()
    path = Path(name).expanduser().resolve()  # adapters record it as their base
    if local and (path / "adapter_config.json").is_file() and auto_class is AutoModelForCausalLM:
        raise ValueError(
            f"model_name_or_path: {name} holds adapters without their model; merge them with "
            "peft.AutoPeftModelForCausalLM.from_pretrained(...).merge_and_unload() and save that"
        )
    if local and not (path / "config.json").is_file():
        raise ValueError(
            f"model_name_or_path: {name} is not a model directory: it has no config.json; "
            "save one with model.save_pretrained and tokenizer.save_pretrained"
        )
    if local and auto_class is AutoTokenizer and not any(path.glob("token*")):
        raise ValueError(
            f"model_name_or_path: {name} holds no tokenizer; save it there with "
            "tokenizer.save_pretrained"
        )
    named = f"model_name_or_path: {name}"
    place = str(path) if local else name
    try:
        if auto_class is not AutoTokenizer and not options.get("trust_remote_code"):
            hub = {key: options[key] for key in options.keys() & {"revision"}}
            brought = AutoConfig.from_pretrained(place, **hub)
            check_brings_no_code(named, brought, options.get("attn_implementation"))
        if auto_class is AutoModelForCausalLM:
            check_weights(named, path)
            options["use_safetensors"] = True
        return auto_class.from_pretrained(place, **options)
    except (torch.OutOfMemoryError, Untrusted):
        raise
    except Exception as error:  # what readers of damaged files raise is of any kind
        reason = shown(str(error), quoted=False, most=300)
        if "trust_remote_code" in str(error):
            raise Untrusted(
                f"{named} cannot be loaded without the Python files that it brings; set "
                "trust_remote_code: true if you trust them"
            ) from error
        if "use_safetensors" in str(error):
            raise ValueError(not_safe(named, "no weights")) from error
        remedy = "there is no such directory, so it was taken for a Hub name"
        if local:
            remedy = "install that" if isinstance(error, ImportError) else "save it again"
        place = shown(name, quoted=False)
        raise ValueError(
            f"model_name_or_path: {place} cannot be loaded: {reason}; {remedy}"
        ) from error


def _check_complete(name: str, report: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that is not the whole model: the rest of it would be random.

    Args:
        name: of the model.
        report: what transformers says of having loaded it.

    Raises:
        ValueError: names a parameter, and how many there are.
    """
    for keys, what in (
        ([key for key, *_ in report["mismatched_keys"]], "has another shape than in"),
        (list(report["missing_keys"]), "is not in"),
    ):
        if keys:
            more = f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""
            raise ValueError(
                f"model_name_or_path: {min(keys)}{more} {what} the weights of {name}, and would be "
                "random; save the model again, or mend its config.json"
            )
