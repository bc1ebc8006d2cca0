import pytest
import torch
from given_gradients import MASTER, OFFLOAD, OPTIMIZERS, STEPS, STOCHASTIC, one_matrix, train_config
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.optim import AdamW
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.measure import CpuAllocations
from fastgrpo import low_precision
from fastgrpo.low_precision import MasterWeights
from fastgrpo.optim import build_optimizer, optimizer_bytes
from fastgrpo.optimizer_state import gathered

# bytes of states for each parameter, and at the peak of a step
MEMORY = {
    "adamw": ({}, 8, 0),
    "offload": (OFFLOAD, 12, None),
    "master_weights": (MASTER, 12, 4),
    "stochastic_rounding": (STOCHASTIC, 8, 11),
    "8 bit": ({"optim": "adamw_8bit"}, 2 + 8 / 256, None),
    "master_weights, 8 bit": (MASTER | {"optim": "adamw_8bit"}, 6 + 8 / 256, None),
}


@pytest.mark.parametrize(("values", "kept", "peak"), MEMORY.values(), ids=MEMORY)
def test_an_optimizer_keeps_the_bytes_that_the_planner_is_told(values, kept, peak):
    elements = 2**19
    config = train_config(**values)
    model = one_matrix(elements, torch.bfloat16 if "dtype" in values else torch.float32)
    optimizer, _ = build_optimizer(model, config, STEPS)
    optimizer.step()
    tensors = list(gathered(optimizer).values())
    large = {x.data_ptr(): x.nbytes for x in tensors if x.nbytes >= 4 * elements // 256}
    assert sum(large.values()) == kept * elements
    told = optimizer_bytes(elements, config)
    assert told.device + told.host == kept * elements
    assert (told.host > 0) == config.offload_optimizer
    small = sum(x.nbytes for x in tensors if x.data_ptr() not in large)
    assert small < 8192  # counters, tables of 256 numbers, the state of random numbers
    if peak is not None:  # bitsandbytes takes 20 more a parameter, on a CPU only
        allocations = CpuAllocations()
        optimizer.step()
        assert told.step == peak * elements
        assert told.step <= allocations.stop() <= told.step + 4096


@pytest.mark.parametrize("values", [MASTER, STOCHASTIC], ids=["master_weights", "stochastic"])
def test_a_step_needs_room_for_one_piece_however_large_the_model(values, monkeypatch):
    monkeypatch.setattr(low_precision, "PIECE", 1024)
    peaks = []
    for elements in (2**14, 2**16):
        model = one_matrix(elements, torch.bfloat16)
        optimizer, _ = build_optimizer(model, train_config(**values), STEPS)
        optimizer.step()
        allocations = CpuAllocations()
        optimizer.step()
        peaks.append(allocations.stop())
    assert peaks[0] == peaks[1] <= 11 * 1024 + 1024


class NewBytes(TorchDispatchMode):
    """Bytes of every tensor made on a device, views apart, whether it was freed or not."""

    def __init__(self, device, *known):
        super().__init__()
        self.device = device
        self.seen = {x.untyped_storage()._cdata: 0 for x in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.device.type == self.device:
                self.seen.setdefault(x.untyped_storage()._cdata, x.untyped_storage().nbytes())
        return result

    def total(self):
        return sum(self.seen.values())


@pytest.mark.parametrize("values", [OFFLOAD, MASTER | OFFLOAD], ids=["fp32", "bf16"])
def test_offloaded_states_and_copies_take_nothing_of_the_training_device(values):
    """On tensors without data, of a device that is not the CPU."""
    dtype = torch.bfloat16 if "dtype" in values else torch.float32
    with FakeTensorMode():
        model = nn.Linear(64, 64, bias=False, device="meta", dtype=dtype)
        model.weight.grad = torch.empty_like(model.weight)
        known = (model.weight, model.weight.grad)
        offloaded, _ = build_optimizer(model, train_config(**values), STEPS)
        beside = MasterWeights([{"params": [model.weight]}], AdamW, lr=0.1)
        made = []
        for optimizer in (offloaded, beside):
            with NewBytes("meta", *known) as new:
                optimizer.step()
                optimizer.step()
            made.append(new.total())
        kept = list(gathered(offloaded).values())
    assert made[0] == 0
    assert made[1] >= 12 * 64 * 64  # so it would be seen
    assert {x.device.type for x in kept} == {"cpu"}
    assert sum(x.nbytes for x in kept if x.dim()) == 12 * 64 * 64


@pytest.mark.gpu
@pytest.mark.parametrize("values", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_on_a_gpu_an_optimizer_takes_the_bytes_that_the_planner_is_told(values):
    elements = 2**24  # four pieces
    config = train_config(**values)
    with torch.device("cuda"):
        model = one_matrix(elements, torch.bfloat16 if "dtype" in values else torch.float32)
    optimizer, _ = build_optimizer(model, config, STEPS)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    optimizer.step()
    after = torch.cuda.memory_stats()
    told = optimizer_bytes(elements, config)
    slack = 2**14
    taken = after["requested_bytes.all.current"] - before
    assert told.device <= taken <= told.device + slack
    peak = after["requested_bytes.all.peak"] - before
    assert peak <= told.device + told.step + slack
