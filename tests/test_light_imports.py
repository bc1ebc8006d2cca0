"""What an import brings along: the loss costs little, and no integration needs another's peer."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from absent_modules import HIDE

ROOT = Path(__file__).parents[1]
INTEGRATIONS = {path.stem for path in (ROOT / "fastgrpo/integrations").glob("[!_]*.py")}
OF_TRL = {"transformers", "datasets", "accelerate", "trl"}
NEEDS = {"fused_head": {"transformers"}, "trl_metrics": {"transformers"}, "trl": OF_TRL}
OTHERS = {
    "accelerate", "cut_cross_entropy", "datasets", "kernels", "liger_kernel", "openrlhf", "peft",
    "transformers", "trl", "verl", "vllm",
}  # fmt: skip

ABSENT = (
    """
import importlib.util, sys
absent = set(sys.argv[1].split(","))
"""
    + HIDE
    + """
for module in sys.argv[2:]:
    importlib.import_module("fastgrpo.integrations." + module)
print(*absent & {name.split(".")[0] for name in sys.modules})
"""
)


def run(code: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_fastgrpo_imports_torch_and_no_more() -> None:
    """Not even the compiler, which is a part of torch that takes as long again."""
    said = run("""
import sys
import torch
before = set(sys.modules)
import fastgrpo
from fastgrpo import linear_grpo_loss
added = {name.split(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)
print(*sorted(added), "torch._dynamo" in sys.modules)
""")
    assert said == "fastgrpo fastgrpo_kernels False"


@pytest.mark.parametrize("command", ["train", "plan"])
def test_a_wrong_key_is_told_before_what_takes_long_is_imported(
    tmp_path: Path, command: str
) -> None:
    (tmp_path / "config.yaml").write_text("loss_typ: dapo\n")
    said = run(
        """
import sys
from fastgrpo.cli import main
print(main(sys.argv[1:]), "transformers" in sys.modules)
""",
        *(command, str(tmp_path / "config.yaml")),
    )
    assert said == "2 False"


def test_an_integration_imports_nothing_that_it_does_not_need() -> None:
    assert NEEDS.keys() <= INTEGRATIONS
    assert run(ABSENT, ",".join(sorted(OTHERS)), *sorted(INTEGRATIONS - NEEDS.keys())) == ""
    others = OTHERS - {"transformers"}
    assert run(ABSENT, ",".join(sorted(others)), "fused_head", "trl_metrics") == ""


@pytest.mark.peers
def test_the_integration_of_trl_needs_no_other_peer() -> None:
    pytest.importorskip("trl")
    assert run(ABSENT, ",".join(sorted(OTHERS - NEEDS["trl"])), "trl") == ""
