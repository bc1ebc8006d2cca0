"""The losses and the fused head for verl against verl's own, in verl's own registry and patches.

verl runs on the installed transformers, though its metadata asks for an older one; nothing of it is
replaced. B sequences, T positions of a response, L positions of the model.
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from policy_cases import MODES, make_batch, make_far_batch
from small_models import save_small_model, small_model
from torch import nn

from fastgrpo.integrations.verl import register
from fastgrpo.integrations.verl_head import forward_with_fastgrpo_backend

pytestmark = pytest.mark.peers

core_algos: Any = pytest.importorskip("verl.trainer.ppo.core_algos")
dense_common: Any = pytest.importorskip("verl.models.transformers.dense_common")
monkey_patch: Any = pytest.importorskip("verl.models.transformers.monkey_patch")
losses: Any = pytest.importorskip("verl.workers.utils.losses")
import_utils: Any = pytest.importorskip("verl.utils.import_utils")
tensordict: Any = pytest.importorskip("tensordict")
configs: Any = pytest.importorskip("verl.workers.config")


@pytest.fixture(autouse=True)
def without_trl(monkeypatch: pytest.MonkeyPatch) -> None:
    """verl 0.9.1 wants a class that TRL no longer has, wherever it finds TRL."""
    monkeypatch.setattr(monkey_patch, "is_trl_available", lambda: False)


CASES = [
    *(("fastgrpo", "vanilla", mode) for mode in MODES),
    *(("fastgrpo_gspo", "gspo", mode) for mode in MODES),
    *(("fastgrpo_cispo", "cispo", mode) for mode in MODES),
    ("fastgrpo_sapo", "sapo", "seq-mean-token-mean"),
]
# verl adds 1e-8 to lengths and counts of tokens before it divides by them.
REL = 2e-8


@pytest.fixture(autouse=True)
def external_lib():
    """Do what verl's HFModelConfig does with `external_lib`, in every worker."""
    import_utils.import_external_libs("fastgrpo.integrations.verl")


@pytest.fixture
def put_back(monkeypatch):
    """Give the class of a model its own forward back after the test: verl patches the class."""

    def keep(model):
        monkeypatch.setattr(type(model), "forward", type(model).forward)
        return model

    return keep


def actor(mode: str, **options: Any) -> Any:
    defaults = {"clip_ratio_low": 0.3, "clip_ratio_high": 0.4, "clip_ratio_c": 2.0, "tau_neg": 1.3}
    return configs.ActorConfig(
        strategy="fsdp",
        rollout_n=4,
        ppo_micro_batch_size_per_gpu=1,
        loss_agg_mode=mode,
        **defaults | options,
    )


def call(name: str, mode: str, config: Any, batch: Any, weighted: bool) -> Any:
    loss, metrics = core_algos.get_policy_loss_fn(name)(
        old_log_prob=batch.old,
        log_prob=batch.logps,
        advantages=batch.advantages,
        response_mask=batch.mask,
        loss_agg_mode=mode,
        config=config,
        rollout_is_weights=batch.weights if weighted else None,
    )
    loss.backward()
    return loss, batch.logps.grad, metrics


def assert_equal(ours: Any, theirs: Any) -> None:
    (loss, grad, metrics), (their_loss, their_grad, their_metrics) = ours, theirs
    torch.testing.assert_close(loss, their_loss, rtol=REL, atol=0)
    torch.testing.assert_close(grad, their_grad, rtol=REL, atol=1e-15)
    assert metrics == pytest.approx(their_metrics, rel=1e-6)  # verl averages 0 and 1 in fp32


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("name", "theirs", "mode"), CASES)
def test_loss_gradient_and_metrics_are_verls(name, theirs, mode, weighted):
    config, clipped = actor(mode), 0.0
    for seed in range(3):
        ours = call(name, mode, config, make_batch(seed), weighted)
        assert_equal(ours, call(theirs, mode, config, make_batch(seed), weighted))
        clipped += ours[2]["actor/pg_clipfrac"]
    assert clipped > 0.2 or theirs == "sapo"


@pytest.mark.parametrize(("name", "theirs", "mode"), CASES)
def test_far_log_ratios_are_cut_where_verl_cuts_them(name, theirs, mode):
    config = actor(mode, clip_ratio_low=10, clip_ratio_c=1e12)  # bounds that hide nothing
    ours, others = (call(each, mode, config, make_far_batch(), True) for each in (name, theirs))
    assert_equal(ours, others)
    torch.testing.assert_close(ours[1], others[1], rtol=REL, atol=0)


@pytest.mark.parametrize(("name", "theirs", "mode"), CASES)
def test_shares_of_the_step_are_verls(name, theirs, mode):
    whole = call(theirs, mode, actor(mode), make_batch(), True)
    if mode.endswith("norm"):
        whole = [whole[0] * 6 / 40, whole[1] * 6 / 40]
    batch = make_batch()
    config = actor(mode, loss_scale_factor=40 if mode.endswith("norm") else None)
    config.global_batch_info.update(
        dp_size=2,
        batch_num_tokens=int(batch.mask.sum()),
        global_batch_size=int(batch.mask.any(-1).sum()),
        loss_scale_factor=config.loss_scale_factor,
    )
    total, grads = 0.0, []
    for pick in (slice(0, 2), slice(2, 3), slice(3, 5)):  # the second has no token
        ours = call(name, mode, config, batch.rows(pick), True)
        assert_equal(ours, call(theirs, mode, config, batch.rows(pick), True))
        total, grads = total + ours[0], [*grads, ours[1]]
    torch.testing.assert_close(total / 2, whole[0], rtol=REL, atol=0)
    torch.testing.assert_close(torch.cat(grads) / 2, whole[1], rtol=REL, atol=1e-15)


@pytest.mark.parametrize("mode", MODES)
def test_in_fp32_the_two_differ_by_roundings(mode):
    batches = [make_batch() for _ in range(2)]
    results = []
    for name, batch in zip(("fastgrpo", "vanilla"), batches, strict=True):
        half = {n: x if n == "mask" else x.detach().float() for n, x in vars(batch).items()}
        results.append(call(name, mode, actor(mode), type(batch)(**half).with_graph(), True))
    (loss, grad, _), (their_loss, their_grad, _) = results
    torch.testing.assert_close(loss, their_loss, rtol=2e-6, atol=0)
    torch.testing.assert_close(grad, their_grad, rtol=2e-6, atol=1e-8)


def test_the_signature_is_verls():
    names = list(inspect.signature(core_algos.compute_policy_loss_vanilla).parameters)
    for name in ("fastgrpo", "fastgrpo_gspo", "fastgrpo_cispo", "fastgrpo_sapo"):
        found = inspect.signature(core_algos.get_policy_loss_fn(name)).parameters
        assert list(found) == names


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-sum-norm"])
def test_verls_worker_trains_with_it(mode):
    """Run verl's own `ppo_loss`, with its entropy bonus, KL loss and nested tensors."""
    responses = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)
    lengths = [3 + int(n) for n in responses.sum(-1)]  # prompts of 3 tokens
    generator = torch.Generator().manual_seed(0)

    def nested(values: list[torch.Tensor]) -> Any:
        return torch.nested.as_nested_tensor(values, layout=torch.jagged)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    fields = {name: normal(3, 4) for name in ("old_log_probs", "advantages", "ref_log_prob")}
    flat, flat_entropy = normal(sum(lengths)), normal(sum(lengths)).abs()
    results = []
    for loss_mode in ("fastgrpo", "vanilla"):
        logps = flat.clone().requires_grad_()
        entropy = flat_entropy.clone().requires_grad_()
        offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
        data = tensordict.TensorDict(
            {
                **fields,
                "response_mask": responses,
                "prompts": nested([torch.zeros(3, dtype=torch.int64) for _ in lengths]),
                "responses": nested([torch.zeros(n - 3, dtype=torch.int64) for n in lengths]),
                "input_ids": nested([torch.zeros(n, dtype=torch.int64) for n in lengths]),
                "attention_mask": torch.ones(3, 7, dtype=torch.int64),
            },
            batch_size=3,
        )
        for name, value in {
            "dp_size": 2,
            "batch_num_tokens": 30,
            "global_batch_size": 8,
            "max_response_len": 4,
        }.items():
            data.set_non_tensor(name, value)
        output = {
            "log_probs": torch.nested.nested_tensor_from_jagged(logps, offsets),
            "entropy": torch.nested.nested_tensor_from_jagged(entropy, offsets),
        }
        config = actor(
            mode,
            use_kl_loss=True,
            entropy_coeff=0.01,
            kl_loss_coef=0.1,
            policy_loss=configs.PolicyLossConfig(loss_mode=loss_mode),
        )
        loss, metrics = losses.ppo_loss(config, output, data)
        loss.backward()
        found = {n: getattr(m, "values", m) for n, m in metrics.items()}
        results.append((loss, logps.grad, entropy.grad, found))
    assert results[0][1].count_nonzero() == responses.sum()
    for ours, theirs in zip(results[0][:3], results[1][:3], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8)
    assert results[0][3].keys() == results[1][3].keys()
    for name, value in results[0][3].items():
        assert torch.tensor(value).tolist() == pytest.approx(
            torch.tensor(results[1][3][name]).tolist(), rel=1e-5
        ), name


def run(model: nn.Module, arguments: dict[str, Any]) -> tuple[Any, dict[str, torch.Tensor]]:
    """Return what a patched model gives, and the gradients of a loss with both of its results."""
    model.zero_grad()
    output = model(**arguments, return_dict=True, use_cache=False)
    weights = torch.linspace(-1, 1, output.log_probs.numel()).view_as(output.log_probs)
    ((output.log_probs + 0.3 * output.entropy) * weights).sum().backward()
    return output, {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("layout", ["padded", "labels", "packed"])
@pytest.mark.parametrize(("family", "tie"), [("qwen2", True), ("llama", False)])
def test_the_fused_head_is_verls_torch_backend(put_back, family, tie, layout):
    model = put_back(small_model(family, tie=tie))
    ids = torch.randint(2, 90, (2, 9), generator=torch.Generator().manual_seed(1))
    arguments: dict[str, Any] = {"input_ids": ids, "temperature": 0.7}
    if layout == "padded":
        arguments["attention_mask"] = (torch.arange(9) >= torch.tensor([[0], [3]])).long()
    elif layout == "labels":
        arguments["labels"] = ids.flip(1)
    else:
        arguments["input_ids"] = ids.view(1, 18)
        arguments["position_ids"] = torch.arange(9).repeat(2)[None]
        arguments["shift_labels"] = ids.roll(-1, -1).view(1, 18)
    results = []
    for backend in ("fastgrpo", "torch"):
        monkey_patch.apply_monkey_patch(
            model,
            use_remove_padding=False,
            use_fused_kernels=True,
            fused_kernels_backend=backend,
        )
        results.append(run(model, arguments))
    (ours, grads), (theirs, their_grads) = results
    assert type(ours) is type(theirs) is dense_common.CausalLMOutputForPPO
    assert ours.log_probs.shape == arguments["input_ids"].shape and ours.logits is None
    torch.testing.assert_close(ours.log_probs, theirs.log_probs, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(ours.entropy, theirs.entropy, rtol=2e-6, atol=2e-6)
    assert grads.keys() == their_grads.keys()
    for name, grad in grads.items():
        scale = their_grads[name].abs().max()
        assert (grad - their_grads[name]).abs().max() <= 2e-5 * scale, name


@pytest.mark.filterwarnings("ignore")  # of verl's engine, on import
def test_verls_engine_builds_the_model_from_the_two_options(put_back, tmp_path):
    """Run verl's FSDP engine from its options to what its loss gets, on a CPU and not sharded."""
    engines: Any = pytest.importorskip("verl.workers.engine.fsdp.transformer_impl")
    tu: Any = pytest.importorskip("verl.utils.tensordict_utils")
    path = save_small_model(tmp_path / "model", "qwen2", tie=True)
    put_back(small_model("qwen2"))

    def nested(*values: torch.Tensor) -> Any:
        return torch.nested.as_nested_tensor(list(values), layout=torch.jagged)

    def outputs(backend: str) -> Any:
        engine = engines.FSDPEngineWithLMHead.__new__(engines.FSDPEngineWithLMHead)
        engine.model_config = configs.HFModelConfig(
            path=path,
            external_lib="fastgrpo.integrations.verl",
            use_fused_kernels=True,
            fused_kernel_options={"impl_backend": backend},
            override_config={"attn_implementation": "eager"},
            use_remove_padding=False,
            enable_gradient_checkpointing=False,
        )
        engine.engine_config = configs.FSDPEngineConfig(strategy="fsdp2", model_dtype="fp32")
        # What `__init__` sets from the configuration and from a process group of GPUs.
        engine.device_mesh, engine.pad_to_length = None, False
        engine.use_remove_padding = engine.use_ulysses_sp = False
        engine.ulysses_sequence_parallel_size = 1
        engine.module = engine._build_module()
        batch = tensordict.TensorDict(
            {
                "input_ids": nested(torch.arange(3, 8), torch.arange(10, 14)),
                "position_ids": nested(torch.arange(5), torch.arange(4)),
            },
            batch_size=2,
        )
        tu.assign_non_tensor(
            batch,
            use_fused_kernels=True,
            use_remove_padding=False,
            temperature=0.7,
            calculate_entropy=True,
        )
        inputs, others = engine.prepare_model_inputs(batch)
        output = engine.module(**inputs, use_cache=False)
        return type(engine.module).forward, engine.prepare_model_outputs(
            output=output, output_args=others, micro_batch=batch, logits_processor_func=None
        )

    forward, ours = outputs("fastgrpo")
    assert forward is forward_with_fastgrpo_backend
    _, theirs = outputs("torch")
    assert ours.keys() == theirs.keys() == {"log_probs", "entropy"}
    for name, value in ours.items():
        torch.testing.assert_close(value.values(), theirs[name].values(), rtol=2e-6, atol=2e-6)


def test_the_bias_of_a_head_counts(put_back):
    """verl's own backends leave it out."""
    model = put_back(small_model("llama", tie=False))
    model.lm_head.bias = nn.Parameter(torch.linspace(-2, 2, model.config.vocab_size))
    ids = torch.randint(2, 90, (2, 9), generator=torch.Generator().manual_seed(1))
    logits = model(input_ids=ids).logits / 0.7
    expected = logits.log_softmax(-1).gather(-1, ids.roll(-1, -1)[..., None])[..., 0]
    monkey_patch.patch_forward_with_backends(model, True, "fastgrpo")
    found, grads = run(model, {"input_ids": ids, "temperature": 0.7})
    torch.testing.assert_close(found.log_probs, expected, rtol=2e-6, atol=2e-6)
    assert grads["lm_head.bias"].abs().max() > 0.1


def test_to_register_again_changes_nothing():
    patched = monkey_patch.patch_forward_with_backends
    register()
    assert monkey_patch.patch_forward_with_backends is patched


def test_verls_other_backends_are_still_verls(put_back):
    model = put_back(small_model("llama"))
    own = type(model).forward
    monkey_patch.patch_forward_with_backends(model, False, "fastgrpo")
    assert type(model).forward is own
    for backend in ("torch", "triton"):
        monkey_patch.patch_forward_with_backends(model, True, backend)
        assert type(model).forward is getattr(dense_common, f"forward_with_{backend}_backend")


def test_the_arguments_of_the_forward_are_verls():
    names = inspect.signature(dense_common.forward_with_torch_backend).parameters
    assert list(inspect.signature(forward_with_fastgrpo_backend).parameters) == list(names)
