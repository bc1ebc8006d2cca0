"""A model's forward pass that ends in our head: without any trainer."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

import pytest
import torch
from small_models import small_model
from torch import Tensor

from fastgrpo import linear_grpo_loss, linear_logps
from fastgrpo.integrations.fused_head import FusedHead, FusedOutput, add_fused_head

IDS = torch.randint(2, 90, (3, 9), generator=torch.Generator().manual_seed(0))
ADVANTAGES = torch.tensor([1.0, -0.5, 2.0])
T = 4  # tokens of a completion


def logps_head(labels: Tensor) -> FusedHead:
    def head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> FusedOutput:
        ids = labels[:, 1:]
        logps, entropy = linear_logps(hidden[:, :-1], weight, ids, bias=bias, mask=ids != -100)
        return FusedOutput(log_probs=logps, entropy=entropy)

    return head


def loss_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> FusedOutput:
    found = linear_grpo_loss(hidden[:, -T - 1 : -1], weight, IDS[:, -T:], ADVANTAGES, bias=bias)
    return FusedOutput(loss=found.loss, log_probs=found.logps)


def fused(model: Any, **options: Any) -> Any:
    add_fused_head(model, logps_head, **options)
    return model


def test_the_loss_and_its_gradients_are_those_of_the_logits() -> None:
    model, plain = fused(small_model()), small_model()
    output = model(input_ids=IDS, attention_mask=torch.ones_like(IDS), fused_head=loss_head)
    output.loss.backward()
    logps = plain(input_ids=IDS).logits[:, -T - 1 : -1].log_softmax(-1)
    logps = logps.gather(-1, IDS[:, -T:, None])[..., 0]
    torch.testing.assert_close(output.log_probs, logps, rtol=0, atol=1e-5)
    # On-policy, token mean: the ratio is 1 and its derivative that of the log-prob.
    loss = -((logps - logps.detach()).exp() * ADVANTAGES[:, None]).mean()
    loss.backward()
    torch.testing.assert_close(output.loss, loss)
    for (name, x), wanted in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(x.grad, wanted.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_log_probs_of_labels() -> None:
    model = fused(small_model())
    labels = IDS.clone()
    labels[:, :5] = -100
    with torch.no_grad():
        output = model(input_ids=IDS, labels=labels, fused_lm_head=True)
        logits = small_model()(input_ids=IDS).logits[:, :-1]
    wanted = logits.log_softmax(-1).gather(-1, IDS[:, 1:, None])[..., 0]
    wanted[:, :4] = 0
    torch.testing.assert_close(output.log_probs, wanted, rtol=0, atol=1e-5)
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(output.entropy[:, 4:], entropy[:, 4:], rtol=1e-5, atol=1e-5)


def test_without_a_head_the_model_does_what_it_did() -> None:
    model, plain = fused(small_model()), small_model()
    found, wanted = (x(input_ids=IDS, labels=IDS) for x in (model, plain))
    assert torch.equal(found.logits, wanted.logits) and torch.equal(found.loss, wanted.loss)
    options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    assert torch.equal(model.generate(IDS, **options), plain.generate(IDS, **options))


def test_an_fp32_head_gets_fp32_hidden_states_out_of_autocast() -> None:
    model = fused(small_model().bfloat16(), in_fp32=True)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.float())
    seen: list[tuple[torch.dtype, bool]] = []

    def head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> FusedOutput:
        seen.append((hidden.dtype, torch.is_autocast_enabled("cpu")))
        return loss_head(hidden, weight, bias)

    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=IDS, fused_head=head)
    assert seen == [(torch.float32, False)]


def test_the_loss_of_the_router_is_the_models_own() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=100, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, num_local_experts=4,
            num_experts_per_tok=2,
        )
    )  # fmt: skip
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0
    call: dict[str, Any] = {
        "input_ids": IDS, "attention_mask": mask, "output_router_logits": True,
    }  # fmt: skip
    wanted = model(**call).aux_loss
    output = fused(model)(**call, fused_head=loss_head)
    assert wanted > 1
    torch.testing.assert_close(output.aux_loss, wanted)
    output.aux_loss.backward()
    assert model.model.layers[0].mlp.gate.weight.grad.abs().sum() > 0


def import_with(monkeypatch: pytest.MonkeyPatch, trl: ModuleType | None) -> None:
    monkeypatch.setitem(sys.modules, "trl", trl)
    monkeypatch.delitem(sys.modules, "fastgrpo.integrations.trl", raising=False)
    import_module("fastgrpo.integrations.trl")


def test_without_trl_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ImportError, match=r"needs TRL: pip install 'trl>=1.15,<1.17'"):
        import_with(monkeypatch, None)


@pytest.mark.parametrize("version", ["1.14.2", "1.17.0", "2.0.0"])
def test_a_version_of_trl_that_was_not_tested_is_refused(
    monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    trl = ModuleType("trl")
    trl.__version__ = version
    with pytest.raises(ImportError, match=rf"TRL {version} .*pip install 'trl>=1.15,<1.17'"):
        import_with(monkeypatch, trl)
