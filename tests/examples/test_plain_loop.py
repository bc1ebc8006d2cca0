import re
import runpy
from pathlib import Path

import torch
from small_models import small_model


def test_the_loop_of_ones_own_learns():
    rewards = runpy.run_path("benchmarks/examples/plain_loop.py")["main"]()
    assert len(rewards) == 30
    assert sum(rewards[:5]) / 5 < 0.05
    assert sum(rewards[-5:]) / 5 > 0.5


def test_the_lines_in_the_readme_run():
    readme = Path("README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    (lines,) = [block for block in blocks if "linear_grpo_loss(" in block]
    model = small_model()
    ids = torch.arange(20, 32).view(3, 4)
    names = {
        "model": model,
        "prompt_length": 5,
        "ids": ids,
        "input_ids": torch.cat([torch.arange(2, 17).view(3, 5), ids], 1),
        "mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]]),
        "advantages": torch.tensor([1.0, -0.5, 0.25]),
    }
    exec(lines, names)
    # On-policy every ratio is 1: minus the mean advantage of the counted tokens.
    expected = -(4 * 1.0 - 2 * 0.5 + 3 * 0.25) / 9
    torch.testing.assert_close(names["output"].loss.detach(), torch.tensor(expected))
    assert model.model.embed_tokens.weight.grad.abs().sum() > 0
