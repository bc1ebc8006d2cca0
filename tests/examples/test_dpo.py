"""DPO from `linear_logps` is DPO from all the logits."""

import re
import runpy
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from small_models import small_model

from fastgrpo import linear_logps

DPO = runpy.run_path("benchmarks/examples/dpo.py")


def from_all_logits(policy, reference, input_ids, mask, beta):
    """Equation 7 of the paper, a pair at a time."""
    losses, margins = [], []
    pairs = len(input_ids) // 2

    def log_prob(model, i):
        logps = F.log_softmax(model(input_ids[i : i + 1]).logits[0], -1)
        positions = mask[i].nonzero()[:, 0].tolist()
        return sum(logps[t - 1, input_ids[i, t]] for t in positions)

    for i in range(pairs):
        ratios = [log_prob(policy, j) - log_prob(reference, j).detach() for j in (i, i + pairs)]
        margins.append(beta * (ratios[0] - ratios[1]))
        losses.append(-torch.log(torch.sigmoid(margins[-1])))
    return torch.stack(losses).mean(), torch.stack(margins).detach()


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("reference_seed", [0, 1])
def test_loss_and_gradients_are_those_of_all_logits(reference_seed, tie):
    torch.manual_seed(0)
    input_ids, mask = DPO["make_pairs"](3)
    assert len(set(mask.sum(1).tolist())) > 1
    model, reference = small_model(tie=tie), small_model(tie=tie, seed=reference_seed)
    beta = 2.0  # far from where the loss is a straight line
    with torch.no_grad():
        reference_logps = DPO["completion_logps"](reference, input_ids, mask)
    loss, margins = DPO["dpo_loss"](
        DPO["completion_logps"](model, input_ids, mask), reference_logps, beta
    )
    loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    model.zero_grad()
    expected, expected_margins = from_all_logits(model, reference, input_ids, mask, beta)
    expected.backward()
    if reference_seed == 0:  # the policy is its own reference: what the first step sees
        torch.testing.assert_close(loss.item(), torch.tensor(2.0).log().item())
        assert (expected_margins == 0).all()
    else:
        assert expected_margins.abs().min() > 0.01
    # Sums of 8 log-probs of about 5 have a last bit of 4e-6 in fp32: times beta, twice subtracted
    # (gradients have the relative error of the margin).
    torch.testing.assert_close(margins, expected_margins, rtol=0, atol=2e-5)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-5)
    for name, parameter in model.named_parameters():
        largest = parameter.grad.abs().max().item()
        assert largest > 0, name
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=0, atol=3e-5 * largest)


def test_margins_grow(capsys):
    margins = DPO["main"]()
    assert margins[0] == pytest.approx(0, abs=1e-6)
    assert all(later > earlier for earlier, later in pairwise(margins))
    assert margins[-1] > 0.5
    assert capsys.readouterr().out.startswith("step  1  loss 0.693  margin ")


def test_the_lines_in_the_readme_are_dpo():
    readme = Path("README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    (lines,) = [block for block in blocks if "linear_logps(" in block]
    torch.manual_seed(0)
    input_ids, mask = DPO["make_pairs"](3)
    model, reference, beta = small_model(), small_model(seed=1), 2.0
    names = {"torch": torch, "linear_logps": linear_logps, "model": model, "beta": beta}
    names |= {"reference": reference, "input_ids": input_ids, "mask": mask}
    exec(lines, names)
    expected, _ = from_all_logits(model, reference, input_ids, mask, beta)
    torch.testing.assert_close(names["loss"], expected, rtol=0, atol=1e-5)
    assert model.lm_head.weight.grad.abs().sum() > 0
