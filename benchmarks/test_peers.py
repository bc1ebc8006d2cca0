"""The adapters of the peers without a GPU: the peers' own code and kernels, held to fp64.

Of a peer that is not installed the tests are skipped; those that take long want `-m ""`.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import json
import os
import subprocess
import sys
import types
import warnings
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from packaging.version import Version

from . import measure, peers, worker
from .cells import Cell, Inputs, make_inputs
from .peers.without_gpu import CASES, UNSEEN, key

ROOT = Path(__file__).parents[1]
HOPPER_SHARED = 232_448  # bytes of shared memory of one block on Hopper

PACKAGES = {
    "trl": ("trl",),
    "liger_triton": ("liger_kernel",),
    "liger_linear": ("liger_kernel",),
    "liger_sm90": ("liger_kernel", "cutlass"),
    "cce": ("cut_cross_entropy",),
    "verl": ("verl",),
}
GPU_ONLY = ("liger_triton", "liger_sm90", "cce", "verl")
# What is imported last: where a package that is installed and broken shows it.
INNERMOST = {
    "trl": "trl.trainer.grpo_trainer",
    "liger_triton": "liger_kernel.transformers.grpo_loss",
    "liger_linear": "liger_kernel.chunked_loss",
    "liger_sm90": "liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90",
    "cce": "cut_cross_entropy",
    "verl": "verl.utils.kernel.linear_cross_entropy",
}
# Products of 2NHV inside of kernels, which PyTorch does not see; verl's others are dX and dW.
HIDDEN = {
    "cce": lambda cell: 1 if cell.op == "logps" else 3 if cell.frozen else 4,
    "verl": lambda cell: 1 if cell.op == "logps" else 2,
}
KERNELS = {
    "trl": {"_forward_kernel", "_backward_kernel"},
    "liger_triton": {"_grpo_loss_fwd_kernel", "_grpo_loss_bwd_kernel"},
    "liger_sm90": {
        "_ScaledCEForwardFragmentSM90",
        "_ScaledCEForwardFragmentFinalizeSM90",
        "_FusedBackwardSM90",
    },
    "cce": {
        "_cce_lse_forward_kernel",
        "_indexed_neg_dot_forward_kernel",
        "_cce_backward_kernel",
    },
    "verl": {
        "efficient_entropy_kernel_general_mainloop",
        "efficient_entropy_triton_kernel_epilogue",
        "efficient_entropy_backward_kernel_general_d_logits_split_N",
    },
}


class Run(NamedTuple):
    """One method on one cell in one way."""

    way: str
    name: str
    method: peers.Method
    cell: Cell

    def __str__(self) -> str:
        cell = self.cell
        head = "-frozen" if cell.frozen else ""
        kind = f"{cell.op}-{cell.dtype}-rho{cell.rho}{head}"
        return f"{self.way}-{self.name}-{self.method.name}-{kind}"


RUNS = [
    Run(way, name, method, cell)
    for (way, name), cells in CASES.items()
    for cell in cells
    for method in peers.load(name).METHODS
    if cell.op in method.ops
]


def parameters(runs: Iterable[Run]) -> list[Any]:
    return [
        pytest.param(run, marks=[pytest.mark.slow] if run.way == "inductor" else [], id=str(run))
        for run in runs
    ]


@pytest.mark.peers
@pytest.mark.parametrize("run", parameters(RUNS))
def test_loss_and_gradients_are_those_of_fp64(run: Run) -> None:
    record = records(run.way, run.name)[key(run.method, run.cell)]
    error, naive = record["error"], record["naive"]
    assert error.keys() == (
        {"logps"} if run.cell.op == "logps" else
        {"loss", "logits"} if run.cell.op == "logits" else
        {"loss", "hidden"} if run.cell.frozen else
        {"loss", "hidden", "weight"}
    )  # fmt: skip
    assert not measure.is_wrong(error, naive, dtype=getattr(torch, run.cell.dtype))
    # Measured: 2.0 times naive's error, 2e-4 in the log-probs of fp16, and 5e-6 in a loss of fp32,
    # of which naive's own error is now and then next to none.
    floor = {"float32": 1e-6, "float16": 3e-4, "bfloat16": 3e-4}[run.cell.dtype]
    floors = {part: max(floor, 1e-5) if part == "loss" else floor for part in error}
    assert all(error[part] <= 2.5 * naive[part] + floors[part] for part in error), record


@pytest.mark.peers
@pytest.mark.parametrize(
    "run",
    parameters(run for run in RUNS if run.method.products is not None and run.name not in UNSEEN),
)
def test_the_products_stated_are_those_done(run: Run) -> None:
    assert run.method.products is not None
    hidden = HIDDEN[run.name](run.cell) if run.name in HIDDEN else 0
    seen = run.method.products(run.cell) - hidden
    found = records(run.way, run.name)[key(run.method, run.cell)]["flops"]
    assert found == seen * 2 * run.cell.N * run.cell.H * run.cell.V


@pytest.mark.peers
@pytest.mark.aot
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name == "liger_sm90" else [])
        for name in KERNELS
    ],
)
def test_kernels_compile_for_hopper(name: str) -> None:
    found = records("build", name)
    assert {kernel["name"] for kernel in found.values()} == KERNELS[name]
    assert all(kernel["shared"] <= HOPPER_SHARED for kernel in found.values())


@pytest.mark.peers
def test_liger_sm90_gets_its_arguments_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that runs on Hopper alone: its front door and what stands behind take the same."""
    skip_without("liger_sm90")
    adapter = peers.load("liger_sm90")
    apply = inspect.signature(adapter._imports())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of CuTe, about Liger
        adapter._kernels()
    behind = sys.modules[INNERMOST["liger_sm90"]]
    forward = inspect.signature(behind.LigerFusedScaledCrossEntropySM90Function.forward)
    given: dict[str, Any] = {}

    def record(*args: Any, **kwargs: Any) -> torch.Tensor:
        given.update(apply.bind(*args, **kwargs).arguments)
        forward.bind(None, **given)
        return torch.zeros(args[2].shape)

    monkeypatch.setattr(adapter, "_imports", lambda: record)
    monkeypatch.setenv("LIGER_SCALED_CE_SM90_VALIDATE_TARGETS", "0")  # the adapter sets it too
    inputs = make_inputs(Cell("linear", 64, 48, 320), "cpu")
    assert adapter.logps(inputs).shape == inputs.ids.shape
    assert given.keys() == {"_input", "weight", "target", "temperature"}
    assert given["_input"].shape == (64, 48) and given["weight"] is inputs.weight
    assert given["target"].equal(inputs.ids.view(-1)) and given["temperature"] == 1.0


@pytest.mark.parametrize("accumulates", [False, True], ids=["25.1", "later"])
def test_cce_is_exact_when_asked(accumulates: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def of_25_1(e, c, targets, reduction="mean", filter_eps="auto"):
        return e, c, targets, reduction, filter_eps

    def later(e, c, targets, reduction="mean", accum_e_fp32=False, accum_c_fp32=False):
        return e, c, targets, reduction, accum_e_fp32, accum_c_fp32

    adapter = peers.load("cce")
    adapter._options.cache_clear()
    monkeypatch.setattr(adapter, "_imports", lambda: later if accumulates else of_25_1)
    wanted = {"accum_e_fp32": True, "accum_c_fp32": True} if accumulates else {}
    assert adapter._options(True) == {"filter_eps": None} | wanted
    assert adapter._options(False) == {}
    adapter._options.cache_clear()


@pytest.mark.parametrize("name", PACKAGES)
def test_a_missing_package_is_not_installed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = peers.load(name)
    for package in PACKAGES[name]:
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda found, absent=package: found != absent or None
        )
        assert adapter.unavailable("cpu") == adapter.unavailable("cuda") == "not installed"


@pytest.mark.parametrize("name", GPU_ONLY)
def test_no_gpu_is_a_failure_that_says_so(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: package)
    assert peers.load(name).unavailable("cpu") == "failed: needs a GPU"


@pytest.mark.parametrize("capability", [(8, 9), (10, 0), None])
def test_liger_sm90_is_for_one_capability(
    capability: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: package)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    adapter = peers.load("liger_sm90")
    assert adapter.unavailable("cuda") == "failed: needs a GPU of compute capability 9.0"


@pytest.fixture
def broken_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Stand in the place of every peer's packages with some that are installed and broken."""
    for module in INNERMOST.values():
        folder = tmp_path.joinpath(*module.split("."))
        for parent in (folder, *folder.parents):
            if parent == tmp_path:
                break
            parent.mkdir(parents=True, exist_ok=True)
            (parent / "__init__.py").touch()
        (folder / "__init__.py").write_text("raise OSError('libcudart.so.99: no such file')")
    (tmp_path / "cutlass").mkdir()
    (tmp_path / "cutlass" / "__init__.py").touch()
    names = {package for packages in PACKAGES.values() for package in packages}

    def theirs() -> list[str]:
        return [module for module in sys.modules if module.partition(".")[0] in names]

    for module in theirs():
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for module in theirs():
        del sys.modules[module]


@pytest.mark.parametrize("name", PACKAGES)
def test_a_broken_package_is_a_failure_that_breaks_nothing_else(
    name: str, broken_packages: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    cells = [Cell(op, 64, 48, 320) for op in ("linear", "logits", "logps")]
    found = list(worker.records_of(name, cells, "cuda", 0.0))
    methods = peers.load(name).METHODS
    assert len(found) == sum(cell.op in method.ops for method in methods for cell in cells)
    assert {record["status"] for record in found} == {
        "failed: OSError: libcudart.so.99: no such file"
    }


def test_a_method_that_fails_lets_the_next_one_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(inputs: Inputs) -> torch.Tensor:
        raise RuntimeError("illegal memory access\nlong story")

    naive = peers.load("naive")
    methods = [peers.Method("bad", ("linear",), fails), naive.METHODS[0]]
    adapter = types.SimpleNamespace(unavailable=naive.unavailable, METHODS=methods)
    monkeypatch.setattr(peers, "load", lambda name: adapter)
    found = list(worker.records_of("any", [Cell("linear", 64, 48, 320)], "cpu", 0.0))
    statuses = [record["status"] for record in found]
    assert statuses == ["failed: RuntimeError: illegal memory access", "ok"]


def test_every_shape_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """More shapes than `torch.compile` compiles of one function before it gives up in silence."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, examples: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    adapter = peers.load("compiled")
    adapter._compiled.cache_clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    shapes = [Cell("linear", 16, hidden, 40, dtype="float32") for hidden in (8, 16, 24, 32)]
    with torch._dynamo.config.patch(recompile_limit=2):
        for cell in shapes:
            inputs = make_inputs(cell, "cpu")
            wanted = peers.naive.linear(inputs)
            for _ in range(2):
                assert adapter.linear(inputs).item() == pytest.approx(wanted.item(), rel=1e-5)
    adapter._compiled.cache_clear()
    assert len(graphs) == len(shapes)


def test_liger_linear_leaves_the_precision_of_products_alone() -> None:
    before = torch.get_float32_matmul_precision()
    with peers.load("liger_linear")._tf32():
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == before == "highest"


def skip_without(name: str) -> None:
    for package in PACKAGES.get(name, ()):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")


def records(way: str, name: str) -> dict[str, dict[str, Any]]:
    """Return the records of a process of its own: the interpreter and the compiler share none."""
    if (way, name) != ("plain", "liger_sm90"):
        skip_without(name)
    elif importlib.util.find_spec("liger_kernel") is None:
        pytest.skip("liger_kernel is not installed")
    if way == "inductor" and (reason := peers.load("compiled").unavailable("cpu")):
        pytest.skip(reason)
    # The older interpreter makes its loops' bounds as only the older NumPy allows.
    triton, numpy = (Version(metadata.version(package)) for package in ("triton", "numpy"))
    if way == "interpret" and triton < Version("3.7") and numpy >= Version("2.4"):
        pytest.skip(f"the interpreter of Triton {triton} does not work with NumPy {numpy}")
    done = process(way, name)
    assert done.returncode == 0, done.stderr[-4000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    return {record.pop("key"): record for record in found}


@functools.cache
def process(way: str, name: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "TRITON_INTERPRET": "1" if way == "interpret" else "0",
        "CUTE_DSL_ARCH": "sm_90a",
    }
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.peers.without_gpu", way, name],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
