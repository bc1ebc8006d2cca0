"""The loop that a user would write, and the lines of the README."""

import ast
import io
import re
import runpy
import tokenize
from pathlib import Path

import torch
from small_models import small_model

LOOP = Path("benchmarks/examples/minimal_loop.py")
NO_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
}


def code_lines(source: str) -> int:
    """Count the lines that hold code: neither empty, nor comment, nor docstring."""
    counted: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in NO_CODE | {tokenize.ENDMARKER}:
            counted |= set(range(token.start[0], token.end[0] + 1))
    docstring = ast.parse(source).body[0]
    assert docstring.end_lineno is not None
    return len(counted - set(range(docstring.lineno, docstring.end_lineno + 1)))


def test_lines_of_code_are_counted():
    assert code_lines('"""Says\n\nwhat."""\n\nx = [\n    1,  # one\n]\n\n# then\ny = 2\n') == 4


def test_the_loop_is_short_and_learns(capsys):
    assert code_lines(LOOP.read_text(encoding="utf-8")) == 25
    runpy.run_path(str(LOOP))
    rewards = [float(x) for x in re.findall(r"reward (\S+)", capsys.readouterr().out)]
    assert len(rewards) == 30
    assert sum(rewards[:5]) / 5 < 0.05
    assert sum(rewards[-5:]) / 5 > 0.9


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
