"""Memory that runs out: in training, for log-probs and while sampling."""

from __future__ import annotations

import re
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_models import small_model
from small_runs import lines, weights_of

from fastgrpo.batch import make_batch
from fastgrpo.config import config_from
from fastgrpo.distributed import World
from fastgrpo.rollout import SamplingParams
from fastgrpo.rollout.static import StaticCacheRollout
from fastgrpo.token_budget import TokenBudget

CUDA_SAYS = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 3 GiB"
BUDGET = 200  # three sequences of these models' runs
LAYER = "model.layers.1.mlp.act_fn"


class RunsOut(torch.autograd.Function):
    """Passes on what it gets; memory runs out on the way back."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError(CUDA_SAYS)


def cuda_out_of_memory() -> None:
    raise torch.OutOfMemoryError(CUDA_SAYS)


def cpu_out_of_memory() -> None:
    torch.empty(2**60)


class Shortage:
    """Lets memory run out in a layer, at one of its calls or where there are too many rows."""

    def __init__(self, model, *, at=None, rows_above=None, way=cuda_out_of_memory, trains=True):
        self.at, self.rows_above, self.way, self.trains = at, rows_above, way, trains
        self.calls = 0
        self.kept: list[Any] = []
        """What the call that failed had made, if it is still there."""
        self.alive: list[int] = []
        """How much of that was there at each call after it."""
        self.handle = model.get_submodule(LAYER).register_forward_hook(self)

    def __call__(self, module, args, output):
        if torch.is_grad_enabled() != self.trains:
            return None
        self.calls += 1
        if self.kept:
            self.alive.append(sum(one() is not None for one in self.kept))
        short = self.calls - 1 == self.at
        short |= self.rows_above is not None and len(output) > self.rows_above
        if not short:
            return None
        self.kept = [weakref.ref(output)]
        if self.way is RunsOut:
            return RunsOut.apply(output)
        return self.way()


class Trained:
    """Takes the same step on the same batch again and again, and says what came of it."""

    def __init__(self, trainer):
        self.trainer, self.learner = trainer, trainer.learner
        (self.batch,), _ = trainer.collect(1, {})
        self.gradient: dict[str, torch.Tensor] = {}
        self.learner.optimizer.register_step_pre_hook(self._note)
        self.start = weights_of(trainer)

    def _note(self, *_):
        named = self.trainer.policy.model.named_parameters()
        self.gradient = {name: p.grad.clone() for name, p in named}

    def step(self, budget=BUDGET):
        for name, p in self.trainer.policy.model.named_parameters():
            p.data.copy_(self.start[name])
        self.learner.budget.max_tokens = budget
        torch.manual_seed(7)
        metrics = self.learner.optimise(self.batch, 1)
        return dict(self.gradient), metrics


@pytest.mark.fault(
    "out of memory in any micro-batch, forward or backward",
    "smaller micro-batches, the same gradient and metrics; said once and remembered",
)
@pytest.mark.parametrize(
    ("way", "places"),
    [
        (cuda_out_of_memory, slice(1)),
        (RunsOut, slice(2, 3)),
        pytest.param(cuda_out_of_memory, slice(None), marks=pytest.mark.slow),
        pytest.param(RunsOut, slice(None), marks=pytest.mark.slow),
        pytest.param(cpu_out_of_memory, slice(None), marks=pytest.mark.slow),
    ],
)
def test_a_micro_batch_that_does_not_fit_is_divided_and_the_gradient_is_the_same(
    start, way, places
):
    trained = Trained(start(gradient_checkpointing=False, max_tokens_per_microbatch=BUDGET))
    model, budget = trained.trainer.policy.model, trained.learner.budget
    whole, expected = trained.step()
    passes = budget.passes(trained.batch).of(0)
    assert len(passes) > 4
    for k, rows in list(enumerate(passes))[places]:
        shortage = Shortage(model, at=k, way=way)
        gradient, metrics = trained.step()
        shortage.handle.remove()
        tokens = sum(trained.batch.lengths[i] for i in rows)
        assert budget.max_tokens == tokens // 2
        (said,) = trained.learner.take_problems()
        assert f"{len(rows)} sequences, {tokens} tokens (" in said
        assert f"max_tokens_per_microbatch={tokens // 2} says so from the start" in said
        assert metrics["memory/max_tokens_per_microbatch"] == tokens // 2
        assert not any(shortage.alive) and shortage.alive  # all gone before it was tried again
        alike, _ = trained.step(tokens // 2)
        for name, value in gradient.items():
            # The sum of another order of some 20 parts; bitwise where the order is the same.
            scale = whole[name].abs().max()
            torch.testing.assert_close(value, whole[name], rtol=0, atol=1e-5 * scale)
            assert torch.equal(value, alike[name])
        for name in expected.keys() - {"memory/peak_gib"}:
            assert metrics[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-6), name


def test_dropout_is_the_same_when_a_step_is_tried_again(start):
    trained = Trained(start(gradient_checkpointing=False, max_tokens_per_microbatch=BUDGET))
    model = trained.trainer.policy.model
    model.get_submodule("model.norm").register_forward_hook(
        lambda module, args, output: F.dropout(output, 0.1) if torch.is_grad_enabled() else output
    )
    shortage = Shortage(model, at=1)
    gradient, _ = trained.step()
    shortage.handle.remove()
    alike, _ = trained.step(trained.learner.budget.max_tokens)
    for name, value in gradient.items():
        assert torch.equal(value, alike[name])


@pytest.mark.fault(
    "out of memory as log-probs of the policy and the reference are computed",
    "smaller micro-batches, the same log-probs; what training runs is smaller too",
)
@pytest.mark.slow
def test_log_probs_are_computed_in_smaller_passes(start):
    options = {"steps_per_generation": 4, "beta": 0.1, "max_tokens_per_microbatch": BUDGET}
    trainer = start(**options, gradient_checkpointing=False)
    learner, sampled = trainer.learner, []
    learner.add_logps, add = lambda batch, **_: sampled.append(batch) or {}, learner.add_logps
    trainer.collect(1, {})
    (batch,) = sampled

    def logps(budget=BUDGET):
        learner.budget.max_tokens = budget
        batch.old_logps = batch.ref_logps = None
        add(batch)
        return torch.stack([batch.old_logps, batch.ref_logps])

    whole = logps()
    for model in (trainer.policy.model, learner.reference.frozen.model):
        for k in (0, 2):
            shortage = Shortage(model, at=k, trains=False)
            found = logps()
            shortage.handle.remove()
            assert len(learner.take_problems()) == 1 and learner.budget.max_tokens < BUDGET
            assert not any(shortage.alive)
            # One product of a row may be summed in another order in a smaller matrix.
            torch.testing.assert_close(found, whole, rtol=0, atol=1e-5)
    assert found[0].count_nonzero() == batch.num_completion_tokens


def halved(config, batch, fault, *, world=None):
    """Run the passes of a batch with a fault in the first, and return the budget that is left."""
    budget = TokenBudget(config, world or World(), packed=True)

    def run(passes, own):
        for _ in own:
            fault()

    budget.run(batch, run)
    return budget


def made_batch(count=6, length=10):
    logps = [torch.zeros(length)] * count
    ids = [[5] * length] * count
    return make_batch([[3]] * count, ids, logps, torch.ones(count), device="cpu")


@pytest.mark.fault(
    "out of memory where passes cannot be made smaller: one sequence, a loss that is a mean over "
    "the pass, several processes",
    "the run ends with one sentence that says what to write",
)
@pytest.mark.parametrize(
    ("options", "world", "sentence"),
    [
        (
            {"max_tokens_per_microbatch": 11},
            World(),
            "out of memory in a pass of one sequence, 11 tokens (CUDA out of memory. Tried to "
            "allocate 2.00 GiB), which cannot be divided: lower max_completion_length",
        ),
        ({"loss_type": "bnpo"}, World(), "smaller on the way: lower per_device_train_batch_size"),
        ({"top_entropy_quantile": 0.5}, World(), "lower per_device_train_batch_size"),
        ({}, World(0, 2), "alone: write max_tokens_per_microbatch=16"),
    ],
)
def test_what_cannot_be_divided_ends_with_a_sentence(options, world, sentence):
    config = config_from(
        {"max_completion_length": 10, "num_generations": 2, "per_device_train_batch_size": 6}
        | options
    )
    with pytest.raises(torch.OutOfMemoryError, match=re.escape(sentence)) as error:
        halved(config, made_batch(), cuda_out_of_memory, world=world)
    assert "\n" not in str(error.value)


def test_budgets_are_halved_as_often_as_it_takes_and_errors_of_others_are_theirs():
    config = config_from({"max_completion_length": 10, "per_device_train_batch_size": 8})
    failures = iter([True, True])

    def twice():
        if next(failures, False):
            cpu_out_of_memory()

    budget = halved(config, made_batch(8), twice)
    assert budget.max_tokens == 22  # 88, then 44
    said = budget.take_problems()
    assert len(said) == 2 and "DefaultCPUAllocator: can't allocate memory" in said[0]
    again = TokenBudget(config, World(), packed=True)
    again.load_state_dict(budget.state_dict())
    assert again.passes(made_batch(8)) == budget.passes(made_batch(8))
    fresh = TokenBudget(config, World(), packed=True)
    fresh.load_state_dict(TokenBudget(config, World(), packed=True).state_dict())
    assert fresh.max_tokens is None and not fresh.lowered

    def slips():
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        halved(config, made_batch(), slips)


@pytest.mark.fault(
    "out of memory while sampling, in training and in evaluations",
    "fewer completions at once, the same texts; said once and remembered",
)
@pytest.mark.slow
def test_what_does_not_fit_is_sampled_in_smaller_parts_with_the_same_texts(start, two_splits):
    options = {"dataset_name": two_splits, "eval_strategy": "steps", "eval_steps": 1,
               "max_steps": 2, "max_eval_samples": 8, "num_generations_eval": 2}  # fmt: skip
    whole = start("whole", **options)
    whole.train()
    trainer = start("run", **options)
    shortage = Shortage(trainer.policy.model, rows_above=10, trains=False)
    trainer.train()
    assert not any(shortage.alive) and trainer.sampler.rollout.max_batch == 8  # 32, 16
    for name in ("completions", "rewards"):
        found, wanted = (lines(one.run.path / f"{name}.jsonl") for one in (trainer, whole))
        assert found == wanted
    said = [line["text"] for line in lines(trainer.run.path / "warnings.jsonl")]
    said = [text for text in said if "out of memory" in text]
    assert len(said) == 2
    assert said[0].startswith("out of memory while 32 completions were sampled at once (CUDA out")
    assert said[1].endswith("max_generation_batch_size=8 says so from the start")
    for name, value in weights_of(trainer).items():
        torch.testing.assert_close(value, weights_of(whole)[name], rtol=0, atol=1e-3)


def test_one_completion_that_does_not_fit_ends_with_a_sentence():
    model = small_model()
    rollout = StaticCacheRollout(model, eos_token_ids=[1], pad_token_id=0)
    Shortage(model, rows_above=0, trains=False)
    sentence = "while 1 completion was sampled .*: lower max_completion_length, or take shorter"
    with pytest.raises(torch.OutOfMemoryError, match=sentence):
        rollout.generate([[5, 6]], 4, SamplingParams(max_completion_length=4))
    assert [text.partition(" at once")[0][-2:] for text in rollout.take_problems()] == ["ed", "ed"]
