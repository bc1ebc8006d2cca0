"""Models small enough to decode in a test, and what `generate` and `forward` say about them."""

import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from fastgrpo.rollout import SamplingParams

PAD = 0
PROMPTS = [[5, 9, 2], [7, 1, 8, 2, 8, 1, 8], [3], [250, 17, 99, 4, 6]]
NO_EOS = {"eos_token_ids": [], "pad_token_id": PAD}


def tiny(config_class=Qwen3Config, attention="sdpa", **overrides):
    options = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "eos_token_id": None,
        "bos_token_id": None,
        "pad_token_id": PAD,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(
            config_class(**options | overrides), attn_implementation=attention, dtype=torch.float32
        ).eval()


def greedy(n):
    return SamplingParams(max_completion_length=n, temperature=0)


def generate_greedily(model, prompt, n, eos=None):
    ids = torch.tensor([prompt])
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=n,
        eos_token_id=eos,
        pad_token_id=PAD,
    )
    return out[0, len(prompt) :].tolist()


@torch.no_grad()
def forward_logps(model, prompt, completion, temperature):
    logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].float()
    return (logits / temperature).log_softmax(-1)


def count_embedded(model):
    """Count the tokens of each pass through the embedding, as they come."""
    fed = []
    model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: fed.append(args[0].numel())
    )
    return fed
