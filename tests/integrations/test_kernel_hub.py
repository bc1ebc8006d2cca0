"""The layout for the Hugging Face kernel Hub, and `kernels` itself loading it.

That a copy of the package works with nothing else there is shown in tests/kernels/test_hub.py.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import fastgrpo
from fastgrpo.integrations import kernel_hub
from fastgrpo.integrations.kernel_hub import BACKENDS, PACKAGE, lay_out, main

ROOT = Path(__file__).parents[2]


def files(folder: Path) -> dict[str, bytes]:
    """Return name and content of every file but bytecode."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in paths
        if path.parent.name != "__pycache__"
    }


def test_each_backend_has_the_package_and_what_kernels_has_to_know_of_it(tmp_path: Path) -> None:
    directory = lay_out(tmp_path / "new" / "hub")
    assert directory == tmp_path / "new" / "hub"
    assert {path.name for path in directory.iterdir()} == {"README.md", "LICENSE", "build"}
    variants = sorted((directory / "build").iterdir())
    assert [path.name for path in variants] == [f"torch-{backend}" for backend in BACKENDS]
    ids = set()
    for backend, variant in zip(BACKENDS, variants, strict=True):
        found = files(variant)
        metadata = json.loads(found.pop("metadata.json"))
        assert found == files(PACKAGE)
        assert re.fullmatch(rf"_fastgrpo_kernels_{backend}_[0-9a-f]{{8}}", metadata["id"])
        ids.add(metadata.pop("id"))
        assert metadata == {
            "name": "fastgrpo-kernels",
            "version": 1,
            "license": "Apache-2.0",
            "python-depends": [],
            "backend": {"type": backend},
        }
    assert len({name.rpartition("_")[2] for name in ids}) == 1


def test_the_card_and_the_licence_are_those_of_the_project(tmp_path: Path) -> None:
    directory = lay_out(tmp_path / "hub")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    _, head, text = (directory / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    head = yaml.safe_load(head)
    assert head["library_name"] == "kernels"
    assert head["license"] == project["license"].lower()
    assert f"# The GRPO loss of fastgrpo {project['version']}\n" in text
    assert (directory / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


def test_another_source_has_another_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def name(directory: Path) -> str:
        return json.loads((directory / "build/torch-cuda/metadata.json").read_text())["id"]

    first, again = name(lay_out(tmp_path / "a")), name(lay_out(tmp_path / "b"))
    changed = shutil.copytree(PACKAGE, tmp_path / "fastgrpo_kernels")
    (changed / "_row.py").write_text((changed / "_row.py").read_text() + "\n")
    monkeypatch.setattr(kernel_hub, "PACKAGE", changed)
    assert first == again != name(lay_out(tmp_path / "c"))


def test_what_is_there_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "README.md").write_text("mine")
    for there in (kept, kept / "README.md"):
        with pytest.raises(ValueError, match="is not an empty directory: name another"):
            lay_out(there)
    with pytest.raises(SystemExit) as stopped:
        main([str(kept)])
    assert stopped.value.code == 2
    assert f"{kept} exists and is not an empty directory" in capsys.readouterr().err
    assert files(tmp_path) == {"kept/README.md": b"mine"}


def test_an_empty_directory_is_filled_and_stays_what_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It may have rights of its own, be a mount point, or the current one."""
    empty = tmp_path / "empty"
    empty.mkdir()
    empty.chmod(0o750)
    before = empty.stat()
    os.utime(tmp_path, (0, 0))
    monkeypatch.chdir(empty)
    assert main(["."]) == 0
    after = empty.stat()
    assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)
    assert {path.name for path in empty.iterdir()} == {"README.md", "LICENSE", "build"}
    # Nothing was made or moved beside it, which may be another file system or forbidden.
    assert tmp_path.stat().st_mtime == 0
    said = capsys.readouterr().out
    assert f"hf upload OWNER/fastgrpo-kernels {empty} . --repo-type kernel --revision v1" in said
    assert f"kernels.get_local_kernel(pathlib.Path({str(empty)!r}))\n" in said


def test_bytecode_stays_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = shutil.copytree(PACKAGE, tmp_path / "fastgrpo_kernels")
    (source / "__pycache__").mkdir(exist_ok=True)
    (source / "__pycache__" / "linear.pyc").write_bytes(b"compiled")
    monkeypatch.setattr(kernel_hub, "PACKAGE", source)
    assert not list(lay_out(tmp_path / "hub").rglob("__pycache__"))


def test_half_a_layout_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = shutil.copytree(PACKAGE, tmp_path / "fastgrpo_kernels")
    (broken / "zzz.py").symlink_to(broken / "nowhere.py")  # copied last, and cannot be
    monkeypatch.setattr(kernel_hub, "PACKAGE", broken)
    empty = tmp_path / "empty"
    empty.mkdir()
    for directory in (tmp_path / "hubs" / "hub", empty):
        with pytest.raises(OSError, match="No such file"):
            lay_out(directory)
    assert not any((tmp_path / "hubs").iterdir()) and not any(empty.iterdir())


# ---------------------------------------------------------------- with `kernels` itself


@pytest.fixture
def kernels() -> Any:
    """The installed package: where there is none our folder of that name can be imported too."""
    pytest.importorskip("kernels.layer", reason="the package kernels is not installed")
    return sys.modules["kernels"]


@pytest.mark.peers
def test_kernels_loads_the_package_under_a_name_of_its_own(kernels: Any, tmp_path: Path) -> None:
    loaded = kernels.get_local_kernel(lay_out(tmp_path / "hub"))
    assert Path(loaded.__file__).is_relative_to(tmp_path / "hub" / "build")
    assert loaded.__name__.startswith("_fastgrpo_kernels_")
    assert sys.modules[f"{loaded.__name__}.linear"] is not sys.modules["fastgrpo_kernels.linear"]
    assert loaded.__all__ == sys.modules["fastgrpo_kernels"].__all__
    (known,) = [one for one in kernels.get_loaded_kernels() if one.module is loaded]
    assert (str(known.metadata.name), known.metadata.version) == ("fastgrpo-kernels", 1)
    assert known.metadata.license == "Apache-2.0"


@pytest.mark.peers
@pytest.mark.parametrize("backend", ["torch", "triton"])  # on a CPU in Triton's interpreter
def test_the_loaded_loss_has_the_bits_of_ours(
    kernels: Any, tmp_path: Path, backend: str, device: str
) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(3, 4, 8, device=device), torch.randn(33, 8, device=device)
    ids = torch.randint(33, (3, 4), device=device)
    advantages = torch.tensor([1.0, -0.5, 2.0], device=device)
    old_logps = torch.randn(3, 4, device=device) / 4 - 3.5

    def results(package):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        config = package.GRPOLossConfig(loss_type="dapo", epsilon_high=0.28, entropy_coef=0.01)
        output = package.linear_grpo_loss(
            *leaves, ids, advantages, old_logps=old_logps, config=config, backend=backend
        )
        output.loss.backward()
        return [output.loss.detach(), output.logps, output.entropy, *(x.grad for x in leaves)]

    loaded = results(kernels.get_local_kernel(lay_out(tmp_path / "hub")))
    ours = results(fastgrpo)
    assert all(x.abs().sum() > 0 for x in ours)
    assert all(torch.equal(x, y) for x, y in zip(ours, loaded, strict=True))


@pytest.mark.peers
def test_the_line_to_try_it_works(
    kernels: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([str(tmp_path / "hub")])
    (line,) = re.findall(r"^  (import .*)$", capsys.readouterr().out, re.MULTILINE)
    exec(line, {})
    assert any(
        Path(str(one.module.__file__)).is_relative_to(tmp_path)
        for one in kernels.get_loaded_kernels()
    )


def run_at_the_root(code: str, *arguments: str | Path, **environment: str) -> str:
    """Run code as `python -c` does, in the root of the repository, which holds `kernels/`."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT / "kernels"), "HF_HUB_OFFLINE": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.peers
def test_the_card_does_as_it_says(kernels: Any, tmp_path: Path) -> None:
    directory = lay_out(tmp_path / "hub")
    (block,) = re.findall(r"```python\n(.*?)```", (directory / "README.md").read_text(), re.DOTALL)
    given = """
import torch
hidden, head = torch.ones(2, 3, 4).requires_grad_(), torch.zeros(9, 4)
ids, advantages = torch.ones(2, 3).long(), torch.tensor([2.0, 0.0])
"""
    # `get_kernel` then takes the folder for the repository of that name.
    local = {"LOCAL_KERNELS": f"OWNER/fastgrpo-kernels={directory}", "CUDA_VISIBLE_DEVICES": ""}
    said = run_at_the_root(f"{given}\n{block}\nprint(output.loss.item())", **local)
    assert said.strip() == "-1.0"


BESIDE = """
import sys
from importlib.metadata import distribution, version
from pathlib import Path

assert sys.path[0] == "" and Path("kernels/fastgrpo_kernels").is_dir()
import kernels

assert Path(kernels.__file__) == distribution("kernels").locate_file("kernels/__init__.py")

import torch
from packaging.version import Version
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from transformers.utils import import_utils, is_kernels_available

least, beyond = import_utils.KERNELS_MIN_VERSION, import_utils.KERNELS_MAX_VERSION
wanted = Version(least) <= Version(version("kernels")) < Version(beyond)
assert is_kernels_available() == wanted

small = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 4}
model = Qwen3ForCausalLM(
    Qwen3Config(vocab_size=32, num_attention_heads=2, num_key_value_heads=1, **small)
).eval()
with torch.no_grad():
    before = model(torch.arange(6)[None]).logits
assert before.shape == (1, 6, 32) and before.isfinite().all() and before.abs().sum() > 0

# Layers from a folder in place of those of the model: with this one no logit is left.
kernels.replace_kernel_forward_from_hub(Qwen3RMSNorm, "RMSNorm")
nothing = kernels.LocalLayerRepository(Path(sys.argv[1]), layer_name="Nothing")
with kernels.use_kernel_mapping({"RMSNorm": {"cpu": nothing}}, inherit_mapping=False):
    kernels.kernelize(model, mode=kernels.Mode.INFERENCE, device="cpu")
with torch.no_grad():
    assert (model(torch.arange(6)[None]).logits == 0).all()

import fastgrpo_kernels

assert fastgrpo_kernels.__file__ == str(Path("kernels/fastgrpo_kernels/__init__.py").resolve())
print(kernels.__version__, "wanted" if wanted else "not wanted")
"""
LAYER = """
from torch import nn

class layers:
    class Nothing(nn.Module):
        def forward(self, hidden_states):
            return 0 * hidden_states
"""


@pytest.mark.peers
def test_our_folder_of_that_name_breaks_nothing_of_the_package_kernels(
    kernels: Any, tmp_path: Path
) -> None:
    metadata = {"id": "_nothing_1", "name": "nothing", "version": 1, "license": "Apache-2.0"}
    metadata |= {"python-depends": [], "backend": {"type": "cpu"}}
    (tmp_path / "metadata.json").write_text(json.dumps(metadata))
    (tmp_path / "__init__.py").write_text(LAYER)
    assert "wanted" in run_at_the_root(BESIDE, tmp_path, CUDA_VISIBLE_DEVICES="")
