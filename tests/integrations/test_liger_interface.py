"""The loss by Liger's signature, held to the reference in fp64; Liger itself need not be there.

B sequences, T positions, H hidden, V vocabulary.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from liger_calls import DEVICE, LOSSES, B, H, T, V, assert_close, make_call, run
from torch import Tensor

from fastgrpo.integrations.liger import FusedLinearGRPOLoss
from fastgrpo_kernels import GRPOLossConfig, reference

# fp32 against fp64, relative to the largest value; a loss relative to 1 at least. Measured: 8e-7.
TOLERANCE = 3e-6

SIGNATURE = {
    "__init__": {
        "beta": 0.04,
        "compiled": True,
        "use_ref_model": True,
        "chunk_size": 1,
        "epsilon_low": 0.2,
        "epsilon_high": 0.2,
        "loss_type": "dapo",
        "max_completion_length": None,
        "importance_sampling_level": "token",
        "sapo_temperature_pos": 1.0,
        "sapo_temperature_neg": 1.05,
        "temperature": 1.0,
        "delta": None,
        "use_bias_correction_kl": False,
        "vespo_k_pos": 2.0,
        "vespo_lambda_pos": 3.0,
        "vespo_k_neg": 3.0,
        "vespo_lambda_neg": 2.0,
    },
    "forward": {
        **dict.fromkeys(
            ("_input", "lin_weight", "selected_token_ids", "attention_mask", "advantages"),
            inspect.Parameter.empty,
        ),
        **dict.fromkeys(
            ("bias", "ref_per_token_logps", "old_per_token_logps", "ref_input", "ref_weight")
        ),
        **dict.fromkeys(("ref_bias", "vllm_is_ratio", "num_items_in_batch")),
    },
}


@pytest.mark.parametrize("name", SIGNATURE)
def test_the_signature_is_that_of_liger_0_8_5(name: str) -> None:
    parameters = inspect.signature(getattr(FusedLinearGRPOLoss, name)).parameters
    found = {p.name: p.default for p in parameters.values()}
    assert found.pop("self") is inspect.Parameter.empty
    assert list(found.items()) == list(SIGNATURE[name].items())
    assert {p.kind for p in parameters.values()} == {inspect.Parameter.POSITIONAL_OR_KEYWORD}


def in_fp64(options: dict[str, Any], call: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor], Any]:
    """Compute what a module with these options must find: loss, gradients and output."""
    leaves = {
        name: call[name].detach().double().requires_grad_(call[name].requires_grad)
        for name in ("_input", "lin_weight", "bias")
        if name in call
    }
    config = GRPOLossConfig(**{"beta": 0.04} | options)
    ref = call.get("ref_per_token_logps")
    if ref is None and config.beta:
        ref, _ = reference.linear_logps(
            call["ref_input"].double(),
            call["ref_weight"].double(),
            call["selected_token_ids"],
            bias=call["ref_bias"].double(),
            temperature=config.temperature,
        )
    by_tokens = config.loss_type in ("dapo", "cispo", "vespo")
    out = reference.linear_grpo_loss(
        leaves["_input"],
        leaves["lin_weight"],
        call["selected_token_ids"],
        call["advantages"].double(),
        bias=leaves.get("bias"),
        completion_mask=call["attention_mask"],
        old_logps=call.get("old_per_token_logps"),
        ref_logps=ref,
        importance_sampling_ratio=call.get("vllm_is_ratio"),
        num_items_in_batch=call["num_items_in_batch"] if by_tokens else None,
        config=config,
    )
    wanted = {name: x for name, x in leaves.items() if x.requires_grad}
    gradients = torch.autograd.grad(0.7 * out.loss, list(wanted.values()))
    return out.loss.detach(), dict(zip(wanted, gradients, strict=True)), out


def clipped_tokens(options: dict[str, Any], call: dict[str, Any], logps: Tensor) -> float:
    """Return the fraction of counted tokens that are clipped, one after the other."""
    if options["loss_type"] in ("sapo", "vespo"):
        return 0.0
    low, high = 1 - options.get("epsilon_low", 0.2), 1 + options.get("epsilon_high", 0.2)
    if options["loss_type"] == "cispo":
        low, high = 0.0, high - 1
    mask, old = call["attention_mask"] != 0, call.get("old_per_token_logps", logps)
    clipped = 0
    for i in range(B):
        log_ratios = [(logps[i, t] - old[i, t]).item() for t in range(T) if mask[i, t]]
        if options.get("importance_sampling_level") == "sequence" and log_ratios:
            log_ratios = [sum(log_ratios) / len(log_ratios)] * len(log_ratios)
        ratios = torch.tensor(log_ratios).exp()
        advantage = call["advantages"][i]
        clipped += (ratios < low).sum() if advantage < 0 else 0
        clipped += (ratios > high).sum() if advantage > 0 else 0
    return int(clipped) / int(mask.sum())


CALLS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "kl": ({"beta": 0.3}, {}),
    "no_kl": ({"beta": 0.0}, {}),
    "reference_input": ({"beta": 0.3, "temperature": 0.7}, {"reference": "input"}),
    "on_policy": ({"beta": 0.0}, {"policy": "on", "frozen": True}),
    "ratio": ({"beta": 0.3, "use_bias_correction_kl": True}, {"ratio": "(B, 1)"}),
    "bool": ({"beta": 0.0, "epsilon_high": 1.1, "delta": 2.4}, {"mask": "bool", "bias": False}),
    "float16": ({"beta": 0.0}, {"mask": "float16", "ratio": "(B,)", "items": 50}),
}


@pytest.mark.parametrize("case", CALLS)
@pytest.mark.parametrize("loss", LOSSES)
def test_it_is_the_loss_of_the_reference(loss: str, case: str) -> None:
    changes, arguments = CALLS[case]
    options, call = changes | LOSSES[loss], make_call(**arguments)
    if options["loss_type"] in ("cispo", "sapo", "vespo"):
        options.pop("delta", None)
    mine = run(FusedLinearGRPOLoss, options, call)
    wanted, gradients, out = in_fp64(options, call)
    assert_close(mine.loss, wanted.float(), "loss", TOLERANCE)
    assert mine.gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 0
        assert_close(mine.gradients[name], gradient.float(), name, TOLERANCE)
    *kl, clip = mine.metrics
    assert clip.item() == pytest.approx(clipped_tokens(options, call, out.logps), abs=1e-6)
    assert len(kl) == (options["beta"] != 0)
    for x in kl:
        assert_close(x, out.metrics["kl"].float(), "kl", TOLERANCE)


def test_tokens_and_sequences_are_clipped_in_these_calls() -> None:
    for level in ("token", "sequence"):
        options = {"loss_type": "grpo", "importance_sampling_level": level}
        clip = run(FusedLinearGRPOLoss, options, make_call()).metrics[1]
        assert 0.2 < clip < 0.8


@pytest.mark.parametrize("ratio", ["(B,)", "(B, 1)"])
def test_a_ratio_of_sequences_is_that_of_all_their_tokens(ratio: str) -> None:
    call = make_call(ratio=ratio)
    spread = call | {"vllm_is_ratio": call["vllm_is_ratio"].view(B, 1).expand(B, T)}
    for loss in ("dapo", "grpo-sequence", "luspo-sequence"):
        mine = run(FusedLinearGRPOLoss, LOSSES[loss], call)
        other = run(FusedLinearGRPOLoss, LOSSES[loss], spread)
        assert_close(mine.loss, other.loss, loss, 1e-6)


def test_ratios_of_tokens_are_multiplied_for_vespo_and_averaged_for_luspo() -> None:
    """Those of masked tokens too; the product goes beyond what one ratio may be."""
    call = make_call(ratio="(B, T)")
    ratio = call["vllm_is_ratio"]
    for loss, whole in (("vespo", ratio.log().sum(1).exp()), ("luspo-sequence", ratio.mean(1))):
        mine = run(FusedLinearGRPOLoss, LOSSES[loss], call)
        other = run(FusedLinearGRPOLoss, LOSSES[loss], call | {"vllm_is_ratio": whole})
        assert_close(mine.loss, other.loss, loss, 1e-6)
    # Log-ratios of 37 a sequence, which the ratios of two tokens take away: 0 counts as 1e-8.
    advantages, mask = call["advantages"].double()[:, None], torch.ones(B, T, device=DEVICE)
    mask[:, 3:] = 0
    per_token = torch.linspace(12.1, 12.5, B, dtype=torch.float64, device=DEVICE)[:, None]
    call |= {"attention_mask": mask, "vllm_is_ratio": torch.ones(B, T, device=DEVICE)}
    call["vllm_is_ratio"][:, [1, 4]] = torch.tensor([0.0, 1e-8], device=DEVICE)
    logps = in_fp64({"beta": 0.0}, call | {"vllm_is_ratio": None})[2].logps
    call["old_per_token_logps"] = logps - per_token
    log_w = 3 * per_token + 2 * math.log(1e-8)
    k = torch.where(advantages >= 0, 2, 3)
    rate = torch.where(advantages >= 0, 3, 2)
    phi = (k * log_w + rate * (1 - log_w.exp())).exp()
    wanted = -(phi * advantages * logps)[mask.bool()].mean()
    mine = run(FusedLinearGRPOLoss, {"loss_type": "vespo", "beta": 0.0}, call)
    assert mine.loss.item() == pytest.approx(wanted.item(), rel=1e-4)  # sums of 37 in fp32


def test_without_a_reference_the_policy_is_its_own() -> None:
    call = make_call(reference="none")
    mine = run(FusedLinearGRPOLoss, {"beta": 0.3, "use_ref_model": False}, call)
    plain = run(FusedLinearGRPOLoss, {"beta": 0.0, "use_ref_model": False}, call)
    assert mine.loss == plain.loss and mine.metrics == (0.0, *plain.metrics)
    for name, gradient in plain.gradients.items():
        assert torch.equal(mine.gradients[name], gradient)


@pytest.mark.parametrize("use", [True, False])
def test_a_reference_is_not_read_at_beta_0(use: bool) -> None:
    call = make_call() | {"ref_per_token_logps": torch.full((B, T), torch.nan, device=DEVICE)}
    mine = run(FusedLinearGRPOLoss, {"beta": 0.0, "use_ref_model": use}, call)
    assert mine.loss.isfinite() and len(mine.metrics) == 1


def test_what_changes_no_result_changes_no_bit() -> None:
    call = make_call()
    plain, metrics = FusedLinearGRPOLoss(compiled=False)(**call)
    for options in ({"compiled": True}, {"chunk_size": 4}):
        loss, found = FusedLinearGRPOLoss(**options)(**call)
        assert (loss, found) == (plain, metrics)


def test_an_option_may_be_changed_later() -> None:
    function = FusedLinearGRPOLoss(beta=0.04)
    function.beta = 0.3
    assert function(**make_call())[0] == FusedLinearGRPOLoss(beta=0.3)(**make_call())[0]
    function.loss_type = "dr_grpo"
    with pytest.raises(ValueError, match="max_completion_length: set it"):
        function(**make_call())


@pytest.mark.parametrize("loss", [name for name in LOSSES if name[:5] in ("grpo", "bnpo", "sapo")])
def test_the_tokens_of_the_step_are_for_means_over_them_only(loss: str) -> None:
    mine = run(FusedLinearGRPOLoss, LOSSES[loss], make_call(items=50))
    assert mine.loss == run(FusedLinearGRPOLoss, LOSSES[loss], make_call()).loss


def test_a_head_may_be_of_another_type_than_the_hidden_states() -> None:
    call, same = make_call(reference="input"), make_call(reference="input")
    for name, x in call.items():
        if name in ("_input", "lin_weight", "bias", "ref_input", "ref_weight", "ref_bias"):
            rounded = x.detach().bfloat16()
            keeps = name.endswith("input")
            call[name] = (rounded if keeps else rounded.float()).requires_grad_(x.requires_grad)
            same[name] = rounded.clone().requires_grad_(x.requires_grad)
    mine, wanted = run(FusedLinearGRPOLoss, {}, call), run(FusedLinearGRPOLoss, {}, same)
    assert mine.loss == wanted.loss
    for name, gradient in wanted.gradients.items():
        assert mine.gradients[name].dtype == call[name].dtype
        assert torch.equal(mine.gradients[name].bfloat16(), gradient)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "gmpo": ({"loss_type": "gmpo"}, "loss_type must be one of grpo, .*, got 'gmpo'"),
    "level": ({"importance_sampling_level": "word"}, "must be one of token, sequence, got 'word'"),
    "dr_grpo": ({"loss_type": "dr_grpo"}, "divides by max_completion_length: set it"),
    "delta": ({"delta": 1.1}, r"delta must be a finite number above 1 \+ epsilon_high = 1.2"),
    "sapo": ({"sapo_temperature_neg": -1.0}, "sapo_temperature_neg must be .* got -1.0"),
    **{
        name: (
            {"loss_type": name, "importance_sampling_level": "sequence"},
            f"'sequence' is not defined for loss_type='{name}' in Liger: use 'token'",
        )
        for name in ("cispo", "sapo", "vespo")
    },
    "luspo": ({"loss_type": "luspo", "beta": 0.0}, "level='token' and beta=0.0 trains on padding"),
    "luspo-kl": (
        {"loss_type": "luspo", "importance_sampling_level": "sequence"},
        "level='sequence' and beta=0.04 trains on padding in Liger: use 'sequence' and beta=0",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_options_without_meaning_are_refused_at_once(case: str) -> None:
    options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        FusedLinearGRPOLoss(**options)


WRONG: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "packed": ({}, {"_input": torch.ones(B * T, H)}, r"_input must be \(B, T, H\), got \(30, 8\)"),
    "mask": ({}, {"attention_mask": torch.ones(B)}, r"attention_mask must be \(B, T\), got \(6,\)"),
    "ref": ({}, {"ref_per_token_logps": torch.ones(B, T - 1)}, "ref_per_token_logps must be"),
    "ratio": (
        {},
        {"vllm_is_ratio": torch.ones(B, 2)},
        r"must be \(6,\), \(6, 1\) or \(6, 5\), got",
    ),
    "weights": ({}, {"attention_mask": torch.full((B, T), 0.5)}, "must hold 0 and 1 only"),
    "no reference": ({}, {"ref_per_token_logps": None}, "use_ref_model=True needs ref_per_token"),
    "no head": (
        {},
        {"ref_per_token_logps": None, "ref_input": torch.ones(B, T, H)},
        "or ref_input and ref_weight: give them, or use_ref_model=False",
    ),
    "unread": ({"use_ref_model": False}, {}, "would leave the reference unread at beta=0.04"),
    "vocabulary": ({}, {"selected_token_ids": torch.full((B, T), V)}, "outside"),
}


@pytest.mark.parametrize("case", WRONG)
def test_arguments_that_do_not_fit_are_refused_by_liger_s_names(case: str) -> None:
    options, changes, message = WRONG[case]
    call = {n: x.cpu() if isinstance(x, Tensor) else x for n, x in (make_call() | changes).items()}
    with pytest.raises(ValueError, match=message):
        FusedLinearGRPOLoss(**options)(**call)


def test_a_module_is_no_weight() -> None:
    call = make_call() | {"lin_weight": torch.nn.Linear(H, V, device=DEVICE)}
    with pytest.raises(TypeError, match=r"weight must be a tensor, got Linear: pass its \.weight"):
        FusedLinearGRPOLoss()(**call)
    with pytest.raises(TypeError, match="attention_mask must be a tensor, got NoneType"):
        FusedLinearGRPOLoss()(**make_call() | {"attention_mask": None})


def test_two_references_make_a_warning_and_the_log_probs_are_used() -> None:
    call = make_call(reference="input")
    given = make_call()["ref_per_token_logps"]
    with pytest.warns(UserWarning, match="ref_per_token_logps and ref_input are both given"):
        mine = run(FusedLinearGRPOLoss, {}, call | {"ref_per_token_logps": given})
    alone = {n: x for n, x in call.items() if not n.startswith("ref_")}
    assert mine.loss == run(FusedLinearGRPOLoss, {}, alone | {"ref_per_token_logps": given}).loss


def _rank(rank: int, meeting: str) -> None:
    """Hold the mean over two ranks to one call with the sequences of both."""
    torch.set_num_threads(1)
    parts = [make_call(items=None), make_call(items=None)]
    parts[1]["attention_mask"][:3] = 0
    whole = {
        name: torch.cat([x, parts[1][name]]).detach()
        for name, x in parts[0].items()
        if isinstance(x, Tensor) and x.shape[0] == B
    }
    heads = {name: parts[0][name].detach() for name in ("lin_weight", "bias")}
    losses = {name: LOSSES[name] | {"beta": 0.3} for name in ("dapo", "cispo", "vespo")}
    wanted = {n: FusedLinearGRPOLoss(**losses[n])(**whole, **heads)[0] for n in losses}
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    counted = int(whole["attention_mask"].sum())
    for name, options in losses.items():
        for items in (None, counted, torch.tensor(counted)):
            call = parts[rank] | {"num_items_in_batch": items}
            mine = FusedLinearGRPOLoss(**options)(**call)[0].detach()
            dist.all_reduce(mine)
            assert_close(mine / 2, wanted[name], name, 1e-6)
    dist.destroy_process_group()


@pytest.mark.slow
def test_ranks_average_to_the_loss_of_one_process(tmp_path: Any) -> None:
    torch.multiprocessing.spawn(_rank, ((tmp_path / "meeting").as_uri(),), nprocs=2)
