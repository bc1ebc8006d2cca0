"""Runs the peers' own code and kernels where there is no GPU; the tests start it.

Triton's interpreter and its compiler cannot share a process: one for each pair of WAY and NAME.

    python -m benchmarks.peers.without_gpu WAY NAME      prints a record a line

    plain         on the CPU as it is; what is compiled is traced, and run by PyTorch
    inductor      on the CPU, compiled
    interpret     its Triton kernels in Triton's interpreter
    build         its kernels compiled for Hopper with the types and arguments of a real call, and
                  none of them launched: what they would compute stays uninitialised
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from .. import measure, peers
from ..cells import Cell, make_inputs


def linear_cells(dtype: str, hidden: int = 48) -> list[Cell]:
    kinds = [(rho, frozen) for rho in (1.0, 0.5) for frozen in (False, True)]
    cells = [Cell("linear", 64, hidden, 320, *kind, dtype) for kind in kinds]
    return [*cells, Cell("logps", 64, hidden, 320, dtype=dtype)]


def logits_cells(dtype: str) -> list[Cell]:
    return [Cell("logits", 64, 48, 320, rho, dtype=dtype) for rho in (1.0, 0.5)]


# The interpreter multiplies matrices of bf16 as if their bits were integers; cce's backward refuses
# fp32, and verl takes hidden sizes in multiples of 128.
CASES: dict[tuple[str, str], list[Cell]] = {
    ("plain", "naive"): [*linear_cells("float32"), *logits_cells("bfloat16")],
    ("plain", "compiled"): [*linear_cells("float32"), *logits_cells("bfloat16")],
    ("plain", "trl"): [*linear_cells("float32"), *linear_cells("bfloat16")],
    ("plain", "liger_linear"): [*linear_cells("float32"), *linear_cells("bfloat16")],
    # On a CPU the function behind liger_sm90 is PyTorch of the same signature and meaning.
    ("plain", "liger_sm90"): linear_cells("float32"),
    ("interpret", "trl"): [*linear_cells("float32"), *linear_cells("bfloat16")],
    ("interpret", "liger_triton"): [*logits_cells("float32"), *logits_cells("bfloat16")],
    ("interpret", "cce"): linear_cells("float16"),
    ("interpret", "verl"): linear_cells("float32", hidden=128),
    ("inductor", "compiled"): [linear_cells("float32")[0], *logits_cells("float32")[:1]],
}
# Compiled code shows no products; and where liger_sm90 runs on a CPU it is not what is stated.
UNSEEN = ("compiled", "liger_sm90")


def key(method: peers.Method, cell: Cell) -> str:
    return json.dumps([method.name, method.ops, cell.facts()])


def measured(way: str, name: str) -> Iterator[dict[str, Any]]:
    methods = peers.load(name).METHODS
    for cell in CASES[way, name]:
        inputs = make_inputs(cell, "cpu")
        exact_of = measure.exact_logps if cell.op == "logps" else measure.exact_result
        exact = exact_of(cell, inputs, torch.float64)
        naive = measure.errors(exact_of(cell, inputs, getattr(torch, cell.dtype)), exact)
        for method in methods:
            if cell.op in method.ops:
                # Nothing that is compiled may run below the counter.
                counter = measure.FlopCounter() if name not in UNSEEN else contextlib.nullcontext()
                with counter:
                    result = measure.Trial(cell, inputs, method).result()
                record = {"key": key(method, cell), "naive": naive}
                record["error"] = measure.errors(result, exact)
                record["flops"] = counter.get_total_flops() if name not in UNSEEN else None
                yield record


def built(name: str, kernels: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Call every method of a peer in bf16; the launches are what comes of it."""
    for method in peers.load(name).METHODS:
        op = "logits" if "logits" in method.ops else "linear"
        for frozen in (False, True) if op == "linear" else (False,):
            cell = Cell(op, 256, 128, 1056, frozen=frozen)
            trial = measure.Trial(cell, make_inputs(cell, "cpu"), method)
            trial.refresh()
            found = trial.forward()
            if found.ndim == 0:
                found.backward()
    for kernel in kernels:
        yield {"key": json.dumps(kernel), **kernel}


def prepare(way: str, name: str, patch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Let a peer's code run where it would not: on a CPU. Return where launches are noted."""
    kernels: list[dict[str, Any]] = []
    if way == "plain":
        patch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    if way in ("interpret", "build"):
        prepare_triton(name, patch)
    if way == "build" and name == "liger_sm90":
        patch_cute(patch, kernels)
    elif way == "build":
        patch_launches(patch, kernels)
    return kernels


def prepare_triton(name: str, patch: pytest.MonkeyPatch) -> None:
    if name == "trl":
        # It asks for a GPU before it uses its kernels; and several tiles of every kind.
        patch.setattr("trl.kernels.chunked_logprob._use_triton", lambda device: True)
        patch.setattr("trl.kernels.chunked_logprob._BLOCK_SIZE", 128)
        patch.setattr("trl.kernels.chunked_logprob.TOKEN_CHUNK_SIZE", 40)
        patch.setattr("trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE", 192)
    elif name == "cce":
        # The interpreter has no functions of libdevice; and a sort needs no C++ compiler.
        if os.environ["TRITON_INTERPRET"] == "1":
            language: Any = importlib.import_module("triton.language")
            log1p = types.SimpleNamespace(log1p=lambda x: language.log(1 + x))
            patch.setattr("cut_cross_entropy.tl_utils.tl_libdevice", log1p)
        patch.setattr(
            "cut_cross_entropy.cce.sort_logit_avg", lambda x: torch.argsort(x).to(torch.int32)
        )
    elif name == "verl":
        peers.load("verl")._imports()
        kernels: Any = importlib.import_module("verl.utils.kernel.kernels")
        # On Hopper it loads by descriptors; and it asserts that its tensors are on a GPU.
        patch.setattr(kernels, "SUPPORT_CUDA_TMA", True)
        for function in ("efficient_entropy_forward", "efficient_entropy_backward"):
            patch.setattr(kernels, function, as_if_on_gpu(getattr(kernels, function)))
        patch.setattr(torch.cuda.nvtx, "range", lambda name: contextlib.nullcontext())


def as_if_on_gpu(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "is_cuda", True, raising=False)
            return function(*args)

    return call


def patch_launches(patch: pytest.MonkeyPatch, kernels: list[dict[str, Any]]) -> None:
    """Compile for Hopper what Triton would launch, with a driver that has no device."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    def warm_up(self, *args, grid, warmup, _run=JITFunction.run, **kwargs):
        kernel = _run(self, *args, grid=grid, warmup=True, **kwargs)
        kernels.append({"name": self.__name__, "shared": kernel.metadata.shared})
        return kernel

    driver = types.SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_benchmarker=lambda: None,
    )
    triton.runtime.driver.set_active(driver)
    patch.setattr(JITFunction, "run", warm_up)


def patch_cute(patch: pytest.MonkeyPatch, kernels: list[dict[str, Any]]) -> None:
    """Compile for Hopper what CuTe would launch; the numbers are an H100's."""
    import cutlass.cute as cute
    from cuda.bindings import driver

    patch.setattr(torch.cuda, "is_available", lambda: True)
    patch.setattr(torch.cuda, "get_device_capability", lambda *device: (9, 0))
    adapter = peers.load("liger_sm90")
    adapter._kernels()
    front: Any = importlib.import_module("liger_kernel.ops.fused_linear_scaled_cross_entropy")
    patch.setattr(front, "_resolve_implementation", lambda device: front._load_sm90_function())
    folder = "liger_kernel.ops.cutedsl.ops"
    stands_in = {
        "ensure_cuda_context": lambda: None,
        "_cute_stream": lambda: driver.CUstream(0),
        "_max_active_clusters": lambda size: 132 // size,
        "_sm_count": lambda: 132,
    }
    for module in [m for n, m in sys.modules.items() if n.startswith(folder)]:
        for function, instead in stands_in.items():
            if hasattr(module, function):
                patch.setattr(module, function, instead)

    def compile(kernel: Any, *args: Any, _compile=cute.compile, **kwargs: Any):
        _compile(kernel, *args, **kwargs)
        kernels.append({"name": type(kernel).__name__, "shared": 0})
        return lambda *args: None

    patch.setattr(cute, "compile", compile)


def main(way: str, name: str) -> None:
    torch.set_num_threads(1)
    out = sys.stdout
    with contextlib.redirect_stdout(sys.stderr), pytest.MonkeyPatch.context() as patch:
        kernels = prepare(way, name, patch)
        for record in built(name, kernels) if way == "build" else measured(way, name):
            print(json.dumps(record), file=out, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
