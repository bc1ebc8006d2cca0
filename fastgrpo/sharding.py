"""A model in parts, one on each GPU: PyTorch's FSDP2, and how a step uses it.

Every decoder layer is a group that is gathered while it computes. What is left, the embeddings, the
last norm and the LM head, is the root's group: it is gathered once per optimisation step and its
gradient, (V, H) for the head, reduced once. Gradients of layers are reduced after every pass within
the processes that share a copy of the model, and once per step between copies.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from transformers.modeling_layers import GradientCheckpointingLayer


def build_mesh(data: int, shard: int) -> DeviceMesh:
    """Return the mesh of all processes: copies of the model times parts of each."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return init_device_mesh(device, (data, shard), mesh_dim_names=("data", "shard"))


class _Hook(NamedTuple):
    """What a module calls around its forward pass."""

    place: OrderedDict[int, Any]
    key: int
    function: Any
    before_forward: bool


def _hooks_of(module: Any) -> list[_Hook]:
    return [
        _Hook(place, key, function, before)
        for place, before in ((module._forward_pre_hooks, True), (module._forward_hooks, False))
        for key, function in place.items()
    ]


class Sharding:
    """A causal LM whose parameters are DTensors, each process with its part of them.

    FSDP2 averages gradients over all processes: the loss of a pass is multiplied by their number.
    """

    def __init__(self, model: nn.Module, mesh: DeviceMesh, *, bf16: bool) -> None:
        """Shard a model in place, and move its parts to the device of the mesh.

        Args:
            model: a causal LM, also with adapters of PEFT, the same on all ranks.
            mesh: `build_mesh`.
            bf16: gather parameters, and so compute, in bf16; gradients are reduced in fp32.

        Raises:
            ValueError: the model has no layers that transformers marks as such.
        """
        self.model = model
        self._root: Any = getattr(model, "get_base_model", lambda: model)()
        layers = [m for m in self._root.modules() if isinstance(m, GradientCheckpointingLayer)]
        if not layers:
            raise ValueError(
                f"parallel: {type(self._root).__name__} has no layers to shard; use one process"
            )
        options: dict[str, Any] = {"mesh": mesh["shard"] if mesh["data"].size() == 1 else mesh}
        if bf16:
            options["mp_policy"] = MixedPrecisionPolicy(
                param_dtype=torch.bfloat16, reduce_dtype=torch.float32
            )
        self._hooks: list[_Hook] = []
        for group in (*layers, self._root):
            before = {hook.key for hook in _hooks_of(group)}
            fully_shard(group, reshard_after_forward=group is not self._root, **options)
            self._hooks += [hook for hook in _hooks_of(group) if hook.key not in before]
        self._groups = [m for m in self._root.modules() if isinstance(m, FSDPModule)]
        self._depth = 0
        # Calls of these gather the root's group, as calls of the model do; without an argument
        # nothing is computed: FSDP2 learns which group is the root.
        decoder = self._root.get_decoder()

        def decode(**arguments: Any) -> Any:
            return decoder(**arguments) if arguments else None

        self._root.fastgrpo_decode = decode
        register_fsdp_forward_method(self._root, "fastgrpo_decode")
        self._root.fastgrpo_decode()
        self.reshard()

    def decode(self, **arguments: Any) -> Any:
        """Run the decoder; the LM head is whole from then on, until backward or `reshard`."""
        return self._root.fastgrpo_decode(**arguments)

    def begin_pass(self, *, last: bool) -> None:
        """Get ready for a forward and backward pass of an optimisation step, on all ranks.

        Args:
            last: of the step; the others leave to it what is done once per step.
        """
        self._root.set_requires_gradient_sync(last, recurse=False)
        self._root.set_reshard_after_backward(last, recurse=False)
        self._root.set_requires_all_reduce(last)

    def reshard(self) -> None:
        """Give back what is gathered; the parts are what is trained, and may change now."""
        for group in self._groups:
            group.reshard()

    @contextmanager
    def whole(self) -> Generator[None]:
        """Gather all parameters and hold them, for many forward passes without a gradient.

        All ranks enter and leave; in between each computes what and as much as it likes. FSDP2 is
        not asked then: its hooks take time for every token, and wait for streams that a CUDA graph
        cannot capture.
        """
        self._depth += 1
        if self._depth == 1:
            for group in self._groups:
                group.unshard()
            for hook in self._hooks:
                del hook.place[hook.key]
        try:
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                for hook in self._hooks:
                    hook.place[hook.key] = hook.function
                    hook.place.move_to_end(hook.key, last=not hook.before_forward)
                self.reshard()

    def state_dict(self, module: nn.Module) -> dict[str, Any]:
        """Return parameters whole and in CPU memory to the first rank, and {} to the others.

        Args:
            module: the model, or the one that adapters have been put on.
        """
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_model_state_dict(module, options=options)
        # Tied parameters are one tensor again, which a checkpoint has once.
        first: dict[int, str] = {}
        for name, parameter in module.named_parameters(remove_duplicate=False):
            first.setdefault(id(parameter), name)
            if name in state:
                state[name] = state[first[id(parameter)]]
        return state
