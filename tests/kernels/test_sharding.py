"""Ranks with micro-batches of their own get the gradient of one process that has them all.

A call returns its share of the step's loss, over the denominators of the whole step; DDP and FSDP2
average over ranks, so the caller multiplies by their number. The oracle is the reference in fp64
on the sequences of all ranks together, padded behind the mask.

B sequences, T positions, H hidden, V vocabulary.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from fastgrpo_kernels import GRPOLossConfig, linear_grpo_loss, linear_logps, reference
from fastgrpo_kernels._sharding import gathered

H, V = 8, 37  # 37 rows: the pieces of the ranks differ
TIMEOUT_S = 20  # of a collective: a rank that waits for another one for ever is a failure

# Where the head is when the loss is computed, and what its weight is there.
PLACES = {
    "ddp": Tensor,  # whole on every rank
    "in forward": Tensor,  # FSDP2 has gathered it for the forward that computes the loss
    "left gathered": Tensor,  # after forward, of a module that FSDP2 does not shard again (a root)
    "after forward": DTensor,  # after forward, sharded again
    "own group": DTensor,  # in forward, but FSDP2 would gather it for its own forward only
}
PLACES_AND_HEADS = [
    (place, head)
    for place in PLACES
    for head in ("bias", "tied", "frozen")
    if (place, head) != ("own group", "tied")  # FSDP2 cannot: a parameter is in one group
]
# The lengths of each rank's micro-batches.
STEPS = {
    "even": ([5], [5]),
    "uneven": ([3], [7]),
    "masked": ([5], [5]),  # nothing counts on the second rank
    "empty": ([5], [5]),  # no sequence on the second rank
    "accumulated": ([5, 2], [4, 6]),
}

Batch = dict[str, Tensor]
Use = Callable[[Tensor, nn.Linear, Batch], Any]  # what is made of hidden states and head


def make_batch(length: int) -> Batch:
    shape = (2, length)
    mask = torch.rand(shape) < 0.8
    mask[:, 0] = True
    return {
        "tokens": torch.randint(V, shape),
        "completion_ids": torch.randint(V, shape),
        "advantages": torch.randn(2),
        "completion_mask": mask,
        "old_logps": 0.3 * torch.randn(shape) - math.log(V),
        "ref_logps": 0.3 * torch.randn(shape) - math.log(V),
    }


def make_step(kind: str, world: int) -> list[list[Batch]]:
    """Return the micro-batches of each rank; every rank makes those of all."""
    torch.manual_seed(1)
    step = [[make_batch(t) for t in STEPS[kind][rank % 2]] for rank in range(world)]
    if kind == "masked":
        step[1][0]["completion_mask"].zero_()
    elif kind == "empty":
        step[1][0] = {name: value[:0] for name, value in step[1][0].items()}
    return step


def together(step: list[list[Batch]]) -> Batch:
    """Return all sequences of a step as one batch."""
    batches = [batch for batches in step for batch in batches]
    length = max(batch["tokens"].shape[1] for batch in batches)

    def padded(x: Tensor) -> Tensor:
        return x if x.dim() == 1 else nn.functional.pad(x, (0, length - x.shape[1]))

    return {name: torch.cat([padded(batch[name]) for batch in batches]) for name in batches[0]}


class Policy(nn.Module):
    """The smallest model with embeddings, a body and a head; always the same."""

    def __init__(self, head: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(V, H)
        self.body = nn.Sequential(nn.Linear(H, H), nn.Tanh())
        self.head = nn.Linear(H, V, bias=head != "tied")
        if head == "tied":
            self.head.weight = self.embedding.weight
        self.head.requires_grad_(head != "frozen")

    def forward(self, batch: Batch, use: Use | None = None) -> Any:
        """Return the hidden states, or what `use` makes of them and the head."""
        hidden = self.body(self.embedding(batch["tokens"]))
        return hidden if use is None else use(hidden, self.head, batch)


def grpo(function: Callable[..., Any], loss_type: Any, whole: Batch) -> Use:
    """Return what computes a batch's share of the loss of the whole step."""
    config = GRPOLossConfig(loss_type=loss_type, beta=0.05, max_completion_length=9)
    step: dict[str, Any] = {
        "num_items_in_batch": whole["completion_mask"].sum(),
        "num_sequences_in_batch": len(whole["tokens"]),
        "config": config,
    }

    def use(hidden: Tensor, head: nn.Linear, batch: Batch) -> Tensor:
        arguments = {name: value for name, value in batch.items() if name != "tokens"}
        return function(hidden, head.weight, bias=head.bias, **arguments, **step).loss

    return use


def logps(function: Callable[..., tuple[Tensor, Tensor]]) -> Use:
    """Return what computes the log-probs and entropies of a batch."""

    def use(hidden: Tensor, head: nn.Linear, batch: Batch) -> Tensor:
        ids, mask = batch["completion_ids"], batch["completion_mask"]
        return torch.stack(function(hidden, head.weight, ids, bias=head.bias, mask=mask))

    return use


def summed_squares(use: Use) -> Use:
    return lambda hidden, head, batch: use(hidden, head, batch).square().sum()


def mesh() -> DeviceMesh:
    """Return all ranks: 2 pieces (FSDP), or 2 copies of 2 pieces (HSDP)."""
    if dist.get_world_size() == 2:
        return init_device_mesh("cpu", (2,))
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "pieces"))


def distribute(policy: Policy, place: str) -> nn.Module:
    if place == "ddp":
        return DistributedDataParallel(policy)
    for part in [policy.body] + ([policy.head] if place == "own group" else []):
        fully_shard(part, mesh=mesh())
    fully_shard(policy, mesh=mesh(), reshard_after_forward=place == "after forward")
    return policy


def call(policy: nn.Module, place: str, use: Use, batch: Batch) -> Any:
    """Use the head where `place` says, and see to it that it is there."""

    def checked(hidden: Tensor, head: nn.Linear, batch: Batch) -> Any:
        assert isinstance(head.weight, DTensor) == (PLACES[place] is DTensor)
        return use(hidden, head, batch)

    if place in ("left gathered", "after forward"):
        assert isinstance(policy, Policy)
        return checked(policy(batch), policy.head, batch)
    return policy(batch, checked)


def reduces_later(policy: nn.Module, last: bool) -> contextlib.AbstractContextManager[Any]:
    """Keep gradients from being reduced before the last micro-batch."""
    if isinstance(policy, FSDPModule):
        policy.set_requires_gradient_sync(last)
    elif isinstance(policy, DistributedDataParallel) and not last:
        return policy.no_sync()
    return contextlib.nullcontext()


def assert_close(actual: Tensor, exact: Tensor, what: str) -> None:
    """Allow what fp32 and another order of its sums can do (measured: 3e-7)."""
    torch.testing.assert_close(
        actual, exact.float(), rtol=2e-6, atol=2e-6, msg=lambda text: f"{what}: {text}"
    )


def check_gradients(place: str, head: str, kind: str, loss_type: str) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    step = make_step(kind, world)
    whole = together(step)
    if loss_type == "logps":  # a loss of our own: a sum of squares, which has no denominator
        use = summed_squares(logps(linear_logps))
        exact_use = summed_squares(logps(reference.linear_logps))
    else:
        use = grpo(linear_grpo_loss, loss_type, whole)
        exact_use = grpo(reference.linear_grpo_loss, loss_type, whole)
    one_process = Policy(head).double()
    exact = one_process(whole, exact_use)
    exact.backward()

    policy = distribute(Policy(head), place)
    loss = torch.zeros(())
    for batch in step[rank]:
        with reduces_later(policy, last=batch is step[rank][-1]):
            share = call(policy, place, use, batch)
            (share * world).backward()
        loss += share.detach()
    dist.all_reduce(loss)
    assert_close(loss, exact.detach(), "loss")
    parameters = zip(policy.parameters(), one_process.named_parameters(), strict=True)
    for parameter, (name, wanted) in parameters:
        if wanted.grad is None:
            assert parameter.grad is None and not parameter.requires_grad, name
        else:
            assert parameter.grad is not None, name
            check_gradient(parameter, parameter.grad, wanted.grad, name)


def check_gradient(parameter: Tensor, actual: Tensor, exact: Tensor, name: str) -> None:
    assert exact.abs().max() > 1e-3, name
    if isinstance(parameter, DTensor):
        assert isinstance(actual, DTensor), name
        assert actual.placements == parameter.placements, name
        assert actual.device_mesh == parameter.device_mesh, name
        exact = distribute_tensor(exact, actual.device_mesh, actual.placements).to_local()
        actual, name = actual.to_local(), f"this rank's piece of {name}"
    assert_close(actual, exact, f"gradient of {name}")


def check_without_gradient(kind: str) -> None:
    step = make_step(kind, dist.get_world_size())
    [batch] = step[dist.get_rank()]
    whole = together(step)
    policy, one_process = distribute(Policy("bias"), "after forward"), Policy("bias").double()
    with torch.no_grad():
        share = call(policy, "after forward", grpo(linear_grpo_loss, "grpo", whole), batch)
        found = call(policy, "after forward", logps(linear_logps), batch)
        exact_share = one_process(batch, grpo(reference.linear_grpo_loss, "grpo", whole))
        exact_found = one_process(batch, logps(reference.linear_logps))
    assert not share.requires_grad and not found.requires_grad
    assert_close(share, exact_share, "loss")
    assert_close(found, exact_found, "log-probs and entropies")


def check_gathered(trainable: bool) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    whole = torch.randn(V, H, generator=torch.Generator().manual_seed(0))
    weight = distribute_tensor(whole, mesh()).requires_grad_(trainable)
    full = gathered(weight)
    assert type(full) is Tensor and full.requires_grad == trainable
    assert torch.equal(full, whole)
    with torch.no_grad():
        assert torch.equal(gathered(weight), whole)
    if trainable:
        full.backward(whole * (rank + 1))
        assert isinstance(weight.grad, DTensor)
        assert_close(weight.grad.full_tensor(), whole * (world + 1) / 2, "mean of the ranks")


def serve(rank: int, world: int, meeting: str, pipe: Connection) -> None:
    """Run what comes through the pipe, and send back None or what went wrong."""
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # uninitialised memory is NaN
    timeout = timedelta(seconds=TIMEOUT_S)
    dist.init_process_group(
        "gloo", init_method=meeting, rank=rank, world_size=world, timeout=timeout
    )
    with contextlib.suppress(EOFError, BrokenPipeError):  # the test run has ended
        while True:
            function, arguments = pipe.recv()
            try:
                function(*arguments)
                pipe.send(None)
            except Exception:
                pipe.send(traceback.format_exc())
    dist.destroy_process_group()


class Ranks:
    """Processes of one group; started when first needed, and again after a failure."""

    def __init__(self, world: int, folder: Path) -> None:
        self.world, self.folder = world, folder
        self.processes: list[Any] = []
        self.pipes: list[Connection] = []

    def start(self) -> None:
        # One process imports torch and the ranks are its forks: that takes 3 seconds, not 8.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch.distributed.fsdp", "torch._dynamo"])
        # They meet in a file: no port that somebody else may have taken meanwhile.
        meeting = (self.folder / str(time.monotonic_ns())).as_uri()
        for rank in range(self.world):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=serve, args=(rank, self.world, meeting, theirs), daemon=True
            )
            process.start()
            theirs.close()
            self.processes.append(process)
            self.pipes.append(ours)

    def run(self, function: Callable[..., None], *arguments: object) -> None:
        """Run a function of this module on every rank."""
        if not self.processes:
            self.start()
        for pipe in self.pipes:
            pipe.send((function, arguments))
        waiting = {pipe: rank for rank, pipe in enumerate(self.pipes)}
        failures: dict[int, str] = {}
        patience = TIMEOUT_S + 10
        while waiting and (answers := wait(list(waiting), patience)):
            for pipe in answers:
                assert isinstance(pipe, Connection)
                rank = waiting.pop(pipe)
                try:
                    failure = pipe.recv()
                except EOFError:
                    failure = "it died"
                if failure is not None:
                    failures[rank] = failure
                    patience = 2  # the others may wait for this one
        failures |= dict.fromkeys(waiting.values(), "no answer")
        if failures:
            self.stop()
            text = "\n".join(f"rank {rank}: {why}" for rank, why in sorted(failures.items()))
            pytest.fail(text, pytrace=False)

    def stop(self) -> None:
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(timeout=2)
            process.kill()
            process.join()
            process.close()
        self.processes, self.pipes = [], []


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, Ranks]]:
    ranks = {world: Ranks(world, tmp_path_factory.mktemp("ranks")) for world in (2, 4)}
    yield ranks
    for group in ranks.values():
        group.stop()


@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.parametrize(("place", "head"), PLACES_AND_HEADS)
def test_ranks_get_the_gradient_of_one_process(
    ranks: dict[int, Ranks], place: str, head: str, kind: str
) -> None:
    ranks[2].run(check_gradients, place, head, kind, "dapo")


@pytest.mark.parametrize("kind", ("uneven", "masked"))
@pytest.mark.parametrize("loss_type", ("grpo", "dr_grpo", "logps"))
@pytest.mark.parametrize("place", PLACES)
def test_so_they_do_for_means_over_sequences_and_for_log_probs(
    ranks: dict[int, Ranks], place: str, loss_type: str, kind: str
) -> None:
    ranks[2].run(check_gradients, place, "bias", kind, loss_type)


@pytest.mark.parametrize("head", ("bias", "tied"))
@pytest.mark.parametrize("place", ("in forward", "after forward"))
def test_so_they_do_with_copies_of_pieces(ranks: dict[int, Ranks], place: str, head: str) -> None:
    ranks[4].run(check_gradients, place, head, "uneven", "dapo")


@pytest.mark.parametrize("kind", ("uneven", "masked"))
def test_without_gradient_a_rank_gets_its_own_share(ranks: dict[int, Ranks], kind: str) -> None:
    ranks[2].run(check_without_gradient, kind)


@pytest.mark.parametrize("trainable", (True, False))
@pytest.mark.parametrize("world", (2, 4))
def test_a_gathered_tensor_is_whole_and_averages_gradients(
    ranks: dict[int, Ranks], world: int, trainable: bool
) -> None:
    ranks[world].run(check_gathered, trainable)


def test_a_plain_tensor_is_gathered_already() -> None:
    weight = torch.randn(V, H, requires_grad=True)
    assert gathered(weight) is weight
    assert gathered(None) is None
