"""Memory of a GPU that really runs out: passes and samplings are made smaller until they fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import small_model
from small_runs import weights_of

from fastgrpo.batch import make_batch
from fastgrpo.rollout import SamplingParams
from fastgrpo.rollout.static import StaticCacheRollout


@pytest.fixture
def cap():
    """Let this process take so many bytes of the GPU beyond what it has now."""

    def to(size):
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        limit = torch.cuda.memory_reserved() + size
        torch.cuda.set_per_process_memory_fraction(limit / total)

    yield to
    torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.gpu
@pytest.mark.fault(
    "a GPU with less memory than a micro-batch takes", "smaller micro-batches, the same gradient"
)
def test_on_a_gpu_passes_are_divided_until_they_fit(start, cap):
    count, length = 512, 200
    trainer = start(
        max_completion_length=length, gradient_checkpointing=False, bf16=False,
        per_device_train_batch_size=count, gradient_accumulation_steps=1,
    )  # fmt: skip
    learner, model, gradients = trainer.learner, trainer.policy.model, list[Any]()
    ids = torch.randint(3, 60, (count, length), generator=torch.Generator().manual_seed(0))
    batch = make_batch(
        [[5]] * count, ids.tolist(), [torch.zeros(length)] * count,
        torch.linspace(-1, 1, count), device="cuda",
    )  # fmt: skip
    start_weights = weights_of(trainer)
    learner.optimizer.register_step_pre_hook(
        lambda *_: gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
    )
    learner.optimise(batch)
    for name, p in model.named_parameters():
        p.data.copy_(start_weights[name])
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    learner.optimise(batch)  # as before: with the states of the optimizer, too
    peak = torch.cuda.max_memory_allocated() - before
    for name, p in model.named_parameters():
        p.data.copy_(start_weights[name])
    cap(peak // 3)
    learner.optimise(batch)
    said = learner.take_problems()
    assert said and learner.budget.max_tokens == count * (length + 1) // 2 ** len(said)
    for name, value in gradients[0].items():
        assert torch.equal(gradients[1][name], value)
        torch.testing.assert_close(
            gradients[2][name], value, rtol=0, atol=1e-4 * value.abs().max().item()
        )


@pytest.mark.gpu
@pytest.mark.fault(
    "a GPU with less memory than the completions take", "fewer at once, the same number of them"
)
def test_on_a_gpu_fewer_are_sampled_at_once_until_they_fit(cap):
    model = small_model().cuda()
    sampling = SamplingParams(max_completion_length=200)
    for cuda_graph in (False, True):
        rollout = StaticCacheRollout(
            model, eos_token_ids=[], pad_token_id=0, max_batch=4096, cuda_graph=cuda_graph
        )
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        rollout.generate([[5, 6, 7]] * 4096, 1, sampling, [3] * 4096)
        peak = torch.cuda.max_memory_allocated() - before
        cap(peak // 3)
        found = rollout.generate([[5, 6, 7]] * 4096, 1, sampling, [3] * 4096)
        assert len(found.ids) == 4096 and rollout.max_batch < 4096
        assert len(rollout.take_problems()) == (4096 // rollout.max_batch).bit_length() - 1
        torch.cuda.set_per_process_memory_fraction(1.0)
