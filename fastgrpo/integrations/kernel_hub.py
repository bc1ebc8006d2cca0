"""The loss as a kernel of the Hugging Face Hub, which `kernels.get_kernel` downloads and loads.

`python -m fastgrpo.integrations.kernel_hub DIRECTORY` lays out `fastgrpo_kernels` as the package
`kernels` wants a kernel without compiled code (read in its version 0.17.2): a copy in
`build/torch-<backend>` for each backend, with a `metadata.json`. `kernels` is not needed for that.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from tempfile import TemporaryDirectory

import fastgrpo_kernels

PACKAGE = Path(fastgrpo_kernels.__file__).parent
NAME = "fastgrpo-kernels"
VERSION = 1
"""Goes up when callers would have to change: Hub users ask for a version, a branch `v1` there."""
BACKENDS = ("cpu", "cuda", "metal", "rocm", "xpu")
"""What torch may be built for: those that `kernels` has a folder without compiled code for."""

CARD = """\
---
library_name: kernels
license: {license}
tags: [grpo, reinforcement-learning, triton]
---
# The GRPO loss of fastgrpo {source}

From hidden states, logits or log-probs to the loss and its gradients, without the tokens x
vocabulary matrix. Triton kernels on CUDA and ROCm, torch elsewhere; nothing else is needed.

```python
from kernels import get_kernel

fastgrpo = get_kernel("OWNER/{name}", version={version}, trust_remote_code=True)
config = fastgrpo.GRPOLossConfig(loss_type="dapo", epsilon_high=0.28)
output = fastgrpo.linear_grpo_loss(hidden, head, ids, advantages, config=config)
output.loss.backward()
```

`hidden` (B, T, H) are last hidden states, shifted by you: `hidden[:, t]` predicts `ids[:, t]`;
`head` (V, H) is the LM head, `advantages` (B,) or (B, T). `help(fastgrpo.linear_grpo_loss)` has the
arguments. Version {version} keeps its interface. Licence: {license_name}, in `LICENSE`.
"""


def lay_out(directory: str | Path) -> Path:
    """Write the kernel into a directory, all of it or nothing.

    Args:
        directory: does not exist yet, or is empty.

    Returns:
        The directory, absolute.

    Raises:
        ValueError: the directory holds something, or fastgrpo is not installed, whose licence and
            version the kernel carries.
    """
    directory = Path(directory).expanduser().resolve()
    exists = directory.exists()
    if exists and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"{directory} exists and is not an empty directory: name another")
    license_name, license_text, source = _installed()
    directory.parent.mkdir(parents=True, exist_ok=True)
    # On the directory's own file system, from where a move takes no copy.
    room = directory if exists else directory.parent
    with TemporaryDirectory(dir=room, prefix=f".{directory.name}.") as found:
        layout = Path(found) / "layout"
        for backend in BACKENDS:
            variant = layout / "build" / f"torch-{backend}"
            shutil.copytree(PACKAGE, variant, ignore=shutil.ignore_patterns("__pycache__"))
            metadata = {
                "id": f"_{PACKAGE.name}_{backend}_{_digest(variant)}",
                "name": NAME,
                "version": VERSION,
                "license": license_name,
                "python-depends": [],  # torch goes without saying, and Triton comes with it
                "backend": {"type": backend},
            }
            _write(variant / "metadata.json", json.dumps(metadata, indent=2) + "\n")
        card = CARD.format(
            license=license_name.lower(),  # as the Hub spells it
            license_name=license_name,
            name=NAME,
            source=source,
            version=VERSION,
        )
        _write(layout / "README.md", card)
        _write(layout / "LICENSE", license_text)
        if exists:
            # It stays what it is: with its rights, a mount point, or the current one.
            for child in sorted(layout.iterdir()):
                child.rename(directory / child.name)
        else:
            layout.rename(directory)
    return directory


def main(arguments: Sequence[str] | None = None) -> int:
    """Lay out the kernel, say how to try and to upload it; wrong input exits with 2."""
    parser = argparse.ArgumentParser(
        prog="python -m fastgrpo.integrations.kernel_hub",
        description="Lay out the loss as a kernel for the Hugging Face Hub.",
    )
    parser.add_argument("directory", help="where to; new or empty")
    options = parser.parse_args(arguments)
    try:
        directory = lay_out(options.directory)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(directory)
    print(
        "Try it, in Python, with\n"
        f"  import kernels, pathlib; kernels.get_local_kernel(pathlib.Path({str(directory)!r}))\n"
        "Write your name for OWNER in README.md, then upload it with\n"
        f"  hf upload OWNER/{NAME} {directory} . --repo-type kernel --revision v{VERSION}"
    )
    return 0


def _installed() -> tuple[str, str, str]:
    """Return name and text of the licence and the version, of fastgrpo as pip installed it."""
    try:
        found = distribution("fastgrpo")
    except PackageNotFoundError:
        found = None
    text = found and found.read_text("licenses/LICENSE")
    if not found or not text:
        raise ValueError("fastgrpo is not installed: pip install it, or `-e .` from a clone")
    return found.metadata["License-Expression"], text, found.version


def _digest(package: Path) -> str:
    """Return a few characters that tell this source from any other.

    Several versions may be in one process: `kernels` imports each under the name of its id.
    """
    found = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        found.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:8]


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
