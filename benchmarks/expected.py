"""What the miniature must find on any machine: exactness, FLOPs, bytes. Times are only printed.

N tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

SURE = ("fastgrpo", "naive")
"""Peers that are always there."""


def surprises(record: dict[str, Any]) -> list[str]:
    """Return what a record of the miniature should not say."""
    if record["peer"] not in SURE:
        return [record["status"]] if record["status"] == "wrong" else []
    if record["status"] != "ok":
        return [record["status"]]
    found = []
    wanted = products(record) * 2 * record["N"] * record["H"] * record["V"]
    if record["flops"] != wanted:
        found.append(f"{record['flops']} FLOPs, wanted {wanted:.0f}")
    least, most = peak_bytes(record)
    if not least <= record["peak_extra_bytes"] <= most:
        found.append(f"{record['peak_extra_bytes']} bytes, wanted {least} to {most}")
    return found


def products(record: dict[str, Any]) -> float:
    """Return how many products of 2NHV a step takes.

    Rows that cannot contribute get no gradient products, and naive PyTorch does not know them.
    """
    if record["op"] == "logits":
        return 0
    if record["op"] == "logps":
        return 1
    share = record["rho"] if record["peer"] == "fastgrpo" else 1.0
    gradients = 1 if record["frozen"] else 2
    return 1 + share * (gradients + (record["method"] == "recompute"))


def peak_bytes(record: dict[str, Any]) -> tuple[int, int]:
    """Return the least and the most that a step may hold beside its inputs and its gradients."""
    N, H, V = record["N"], record["H"], record["V"]
    itemsize = 4 if record["dtype"] == "float32" else 2
    if record["peer"] == "naive":  # fp32 logits and their softmax, at least
        return 8 * N * V, 20 * N * V
    # Logits of the rows at hand, two fp32 matrices of the row step, the head's gradient in fp32 and
    # as it is returned, and of each token its vectors and hidden states.
    own_logits = itemsize if record["op"] != "logits" else 0
    tokens = N * (128 + 16 * H)
    head = 0 if record["frozen"] or record["op"] != "linear" else 8 * V * H
    rows = round(N * min(record["rho"], 1 - record["rho"]) or N)
    return own_logits * rows * V, (own_logits + 8) * N * V + head + tokens
