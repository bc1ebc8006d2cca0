"""Compiles for real GPUs what the launchers of `_row_triton.py` launch, with no GPU; prints JSON.

The interpreter and the compiler cannot share a process: the tests run this file as a script, with
TRITON_INTERPRET unset. Nothing is written out by hand that a launcher decides (types, alignment,
block size, warps): a driver that has no device stands in for CUDA's, every launch becomes a
warm-up, and the launchers are called with tensors on the CPU.

    python tests/kernels/aot.py resources [--full]   registers, stack, shared memory, accesses
    python tests/kernels/aot.py blocks               other block sizes
    python tests/kernels/aot_variants.py             what is compiled anew when arguments change
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[2] / "kernels"))  # PYTHONPATH goes first

import torch
import triton
from aot_cases import TABLE, launch, objective_cases, row_cases
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from fastgrpo_kernels import _row_triton

ARCHS = (80, 86, 89, 90, 100, 120)
DTYPES = ("bfloat16", "float16", "float32")
VOCABULARIES = (151936, 50257)

Launch = tuple[str, dict[str, Any], Any]  # kernel name, its arguments, the compiled kernel


class NoDevice:
    """What Triton asks a driver before it compiles."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # compiled kernels are kept by device: one for each architecture

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def compile_only(arch: int) -> Iterator[list[Launch]]:
    """Collect the launches made inside, each compiled for `arch` and none of them run."""
    launches: list[Launch] = []
    run = JITFunction.run

    def warm_up(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        launches.append((self.__name__, kwargs, kernel))
        return kernel

    triton.runtime.driver.set_active(NoDevice(arch))
    JITFunction.run = warm_up
    try:
        yield launches
    finally:
        JITFunction.run = run


def resources(kernel: Any) -> dict[str, int]:
    """Return what one compiled kernel occupies, from its machine code, and its accesses by kind."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found is not None, usage
    registers, stack, local = map(int, found.groups())
    names, ptx = list(kernel.src.signature), kernel.asm["ptx"]
    block = next(name for name in names if name.startswith("BLOCK_"))
    used = {
        "registers": registers,
        "stack": stack,
        "local": local,
        "shared": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
        "block": kernel.src.constants[(names.index(block),)],
    }
    # Whether all warps wait between reading the target's logit and writing over the row.
    used["barrier_after_target"] = ptx.rfind("bar.sync") > ptx.rfind("ld.global.b16")
    access = r"\b(ld|st)\.global[.\w:]*?\.(?:v(\d)\.)?[bfus](\d+)\b"
    for what, width, bits in re.findall(access, ptx):
        kind = f"{int(width or 1) * int(bits) // 8}_{'vector' if width else 'scalar'}"
        used[f"{what}_{kind}"] = used.get(f"{what}_{kind}", 0) + 1
    return used


def compile_rows(arch: int, dtype: str, vocabulary: int, cases: list[str]) -> list[dict[str, Any]]:
    """Compile launches over rows of logits, for one architecture, type and vocabulary."""
    results = []
    with compile_only(arch) as launches:
        for case in cases:
            launch(case, getattr(torch, dtype), vocabulary)
            given = {"arch": arch, "dtype": dtype, "vocabulary": vocabulary, "case": case}
            results.append(given | resources(launches[-1][2]))
    return results


def compile_block(arch: int, block: int, warps: int) -> list[dict[str, Any]]:
    """Compile the heaviest launches with another block size."""
    _row_triton.launch_options = lambda vocabulary: {"BLOCK_V": block, "num_warps": warps}
    return compile_rows(arch, DTYPES[0], VOCABULARIES[0], list(TABLE))


def _call(task: tuple[Callable[..., list[dict[str, Any]]], tuple[Any, ...]]):
    return task[0](*task[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("resources", "blocks"))
    parser.add_argument("--full", action="store_true", help="every type on every architecture")
    options = parser.parse_args()
    if options.what == "blocks":
        shapes = ((4096, 8), (4096, 16), (8192, 8), (8192, 16), (8192, 32), (16384, 32))
        tasks = [(compile_block, (arch, *shape)) for arch in ARCHS for shape in shapes]
    else:
        axes = itertools.product(ARCHS, DTYPES, VOCABULARIES)
        if not options.full:
            # The main type everywhere; others, and a vocabulary that divides by nothing, once.
            axes = [(arch, DTYPES[0], VOCABULARIES[0]) for arch in ARCHS]
            axes += [(90, dtype, VOCABULARIES[0]) for dtype in DTYPES[1:]]
            axes += [(86, DTYPES[0], VOCABULARIES[1])]
        tasks = [
            (compile_rows, (*axis, row_cases(options.full, axis[1] != "float32"))) for axis in axes
        ]
        # These know neither logits nor vocabulary.
        cases = objective_cases(options.full)
        tasks += [(compile_rows, (arch, "float32", 0, cases)) for arch in ARCHS]
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        results = [row for rows in pool.map(_call, tasks) for row in rows]
    print("[" + ",\n".join(map(json.dumps, results)) + "]")


if __name__ == "__main__":
    main()
