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
# Launches of `_row.py` that differ in kernel or in the pointers they are given.
LAUNCHES = 18


def aot(*arguments: str) -> Any:
    """Run the compiler in its own process: this one has the interpreter."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(fastgrpo_kernels.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("aot.py")), *arguments],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    return aot("resources")


def name(launch: dict[str, Any]) -> str:
    return "{case} {dtype} V={vocabulary} on sm_{arch}".format(**launch)


def check(launches: list[dict[str, Any]]) -> None:
    for launch in launches:
        assert launch["stack"] == 0 and launch["local"] == 0, f"{name(launch)} spills: {launch}"
        assert launch["shared"] <= SHARED_MEMORY[launch["arch"]], name(launch)
        if launch["vocabulary"] % 16 == 0:
            check_accesses(launch)


def check_accesses(launch: dict[str, Any]) -> None:
    """All of a row moves 16 bytes at a time; only the target's own logit is read by itself."""
    kind = launch["case"].split("-")[0]
    reads_twice = kind == "dlogits" or launch["case"].endswith("gradient")
    writes = reads_twice or kind == "scale"
    itemsize = 4 if launch["dtype"] == "float32" else 2
    accesses_of_a_sweep = launch["block"] * itemsize // (16 * 32 * launch["warps"])
    assert launch["wide_loads"] >= accesses_of_a_sweep * (2 if reads_twice else 1), name(launch)
    assert launch["wide_stores"] >= accesses_of_a_sweep * writes, name(launch)
    if itemsize == 2:
        assert launch["loads_of_2_bytes"] == (kind != "scale"), name(launch)
        assert launch["stores_of_2_bytes"] == 0, name(launch)


@pytest.mark.parametrize("arch", SHARED_MEMORY)
def test_no_spill_and_16_byte_accesses(compiled: list[dict[str, Any]], arch: int) -> None:
    launches = [launch for launch in compiled if launch["arch"] == arch]
    groups = {(launch["dtype"], launch["vocabulary"]) for launch in launches}
    assert ("bfloat16", 151936) in groups
    assert len(groups) == (4 if arch in (80, 90) else 1)
    assert len(launches) == LAUNCHES * len(groups)
    check(launches)


@pytest.mark.slow
def test_no_spill_and_16_byte_accesses_full() -> None:
    launches = aot("resources", "--full")
    assert len(launches) == LAUNCHES * len(SHARED_MEMORY) * 3 * 2
    check(launches)


def test_lengths_offsets_and_hyperparameters_compile_nothing_new() -> None:
    found = aot("variants")
    assert {kernel.split("(")[0] for kernel in found} == {
        "loss_kernel",
        "logps_kernel",
        "scale_kernel",
    }
    assert sum(entry["launches"] for entry in found.values()) > 1000
    for kernel, entry in found.items():
        # What differs between the variants is what was compiled for, and should not have been.
        differs = set.union(*map(set, entry["variants"])) - set.intersection(
            *map(set, entry["variants"])
        )
        assert len(entry["variants"]) == 1, f"{kernel}: compiled anew for {sorted(differs)}"
