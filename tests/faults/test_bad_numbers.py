"""Losses and gradients that are no numbers, or far above those before them."""

from __future__ import annotations

import math
import re
from copy import deepcopy
from statistics import median

import pytest
import torch
from safetensors.torch import load_file
from small_runs import lines, weights_of

from fastgrpo.bad_steps import read_bad_step
from fastgrpo.cli import main
from fastgrpo.replay import replay
from fastgrpo.trace import Finding

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")

UP = "model.layers.0.mlp.up_proj"
ATTENTION = "model.layers.0.self_attn.o_proj"
EARLY_REWARD = """
def too_large(completions, trainer_state, **columns):
    # Of the second generation alone: 3e38 is a number in fp32, and ten of them are none.
    large = 3e38 if trainer_state.global_step == 1 else 1.0
    return [large * ("e" in text) for text in completions]
"""


class Spoil(torch.autograd.Function):
    """Passes on what it gets; a value of the gradient becomes NaN."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone()
        gradient.view(-1)[3] = math.nan
        return gradient


def infinite_for_one_token(model, batch):
    """A layer gives infinity where one of its inputs is that token."""
    token = int(batch.input_ids[batch.mask][0])
    where = {}
    embedding = model.get_input_embeddings()
    layer = model.get_submodule(UP)
    handles = [
        embedding.register_forward_hook(
            lambda module, args, output: where.update(found=args[0] == token)
        ),
        layer.register_forward_hook(
            lambda module, args, output: output.masked_fill(where["found"][..., None], math.inf)
        ),
    ]
    return lambda: [handle.remove() for handle in handles]


def nan_on_the_way_back(model, batch):
    handle = model.get_submodule(ATTENTION).register_forward_hook(
        lambda module, args, output: Spoil.apply(output)
    )
    return handle.remove


def nan_parameter(model, batch):
    values = model.get_parameter(f"{UP}.weight").data
    kept = values[2, 3].clone()
    values[2, 3] = math.nan

    def undo():
        values[2, 3] = kept

    return undo


def overflowing_logits(model, batch):
    """A row of the head is finite, and so are hidden states, but not their product."""
    values = model.get_output_embeddings().weight.data
    token = next(i for i in range(len(values)) if i not in batch.input_ids)
    kept = values[token].clone()
    values[token] = 3e38

    def undo():
        values[token] = kept

    return undo


def overflowing_advantage(model, batch):
    first, second = batch.mask.nonzero()[:2]
    kept = batch.advantages.clone()
    batch.advantages[first] = batch.advantages[second] = 3e38

    def undo():
        batch.advantages.copy_(kept)

    return undo


def nan_advantage(model, batch):
    kept = batch.advantages.clone()
    batch.advantages[batch.mask.nonzero()[0]] = math.nan

    def undo():
        batch.advantages.copy_(kept)

    return undo


FAULTS = {
    infinite_for_one_token: (UP, "forward"),
    nan_on_the_way_back: (ATTENTION, "backward"),
    nan_parameter: (f"{UP}.weight", "before"),
    overflowing_logits: ("lm_head", "loss"),
    overflowing_advantage: ("lm_head", "loss"),
    nan_advantage: ("advantages of the batch", "before"),
}


def everything(trainer):
    """Return what a step that is not taken must leave as it is."""
    learner = trainer.learner
    return deepcopy(
        {
            "weights": weights_of(trainer),
            "optimizer": learner.optimizer.state_dict(),
            "entropy bonus": learner.entropy_bonus.state_dict(),
        }
    )


def assert_equal(found, wanted):
    assert type(found) is type(wanted)
    if isinstance(found, torch.Tensor):
        assert torch.equal(found.nan_to_num(7), wanted.nan_to_num(7))
    elif isinstance(found, dict):
        assert found.keys() - {"lr"} == wanted.keys() - {"lr"}  # of the schedule, which goes on
        for name in found.keys() - {"lr"}:
            assert_equal(found[name], wanted[name])
    elif isinstance(found, list | tuple):
        for one, other in zip(found, wanted, strict=True):
            assert_equal(one, other)
    else:
        assert found == wanted


@pytest.mark.fault(
    "a layer gives infinity for one token; a NaN in backward, in a parameter, in an advantage; "
    "logits and advantages that overflow",
    "the step is skipped, nothing has changed, the first bad module is named",
)
def test_a_step_whose_numbers_go_wrong_changes_nothing_and_names_the_module(start):
    trainer = start(max_bad_steps=99, lr_scheduler_type="linear", max_steps=100)
    learner = trainer.learner
    (batch,), _ = trainer.collect(1, {})
    learner.optimise(batch, 1)
    for number, (fault, (module, phase)) in enumerate(FAULTS.items(), 2):
        undo = fault(trainer.policy.model, batch)
        before = everything(trainer)
        metrics = learner.optimise(batch, number)
        assert_equal(everything(trainer), before)
        undo()
        assert metrics["skipped_steps"] == number - 1
        assert not (math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"]))
        assert metrics["learning_rate"] == pytest.approx(1e-2 * (101 - number) / 100)
        (said,) = learner.take_problems()
        bad = read_bad_step(trainer.run.path / "bad_steps" / f"step-{number}")
        assert (bad.finding, bad.weights) == (Finding(module, phase), "step-2"), said
        assert (
            f"step {number} was skipped, nothing has changed: the loss is " in said
            and module in said
        )
        assert not any(p.grad is not None for p in trainer.policy.model.parameters())
    kept = [path.parent.name for path in trainer.run.path.glob("bad_steps/*/weights")]
    assert kept == ["step-2"]  # of all in a row
    learner.optimise(batch, 9)
    assert learner.bad_steps.in_a_row == 0
    assert not torch.equal(weights_of(trainer)[f"{UP}.weight"], before["weights"][f"{UP}.weight"])
    assert not any(m._forward_hooks for m in trainer.policy.model.modules())


@pytest.mark.fault(
    "a reward of 3e38, not scaled", "the step is skipped and kept, replay shows it, the run goes on"
)
def test_a_reward_that_overflows_costs_its_step_and_can_be_replayed(start, tmp_path, capsys):
    (tmp_path / "early.py").write_text(EARLY_REWARD)
    trainer = start(
        reward_funcs=[f"{tmp_path}/early.py:too_large"],
        scale_rewards="none",
        max_steps=3,
        reward_timeout=None,
        lora_r=2,
        use_peft=True,
        lora_dropout=0.2,
    )
    trainer.train()
    run = trainer.run.path
    metrics = lines(run / "metrics.jsonl")
    assert [m["skipped_steps"] for m in metrics] == [0, 1, 1]
    assert [m["grad_norm"] is None for m in metrics] == [False, True, False]
    folder = run / "bad_steps" / "step-2"
    said = [line["text"] for line in lines(run / "warnings.jsonl") if "skipped" in line["text"]]
    assert len(said) == 1 and f"`fastgrpo replay {folder}` runs it again" in said[0]
    names = {path.name for path in (folder / "weights").glob("*.safetensors")}
    assert names == {"adapter_model.safetensors"}  # the adapters alone

    found = replay(folder)
    assert found.came_again
    assert (repr(found.loss), repr(found.grad_norm)) == (
        repr(found.bad.loss),
        repr(found.bad.grad_norm),
    )
    assert found.finding == found.bad.finding
    assert found.columns["advantages"].high > 1e38
    capsys.readouterr()
    assert main(["replay", str(folder)]) == 0
    out = capsys.readouterr().out
    assert out.endswith("the fault came again\n")
    assert found.bad.finding.module in out
    assert main(["replay", str(run)]) == 2
    (sentence,) = capsys.readouterr().err.splitlines()[1:]
    assert "holds no bad_step.json: give a directory bad_steps/step-N" in sentence


@pytest.mark.fault(
    "a parameter becomes NaN and stays so",
    "max_bad_steps in a row are skipped, their weights are kept once, the next ends the run",
)
def test_a_run_ends_after_so_many_bad_steps_in_a_row(start):
    trainer = start(max_bad_steps=2, max_steps=9, save_strategy="steps", save_steps=3)
    take = trainer.take_step

    def spoil_then_take():
        if trainer.step == 1:
            nan_parameter(trainer.policy.model, None)
        return take()

    trainer.take_step = spoil_then_take
    with pytest.raises(FloatingPointError) as error:
        trainer.train()
    folder = trainer.run.path / "bad_steps"
    assert re.match(
        rf"step 4: the loss is \S+ and the norm of the gradient is nan; {UP}.weight held values "
        rf"that are no numbers before the step; `fastgrpo replay {folder}/step-4` runs it again; "
        "3 steps in a row could not be taken, max_bad_steps is 2, .* from an earlier checkpoint",
        str(error.value),
    )
    assert {path.name for path in folder.iterdir()} == {"step-2", "step-3", "step-4"}
    assert [path.parent.name for path in folder.glob("*/weights")] == ["step-2"]
    weights = load_file(folder / "step-2" / "weights" / "model.safetensors")
    assert_equal(weights[f"{UP}.weight"], weights_of(trainer)[f"{UP}.weight"])
    for step in (2, 4):
        found = replay(folder / f"step-{step}")
        assert found.came_again and found.finding == Finding(f"{UP}.weight", "before")
    assert [m["skipped_steps"] for m in lines(trainer.run.path / "metrics.jsonl")] == [0, 1, 2]


def test_a_fault_of_the_model_in_memory_does_not_come_again_in_replay(start):
    trainer = start(max_bad_steps=0)
    (batch,), _ = trainer.collect(1, {})
    undo = infinite_for_one_token(trainer.policy.model, batch)
    with pytest.raises(FloatingPointError, match="this step could not be taken, max_bad_steps is"):
        trainer.learner.optimise(batch, 1)
    undo()
    wanted = trainer.learner.optimise(batch, 1)
    found = replay(trainer.run.path / "bad_steps" / "step-1")
    assert not found.came_again and found.finding is None
    assert (found.loss, found.grad_norm) == (wanted["loss"], wanted["grad_norm"])  # bitwise
    other = replay(trainer.run.path / "bad_steps" / "step-1", ["dtype=bfloat16", "bf16=true",
        "bf16_updates=master_weights"])  # fmt: skip
    assert 0 < abs(other.grad_norm / wanted["grad_norm"] - 1) < 0.05


@pytest.mark.fault(
    "a gradient 100 times the median, with max_grad_norm_ratio: 10",
    "the step is skipped, nothing has changed; replay shows the largest gradients",
)
def test_a_spike_is_skipped_and_kept(start):
    trainer = start(max_grad_norm_ratio=10.0, grad_norm_window=2, max_bad_steps=1)
    learner = trainer.learner
    (batch,), _ = trainer.collect(1, {})
    norms = [learner.optimise(batch, step)["grad_norm"] for step in (1, 2)]
    before = everything(trainer)
    batch.advantages *= 100
    metrics = learner.optimise(batch, 3)
    assert_equal(everything(trainer), before)
    assert metrics["grad_norm"] > 10 * median(norms) and metrics["skipped_steps"] == 1
    found = replay(trainer.run.path / "bad_steps" / "step-3")
    assert found.came_again and found.finding is None
    assert found.grad_norm == metrics["grad_norm"]
    assert found.bad.limit == 10 * median(norms)
    total = math.sqrt(sum(norm**2 for _, norm in found.gradients))
    assert 0.5 * found.grad_norm < total < found.grad_norm
    with pytest.raises(FloatingPointError, match=r"step 4: the norm .* 2 steps in a row could not"):
        learner.optimise(batch, 4)


@pytest.mark.fault(
    "out of memory as a bad step is looked into", "it is skipped, kept and said, the run goes on"
)
def test_a_bad_step_is_skipped_without_a_look_where_memory_runs_out(start):
    trainer = start(max_bad_steps=1)
    learner, model = trainer.learner, trainer.policy.model
    (batch,), _ = trainer.collect(1, {})

    def runs_out(module, args, output):
        if module._forward_pre_hooks:  # it is watched
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 is")

    handle = model.get_submodule(UP).register_forward_hook(runs_out)
    undo, before = infinite_for_one_token(model, batch), everything(trainer)
    assert learner.optimise(batch, 1)["skipped_steps"] == 1
    assert_equal(everything(trainer), before)
    undo()
    (said,) = learner.take_problems()
    assert (
        "memory to find out where (CUDA out of memory. Tried to allocate 2.00 GiB); `fast" in said
    )
    assert read_bad_step(trainer.run.path / "bad_steps" / "step-1").finding is None
    learner.optimise(batch, 2)
    assert learner.bad_steps.in_a_row == 0
    handle.remove()
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.fault("a bad step that cannot be written", "it is skipped and said, the run goes on")
def test_a_bad_step_that_cannot_be_kept_does_not_end_the_run(start):
    trainer = start()
    (batch,), _ = trainer.collect(1, {})
    (trainer.run.path / "bad_steps").write_text("in the way")
    undo = nan_advantage(None, batch)
    assert trainer.learner.optimise(batch, 1)["skipped_steps"] == 1
    undo()
    (said,) = trainer.learner.take_problems()
    assert "step 1 was skipped" in said and "could not be written" in said
    assert trainer.learner.optimise(batch, 2)["skipped_steps"] == 1
