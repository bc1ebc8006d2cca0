"""The same arguments to Liger's own module and to ours: every option, and combinations of them.

B sequences, T positions, H hidden, V vocabulary.
"""

from __future__ import annotations

import inspect
import itertools
import random
import warnings
from typing import Any

import pytest
import torch
from liger_calls import LOSSES, B, T, assert_close, make_call, run
from torch import Tensor

from fastgrpo.integrations.liger import FusedLinearGRPOLoss

pytestmark = pytest.mark.peers
liger: Any = pytest.importorskip("liger_kernel.chunked_loss")
LigerFusedLinearGRPOLoss = liger.LigerFusedLinearGRPOLoss

# fp32 on both sides, relative to the largest value; a loss, whose terms cancel, relative to 1 at
# least. Measured over 2771 calls: 2.6e-6.
TOLERANCE = 5e-6


def assert_same(options: dict[str, Any], call: dict[str, Any], tolerance: float = TOLERANCE):
    mine, its = (
        run(FusedLinearGRPOLoss, options, call),
        run(LigerFusedLinearGRPOLoss, options, call),
    )
    assert its.loss.isfinite()
    assert_close(mine.loss, its.loss, "loss", tolerance)
    assert len(mine.metrics) == len(its.metrics) == (2 if options.get("beta", 0.04) else 1)
    for name, x, y in zip(("clip", "kl"), mine.metrics[::-1], its.metrics[::-1], strict=False):
        assert_close(x, y, name, tolerance)
    assert mine.gradients.keys() == its.gradients.keys()
    for name, gradient in its.gradients.items():
        assert gradient.abs().max() > 0, name
        assert_close(mine.gradients[name], gradient, name, tolerance)
    return mine


# Options of the module, and arguments of the call.
OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "defaults": ({}, {}),
    "on_policy": ({}, {"policy": "on"}),
    "no_kl": ({"beta": 0.0}, {}),
    "no_kl_no_reference": ({"beta": 0.0, "use_ref_model": False}, {"reference": "none"}),
    "own_reference": ({"beta": 0.3, "use_ref_model": False}, {"reference": "none"}),
    "kl": ({"beta": 0.3}, {}),
    "kl_on_policy": ({"beta": 0.3}, {"policy": "on"}),
    "kl_corrected": ({"beta": 0.3, "use_bias_correction_kl": True}, {}),
    "kl_of_input": ({"beta": 0.3}, {"reference": "input"}),
    "kl_of_input_without_bias": ({"beta": 0.3}, {"reference": "input", "bias": False}),
    "kl_of_input_temperature": (
        {"beta": 0.3, "temperature": 0.7},
        {"reference": "input", "temperature": 0.7},
    ),
    "epsilons": ({"epsilon_low": 0.1, "epsilon_high": 1.1}, {}),
    "delta": ({"delta": 2.3}, {}),
    "temperature": ({"temperature": 0.7}, {"temperature": 0.7}),
    "chunks_of_two": ({"chunk_size": 2}, {}),
    "chunks_of_four": ({"chunk_size": 4}, {}),
    "sapo_temperatures": ({"sapo_temperature_pos": 0.5, "sapo_temperature_neg": 2.0}, {}),
    "vespo_weights": (
        {"vespo_k_pos": 1.0, "vespo_lambda_pos": 1.5, "vespo_k_neg": 2.5, "vespo_lambda_neg": 0.5},
        {},
    ),
    "vespo_rates_below_the_least": ({"vespo_lambda_pos": 0.0, "vespo_lambda_neg": -1.0}, {}),
    "no_bias": ({}, {"bias": False}),
    "frozen": ({}, {"frozen": True}),
    "every_token_counts": ({}, {"mask": "full"}),
    "bool_mask": ({}, {"mask": "bool"}),
    "float_mask": ({}, {"mask": "float32"}),
    "int32_mask": ({}, {"mask": "int32"}),
    "ratio_of_sequences": ({}, {"ratio": "(B,)"}),
    "ratio_of_sequences_2d": ({}, {"ratio": "(B, 1)"}),
    "ratio_of_tokens": ({}, {"ratio": "(B, T)"}),
    "step": ({}, {"items": 50}),
    "step_as_tensor": ({}, {"items": torch.tensor(50)}),
    "empty_step": ({}, {"items": 0}),
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("loss", LOSSES)
def test_it_is_that_of_liger(loss: str, option: str) -> None:
    changes, arguments = OPTIONS[option]
    options = changes | LOSSES[loss]
    assert_same(options, make_call(**arguments))


AXES: dict[str, list[Any]] = {
    "policy": ["off", "on"],
    "reference": ["logps", "input", "own", "none"],
    "corrected": [False, True],
    "ratio": ["none", "(B,)", "(B, 1)", "(B, T)"],
    "items": [None, 50],
    "bias": [True, False],
    "frozen": [False, True],
    "delta": [None, 2.4],
    "temperature": [1.0, 0.7],
    "mask": ["int64", "bool", "float32", "full"],
    "chunk_size": [1, 2, 3, 6],
}


@pytest.mark.parametrize("loss", LOSSES)
def test_so_are_combinations(loss: str) -> None:
    """Two hundred of them for each loss."""
    every = list(itertools.product(*AXES.values()))
    for values in random.Random(loss).sample(every, 200):
        chosen = dict(zip(AXES, values, strict=True))
        reference = chosen.pop("reference")
        options = {
            "beta": 0.0 if reference == "none" else 0.3,
            "use_ref_model": reference in ("logps", "input"),
            "use_bias_correction_kl": chosen.pop("corrected"),
            **{name: chosen.pop(name) for name in ("delta", "chunk_size")},
            "temperature": chosen["temperature"],
            **LOSSES[loss],
        }
        known = reference if reference in ("logps", "input") else "none"
        assert_same(options, make_call(reference=known, **chosen))


def test_the_signatures_are_those_of_liger() -> None:
    for name in ("__init__", "forward"):
        mine, its = (
            [p.replace(annotation=p.empty) for p in inspect.signature(f).parameters.values()]
            for f in (getattr(FusedLinearGRPOLoss, name), getattr(LigerFusedLinearGRPOLoss, name))
        )
        assert mine == its
    options = vars(LigerFusedLinearGRPOLoss())
    assert {n: x for n, x in vars(FusedLinearGRPOLoss()).items() if n in options} == options


@pytest.mark.parametrize("loss_type", ["cispo", "sapo", "vespo"])
def test_both_refuse_ratios_of_sequences(loss_type: str) -> None:
    options: dict[str, Any] = {"loss_type": loss_type, "importance_sampling_level": "sequence"}
    with pytest.raises(ValueError, match="is not supported for loss_type"):
        run(LigerFusedLinearGRPOLoss, options, make_call())
    with pytest.raises(ValueError, match=f"is not defined for loss_type='{loss_type}'"):
        FusedLinearGRPOLoss(**options)


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        ({"loss_type": "dr_grpo"}, {}),
        ({"loss_type": "gmpo"}, {}),
        ({"importance_sampling_level": "word"}, {}),
        ({"sapo_temperature_neg": 0.0}, {}),
        ({"delta": 0.0}, {}),
        ({}, {"reference": "none"}),
        ({}, {"vllm_is_ratio": torch.ones(B, 2)}),
        ({}, {"vllm_is_ratio": torch.ones(B, T, 1)}),
        ({}, {"vllm_is_ratio": torch.ones(T)}),
    ],
)
def test_what_liger_refuses_we_refuse(options: dict[str, Any], arguments: dict[str, Any]) -> None:
    arguments = dict(arguments)
    ratio = arguments.pop("vllm_is_ratio", None)
    call = make_call(**arguments) | {"vllm_is_ratio": ratio}
    with pytest.raises((ValueError, AssertionError)):
        run(LigerFusedLinearGRPOLoss, options, call)
    with pytest.raises(ValueError):
        run(FusedLinearGRPOLoss, options, call)


def test_both_warn_of_two_references_and_take_the_log_probs() -> None:
    call = make_call(reference="input") | {"ref_per_token_logps": torch.full((B, T), -3.0)}
    for module in (FusedLinearGRPOLoss, LigerFusedLinearGRPOLoss):
        with pytest.warns(UserWarning, match="ref_per_token_logps"):
            run(module, {}, call)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mine = assert_same({"beta": 0.3}, call)
    only = make_call(reference="none") | {"ref_per_token_logps": torch.full((B, T), -3.0)}
    assert mine.loss == run(FusedLinearGRPOLoss, {"beta": 0.3}, only).loss


def test_advantages_of_tokens_agree_with_liger_one_sequence_at_a_time() -> None:
    call = make_call()
    call["advantages"] = torch.randn(B, T, generator=torch.Generator().manual_seed(3))
    assert_same({"beta": 0.3}, call)


@pytest.mark.parametrize(
    "trained", [(), ("_input",), ("lin_weight",), ("bias",), ("_input", "bias")]
)
def test_the_loss_requires_a_gradient_where_that_of_liger_does(trained: tuple[str, ...]) -> None:
    for enabled in (True, False):
        gradients: list[dict[str, Tensor | None]] = []
        for module in (FusedLinearGRPOLoss, LigerFusedLinearGRPOLoss):
            call = make_call()
            for name in ("_input", "lin_weight", "bias"):
                call[name].requires_grad_(name in trained)
            with torch.set_grad_enabled(enabled):
                loss, _ = module(compiled=False)(**call)
            assert loss.requires_grad == (enabled and bool(trained))
            if loss.requires_grad:
                loss.backward()
            gradients.append({name: call[name].grad for name in ("_input", "lin_weight", "bias")})
        for name, wanted in gradients[1].items():
            mine = gradients[0][name]
            assert (mine is None) == (wanted is None) == (not enabled or name not in trained)
            if mine is not None and wanted is not None:
                assert_close(mine, wanted, name, TOLERANCE)
