"""Every kernel, compiled for six architectures as its launcher launches it, with no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import fastgrpo_kernels

pytestmark = pytest.mark.aot

# Bytes of shared memory a program may have (CUDA programming guide, compute capabilities).
SHARED_MEMORY = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
REGISTERS = 65536  # of a multiprocessor, all of them alike
KERNELS = {"loss", "statistics", "dlogits", "scale", "objective"}


def aot(script: str, *arguments: str) -> Any:
    """Run the compiler in its own process: this one has the interpreter."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    path = [str(Path(fastgrpo_kernels.__file__).parents[1]), environment.get("PYTHONPATH")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name(script)), *arguments],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    return aot("aot.py", "resources")


def name(launch: dict[str, Any]) -> str:
    return "{case} {dtype} V={vocabulary} on sm_{arch}".format(**launch)


def check(launches: list[dict[str, Any]]) -> None:
    for launch in launches:
        assert launch["stack"] == 0 and launch["local"] == 0, f"{name(launch)} spills: {launch}"
        assert launch["registers"] * launch["warps"] * 32 <= REGISTERS, name(launch)
        assert launch["shared"] <= SHARED_MEMORY[launch["arch"]], name(launch)
        if launch["vocabulary"] and launch["vocabulary"] % 16 == 0:
            check_accesses(launch)


def check_accesses(launch: dict[str, Any]) -> None:
    """All of a row moves 16 bytes at a time; only the target's own logit is read by itself."""
    words = launch["case"].split()
    kernel, writes = words[0], words[0] in ("dlogits", "scale") or "gradient" in words
    written = 4 if launch["dtype"] == "float32" else 2
    read = 4 if "wide" in words else written
    a_thread = launch["block"] // (32 * launch["warps"]) / 16  # accesses of a sweep, of one byte
    sweeps = 2 if kernel == "loss" and writes else 1
    assert launch["ld_16_vector"] == sweeps * a_thread * read, name(launch)
    # A row of zeros is written where the mask says so, another where the gradient is 0.
    zeros = 0 if kernel == "scale" else ("mask" in words or "all" in words) + 1
    assert launch.get("st_16_vector", 0) == writes * (1 + zeros) * a_thread * written, name(launch)
    vectors = {kind for kind in launch if kind.endswith("_vector")}
    assert vectors <= {"ld_16_vector", "st_16_vector"}, name(launch)
    assert "st_2_scalar" not in launch, name(launch)
    if read == 2:
        reads_target = kernel in ("loss", "statistics")
        assert launch.get("ld_2_scalar", 0) == reads_target, name(launch)
        if kernel == "loss":
            assert launch["barrier_after_target"], f"{name(launch)}: the target may be overwritten"


@pytest.mark.parametrize("arch", SHARED_MEMORY)
def test_no_spill_and_16_byte_accesses(compiled: list[dict[str, Any]], arch: int) -> None:
    launches = [launch for launch in compiled if launch["arch"] == arch]
    assert {launch["case"].split()[0] for launch in launches} == KERNELS
    groups = {(launch["dtype"], launch["vocabulary"]) for launch in launches}
    assert {("bfloat16", 151936), ("float32", 0)} <= groups
    assert len(groups) == {90: 4, 86: 3}.get(arch, 2)
    check(launches)


@pytest.mark.slow
def test_no_spill_and_16_byte_accesses_full() -> None:
    launches = aot("aot.py", "resources", "--full")
    # Four in six groups have 16-bit gradients, and may read fp32 logits.
    assert len(launches) == len(SHARED_MEMORY) * (4 * 91 + 2 * 82 + 114)
    check(launches)


def test_lengths_offsets_and_hyperparameters_compile_nothing_new() -> None:
    aligned, odd = aot("aot_variants.py")
    for found, vocabulary in ((aligned, 1024), (odd, 1009)):
        kernels = {kernel.split("_kernel(")[0] for kernel in found}
        assert kernels == KERNELS
        assert sum(entry["launches"] for entry in found.values()) > 5000
        for kernel, entry in found.items():
            # What differs between variants is what was compiled for, and should not have been ...
            variants = [set(variant) for variant in entry["variants"]]
            differs = set.union(*variants) - set.intersection(*variants)
            if vocabulary % 16 == 0:
                assert len(variants) == 1, f"{kernel}: compiled anew for {sorted(differs)}"
            else:
                # ... but rows off a 16-byte boundary are, and a last, narrower slice of columns.
                assert len(variants) <= 2, f"{kernel}: compiled anew for {sorted(differs)}"
                assert differs <= {"logits_ptr"} or differs <= {"V", "stride", "dstride"}, kernel
