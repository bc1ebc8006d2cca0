"""LoRA: small matrices are trained beside the model's own, which stay as they are."""

from __future__ import annotations

import warnings
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedModel

from .config.model import ModelOptions
from .trust import check_weights

if TYPE_CHECKING:
    from peft import PeftModel


def add_adapters(model: PreTrainedModel, config: ModelOptions) -> PeftModel:
    """Put LoRA adapters on a model and freeze everything else, the LM head included.

    The adapters begin as zero and are fp32, also on a model in bf16 or 4 bits: small updates are
    not lost. `peft.prepare_model_for_kbit_training` is not needed, and would make the head fp32.
    `get_nb_trainable_parameters()` of the result counts what is trained.

    Args:
        model: changed in place; the result wraps it.
        config: its `lora_` options.

    Raises:
        ValueError: peft is missing, the model has adapters already, or a target is no linear layer
            of its body.
    """
    try:
        from peft import LoraConfig, PeftModel, TaskType, get_peft_model
    except ImportError:
        raise ValueError(
            "use_peft: needs peft, which is not installed; pip install 'fastgrpo[lora]'"
        ) from None
    if isinstance(model, PeftModel) or hasattr(model, "peft_config"):
        raise ValueError(
            "use_peft: the model has adapters already; leave use_peft out to train those, or merge "
            "them first with merge_and_unload()"
        )
    targets = config.lora_target_modules
    alpha: Any = config.lora_alpha  # PEFT takes fractions too
    if targets is not None:
        _check_targets(model, targets)
    lora = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=config.lora_r,
        lora_alpha=alpha,
        lora_dropout=config.lora_dropout,
        target_modules="all-linear" if targets is None else targets,  # all but the LM head
    )
    with _peft_quiet():
        adapted = get_peft_model(model, lora)
    assert isinstance(adapted, PeftModel)
    return adapted


def load_adapters(model: PreTrainedModel, path: Path, *, is_trainable: bool = False) -> PeftModel:
    """Put the adapters of a checkpoint on the model that they were trained on.

    Args:
        model: changed in place; the result wraps it.
        path: the checkpoint.
        is_trainable: they are to be trained, and everything else is frozen.

    Raises:
        ValueError: they are not in safetensors.
    """
    from peft import PeftModel

    check_weights(f"the checkpoint {path}", path)
    with _peft_quiet():
        return PeftModel.from_pretrained(model, str(path), is_trainable=is_trainable)


@contextmanager
def _peft_quiet() -> Generator[None]:
    with warnings.catch_warnings():
        # Of transformers 5.23, about a name that peft uses.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        yield


@contextmanager
def base_trained(model: Any) -> Generator[None]:
    """Train the model below its adapters for a while, if it has some: these are switched off."""
    if not hasattr(model, "disable_adapter"):
        yield
        return
    frozen = [p for p in model.parameters() if not p.requires_grad]
    with model.disable_adapter():
        for parameter in frozen:
            parameter.requires_grad_(True)
        try:
            yield
        finally:
            for parameter in frozen:
                parameter.requires_grad_(False)


def _check_targets(model: PreTrainedModel, targets: list[str]) -> None:
    """Refuse names that peft passes over in silence, and the head: the loss takes its weight."""
    head = model.get_output_embeddings()
    linear = [
        name for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head
    ]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in linear):
            known = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in linear}))
            raise ValueError(
                f"lora_target_modules: no linear layer below the LM head is called {target!r}; "
                f"there are {known}"
            )
