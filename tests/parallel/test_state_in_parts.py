"""States of optimizers that stay with the process that has them."""

import multiprocessing

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.optim import AdamW

from fastgrpo.distributed import World
from fastgrpo.optimizer_state import load_optimizer, save_optimizer


def test_a_part_of_a_state_is_kept_and_filled(tmp_path):
    """States that are in parts, as FSDP2 has them: of each the part that is here."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        start = torch.randn(4, 3)

        def stepped(steps):
            parameter = torch.nn.Parameter(distribute_tensor(start.clone(), mesh, [Shard(0)]))
            optimizer = AdamW([parameter], lr=0.1)
            for _ in range(steps):
                parameter.grad = parameter.detach().clone()
                optimizer.step()
            return optimizer, parameter

        first, parameter = stepped(3)
        save_optimizer(tmp_path / "states.safetensors", first)
        second, again = stepped(0)
        load_optimizer(tmp_path / "states.safetensors", second)
        for key in ("exp_avg", "exp_avg_sq"):
            wanted = first.state[parameter][key].to_local()
            assert wanted.abs().min() > 0
            assert torch.equal(second.state[again][key].to_local(), wanted)
        assert second.state[again]["step"] == 3
    finally:
        dist.destroy_process_group()


def _call(rank, file, failing, said):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    world = World(rank, 2, joined=True)

    def function():
        if rank == failing:
            raise OSError(28, "No space left on device")

    try:
        world.on_each(function)
        said.put((rank, "nothing"))
    except OSError as error:
        said.put((rank, error.errno))
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.fault(
    "a disk that is full where one of several processes writes its part",
    "all of them know, and none waits for the others",
)
@pytest.mark.parametrize(("failing", "wanted"), [(None, "nothing"), (0, 28), (1, 28)])
def test_what_one_raises_all_do(tmp_path, failing, wanted):
    context = multiprocessing.get_context("spawn")
    said = context.SimpleQueue()
    processes = [
        context.Process(target=_call, args=(rank, tmp_path / "store", failing, said))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert sorted(said.get() for _ in processes) == [(0, wanted), (1, wanted)]
