"""Which steps are skipped: by the definition, and again by a run that goes on."""

import re
from shutil import rmtree
from statistics import median

import pytest
from small_runs import lines

from fastgrpo.bad_steps import BadSteps, read_bad_step
from fastgrpo.config import TrainConfig
from fastgrpo.trainer import Trainer

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")


def limits(norms, window, ratio):
    """Return whether each norm is skipped, by the definition."""
    good, skipped = [], []
    for norm in norms:
        bad = len(good) >= window and norm > ratio * median(good[-window:])
        skipped.append(bad)
        if not bad and norm > 0:
            good.append(norm)
    return skipped


def test_a_spike_is_far_above_the_median_of_the_good_steps_before_it():
    norms = [5.0, 1.0, 0.0, 2.0, 3.0, 31.0, 3.0, 0.0, 29.0, 1.0, 1.0, 11.0, 10.0, 8.0]
    wanted = limits(norms, 3, 10.0)
    assert wanted[5] and wanted[11]
    config = TrainConfig(max_grad_norm_ratio=10.0, grad_norm_window=3)
    for resumed_at in (None, 4, 6):
        bad_steps, found = BadSteps(config), []
        for i, norm in enumerate(norms):
            if i == resumed_at:
                state = bad_steps.state_dict()
                bad_steps = BadSteps(config)
                bad_steps.load_state_dict(state)
            found.append(bad_steps.reason(0.0, norm) is not None)
            if found[-1]:
                bad_steps.skip()
            else:
                bad_steps.took(norm)
        assert found == wanted
        assert bad_steps.skipped == sum(wanted)


@pytest.mark.slow
def test_what_is_skipped_after_a_checkpoint_is_skipped_again_by_a_run_that_goes_on(start):
    trainer = start(
        max_grad_norm_ratio=1.0, grad_norm_window=1, max_bad_steps=9, max_steps=6,
        save_strategy="steps", save_steps=3,
    )  # fmt: skip
    run, found = trainer.run.path, []
    for resumed in (False, True):
        if resumed:
            rmtree(run / "checkpoints" / "step-6", ignore_errors=True)  # bad steps save none
            (run / "summary.json").unlink()
            trainer = Trainer(trainer.config, resume=True)
        trainer.train()
        metrics = [
            {k: v for k, v in line.items() if not re.search("time|memory|_per_", k)}
            for line in lines(run / "metrics.jsonl")
        ]
        kept = {path.name: read_bad_step(path) for path in (run / "bad_steps").iterdir()}
        found.append((metrics, kept, trainer.learner.bad_steps.state_dict()))
    assert found[0] == found[1]
    skipped = [m["skipped_steps"] for m in found[0][0]]
    assert skipped[2] < skipped[5] == len(found[0][1])
