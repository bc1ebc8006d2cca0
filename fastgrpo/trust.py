"""What a checkpoint may bring along: numbers in safetensors, and code only where it is trusted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers.utils import import_utils

PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
"""Files of weights that may hold code."""


class Untrusted(ValueError):
    """A checkpoint brings along what could run code of others."""


def check_weights(named: str, path: Path) -> None:
    """Refuse a directory that has weights, but none in safetensors.

    Args:
        named: what it is, to begin a sentence with.
        path: the directory; what is none is passed over.

    Raises:
        Untrusted: names a file and says what to do.
    """
    found = sorted(file.name for pattern in PICKLED for file in path.glob(pattern))
    if found and not any(path.glob("*.safetensors")):
        raise Untrusted(not_safe(named, found[0]))


def not_safe(named: str, what: str) -> str:
    """Return why weights are refused: unpickling them can run code."""
    return (
        f"{named} has {what} and no safetensors, and other files of weights can hold code; if you "
        "trust them, load them with from_pretrained and save them with save_pretrained"
    )


def check_brings_no_code(named: str, config: Any, chosen: str | None = None) -> None:
    """Refuse a configuration that has transformers fetch a kernel, which is code, from the Hub.

    It names one, or flash attention, which is fetched where its package is missing and `kernels`
    is installed.

    Args:
        named: what it is, to begin a sentence with.
        config: a PreTrainedConfig.
        chosen: the attention that the user asks for instead.

    Raises:
        Untrusted: names the kernel.
    """
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        asked = str(getattr(part, "_attn_implementation", None))
        missing = chosen is None and asked.startswith("flash_attention") and not _installed(asked)
        if "/" in asked or missing:
            raise Untrusted(
                f"{named} asks for attn_implementation {asked!r} in its config.json, which is code "
                f"from the Hub{' where its package is missing' if missing else ''}; take that out "
                f"of the file{', install the package' if missing else ''}, or set "
                "trust_remote_code: true if you trust it"
            )


def _installed(flash_attention: str) -> bool:
    version = flash_attention.removeprefix("flash_attention_")
    return getattr(import_utils, f"is_flash_attn_{version}_available", lambda: False)()
