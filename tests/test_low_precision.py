import math

import pytest
import torch
from given_gradients import (
    MASTER,
    OFFLOAD,
    OPTIMIZERS,
    STEPS,
    STOCHASTIC,
    Weights,
    assert_resumes,
    assert_same,
    plain_adamw,
    train,
    train_config,
)
from torch import nn
from torch.optim import AdamW

from fastgrpo import low_precision
from fastgrpo.config import TrainConfig
from fastgrpo.low_precision import round_stochastically, rounds
from fastgrpo.optim import build_optimizer, clip_gradients
from fastgrpo.optimizer_state import load_optimizer, save_optimizer


@pytest.fixture
def small_pieces(monkeypatch):
    """Parameters of these tests take more than one piece, and rounds more than one parameter."""
    monkeypatch.setattr(low_precision, "PIECE", 1024)


@pytest.mark.parametrize("values", [{}, OFFLOAD])
def test_in_fp32_the_optimizer_is_adamw_to_the_last_bit(values, small_pieces):
    exact, model = Weights(), Weights()
    optimizer, scheduler = plain_adamw(exact)
    for step in range(STEPS):
        exact.set_gradients(step)
        nn.utils.clip_grad_norm_(exact.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
    train(model, *build_optimizer(model, train_config(**values), STEPS))
    assert_same(model.state_dict(), exact.state_dict())
    assert not torch.equal(exact.matrix, Weights().matrix)
    assert torch.equal(exact.unused, Weights().unused)  # no gradient: no decay either


@pytest.mark.parametrize("values", [MASTER, MASTER | OFFLOAD, OFFLOAD])
def test_bf16_parameters_are_rounded_from_copies_that_are_trained_in_fp32(values, small_pieces):
    model, exact = Weights(torch.bfloat16), Weights(torch.bfloat16).float()
    optimizer, scheduler = build_optimizer(model, train_config(**values), STEPS)
    plain, schedule = plain_adamw(exact)
    for step in range(STEPS):
        model.set_gradients(step)
        clip_gradients(model, 1.0)
        for ours, theirs in zip(model.parameters(), exact.parameters(), strict=True):
            theirs.grad = None if ours.grad is None else ours.grad.float()
        optimizer.step()
        scheduler.step()
        plain.step()
        schedule.step()
        rounded = {name: x.bfloat16() for name, x in exact.state_dict().items()}
        assert_same(model.state_dict(), rounded)


def fp64_adamw(start, gradients, rates, decay):
    """Loshchilov and Hutter's algorithm 2, transcribed."""
    x, m, v = start.double(), 0.0, 0.0
    for t, (g, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        m = 0.9 * m + 0.1 * g.double()
        v = 0.999 * v + 0.001 * g.double() ** 2
        m_hat, v_hat = m / (1 - 0.9**t), v / (1 - 0.999**t)
        x = x - rate * (m_hat / (v_hat.sqrt() + 1e-8) + decay * x)
    return x, m, v


@pytest.mark.parametrize("values", [MASTER, STOCHASTIC])
def test_copies_and_states_agree_with_adamw_in_fp64(values, small_pieces):
    model = Weights(torch.bfloat16)
    start = model.matrix.detach().clone()
    optimizer, scheduler = build_optimizer(model, train_config(**values), STEPS)
    gradients, rates = [], []
    for step in range(STEPS):
        rates.append(scheduler.get_last_lr()[0])
        train(model, optimizer, scheduler, [step])
        gradients.append(model.matrix.grad)
    x, m, v = fp64_adamw(start, gradients, rates, 0.1)
    if values is MASTER:
        copy = torch.cat([c for part in optimizer.rounds for c in part.copies])
        copy = copy[: start.numel()].view_as(start)
        # twenty roundings of numbers below 4 to fp32, each by 2**-23 at most
        torch.testing.assert_close(copy.double(), x, rtol=0, atol=STEPS * 2**-23)
        assert torch.equal(model.matrix, copy.bfloat16())
    else:
        state = optimizer.state[model.matrix]
        assert state["step"] == STEPS
        torch.testing.assert_close(state["exp_avg"].double(), m, rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(state["exp_avg_sq"].double(), v, rtol=1e-5, atol=1e-12)
        # Each step was off by less than a unit in the last place, independently of the others.
        largest = start.abs().double() + sum(rates)
        unit = torch.finfo(torch.bfloat16).eps * 2.0 ** largest.log2().floor()
        error = (model.matrix.detach().double() - x) / unit
        assert error.abs().max() < STEPS
        assert abs(error.mean()) < 4 * math.sqrt(STEPS / 4 / error.numel())


@pytest.mark.parametrize("values", [None, MASTER, STOCHASTIC])
def test_an_update_of_a_millionth_is_not_lost(values):
    """Adam's update is the learning rate as long as the gradient stays the same."""
    steps, rate = 1000, 1e-6
    model = nn.Linear(128, 128, bias=False, dtype=torch.bfloat16)
    nn.init.ones_(model.weight)
    model.weight.grad = torch.ones_like(model.weight)
    if values is None:
        optimizer = AdamW(model.parameters(), lr=rate, weight_decay=0.0, fused=True)
    else:
        config = TrainConfig(learning_rate=rate, lr_scheduler_type="constant", **values)
        optimizer, _ = build_optimizer(model, config, 2 * steps)
    for _ in range(steps):
        optimizer.step()
    if values is None:
        assert torch.equal(model.weight, torch.ones_like(model.weight))
    elif values is MASTER:
        (copy,) = optimizer.rounds[0].copies
        moved = 1 - copy.double()
        # fp32 too rounds: to 17 times 2**-24, the last place, which is 1.013e-6
        assert moved.eq(steps * 17 * 2**-24).all()
        assert model.weight.eq(1).all()  # still the nearest bfloat16
        for _ in range(steps):
            optimizer.step()
        assert model.weight.eq(1 - 2**-8).all()  # of 0.998
    else:
        moved = 1 - model.weight.double()
        # a step goes down by 2**-8 with probability 1e-6 * 2**8
        deviation = math.sqrt(steps * rate * 2**-8 / moved.numel())
        assert abs(moved.mean() - 1e-3) < 4 * deviation < 7e-5


def test_stochastic_rounding_is_right_on_average_and_only_ever_to_a_neighbour():
    random = torch.Generator().manual_seed(0)
    values = torch.randn(64, generator=random) * 10.0 ** torch.arange(-32, 32)
    many = 20_000
    rounded = round_stochastically(values.expand(many, -1).contiguous(), random).double()
    lower = (values.view(torch.int32) & -(2**16)).view(torch.float32).double()  # towards 0
    unit = (values.view(torch.int32) & 0x7F800000).view(torch.float32).double() * 2**-7
    upper = lower + unit * values.sign()
    assert ((rounded == lower) | (rounded == upper)).all()
    share = (values.double() - lower) / (upper - lower)
    found = (rounded == upper).double().mean(0)
    assert ((found - share).abs() <= 5 * (share * (1 - share) / many).sqrt() + 1e-12).all()
    assert (share > 0.1).sum() > 32  # the neighbours are two indeed


def test_stochastic_rounding_leaves_what_is_exact_and_what_is_no_number():
    random = torch.Generator().manual_seed(0)
    exact = torch.randn(4096, generator=random).bfloat16()
    tiny = torch.finfo(torch.float32).tiny
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, tiny, -tiny]).bfloat16()
    for values in (exact, special):
        again = round_stochastically(values.float(), random)
        assert torch.equal(again.view(torch.int16), values.view(torch.int16))
    patterns = torch.tensor([0x7F800001, 0x7FC00000, 0x7FFFFFFF, -1, -0x7FFFFF])
    nans = patterns.to(torch.int32).view(torch.float32)
    assert nans.isnan().all()
    assert round_stochastically(nans.repeat(100), random).isnan().all()
    largest = torch.full((1000,), torch.finfo(torch.float32).max)
    found = round_stochastically(largest, random).unique().tolist()
    assert set(found) <= {torch.finfo(torch.bfloat16).max, torch.inf}


def test_stochastic_rounding_is_repeatable_and_depends_on_the_seed():
    found = []
    for seed in (1, 1, 2):
        model = Weights(torch.bfloat16)
        train(model, *build_optimizer(model, train_config(**STOCHASTIC, seed=seed), STEPS))
        found.append(model.state_dict())
    assert_same(found[0], found[1])
    assert not torch.equal(found[0]["matrix"], found[2]["matrix"])


@pytest.mark.parametrize("values", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_what_was_saved_goes_on_to_the_last_bit(values, small_pieces, tmp_path):
    assert_resumes(values, tmp_path)


def test_nothing_is_kept_before_the_first_step_and_that_can_be_saved_too(tmp_path):
    model, other = Weights(torch.bfloat16), Weights(torch.bfloat16)
    optimizer, _ = build_optimizer(model, train_config(**MASTER), STEPS)
    fresh, scheduler = build_optimizer(other, train_config(**MASTER), STEPS)
    assert optimizer.rounds == []
    save_optimizer(tmp_path / "saved", optimizer)
    load_optimizer(tmp_path / "saved", fresh)
    with torch.no_grad():
        other.matrix.fill_(3.0)  # as supervised training before the first step would
    train(other, fresh, scheduler, [0, 1])  # the first step of a warm-up is one of 0
    assert (other.matrix - 3).abs().max() < 0.05


def test_small_parameters_are_stepped_together(small_pieces):
    parameters = [torch.ones(size) for size in (1000, 24, 1, 2049, 1022, 3)]
    found = [[(x.start, x.stop) for x in these] for these in rounds(parameters)]
    assert found == [
        [(0, 1000), (0, 24)],
        [(0, 1)],
        [(0, 1024)],
        [(1024, 2048)],
        [(2048, 2049), (0, 1022)],
        [(0, 3)],
    ]


@pytest.mark.gpu
@pytest.mark.parametrize("values", [OFFLOAD, MASTER, MASTER | OFFLOAD])
def test_on_a_gpu_copies_are_trained_as_adamw_trains(values, small_pieces):
    dtype = torch.bfloat16 if "dtype" in values else torch.float32
    exact, model = Weights(dtype).float(), Weights(dtype).cuda()
    plain, schedule = plain_adamw(exact)
    optimizer, scheduler = build_optimizer(model, train_config(**values), STEPS)
    for step in range(STEPS):
        model.set_gradients(step)
        for ours, theirs in zip(model.parameters(), exact.parameters(), strict=True):
            theirs.grad = None if ours.grad is None else ours.grad.float().cpu()
        for x in (optimizer, scheduler, plain, schedule):
            x.step()
    for name, value in exact.state_dict().items():
        found = model.state_dict()[name].cpu()
        if "offload_optimizer" in values:
            assert torch.equal(found, value.to(dtype)), name
        else:  # a copy that lies between two bfloat16 may go the other way
            torch.testing.assert_close(found, value.to(dtype), rtol=2**-7, atol=1e-6)
