"""GRPO in 25 lines: torch, a Hugging Face model and `linear_grpo_loss`, no trainer.

A small random Qwen3 learns to write token 7 and not to stop.
`python benchmarks/examples/minimal_loop.py`
"""

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from fastgrpo import linear_grpo_loss

GROUP, PROMPT_LENGTH, LENGTH, EOS, PAD = 8, 5, 12, 1, 0
torch.manual_seed(0)
size = {"hidden_size": 32, "head_dim": 8, "num_attention_heads": 4, "num_key_value_heads": 2}
size |= {"vocab_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
model = Qwen3ForCausalLM(Qwen3Config(**size))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
# The loss takes the samples for the model's own: nothing is cut off of its distribution.
sampling = {"do_sample": True, "top_k": 0, "eos_token_id": EOS, "pad_token_id": PAD}

for step in range(30):
    prompts = torch.randint(8, 64, (4, PROMPT_LENGTH)).repeat_interleave(GROUP, 0)
    input_ids = model.generate(prompts, max_new_tokens=LENGTH, **sampling)
    ids = input_ids[:, PROMPT_LENGTH:]
    ends = (ids == EOS).long()
    mask = ends.cumsum(1) - ends == 0  # up to the first EOS, and with it
    rewards = ((ids == 7) & mask).sum(1).view(-1, GROUP) / LENGTH
    centred = rewards - rewards.mean(1, keepdim=True)
    advantages = (centred / (rewards.std(1, keepdim=True) + 1e-4)).flatten()

    # A hidden state predicts the next token.
    hidden = model.model(input_ids).last_hidden_state[:, PROMPT_LENGTH - 1 : -1]
    output = linear_grpo_loss(hidden, model.lm_head.weight, ids, advantages, completion_mask=mask)
    output.loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"{step:2d}  reward {rewards.mean():.3f}  entropy {output.metrics['entropy']:.2f}")
