"""Parameters whose gradients are given, to compare optimizers on."""

import torch
from torch import nn
from torch.optim import AdamW
from transformers import get_cosine_schedule_with_warmup

from fastgrpo.config import TrainConfig
from fastgrpo.optim import build_optimizer, clip_gradients
from fastgrpo.optimizer_state import load_optimizer, save_optimizer, set_rates

STEPS = 20
BF16 = {"dtype": "bfloat16"}
MASTER = BF16 | {"bf16_updates": "master_weights"}
STOCHASTIC = BF16 | {"bf16_updates": "stochastic_rounding"}
OFFLOAD = {"offload_optimizer": True}


def train_config(**values):
    return TrainConfig(
        learning_rate=1e-2,
        weight_decay=0.1,
        lr_scheduler_type="cosine",
        warmup_steps=3,
        **values,
    )


OPTIMIZERS = {
    "adamw": {},
    "offload": OFFLOAD,
    "master_weights": MASTER,
    "master_weights, offload": MASTER | OFFLOAD,
    "stochastic_rounding": STOCHASTIC,
    "8 bit": {"optim": "adamw_8bit"},
    "master_weights, 8 bit": MASTER | {"optim": "adamw_bnb_8bit"},
}


class Weights(nn.Module):
    """Parameters of all kinds; gradients are given, and so the same whatever the updates are."""

    def __init__(self, dtype=torch.float32, rows=70):
        super().__init__()
        random = torch.Generator().manual_seed(0)
        self.matrix = nn.Parameter(torch.randn(rows, 64, generator=random).to(dtype))
        self.vector = nn.Parameter(torch.randn(48, generator=random).to(dtype))
        self.scalar = nn.Parameter(torch.tensor(2.0).to(dtype))
        self.frozen = nn.Parameter(torch.ones(5, 5).to(dtype), requires_grad=False)
        self.unused = nn.Parameter(torch.ones(3, 3).to(dtype))

    def set_gradients(self, step):
        random = torch.Generator().manual_seed(step)
        for p in (self.matrix, self.vector, self.scalar):
            p.grad = torch.randn(p.shape, generator=random).to(p)


def one_matrix(elements, dtype):
    model = nn.Linear(256, elements // 256, bias=False, dtype=dtype)
    model.weight.grad = torch.randn_like(model.weight)
    return model


def train(model, optimizer, scheduler, steps=range(STEPS)):
    for step in steps:
        optimizer.zero_grad()
        model.set_gradients(step)
        clip_gradients(model, 1.0)
        optimizer.step()
        scheduler.step()


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


def plain_adamw(model):
    """PyTorch's own AdamW, clipping and schedule on an fp32 model."""
    decay = {"params": [model.matrix, model.unused], "weight_decay": 0.1}
    others = {"params": [model.vector, model.scalar], "weight_decay": 0.0}
    optimizer = AdamW([decay, others], lr=1e-2, fused=True)
    return optimizer, get_cosine_schedule_with_warmup(optimizer, 3, STEPS)


def assert_resumes(values, tmp_path, device="cpu"):
    dtype = torch.bfloat16 if "dtype" in values else torch.float32
    whole, first, second = (Weights(dtype).to(device) for _ in range(3))
    train(whole, *build_optimizer(whole, train_config(**values), STEPS))

    optimizer, scheduler = build_optimizer(first, train_config(**values), STEPS)
    train(first, optimizer, scheduler, range(7))
    weights = {name: x.clone() for name, x in first.state_dict().items()}
    save_optimizer(tmp_path / "saved.safetensors", optimizer)
    schedule = scheduler.state_dict()
    train(first, optimizer, scheduler, range(7, STEPS))  # saving has changed nothing
    assert_same(first.state_dict(), whole.state_dict())

    optimizer, scheduler = build_optimizer(second, train_config(**values, seed=1), STEPS)
    train(second, optimizer, scheduler, [3, 1])  # what this was is forgotten
    second.load_state_dict(weights)
    load_optimizer(tmp_path / "saved.safetensors", optimizer)
    assert_same(second.state_dict(), weights)
    scheduler.load_state_dict(schedule)
    set_rates(optimizer, scheduler.get_last_lr())
    train(second, optimizer, scheduler, range(7, STEPS))
    assert_same(second.state_dict(), whole.state_dict())
