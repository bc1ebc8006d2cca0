"""A loss that is not in the package, from `linear_logps`: DPO (arXiv 2305.18290).

A small random Qwen3 is shown pairs of completions, of which those with more even tokens were
preferred, and learns the preference. `python benchmarks/examples/dpo.py`

P pairs, B = 2P sequences: all chosen, then all rejected; T positions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from fastgrpo import linear_logps

PROMPT_LENGTH, LENGTH, BETA, STEPS = 4, 8, 0.1, 20


def completion_logps(model: PreTrainedModel, input_ids: Tensor, mask: Tensor) -> Tensor:
    """Return the log-prob of each completion (B,); `input_ids` and `mask` of its tokens (B, T)."""
    hidden = model.model(input_ids).last_hidden_state[:, :-1]  # predict the tokens from the second
    logps, _ = linear_logps(hidden, model.lm_head.weight, input_ids[:, 1:], mask=mask[:, 1:])
    return logps.sum(1)


def dpo_loss(logps: Tensor, reference_logps: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Return the loss and the margin of each pair (P,), from log-probs of completions (B,)."""
    chosen, rejected = (beta * (logps - reference_logps)).chunk(2)
    margins = chosen - rejected
    return -F.logsigmoid(margins).mean(), margins.detach()


def make_pairs(number: int) -> tuple[Tensor, Tensor]:
    """Return token ids and the mask of completions, (B, T) each; they differ in length."""
    prompts = torch.randint(2, 64, (number, PROMPT_LENGTH)).repeat(2, 1)
    even = 2 * torch.randint(1, 32, (2 * number, LENGTH))
    odd_share = torch.tensor([0.2, 0.8]).repeat_interleave(number)[:, None]
    completions = even + (torch.rand(even.shape) < odd_share).long()
    lengths = torch.randint(LENGTH // 2, LENGTH + 1, (2 * number, 1))
    counts = torch.arange(LENGTH) < lengths
    input_ids = torch.cat([prompts, completions * counts], 1)  # 0 is padding
    return input_ids, torch.cat([torch.zeros_like(prompts, dtype=torch.bool), counts], 1)


def main() -> list[float]:
    """Train and return the mean margin of each step."""
    torch.manual_seed(0)
    size = {"hidden_size": 32, "head_dim": 8, "num_attention_heads": 4, "num_key_value_heads": 2}
    size |= {"vocab_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    model = Qwen3ForCausalLM(Qwen3Config(**size))
    input_ids, mask = make_pairs(32)
    # The reference is the model at the start: asked once, it need not be kept.
    with torch.no_grad():
        reference_logps = completion_logps(model, input_ids, mask)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    mean_margins = []
    for step in range(STEPS):
        logps = completion_logps(model, input_ids, mask)
        loss, margins = dpo_loss(logps, reference_logps, BETA)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean_margins.append(margins.mean().item())
        print(f"step {step + 1:2d}  loss {loss.item():.3f}  margin {mean_margins[-1]:.3f}")
    return mean_margins


if __name__ == "__main__":
    main()
