"""Reward models: sequence-classification checkpoints with one output, as TRL scores with them.

B completions, T tokens of the longest text of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
)

from ..trust import check_brings_no_code, check_weights, not_safe
from .contract import Completion
from .names import is_checkpoint


class RewardModel:
    """A model that reads prompt and completion and gives a number; called like any function."""

    def __init__(
        self,
        model: str | nn.Module,
        tokenizer: Any = None,
        *,
        device: torch.device | str | None = None,
        batch_size: int = 8,
        chat_template_kwargs: dict[str, Any] | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        """Load it, or take it as it is, and check that it gives one number.

        By name, weights are bf16 on a GPU that has it, else fp32; a module keeps its type.

        Args:
            model: the directory or Hub name of a checkpoint; or a module, from such a checkpoint
                unless its tokenizer is given.
            tokenizer: the model's own; None: that of its checkpoint.
            device: where it runs; None: on the GPU if there is one.
            batch_size: texts read at once.
            chat_template_kwargs: for the tokenizer's chat template.
            trust_remote_code: run code that comes with the checkpoint.

        Raises:
            ValueError: there is no such checkpoint, or it has no head with one output, or no
                padding.
        """
        default = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(default if device is None else device)
        self.batch_size = batch_size
        self.template_options = chat_template_kwargs or {}
        if isinstance(model, nn.Module):
            loaded: Any = model
            name = str(getattr(loaded.config, "_name_or_path", ""))
        else:
            name = _place(model)
            loaded = _load(name, self.device, trust_remote_code)
        self.__name__ = name.rstrip("/").split("/")[-1] or type(loaded).__name__
        self._named = f"reward model {self.__name__!r}"
        _check_head(self._named, loaded.config)
        self.model: Any = loaded.to(self.device).eval()
        self.tokenizer: Any = tokenizer
        if tokenizer is None:
            self.tokenizer = self._load_tokenizer(name, trust_remote_code)
        if self.tokenizer.pad_token_id is None:
            if self.tokenizer.eos_token is None:
                raise ValueError(
                    f"{self._named}: its tokenizer has neither a padding nor an end token, so "
                    "texts cannot be read together; set pad_token in its tokenizer_config.json"
                )
            self.tokenizer.pad_token = self.tokenizer.eos_token
        # The model takes its output at the last token that is none of these.
        text: Any = loaded.config.get_text_config()
        text.pad_token_id = self.tokenizer.pad_token_id
        self._positions: int | None = getattr(text, "max_position_embeddings", None)

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Completion], **columns: Any
    ) -> list[float]:
        """Return the model's number for each text of prompt and completion.

        Raises:
            ValueError: a text has more tokens than the model has positions. Nothing is cut off.
        """
        texts = [self._text(p, c) for p, c in zip(prompts, completions, strict=True)]
        rewards: list[float] = []
        for first in range(0, len(texts), self.batch_size):
            rewards += self._score(texts[first : first + self.batch_size]).tolist()
        return rewards

    def _text(self, prompt: Any, completion: Completion) -> str:
        if isinstance(prompt, str):
            return prompt + str(completion)
        if not self.tokenizer.chat_template:
            raise ValueError(
                f"{self._named} has no chat template, and the prompts are messages; set "
                "chat_template in its tokenizer_config.json, or give prompts as text"
            )
        messages = [*prompt, *completion]
        options = self.template_options
        return self.tokenizer.apply_chat_template(messages, tokenize=False, **options)

    @torch.no_grad()
    def _score(self, texts: list[str]) -> Tensor:
        inputs = self.tokenizer(
            text=texts,
            return_tensors="pt",
            padding=True,
            padding_side="right",
            add_special_tokens=False,
        )
        length = inputs["input_ids"].shape[1]
        if self._positions is not None and length > self._positions:
            raise ValueError(
                f"{self._named} has {self._positions} positions, and a text has {length} tokens; "
                "lower max_completion_length, or judge with a model for longer texts"
            )
        logits: Tensor = self.model(**inputs.to(self.device)).logits  # (B, 1)
        if logits.shape[1:] != (1,):
            shape = tuple(logits.shape)
            raise ValueError(f"{self._named} gives logits of shape {shape}, not (batch, 1)")
        return logits[:, 0].float().cpu()

    def _load_tokenizer(self, name: str, trust_remote_code: bool) -> Any:
        if not name:
            raise ValueError(
                f"{self._named} was not loaded from a checkpoint, so its tokenizer is not known; "
                "give RewardModel(model, tokenizer), of fastgrpo.rewards, in its place"
            )
        try:
            return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
        except (OSError, ValueError, ImportError) as error:
            raise ValueError(
                f"{self._named}: its tokenizer cannot be loaded from {name} ({_reason(error)}); "
                "save it there with tokenizer.save_pretrained"
            ) from error


def reward_model_bytes(
    reward_funcs: Sequence[str], *, on_gpu: bool, trust_remote_code: bool = False
) -> int:
    """Return the bytes of the reward models among some names, from their config.json alone.

    Args:
        reward_funcs: names of any kind; what is no checkpoint takes nothing.
        on_gpu: whether they run on a GPU, in bf16.
        trust_remote_code: run code that comes with a checkpoint.

    Raises:
        ValueError: there is no such checkpoint, or it has no head with one output.
    """
    size = 0
    for name in filter(is_checkpoint, reward_funcs):
        config = _load_config(_place(name), trust_remote_code)
        with torch.device("meta"):
            model: nn.Module = AutoModelForSequenceClassification.from_config(
                config,
                dtype=torch.bfloat16 if on_gpu else torch.float32,
                trust_remote_code=trust_remote_code,
            )
        size += sum(x.nbytes for x in (*model.parameters(), *model.buffers()))
    return size


def _place(name: str) -> str:
    """Return a directory in full, or a Hub name as it is."""
    path = Path(name).expanduser()
    if not (path.exists() or name.startswith((".", "/", "~"))):
        return name
    if not (path / "config.json").is_file():
        raise ValueError(
            f"reward model {name!r}: there is no {path / 'config.json'}; save one with "
            "model.save_pretrained and tokenizer.save_pretrained"
        )
    return str(path.resolve())


def _load_config(name: str, trust_remote_code: bool) -> PreTrainedConfig:
    try:
        config: Any = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        hub = "" if Path(name).exists() else " (there is no such directory: taken for a Hub name)"
        raise ValueError(
            f"reward model {name!r} cannot be loaded: {_reason(error)}{hub}"
        ) from error
    _check_head(f"reward model {name!r}", config)
    if not trust_remote_code:
        check_brings_no_code(f"reward model {name!r}", config)
    return config


def _check_head(named: str, config: Any) -> None:
    """Refuse what is no sequence classifier with one output.

    Raises:
        ValueError: says what it is.
    """
    architectures: list[str] = getattr(config, "architectures", None) or []
    if architectures and not any("SequenceClassification" in x for x in architectures):
        raise ValueError(
            f"{named} is a {architectures[0]}, which has no classification head; reward models "
            "are checkpoints for AutoModelForSequenceClassification with num_labels 1"
        )
    if config.num_labels != 1:
        raise ValueError(
            f"{named} has {config.num_labels} labels; a reward model has 1 (num_labels)"
        )


def _load(name: str, device: torch.device, trust_remote_code: bool) -> nn.Module:
    config = _load_config(name, trust_remote_code)
    check_weights(f"reward model {name!r}", Path(name))
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        model, report = AutoModelForSequenceClassification.from_pretrained(
            name,
            config=config,
            dtype=torch.bfloat16 if bf16 else torch.float32,
            output_loading_info=True,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
        )
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        if "use_safetensors" in str(error):
            raise ValueError(not_safe(f"reward model {name!r}", "no weights")) from error
        raise ValueError(f"reward model {name!r} cannot be loaded: {_reason(error)}") from error
    if missing := sorted(report["missing_keys"]):
        raise ValueError(
            f"reward model {name!r}: its checkpoint has no {', '.join(missing[:3])}; those would "
            "be random, and so would the rewards"
        )
    return model


def _reason(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
