"""The loss for OpenRLHF against OpenRLHF's own.

Only the files of the loss are run: the packages around them import Ray, vLLM and DeepSpeed. The
last is imported by a helper that the loss does not use, so that an empty module may stand for it.

B sequences, T positions.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from policy_cases import make_batch, make_far_batch

from fastgrpo.integrations.openrlhf import PolicyLoss

pytestmark = pytest.mark.peers


@pytest.fixture(scope="module")
def theirs():
    """Import OpenRLHF's `models/loss.py`."""
    spec = importlib.util.find_spec("openrlhf")
    if spec is None or spec.origin is None:
        pytest.skip("OpenRLHF is not installed")
    package = types.ModuleType("openrlhf_models")
    package.__path__ = [str(Path(spec.origin).parent / "models")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "openrlhf_models", package)
        if importlib.util.find_spec("deepspeed") is None:
            patch.setitem(sys.modules, "deepspeed", types.ModuleType("deepspeed"))
        yield importlib.import_module("openrlhf_models.loss")
        for name in ("openrlhf_models.loss", "openrlhf_models.utils"):
            del sys.modules[name]


CORRECTIONS: list[dict[str, Any]] = [
    {},
    *(
        {
            "is_correction_level": level,
            "is_correction_gating": gating,
            "is_correction_threshold": (0.96, 1.1) if gating == "ratio" else (0.0, bound),
        }
        for level in ("token", "seq")
        for gating, bound in (("ratio", 0), ("binary_kl", 0.01), ("tv", 0.05))
    ),
    {
        "is_correction_level": "token",
        "is_correction_mode": "clip",
        "is_correction_threshold": [0.8, 1.3],
    },
]
LOSSES: list[dict[str, Any]] = [
    {},
    {"dual_clip": 2.0},
    {"token_level_loss": False, "dual_clip": 2.0, "clip_eps_low": 0.3, "clip_eps_high": 0.5},
    {"policy_loss_type": "gspo"},
    {"policy_loss_type": "gspo", "dual_clip": 1.5},
]


def run(loss_fn: Any, batch: Any, **share: Any) -> Any:
    found = loss_fn(
        batch.logps,
        batch.old,
        batch.advantages,
        action_mask=batch.mask.double(),
        rollout_log_probs=batch.sampler,
        **share,
    )
    found[0].backward()
    return [*found, batch.logps.grad]


def assert_equal(ours: Any, theirs: Any) -> None:
    assert len(ours) == len(theirs) == 6
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine is None) == (other is None)
        if mine is not None:
            # OpenRLHF adds 1e-8 to lengths, and averages 0 and 1 in fp32; sequences' losses of
            # either sign, a few units large, may all but cancel.
            torch.testing.assert_close(mine.double(), other.double(), rtol=5e-8, atol=3e-8)


@pytest.mark.parametrize("correction", CORRECTIONS, ids=lambda c: "-".join(map(str, c.values())))
@pytest.mark.parametrize("options", LOSSES, ids=lambda o: "-".join(map(str, o.values())))
def test_all_results_and_the_gradient_are_openrlhfs(theirs, options, correction):
    for seed in range(3):
        batch = make_batch(seed)
        # OpenRLHF's statistic of a sequence without tokens is 0 / 0, which it counts as filtered.
        batch = batch.rows(slice(0, 2)) if correction.get("is_correction_level") else batch
        results = [
            run(module(**options, **correction), batch.with_graph())
            for module in (PolicyLoss, theirs.PolicyLoss)
        ]
        assert_equal(*results)
        assert results[0][1] > 0.05, "nothing was clipped"


@pytest.mark.parametrize("options", [{}, {"token_level_loss": False}, {"policy_loss_type": "gspo"}])
def test_far_log_ratios_are_cut_where_openrlhf_cuts_them(theirs, options):
    (*ours, grad), (*others, their_grad) = (
        run(module(**options), make_far_batch()) for module in (PolicyLoss, theirs.PolicyLoss)
    )
    torch.testing.assert_close(grad, their_grad, rtol=5e-8, atol=0)
    for mine, other in zip(ours[:3], others[:3], strict=True):
        torch.testing.assert_close(mine.double(), other.double(), rtol=5e-8, atol=0)


@pytest.mark.parametrize("options", LOSSES[1:4], ids=["tokens", "sequences", "gspo"])
def test_shares_of_the_step_are_openrlhfs_and_sum_to_it(theirs, options):
    whole = run(theirs.PolicyLoss(**options), make_batch())
    batch, steps = make_batch(), 8
    share = {
        "dp_size": 2,
        # As OpenRLHF gives them: divided by DeepSpeed's micro-batches, and so below 1 at times.
        "batch_num_tokens": batch.mask.sum().float() / steps,
        "global_batch_size": batch.mask.any(-1).sum().float() / steps,
    }
    total, grads = 0.0, []
    for pick in (slice(0, 2), slice(2, 3), slice(3, 5)):
        ours = run(PolicyLoss(**options), batch.rows(pick), **share)
        if pick.start != 2:  # their metrics of no tokens are NaN
            assert_equal(ours, run(theirs.PolicyLoss(**options), batch.rows(pick), **share))
        total, grads = total + ours[0], [*grads, ours[-1]]
    # DeepSpeed divides by the micro-batches and averages the gradients of 2 ranks.
    torch.testing.assert_close(total / 2 / steps, whole[0], rtol=5e-8, atol=3e-8)
    torch.testing.assert_close(torch.cat(grads) / 2 / steps, whole[-1], rtol=5e-8, atol=3e-8)


def test_the_signatures_are_openrlhfs(theirs):
    for method in ("__init__", "forward"):
        mine, other = (
            inspect.signature(getattr(module, method)).parameters
            for module in (PolicyLoss, theirs.PolicyLoss)
        )
        assert list(mine) == list(other)
        assert [p.default for p in mine.values()] == [p.default for p in other.values()]


def test_the_attributes_are_openrlhfs(theirs):
    mine, other = PolicyLoss(policy_loss_type="gspo"), theirs.PolicyLoss(policy_loss_type="gspo")
    names = [name for name in vars(other) if not name.startswith("_") and name != "training"]
    assert {n: getattr(mine, n) for n in names} == {n: getattr(other, n) for n in names}


@pytest.mark.parametrize(
    "options",
    [
        {"dual_clip": 0.9},
        {"is_correction_level": "batch"},
        {"is_correction_mode": "drop"},
        {"is_correction_gating": "kl"},
        {"is_correction_level": "seq", "is_correction_mode": "clip"},
        {"is_correction_level": "token", "is_correction_gating": "tv"},
    ],
)
def test_what_openrlhf_refuses_is_refused(theirs, options):
    with pytest.raises((ValueError, AssertionError)):
        theirs.PolicyLoss(**options)
    with pytest.raises(ValueError, match=list(options)[-1]):
        PolicyLoss(**options)
