"""A model with layers as wide as the blocks of 4-bit weights, 64, which CPUs need."""

from pathlib import Path

import torch
from small_models import small_model, small_tokenizer
from transformers import AutoModelForCausalLM

from fastgrpo.config import TrainConfig
from fastgrpo.loading import load_model


def wide_model():
    config = small_model("llama", initializer_range=0.2).config
    config.hidden_size, config.head_dim, config.intermediate_size = 64, 16, 128
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def save_wide_model(path: Path) -> str:
    wide_model().save_pretrained(path)
    small_tokenizer().save_pretrained(path)
    return str(path)


def load_in_4bit(path: Path, **options):
    name = save_wide_model(path)
    return load_model(
        TrainConfig(model_name_or_path=name, load_in_4bit=True, use_peft=True, **options)
    )
