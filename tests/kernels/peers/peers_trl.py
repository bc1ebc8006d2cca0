"""The same inputs through TRL's own `_compute_loss` and through ours.

The trainers are real ones, made by their constructors from a real configuration; only their model
is tiny and the log-probs and entropies, where TRL runs its model, are the leaves of `Inputs`.
"""

from __future__ import annotations

import tempfile
import warnings
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import datasets
import pytest
import torch
from small_models import small_model, small_tokenizer
from torch import Tensor

from fastgrpo_kernels import GRPOLossConfig, off_policy_mask, policy_loss, top_entropy_mask

trl: Any = pytest.importorskip("trl", minversion="1.16")
gmpo: Any = pytest.importorskip("trl.experimental.gmpo")

TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")
TOKEN_MEANS = ("dapo", "cispo", "vespo")  # divided by the tokens of the step in TRL too
# fp64 on both sides: nothing but the order of operations differs. Measured: 3e-16. TRL's metrics
# are means of fp32 flags: 3e-8.
TOLERANCE, METRICS_TOLERANCE = 1e-14, 1e-7


@dataclass
class Inputs:
    """One micro-batch; (B, T) each, fp64."""

    logps: Tensor
    entropy: Tensor
    advantages: Tensor  # (B,) or (B, T)
    mask: Tensor  # int64
    old: Tensor | None
    ref: Tensor
    sampler: Tensor | None = None  # log-probs that the sampler reported
    tool_mask: Tensor | None = None
    ratio: Tensor | None = None  # (B, T) or (B, 1)
    num_items: int = 42  # counted tokens of everything generated at once

    @property
    def counted(self) -> Tensor:
        return self.mask if self.tool_mask is None else self.mask * self.tool_mask

    def rows(self, first: int, last: int) -> Inputs:
        """Return some of the sequences."""
        tensors = {n: x[first:last] for n, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **tensors)


@dataclass
class Result:
    """What both sides are compared by."""

    loss: Tensor
    dlogps: Tensor
    dentropy: Tensor
    metrics: dict[str, float]


def make_inputs(
    length: int = 7, *, seed: int = 0, per_token: bool = False, empty: bool = True
) -> Inputs:
    """Make a micro-batch; the last of its six sequences has no counted token if `empty`.

    Tokens as well as whole sequences are clipped below, above, by delta, and not at all.
    """
    g = torch.Generator().manual_seed(seed)
    shape = (6, length)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, dtype=torch.float64)

    def uniform() -> Tensor:  # representable in fp32, in which both sides take quantiles
        return torch.rand(shape, generator=g).double()

    logps = -3 * uniform() - 0.01
    drift = torch.tensor([[-0.7], [-0.5], [0.0], [0.6], [0.8], [0.1]], dtype=torch.float64)
    sign = torch.tensor([-1.0, 1.0, -1.0, 1.0, -1.0, 1.0], dtype=torch.float64)
    advantages = normal(*shape) if per_token else sign * normal(6).abs()
    mask = (uniform() < 0.75).long()
    mask[:, 0] = 1
    if empty:
        mask[-1] = 0
    return Inputs(
        logps=logps,
        entropy=2 * uniform(),
        advantages=advantages,
        mask=mask,
        old=logps - drift - 0.3 * normal(*shape),
        ref=logps + 0.5 * normal(*shape),
    )


def make_trainer(
    loss_type: str,
    *,
    level: str = "token",
    beta: float = 0.0,
    use_vllm: bool = False,
    start_vllm: bool = False,
    accumulation: int = 1,
    training: bool = True,
    model: Any = None,
    **options: Any,
) -> Any:
    """Make a real trainer; "gmpo" makes TRL's GMPOTrainer."""
    trainer_class, config_class = trl.GRPOTrainer, trl.GRPOConfig
    if loss_type == "gmpo":
        trainer_class, config_class = gmpo.GMPOTrainer, gmpo.GMPOConfig
    else:
        options["loss_type"] = loss_type
    if loss_type == "cispo":
        options.setdefault("epsilon_high", 1.3)  # the cap itself
    if loss_type == "sapo":
        options.setdefault("sapo_temperature_neg", 1.0625)  # TRL rounds it to fp32
    # Of TRL's and transformers' own making; and the constructor seeds the global generator.
    with warnings.catch_warnings(), torch.random.fork_rng(), tempfile.TemporaryDirectory() as out:
        warnings.simplefilter("ignore")
        arguments = config_class(
            output_dir=out,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to=[],
            importance_sampling_level=level,
            gradient_accumulation_steps=accumulation,
            per_device_train_batch_size=2,
            num_generations=2,
            use_vllm=start_vllm,
            **{"max_completion_length": 9, **options},
        )
        trainer = trainer_class(
            _model_that_is_not_run() if model is None else model,
            lambda completions, **_: [0.0] * len(completions),
            args=arguments,
            train_dataset=_prompts(),
            processing_class=_tokenizer(),
        )
    # In the constructor beta would load a second model and use_vllm would start vLLM.
    trainer.beta, trainer.use_vllm = beta, use_vllm
    trainer.current_gradient_accumulation_steps = accumulation  # set by the training loop
    trainer.model.train(training)
    return trainer


@cache
def _model_that_is_not_run() -> Any:
    return small_model()


@cache
def _prompts() -> Any:
    return datasets.Dataset.from_dict({"prompt": ["1+1"] * 8})


@cache
def _tokenizer() -> Any:
    return small_tokenizer()


def inputs_of(trainer: Any, inputs: Inputs) -> dict[str, Tensor]:
    """Return what TRL's `_generate_and_score_completions` would hand to `_compute_loss`."""
    ids = torch.zeros_like(inputs.mask)
    found = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": torch.ones_like(ids[:, :1]),
        "completion_ids": ids,
        "completion_mask": inputs.mask,
        "advantages": inputs.advantages,
        "num_items_in_batch": torch.tensor(inputs.num_items),
        "old_per_token_logps": inputs.old,
        "ref_per_token_logps": inputs.ref if trainer.beta else None,
        "sampling_per_token_logps": inputs.sampler,
        "tool_mask": inputs.tool_mask,
        "importance_sampling_ratio": inputs.ratio,
    }
    return {name: value for name, value in found.items() if value is not None}


def theirs(trainer: Any, inputs: Inputs) -> Result:
    """Run TRL's `_compute_loss`."""
    logps = inputs.logps.clone().requires_grad_()
    entropy = inputs.entropy.clone().requires_grad_()
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (logps * 1, entropy * 1, None)
    trainer._metrics["train"].clear()
    trainer._metrics["eval"].clear()
    loss = trainer._compute_loss(trainer.model, inputs_of(trainer, inputs))
    mode = "train" if trainer.model.training else "eval"
    metrics = {name: values[-1] for name, values in trainer._metrics[mode].items()}
    return _result(loss, logps, entropy, metrics)


def loss_type_of(trainer: Any) -> Any:
    """Return the loss type in our terms."""
    return "gmpo" if isinstance(trainer, gmpo.GMPOTrainer) else trainer.loss_type


def config_of(trainer: Any, **changes: Any) -> GRPOLossConfig:
    """Translate the trainer's configuration."""
    its: Any = trainer.args
    if loss_type_of(trainer) == "gmpo":
        changes = {"gmpo_clip": trainer.epsilon_high, **changes}
    else:
        changes = {
            "epsilon_low": trainer.epsilon_low,
            "epsilon_high": trainer.epsilon_high,
            # Neither side reads it for cispo; ours compares it with 1 + epsilon_high all the same.
            "delta": None if trainer.loss_type == "cispo" else its.delta,
            "use_bias_correction_kl": its.use_bias_correction_kl,
            "entropy_coef": trainer.entropy_coef,
            **changes,
        }
    return GRPOLossConfig(
        **{
            "loss_type": loss_type_of(trainer),
            "importance_sampling_level": trainer.importance_sampling_level,
            "beta": trainer.beta,
            "max_completion_length": its.max_completion_length,
            "sapo_temperature_pos": its.sapo_temperature_pos,
            "sapo_temperature_neg": its.sapo_temperature_neg,
            "vespo_k_pos": its.vespo_k_pos,
            "vespo_lambda_pos": its.vespo_lambda_pos,
            "vespo_k_neg": its.vespo_k_neg,
            "vespo_lambda_neg": its.vespo_lambda_neg,
            **changes,
        }
    )


def arguments_of(trainer: Any, inputs: Inputs) -> dict[str, Any]:
    """Translate what TRL's loss reads from its trainer into the arguments of ours."""
    counted, its, loss_type = inputs.counted, trainer.args, loss_type_of(trainer)
    training, steps = trainer.model.training, trainer.current_gradient_accumulation_steps
    accumulation = steps if training else 1
    arguments: dict[str, Any] = {
        "completion_mask": counted,
        "old_logps": inputs.old,
        "ref_logps": inputs.ref if trainer.beta else None,
        "importance_sampling_ratio": inputs.ratio if trainer.use_vllm else None,
    }
    entropy_mask = torch.ones_like(inputs.entropy)
    if trainer.top_entropy_quantile < 1:
        entropy_mask = top_entropy_mask(
            inputs.entropy, quantile=trainer.top_entropy_quantile, completion_mask=counted
        ).double()
        arguments["entropy_mask"] = entropy_mask
    if trainer.off_policy_mask_threshold is not None:
        sampler = inputs.old if inputs.sampler is None else inputs.sampler
        arguments["policy_weight"] = off_policy_mask(
            inputs.logps,
            inputs.logps if sampler is None else sampler,
            inputs.advantages,
            threshold=trainer.off_policy_mask_threshold,
            completion_mask=counted,
        )
    if loss_type in TOKEN_MEANS:
        share = accumulation / its.steps_per_generation if training else 1
        arguments["num_items_in_batch"] = inputs.num_items * share
    elif loss_type != "bnpo":  # local by definition: see `ours`
        arguments["num_sequences_in_batch"] = accumulation * len(counted)
    if trainer.entropy_coef and loss_type != "bnpo":
        arguments["entropy_denominator"] = accumulation * (entropy_mask * counted).sum()
    return arguments


def ours(
    trainer: Any, inputs: Inputs, arguments: dict[str, Any] | None = None, **changes: Any
) -> Result:
    """Run our `policy_loss` on the same inputs; `changes` of the configuration."""
    logps = inputs.logps.clone().requires_grad_()
    entropy = inputs.entropy.clone().requires_grad_()
    out = policy_loss(
        logps,
        inputs.advantages,
        entropy=entropy,
        config=config_of(trainer, **changes),
        **(arguments_of(trainer, inputs) if arguments is None else arguments),
    )
    loss = out.loss
    if loss_type_of(trainer) == "bnpo" and trainer.model.training:
        # Ours is the mean over this call's tokens; how many calls there are is the caller's.
        loss = loss / trainer.current_gradient_accumulation_steps
    return _result(loss, logps, entropy, {n: x.item() for n, x in out.metrics.items()})


def _result(loss: Tensor, logps: Tensor, entropy: Tensor, metrics: dict[str, float]) -> Result:
    dlogps, dentropy = torch.autograd.grad(
        loss, (logps, entropy), allow_unused=True, materialize_grads=True
    )
    return Result(loss.detach(), dlogps, dentropy, metrics)


def assert_close(actual: Any, wanted: Any, what: str = "", tolerance: float = TOLERANCE) -> None:
    """Compare numbers or tensors relative to the largest of them."""
    actual, wanted = (torch.as_tensor(x, dtype=torch.float64) for x in (actual, wanted))
    size = max(1.0, wanted.abs().max().item())
    torch.testing.assert_close(
        actual, wanted, rtol=0, atol=tolerance * size, msg=lambda m: f"{what}: {m}"
    )


def assert_agree(mine: Result, its: Result, *, without: tuple[str, ...] = ("policy_loss",)) -> None:
    """Compare loss, both gradients, and every metric of TRL under its name."""
    assert its.loss.isfinite() and its.dlogps.abs().max() > 0
    assert_same_gradients(mine, its)
    assert its.metrics, "TRL reports metrics"
    for name, value in its.metrics.items():
        if name not in without:
            assert_close(mine.metrics[name], value, name, METRICS_TOLERANCE)


def assert_same_gradients(mine: Result, its: Result) -> None:
    """Compare loss and both gradients, not the metrics."""
    assert_close(mine.loss, its.loss, "loss")
    assert_close(mine.dlogps, its.dlogps, "gradient of the log-probs")
    assert_close(mine.dentropy, its.dentropy, "gradient of the entropies")
