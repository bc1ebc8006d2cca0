"""The launches of `_row_triton.py`, each named by words that say how it differs from the barest.

"loss cispo gradient list mask old" is a call of `loss_rows` for CISPO that writes a gradient, of
listed tokens, with a mask and old log-probs; "all" stands for every optional pointer. Nothing that
a launcher decides is written out here. B sequences, C rows, N tokens, V vocabulary.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch

from fastgrpo_kernels import GRPOLossConfig, _row_triton
from fastgrpo_kernels._inputs import TokenBatch
from fastgrpo_kernels._layout import Layout
from fastgrpo_kernels._reduce import RowResults, Statistics

TOKENS = 48
FAMILIES: dict[str, dict[str, Any]] = {
    "dapo": {},
    "cispo": {"loss_type": "cispo", "epsilon_high": 5.0},
    "sapo": {"loss_type": "sapo"},
    "gspo": {"importance_sampling_level": "sequence"},
    "gspo-cispo": {
        "loss_type": "cispo", "epsilon_high": 5.0, "importance_sampling_level": "sequence"
    },
    "gspo-sapo": {"loss_type": "sapo", "importance_sampling_level": "sequence"},
    "vespo": {"loss_type": "vespo"},
    "gmpo": {"loss_type": "gmpo"},
}  # fmt: skip
BY_TOKEN, BY_SEQUENCE = tuple(FAMILIES)[:3], tuple(FAMILIES)[3:]
OPTIONAL = ("mask", "old", "ref", "policy_weight", "row_weight", "entropy", "scale", "kept")

# What the table in `kernels/README.md` shows.
TABLE = {
    "loss dapo": "loss, statistics only, no optional pointer",
    "loss dapo gradient list all": "loss with gradient, all pointers, list of tokens",
    "loss dapo gradient list all softcap": "the same, softcap",
    "statistics": "log-probs",
    "dlogits mask entropy": "their gradient with entropy and mask",
    "dlogits mask entropy softcap": "the same, softcap",
}


def row_cases(everything: bool, mixed: bool) -> list[str]:
    """Return the launches over rows of logits; `mixed`: logits may be wider than their gradient."""
    cases = [
        *TABLE,
        "scale",
        "statistics list mask softcap",
        "statistics list mask softcap part",
        "dlogits list mask entropy scale softcap",
        "loss dapo gradient",
        "loss sapo gradient list all k2 bias softcap",
    ]
    if mixed:
        cases.append("loss cispo gradient list all k1 bias softcap wide")
    if everything:
        cases += _all_statistics()
        cases += _all_losses(mixed)
    return sorted(set(cases))


def _words(*choices: tuple[str, ...]) -> list[str]:
    return [" ".join(filter(None, words)) for words in itertools.product(*choices)]


def _all_statistics() -> list[str]:
    where = ("", "list mask")
    cases = _words(("statistics",), where, ("", "softcap"), ("", "part", "last"))
    return cases + _words(("dlogits",), where, ("", "entropy"), ("", "scale"), ("", "softcap"))


def _all_losses(mixed: bool) -> list[str]:
    gradient, all_of_list = ("", "gradient"), "list all"
    cases = _words(("loss",), BY_TOKEN, gradient, ("", all_of_list), ("", "softcap"))
    cases += _words(("loss dapo gradient",), OPTIONAL)
    for kl, bias in itertools.product(("k1", "k2", "k3"), ("", "bias")):
        cases += _words(
            ("loss",), BY_TOKEN, ("gradient " + all_of_list,), (f"{kl} {bias}".strip(),)
        )
    if mixed:
        cases += _words(("loss dapo gradient",), ("", all_of_list), ("", "softcap"), ("wide",))
        cases += _words(("dlogits",), ("", "entropy"), ("", "softcap"), ("wide",))
    return cases


def objective_cases(everything: bool) -> list[str]:
    """Return the launches over log-probs: of single tokens, and of padded and packed sequences."""
    cases = ["objective dapo", "objective sapo gradient all k3 bias"]
    cases += _words(("objective",), ("gspo", "vespo"), ("gradient",), ("all k3 bias packed",))
    cases += ["objective gmpo gradient all", "objective gspo-sapo gradient"]
    if everything:
        gradient, pointers = ("", "gradient"), ("", "all")
        cases += _words(("objective",), BY_TOKEN, gradient, pointers)
        cases += _words(("objective",), BY_SEQUENCE, gradient, pointers, ("", "packed"))
        estimators = _words(("k1", "k2", "k3"), ("", "bias"))
        cases += _words(("objective",), tuple(FAMILIES), ("gradient all",), tuple(estimators))
        cases += _words(("objective",), ("dapo", "gspo"), ("gradient",), OPTIONAL[:6])
    return sorted(set(cases))


def launch(case: str, dtype: torch.dtype = torch.float32, vocabulary: int = 16) -> None:
    """Make the launch that a case names; logits are `dtype` unless they are said to be wide."""
    kernel, *words = case.split()
    if "all" in words:
        words += [word for word in OPTIONAL if kernel != "objective" or word != "scale"]
    logits_CV = torch.empty(2, vocabulary, dtype=torch.float32 if "wide" in words else dtype)
    dlogits_CV = torch.empty(2, vocabulary, dtype=dtype) if "wide" in words else logits_CV
    if kernel == "scale":
        _row_triton.scale_rows(logits_CV, torch.ones(()))
        return
    tokens = torch.arange(2) if "list" in words else 16
    batch, config = _batch(words), _config(words)
    if kernel in ("statistics", "dlogits"):
        in_parts = "part" in words or "last" in words
        found = Statistics.beside(torch.zeros(TOKENS), torch.zeros(TOKENS), in_parts)
        seen = logits_CV, tokens, batch.ids_N, batch.mask_N, config, found
        if kernel == "statistics":
            _row_triton.statistics_rows(*seen, 0, "part" not in words)
            return
        _row_triton.dlogits_rows(
            logits_CV, dlogits_CV, *seen[1:], torch.zeros(TOKENS), batch.entropy_weight_N,
            torch.ones(()) if "scale" in words else None,
        )  # fmt: skip
        return
    rows = RowResults.zeros(batch, torch.float32)
    dlogps_N = torch.zeros(TOKENS)
    if kernel == "objective":
        _row_triton.objective_rows(batch, rows, config, dlogps_N if "gradient" in words else None)
        return
    assert kernel == "loss"
    kept = Statistics.beside(rows.logps_N, rows.entropy_N) if "kept" in words else None
    _row_triton.loss_rows(
        logits_CV,
        dlogits_CV if "gradient" in words else None,
        tokens,
        batch,
        rows,
        config,
        torch.ones(()) if "scale" in words else None,
        kept,
        None if kept is None else dlogps_N,
    )


def _config(words: list[str]) -> GRPOLossConfig:
    family = next((FAMILIES[word] for word in words if word in FAMILIES), {})
    kl = next((word for word in words if word in ("k1", "k2", "k3")), None)
    return GRPOLossConfig(
        beta=0.04 if "ref" in words else 0.0,
        kl_estimator=kl or "k3",
        use_bias_correction_kl="bias" in words,
        logit_softcap=30.0 if "softcap" in words else None,
        **family,
    )


def _batch(words: list[str]) -> TokenBatch:
    ids_N = torch.zeros(TOKENS, dtype=torch.int64)
    by_token = not any(word in BY_SEQUENCE for word in words)
    if "packed" in words:
        layout = Layout(ids_N, torch.tensor([0, 20, TOKENS], dtype=torch.int32))
    else:
        layout = Layout(ids_N if by_token else ids_N.view(2, -1))

    def given(word: str) -> torch.Tensor | None:
        return torch.ones(TOKENS) if word in words else None

    coupled_by_itself = "all" in words and not by_token
    return TokenBatch(
        layout=layout,
        ids_N=ids_N,
        mask_N=torch.ones(TOKENS, dtype=torch.bool) if "mask" in words else None,
        advantages_N=torch.ones(TOKENS),
        old_logps_N=given("old"),
        ref_logps_N=given("ref"),
        policy_weight_N=given("policy_weight"),
        entropy_weight_N=given("entropy"),
        row_weight_N=given("row_weight"),
        ratio_mask_N=torch.ones(TOKENS) if coupled_by_itself and "gmpo" in words else None,
        log_correction_B=torch.ones(2) if coupled_by_itself and "vespo" in words else None,
        denominator=torch.ones(()),
        num_tokens=torch.tensor(TOKENS),
        num_sequences=None,
        state_N=torch.empty(TOKENS, dtype=torch.int8),
    )
