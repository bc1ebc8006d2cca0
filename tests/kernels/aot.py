"""Compiles for real GPUs what the launchers of `_row_triton.py` launch, with no GPU; prints JSON.

The interpreter and the compiler cannot share a process: the tests run this file as a script, with
TRITON_INTERPRET unset. Nothing is written out by hand that a launcher decides (types, alignment,
block size, warps): a driver that has no device stands in for CUDA's, every launch becomes a
warm-up, and the launchers are called with tensors on the CPU.

    python tests/kernels/aot.py resources [--full]   registers, stack, shared memory, accesses
    python tests/kernels/aot.py variants             what is compiled anew when arguments change
    python tests/kernels/aot.py blocks               other block sizes
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
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from fastgrpo_kernels import (
    GRPOLossConfig,
    _row_triton,
    grpo_loss,
    linear,
    linear_grpo_loss,
    linear_logps,
    logits,
    selective_logps,
)
from fastgrpo_kernels._inputs import TokenBatch
from fastgrpo_kernels._reduce import RowResults

ARCHS = (80, 86, 89, 90, 100, 120)
DTYPES = ("bfloat16", "float16", "float32")
VOCABULARIES = (151936, 50257)
TOKENS = 48

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


def row_steps(dtype: torch.dtype, vocabulary: int) -> Iterator[tuple[str, Callable[[], None]]]:
    """Yield every launch that differs in its kernel or in the pointers it is given."""
    logits_CV = torch.empty(2, vocabulary, dtype=dtype)
    ids_N = torch.zeros(TOKENS, dtype=torch.int64)
    values_N = torch.zeros(TOKENS)
    mask_N = torch.ones(TOKENS, dtype=torch.bool)
    scale = torch.ones(())

    def loss_rows(tokens: int | torch.Tensor, everything: bool, gradient: bool) -> None:
        optional_N = values_N if everything else None
        batch = TokenBatch(
            ids_N=ids_N,
            mask_N=mask_N if everything else None,
            advantages_N=values_N,
            old_logps_N=optional_N,
            ref_logps_N=optional_N,
            policy_weight_N=optional_N,
            row_weight_N=optional_N,
            denominator=scale,
            num_tokens=torch.tensor(TOKENS),
            num_sequences=1,
            state_N=torch.empty(TOKENS, dtype=torch.int8),
        )
        rows = RowResults.zeros(TOKENS, everything, logits_CV.device, torch.float32)
        config = GRPOLossConfig(beta=0.04 if everything else 0.0)
        dlogits_CV = logits_CV if gradient else None
        with_scale = scale if everything and gradient else None
        _row_triton.loss_rows(logits_CV, dlogits_CV, tokens, batch, rows, config, with_scale)

    def logps_rows(tokens: int | torch.Tensor, mask: torch.Tensor | None) -> None:
        _row_triton.logps_rows(logits_CV, tokens, ids_N, mask, 1.0, values_N, values_N)

    def dlogits_rows(tokens: int | torch.Tensor, mask, dentropy_N) -> None:
        _row_triton.dlogits_rows(
            logits_CV, logits_CV, tokens, ids_N, mask, 1.0, values_N, dentropy_N
        )

    yield "scale", lambda: _row_triton.scale_rows(logits_CV, scale)
    for where, tokens in (("first", 16), ("list", torch.arange(2))):
        for everything, gradient in itertools.product((False, True), repeat=2):
            name = f"loss-{where}-{'all' if everything else 'none'}"
            name += "-gradient" if gradient else ""
            yield name, lambda t=tokens, e=everything, g=gradient: loss_rows(t, e, g)
        for masked in (None, mask_N) if where == "first" else (None,):  # a list has no masked row
            name = f"-{where}" + ("" if masked is None else "-mask")
            yield "logps" + name, lambda t=tokens, m=masked: logps_rows(t, m)
            yield "dlogits" + name, lambda t=tokens, m=masked: dlogits_rows(t, m, None)
            yield "dlogits-entropy" + name, lambda t=tokens, m=masked: dlogits_rows(t, m, values_N)


def resources(kernel: Any) -> dict[str, int]:
    """Return what one compiled kernel occupies, from its machine code, and its wide accesses."""
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
    ptx = kernel.asm["ptx"]
    wide = r"\.global[.\w:]*\.(?:v4\.[bfu]32|v2\.[bfu]64|v8\.[bfu]16)\b"
    return {
        "registers": registers,
        "stack": stack,
        "local": local,
        "shared": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
        "block": kernel.src.constants[(list(kernel.src.signature).index("BLOCK_V"),)],
        "wide_loads": len(re.findall("ld" + wide, ptx)),
        "wide_stores": len(re.findall("st" + wide, ptx)),
        "loads_of_2_bytes": len(re.findall(r"ld\.global[.\w:]*\.[bu]16\b", ptx)),
        "stores_of_2_bytes": len(re.findall(r"st\.global[.\w:]*\.[bu]16\b", ptx)),
    }


def compile_rows(arch: int, dtype: str, vocabulary: int) -> list[dict[str, Any]]:
    """Compile every launch for one architecture, type and vocabulary."""
    results = []
    with compile_only(arch) as launches:
        for name, launch in row_steps(getattr(torch, dtype), vocabulary):
            launch()
            results.append(
                {"arch": arch, "dtype": dtype, "vocabulary": vocabulary, "case": name}
                | resources(launches[-1][2])
            )
    return results


def compile_block(arch: int, block: int, warps: int) -> list[dict[str, Any]]:
    """Compile the two heaviest launches with another block size."""
    _row_triton.launch_options = lambda vocabulary: {"BLOCK_V": block, "num_warps": warps}
    results = []
    with compile_only(arch) as launches:
        for name, launch in row_steps(torch.bfloat16, VOCABULARIES[0]):
            if name in ("loss-list-all-gradient", "dlogits-entropy-first"):
                launch()
                used = resources(launches[-1][2])
                results.append({"arch": arch, "case": name} | used)
    return results


def count_variants() -> dict[str, dict[str, Any]]:
    """Call the public functions in many ways; per set of pointers, what Triton compiled.

    Returns:
        For each kernel and set of pointers: the number of launches, and for each compiled variant
        the arguments that it was compiled for being a multiple of 16, or 1.
    """
    linear.row_backend = logits.row_backend = lambda *_: _row_triton  # refused on a CPU otherwise
    with compile_only(90) as launches:
        for chunk_rows, length, start in itertools.product(
            (1, 16, None), (1, 16, 17, 33), (0, 1, 16, 33)
        ):
            _call_everything(length, start, chunk_rows)
    found: dict[str, dict[str, Any]] = {}
    for name, arguments, kernel in launches:
        given = sorted(
            key for key in arguments if key.endswith("_ptr") and arguments[key] is not None
        )
        entry = found.setdefault(f"{name}({', '.join(given)})", {"launches": 0, "variants": {}})
        entry["launches"] += 1
        names = list(kernel.src.signature)
        special = [names[path[0]] for path, attributes in kernel.src.attrs.items() if attributes]
        special += [
            f"{names[path[0]]}={x}" for path, x in kernel.src.constants.items() if x is not None
        ]
        entry["variants"][id(kernel)] = sorted(special)
    for entry in found.values():
        entry["variants"] = list(entry["variants"].values())
    return found


def _call_everything(length: int, start: int, chunk_rows: int | None) -> None:
    """Call each public function on tokens `start` to `start + length` of longer tensors."""
    vocabulary, hidden_size = 1024, 16
    end, step = start + length, length + start  # hyperparameters change with the shapes
    part = slice(start, end)
    hidden = torch.zeros(end, hidden_size, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.zeros(vocabulary, hidden_size, dtype=torch.bfloat16, requires_grad=True)
    logits_NV = torch.zeros(end, vocabulary, dtype=torch.bfloat16, requires_grad=True)
    ids, values = torch.zeros(end, dtype=torch.int64)[part], torch.ones(end)[part]
    mask = torch.ones(end, dtype=torch.bool)
    mask[start + 1 :: 3] = False
    plain = GRPOLossConfig(temperature=1 + step / 16, epsilon_low=0.1, epsilon_high=step / 10)
    full = GRPOLossConfig(
        loss_type="grpo", beta=step / 8, delta=2 + step, epsilon_high=0.28, temperature=step
    )
    given: dict[str, Any] = {
        "completion_mask": mask[part],
        "cu_seqlens": torch.tensor([0, length]),
        "old_logps": values,
        "ref_logps": values,
        "policy_weight": values,
        "config": full,
    }
    some_inactive = values.clone()
    some_inactive[::2] = 0
    for advantages, arguments in (
        (values, {"config": plain}),
        (some_inactive, {"config": plain}),
        (values, given),
    ):
        linear_grpo_loss(
            hidden[part], weight, ids, advantages, chunk_rows=chunk_rows, **arguments
        ).loss.backward()
        grpo_loss(logits_NV[part], ids, advantages, **arguments).loss.backward()
        copy = logits_NV[part] * 1
        grpo_loss(copy, ids, advantages, inplace=True, **arguments).loss.backward()
        grpo_loss(logits_NV[part].detach(), ids, advantages, **arguments)
    for part_mask in (None, mask[part]):
        for logps, entropy in (
            linear_logps(hidden[part], weight, ids, mask=part_mask, chunk_rows=chunk_rows),
            selective_logps(logits_NV[part], ids, mask=part_mask, temperature=1 + step / 16),
        ):
            (logps.sum() + entropy.sum()).backward()


def _call(task: tuple[Callable[..., list[dict[str, Any]]], tuple[Any, ...]]):
    return task[0](*task[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("resources", "variants", "blocks"))
    parser.add_argument("--full", action="store_true", help="every type on every architecture")
    options = parser.parse_args()
    if options.what == "variants":
        print(json.dumps(count_variants(), indent=1))
        return
    if options.what == "blocks":
        shapes = ((4096, 8), (4096, 16), (8192, 8), (8192, 16), (8192, 32), (16384, 32))
        tasks = [(compile_block, (arch, *shape)) for arch in ARCHS for shape in shapes]
    elif options.full:
        axes = itertools.product(ARCHS, DTYPES, VOCABULARIES)
        tasks = [(compile_rows, axis) for axis in axes]
    else:
        # The main type everywhere; the others, and a vocabulary that divides by nothing, on two.
        axes = [(arch, DTYPES[0], VOCABULARIES[0]) for arch in ARCHS]
        others = [(dtype, VOCABULARIES[0]) for dtype in DTYPES[1:]] + [(DTYPES[0], VOCABULARIES[1])]
        axes += [(arch, *other) for arch in (80, 90) for other in others]
        tasks = [(compile_rows, axis) for axis in axes]
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        results = [row for rows in pool.map(_call, tasks) for row in rows]
    print("[" + ",\n".join(map(json.dumps, results)) + "]")


if __name__ == "__main__":
    main()
