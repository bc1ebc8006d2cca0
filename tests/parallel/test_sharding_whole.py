"""A sharded model while it is whole, on one process under FSDP2."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from small_models import small_model
from torch import nn
from torch.distributed.tensor import DTensor

from fastgrpo.sharding import Sharding, build_mesh


@pytest.fixture
def alone() -> Generator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def hooks(model: nn.Module) -> list[list[Any]]:
    """Return what every module calls before and after its forward pass, in this order."""
    both = [(m._forward_pre_hooks, m._forward_hooks) for m in model.modules()]
    return [list(some.values()) for pair in both for some in pair]


def test_a_whole_model_is_as_it_was_and_a_model_in_pieces_again_afterwards(alone: None) -> None:
    model = small_model("qwen3", True)
    ids = torch.arange(12)[None]
    wanted = model(input_ids=ids).logits
    plain = hooks(model)
    sharding = Sharding(model, build_mesh(1, 1), bf16=False)
    # What others hang on it stays where it is, and is called.
    seen: list[nn.Module] = []
    model.register_forward_pre_hook(lambda module, _: seen.append(module))
    in_pieces, layers = hooks(model), sum(map(len, hooks(model))) - sum(map(len, plain))
    assert layers > 4
    with sharding.whole(), sharding.whole(), torch.no_grad():
        assert sum(map(len, hooks(model))) == sum(map(len, plain)) + 1
        assert not any(isinstance(p, DTensor) for p in model.parameters())
        torch.testing.assert_close(model(input_ids=ids).logits, wanted, rtol=0, atol=0)
        assert seen == [model]
    assert hooks(model) == in_pieces
    assert all(isinstance(p, DTensor) for p in model.parameters())
    torch.testing.assert_close(model(input_ids=ids).logits, wanted, rtol=0, atol=0)


def test_what_is_changed_in_pieces_is_what_is_gathered_next(alone: None) -> None:
    """Also after a pass without a gradient, which leaves the root's group gathered."""
    model = small_model("qwen3", False)
    sharding = Sharding(model, build_mesh(1, 1), bf16=False)
    with torch.no_grad():
        sharding.decode(input_ids=torch.arange(5)[None])
        assert not isinstance(model.lm_head.weight, DTensor)
        sharding.reshard()
        model.lm_head.weight.mul_(0)
        sharding.decode(input_ids=torch.arange(5)[None])
        assert model.lm_head.weight.abs().max() == 0
    with sharding.whole():
        assert model.lm_head.weight.abs().max() == 0
