"""Checkpoints small enough to make in a test: a character tokenizer and a random model."""

import string
from functools import partial
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma3TextConfig,
    GraniteConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

CONFIGS = {
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "llama": LlamaConfig,
    "cohere": partial(CohereConfig, logit_scale=0.25),
    "granite": partial(GraniteConfig, logits_scaling=4.0),
    # One layer in a window shorter than the tests' sequences, one that sees everything; a softcap.
    "gemma3": partial(
        Gemma3TextConfig,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention"],
        head_dim=8,
        final_logit_softcapping=5.0,
    ),
}
CHAT_TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def small_tokenizer() -> PreTrainedTokenizerFast:
    characters = [c for c in string.printable if c not in "\r\x0b\x0c"]
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *characters])}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="?"))
    backend.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="?",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def small_model(family: str = "qwen3", tie: bool = True, seed: int = 0, **options):
    tokenizer = small_tokenizer()
    config = CONFIGS[family](
        vocab_size=options.pop("vocab_size", len(tokenizer)),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=tie,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **options,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def save_small_model(path: Path, family: str = "qwen3", tie: bool = True, seed: int = 0) -> str:
    small_model(family, tie, seed).save_pretrained(path)
    small_tokenizer().save_pretrained(path)
    return str(path)
