"""The kernels stand alone: torch is needed, triton is used, nothing else is imported."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fastgrpo_kernels

PACKAGE = Path(fastgrpo_kernels.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
FLOORS = (
    {"config", "_autograd", "_layout", "_sharding", "_uncompiled"},
    {"_objective", "_checks"},
    {"_inputs"},
    {"_plan", "_reduce", "_backend", "_row"},
    {"policy", "sampler", "_kernels", "_compiled"},
    {"reference", "_row_torch", "_sequence", "_products"},
    {"_head"},
    {"_row_triton", "_single_pass", "_recompute"},
    {"logits", "linear"},
    {"__init__"},
)


def imports(path: Path) -> list[tuple[int, str]]:
    """Return (level, first name) of every import of a module, wherever it stands."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(0, alias.name.split(".")[0]) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found += [(node.level, name.split(".")[0]) for name in names]
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.name)
def test_only_torch_triton_and_the_standard_library_are_imported(path: Path) -> None:
    allowed = {"torch", "triton"} | set(sys.stdlib_module_names)
    for level, name in imports(path):
        assert level in (0, 1), f"{name}: no import from above the package"
        # Its own name would not be there in a copy of the package (the kernel Hub).
        assert level == 1 or name in allowed, name


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.name)
def test_imports_go_down_the_floors(path: Path) -> None:
    floor = {name: i for i, names in enumerate(FLOORS) for name in names}
    assert path.stem in floor, "a new module: say on which floor it stands"
    for level, name in imports(path):
        if level == 1:
            assert floor[name] < floor[path.stem], f"{path.stem} imports {name}"


def test_the_source_root_is_not_a_package() -> None:
    # A package `kernels` would hide Hugging Face's, which transformers imports.
    assert not (PACKAGE.parent / "__init__.py").exists()


def run(code: str, **environment: str) -> str:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    # The GPU hidden: what a machine without one does is what is asked here.
    env |= {"PYTHONPATH": str(PACKAGE.parent), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code],
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


LOSS = """
import torch
from fastgrpo_kernels import linear_grpo_loss
torch.manual_seed(0)
hidden = torch.randn(4, 3).requires_grad_()
weight, ids = torch.randn(7, 3), torch.arange(4)
def loss(backend):
    return linear_grpo_loss(hidden, weight, ids, torch.ones(4), backend=backend).loss
def refusal():
    try:
        loss("triton")
    except ValueError as error:
        return error
"""
BLOCK_TRITON = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Block())
"""
# What `importlib.util.find_spec` finds where there is no triton.
NOT_INSTALLED = """
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: (
    None if name.split(".")[0] == "triton" else real(name, package)
)
"""


def test_without_triton_everything_runs_on_torch() -> None:
    out = run(
        BLOCK_TRITON
        + NOT_INSTALLED
        + LOSS
        + """
value = loss("auto")
value.backward()
assert value.item() == -1 and hidden.grad.abs().sum() > 0
assert "triton" not in sys.modules
print(refusal())
"""
    )
    assert "needs the package triton" in out


def test_triton_on_cpu_tensors_says_that_it_needs_the_interpreter() -> None:
    out = run(LOSS + "assert loss('auto').item() == -1\nprint(refusal())")
    assert "runs only under TRITON_INTERPRET=1" in out


def test_triton_on_cpu_tensors_runs_in_the_interpreter() -> None:
    assert run(LOSS + "print(loss('triton').item())", TRITON_INTERPRET="1").strip() == "-1.0"


def test_the_public_surface_is_what_the_design_says() -> None:
    """And the type of the keyword arguments, so that their documentation can be found."""
    assert set(fastgrpo_kernels.__all__) == {
        "LossArguments",
        "GRPOLossConfig",
        "GRPOLossOutput",
        "grpo_loss",
        "importance_weights",
        "linear_grpo_loss",
        "linear_logps",
        "off_policy_mask",
        "policy_loss",
        "reference",
        "selective_logps",
        "top_entropy_mask",
    }
    for name in fastgrpo_kernels.__all__:
        assert getattr(fastgrpo_kernels, name).__doc__


def test_no_room_of_the_trainer_takes_the_name_of_something_public() -> None:
    import fastgrpo

    rooms = {path.stem for path in Path(fastgrpo.__file__).parent.iterdir()}
    assert not rooms & set(fastgrpo.__all__)
