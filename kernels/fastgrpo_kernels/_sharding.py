"""A head that lies in pieces on several ranks, made whole for the length of a call."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor

MaybeTensor = TypeVar("MaybeTensor", Tensor, None, Tensor | None)


def gathered(tensor: MaybeTensor) -> MaybeTensor:
    """Return all of a DTensor (FSDP2, HSDP), and anything else as it is.

    Collective: every rank of the mesh takes part here and, if the tensor wants a gradient, again
    in backward. There the gradients of the ranks, each that of its own micro-batch, are averaged
    as FSDP2 and DDP average all others, and every rank keeps its piece. A bare `full_tensor()`
    would take each rank's piece from that rank's own gradient and lose the rest, without a word.
    """
    if not hasattr(type(tensor), "full_tensor"):  # of the type: the compiler knows no other
        return tensor
    from torch.distributed.tensor import DTensor, Partial  # 0.7 s that only DTensors cost

    assert isinstance(tensor, DTensor)
    return tensor.full_tensor(grad_placements=[Partial("avg")] * tensor.device_mesh.ndim)
