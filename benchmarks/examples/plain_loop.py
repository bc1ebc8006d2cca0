"""The loss in a loop of one's own: torch, transformers and `linear_grpo_loss`, no trainer.

A small random Qwen3 learns to write more of token 7. `python benchmarks/examples/plain_loop.py`
"""

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from fastgrpo import GRPOLossConfig, linear_grpo_loss

PROMPTS, GROUP, PROMPT_LENGTH, COMPLETION_LENGTH, STEPS = 4, 8, 5, 12, 30


def main() -> list[float]:
    """Train and return the mean reward of each step."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=True,
    )
    model = Qwen3ForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    mean_rewards = []
    for step in range(STEPS):
        prompts = torch.randint(8, 64, (PROMPTS, PROMPT_LENGTH)).repeat_interleave(GROUP, 0)
        input_ids = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=True,
            top_k=0,
            max_new_tokens=COMPLETION_LENGTH,
            eos_token_id=None,
            pad_token_id=0,
        )
        completion_ids = input_ids[:, PROMPT_LENGTH:]
        rewards = (completion_ids == 7).float().mean(1).view(PROMPTS, GROUP)
        centred = rewards - rewards.mean(1, keepdim=True)
        advantages = (centred / (rewards.std(1, keepdim=True) + 1e-4)).flatten()

        hidden = model.model(input_ids).last_hidden_state[:, PROMPT_LENGTH - 1 : -1]
        output = linear_grpo_loss(
            hidden, model.lm_head.weight, completion_ids, advantages,
            config=GRPOLossConfig(loss_type="dapo", epsilon_high=0.28),
        )  # fmt: skip
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean_rewards.append(rewards.mean().item())
        entropy = output.metrics["entropy"].item()
        print(f"step {step + 1:2d}  reward {mean_rewards[-1]:.3f}  entropy {entropy:.2f}")
    return mean_rewards


if __name__ == "__main__":
    main()
