"""How it is measured: exactness first, then time, memory and FLOPs."""

from __future__ import annotations

import gc
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from fastgrpo_kernels import reference

from .cells import Cell, Inputs
from .peers import CONFIG, Method


class LiveBytes(TorchDispatchMode):
    """The bytes alive at the peak, inputs apart, and the largest tensor ever seen."""

    def __init__(self, *inputs: Tensor | None) -> None:
        super().__init__()
        self.inputs = {x.untyped_storage()._cdata for x in inputs if x is not None}
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = self.largest_tensor = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                self.largest_tensor = max(self.largest_tensor, x.numel())
                storage = x.untyped_storage()
                if storage._cdata not in self.inputs:
                    self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.alive = {key: x for key, x in self.alive.items() if not x[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return result


class CpuAllocations:
    """The most bytes that PyTorch allocates on a CPU from now on, beyond those it has.

    The profiler sees what every allocation takes, compiled code's too, which `LiveBytes`, a mode of
    the dispatcher, does not.
    """

    def __init__(self) -> None:
        self.profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self.profiler.start()

    def stop(self) -> int:
        self.profiler.stop()
        results = self.profiler.profiler.kineto_results
        events = [event for event in results.events() if event.name() == "[memory]"]
        alive = peak = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            alive += event.nbytes()
            peak = max(peak, alive)
        return peak


def exact_result(cell: Cell, inputs: Inputs, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the loss and its gradients from plain PyTorch in `dtype`, some rows at a time.

    Sums over rows are kept in fp64 whatever `dtype` is.
    """
    rows = max(1, 2**28 // cell.V)
    ids, old = inputs.ids.view(-1), inputs.old_logps.view(-1)
    advantages = inputs.advantages[:, None].expand(inputs.ids.shape).reshape(-1)
    total: dict[str, Tensor] = {}
    for part in torch.arange(cell.N, device=ids.device).split(rows):
        if inputs.logits is not None:
            leaves = {"logits": inputs.logits.view(cell.N, -1)[part]}
        else:
            leaves = {"hidden": inputs.hidden.view(cell.N, -1)[part], "weight": inputs.weight}
        leaves = {
            name: x.detach().to(dtype).requires_grad_(not (cell.frozen and name == "weight"))
            for name, x in leaves.items()
        }
        function = reference.linear_grpo_loss if inputs.logits is None else reference.grpo_loss
        with torch.enable_grad():
            loss = function(
                *leaves.values(),
                ids[part],
                advantages[part],
                old_logps=old[part],
                num_items_in_batch=cell.N,
                config=CONFIG,
            ).loss
        loss.backward()
        _add(total, "loss", loss.detach())
        for name, leaf in leaves.items():
            if leaf.grad is None:
                continue
            if name == "weight":
                _add(total, name, leaf.grad)
            else:
                total[name] = torch.cat([x for x in (total.get(name), leaf.grad) if x is not None])
    return total


def exact_logps(cell: Cell, inputs: Inputs, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the log-probs from plain PyTorch in `dtype`, some rows at a time."""
    rows = max(1, 2**28 // cell.V)
    hidden, ids = inputs.hidden.view(cell.N, -1), inputs.ids.view(-1)
    found = [
        reference.linear_logps(hidden[part].to(dtype), inputs.weight.to(dtype), ids[part])[0]
        for part in torch.arange(cell.N, device=ids.device).split(rows)
    ]
    return {"logps": torch.cat(found)}


class Trial:
    """A method on the inputs of a cell, again and again."""

    def __init__(self, cell: Cell, inputs: Inputs, method: Method) -> None:
        self.cell, self.method = cell, method
        self.inputs = replace(inputs)
        self.logits = inputs.logits
        self.leaves: dict[str, Tensor] = {}

    def refresh(self) -> None:
        """Forget gradients; hand out a copy of logits that may be overwritten."""
        inputs = self.inputs
        if self.logits is None:
            both = {"hidden": inputs.hidden, "weight": inputs.weight}
            self.leaves = {name: x for name, x in both.items() if x.requires_grad}
        else:
            inputs.logits = None
            self.leaves.clear()
            leaf = self.logits.detach()
            if self.method.extra_position:
                leaf = torch.nn.functional.pad(leaf, (0, 0, 0, 1))
            else:
                leaf = leaf.clone()
            self.leaves = {"logits": leaf.requires_grad_()}
            inputs.logits = leaf.clone()  # a model's logits are no leaf either
        for leaf in self.leaves.values():
            leaf.grad = None

    def forward(self) -> Tensor:
        if self.cell.op != "logps":
            return self.method.call(self.inputs)
        with torch.no_grad():
            return self.method.call(self.inputs)

    def backward(self, loss: Tensor) -> None:
        if self.cell.op != "logps":
            loss.backward()

    def result(self) -> dict[str, Tensor]:
        """Return what the method computes, named as `exact_result` names it."""
        self.refresh()
        found = self.forward()
        if self.cell.op == "logps":
            return {"logps": found.reshape(-1)}
        self.backward(found)
        result = {"loss": found.detach()}
        for name, leaf in self.leaves.items():
            if leaf.grad is not None:
                gradient = leaf.grad[:, :-1] if self.method.extra_position else leaf.grad
                result[name] = gradient.reshape(-1, gradient.shape[-1])
        self.refresh()
        return result

    def returned_bytes(self) -> int:
        """Return the bytes of the gradients; one in the place of its logits has none."""
        logits = self.inputs.logits
        own = None if logits is None else logits.untyped_storage().data_ptr()
        grads = [x.grad for x in self.leaves.values() if x.grad is not None]
        return sum(x.nbytes for x in grads if x.untyped_storage().data_ptr() != own)


def errors(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Return the root mean square of each error, relative to that of the exact values."""
    if found.keys() != exact.keys():
        raise ValueError(f"gives {sorted(found)}, wanted {sorted(exact)}")
    return {
        name: ((found[name].double() - x.double()).square().mean().sqrt() / _rms(x)).item()
        for name, x in exact.items()
    }


def is_wrong(
    error: dict[str, float],
    naive: dict[str, float],
    tolerance: float = 4.0,
    dtype: torch.dtype = torch.float32,
) -> bool:
    """Say whether an error is more than rounding: naive PyTorch's in the same type, some times.

    The loss is one number, whose naive error is now and then next to none: a unit of its type may
    be missing.
    """
    floor = {"loss": torch.finfo(dtype).eps}
    return any(
        not error[name] <= tolerance * naive[name] + floor.get(name, 0) + 1e-5 for name in naive
    )


def peak_extra_bytes(trial: Trial) -> int:
    """Return the bytes alive at the peak beyond the inputs and the gradients that are returned."""
    trial.refresh()
    gc.collect()
    if trial.inputs.hidden.is_cuda:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        trial.backward(trial.forward())
        peak = torch.cuda.max_memory_allocated() - before
    else:
        allocations = CpuAllocations()
        trial.backward(trial.forward())
        peak = allocations.stop()
    return peak - trial.returned_bytes()


class FlopCounter(FlopCounterMode):
    """PyTorch's counter, which forgets `addmm_` and stumbles over the `out_dtype` of `addmm`."""

    def __init__(self) -> None:
        def addmm(total: Any, a: Any, b: Any, *_: Any, **__: Any) -> int:
            return 2 * a[0] * a[1] * b[1]

        aten = torch.ops.aten
        super().__init__(display=False, custom_mapping={aten.addmm: addmm, aten.addmm_: addmm})


def emulate_memory(gib: float) -> None:
    """Make the GPU one of so much memory: to the allocator, and to those who ask how much it has.

    Our loss takes the rows of its chunks from that; it would take those of the large card.
    """
    real, size = torch.cuda.get_device_properties, int(gib * 2**30)
    torch.cuda.set_per_process_memory_fraction(size / real(0).total_memory)

    def smaller(*device: Any, **named: Any) -> SimpleNamespace:
        found = real(*device, **named)
        facts = {name: getattr(found, name) for name in dir(found) if not name.startswith("_")}
        return SimpleNamespace(**facts | {"total_memory": size})

    torch.cuda.get_device_properties = smaller  # pyright: ignore[reportAttributeAccessIssue]


def _add(total: dict[str, Tensor], name: str, value: Tensor) -> None:
    total[name] = total[name] + value if name in total else value.double()


def _rms(x: Tensor) -> Tensor:
    return x.double().square().mean().sqrt().clamp(min=1e-30)
