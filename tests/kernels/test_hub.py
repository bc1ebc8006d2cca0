"""The package copied alone into another folder, as the Hugging Face kernel Hub wants it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from absent_modules import HIDE

import fastgrpo_kernels

PACKAGE = Path(fastgrpo_kernels.__file__).parent
# Loss kernel, objective kernel between two row kernels, and logits computed again by slices.
CALLS: list[dict[str, Any]] = [
    {"method": "single_pass"},
    {"method": "single_pass", "importance_sampling_level": "sequence"},
    {"method": "recompute", "loss_type": "cispo", "epsilon_high": 2.0},
]

# What the kernel Hub's loader does: a module from a path, under a name of its own making. Nothing
# else of this project can be imported.
LOAD = (
    """
import importlib.util, sys
import torch
absent = set(sys.argv[4].split(","))
"""
    + HIDE
    + """
name = "hub_copy_3f2a"
spec = importlib.util.spec_from_file_location(name, sys.argv[1] + "/__init__.py")
copy = importlib.util.module_from_spec(spec)
sys.modules[name] = copy
spec.loader.exec_module(copy)
torch.set_num_threads(1)
"""
)
RUN = """
def results(package, inputs, calls, backend):
    found = []
    for call in calls:
        options = dict(call)
        method = options.pop("method")
        config = package.GRPOLossConfig(beta=0.1, entropy_coef=0.01, **options)
        hidden, weight = (inputs[n].clone().requires_grad_() for n in ("hidden", "weight"))
        output = package.linear_grpo_loss(
            hidden, weight, inputs["ids"], inputs["advantages"], chunk_rows=5, method=method,
            backend=backend, config=config, old_logps=inputs["old"], ref_logps=inputs["ref"],
        )
        output.loss.backward()
        found.append([output.loss.detach(), output.logps, output.entropy, hidden.grad, weight.grad])
    return found
"""
SAVE = """
inputs, calls, backend = torch.load(sys.argv[2])
torch.save(results(copy, inputs, calls, backend), sys.argv[3])
assert not {x.split(".")[0] for x in sys.modules} & absent
assert sys.modules[name + ".linear"].__file__.startswith(sys.argv[1])
"""


@pytest.mark.parametrize(
    ("backend", "absent"),
    [("torch", ""), ("triton", ""), ("auto", "triton")],
    ids=("torch", "triton", "without-triton"),
)
def test_a_copy_of_the_package_alone_works(tmp_path: Path, backend: str, absent: str) -> None:
    copy = tmp_path / "torch-ext" / "hub_copy"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    torch.manual_seed(0)
    inputs = {
        "hidden": torch.randn(3, 4, 8),
        "weight": torch.randn(33, 8),
        "ids": torch.randint(33, (3, 4)),
        "advantages": torch.tensor([1.0, -0.5, 2.0]),
        "old": torch.randn(3, 4) - 4,
        "ref": torch.randn(3, 4) - 4,
    }
    torch.save((inputs, CALLS, backend), tmp_path / "inputs.pt")
    missing = ",".join(filter(None, ["fastgrpo", "fastgrpo_kernels", absent]))
    # The GPU hidden: the values are compared with those of CPU tensors.
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    given = [str(x) for x in (copy, tmp_path / "inputs.pt", tmp_path / "results.pt")]
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", LOAD + RUN + SAVE, *given, missing],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    original: dict[str, Any] = {}
    exec(RUN, original)
    expected = original["results"](fastgrpo_kernels, inputs, CALLS, "torch")
    actual = torch.load(tmp_path / "results.pt")
    assert all(gradient.abs().sum() > 0 for call in actual for gradient in call[-2:])
    tolerance = 1e-5 if backend == "triton" else 1e-6
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def test_the_configuration_of_another_copy_is_told_apart(tmp_path: Path) -> None:
    copy = tmp_path / "hub_copy"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    call = "\nimport fastgrpo_kernels\nx, ids = torch.ones(1, 2, 3), torch.zeros(1, 2).long()\n"
    call += "config = fastgrpo_kernels.GRPOLossConfig()\n"
    call += "copy.linear_grpo_loss(x, x[0], ids, torch.ones(1), config=config)\n"
    done = subprocess.run(
        [sys.executable, "-c", LOAD + call, str(copy), "", "", "nothing"],
        env=os.environ | {"PYTHONPATH": str(PACKAGE.parent)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stderr.splitlines()[-1] == (
        "TypeError: config must be the GRPOLossConfig of hub_copy_3f2a.config, got that of "
        "fastgrpo_kernels.config, another copy of the package: take loss and config from one"
    )
