"""TRL's fused LM head, then TRL's own GRPO loss code: `GRPOTrainer._compute_loss`."""

from __future__ import annotations

import functools
import tempfile
import warnings
from typing import Any

import torch
from torch import Tensor

from ..cells import Inputs
from . import CONFIG, Method, broken, missing, recomputes


def absent(device: str) -> str | None:
    return missing("trl")


def unavailable(device: str) -> str | None:
    return absent(device) or broken(_imports)


def _imports() -> tuple[Any, Any]:
    import trl.trainer.grpo_trainer  # noqa: F401
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer import utils

    return ChunkedLogProbFunction, utils


def fused_head(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Return log-probs and entropies as `trl.trainer.utils.add_fused_lm_head` computes them."""
    function, utils = _imports()
    hidden, ids, mask = inputs.hidden, inputs.ids, inputs.mask
    compact = utils._use_triton(hidden.device)  # masked tokens are left out where Triton runs
    found = function.apply(
        hidden[mask] if compact else hidden.reshape(-1, hidden.shape[-1]),
        inputs.weight,
        None,
        ids[mask] if compact else ids.reshape(-1),
        1.0,
        utils._CHUNKED_LOGPROB_CHUNK_SIZE,
        None,
        1.0,
        ("entropy",),
    )
    if compact:
        logps, entropy = (x.new_zeros(mask.shape).masked_scatter(mask, x) for x in found[:2])
    else:
        logps, entropy = (x.view(mask.shape) for x in found[:2])
    return logps, entropy


@functools.cache
def _trainer(device: str) -> Any:
    """Make a real trainer of a tiny model: its loss is what is measured."""
    import datasets
    import trl
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    words = {"<pad>": 0, "<eos>": 1, "a": 2}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="a")),
        pad_token="<pad>",
        eos_token="<eos>",
    )
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=2, head_dim=8,
        )
    )  # fmt: skip
    with warnings.catch_warnings(), torch.random.fork_rng(), tempfile.TemporaryDirectory() as out:
        warnings.simplefilter("ignore")
        trainer = trl.GRPOTrainer(
            model,
            lambda completions, **_: [0.0] * len(completions),
            args=trl.GRPOConfig(
                output_dir=out, use_cpu=device == "cpu", bf16=False, gradient_checkpointing=False,
                report_to=[], loss_type="dapo", epsilon=CONFIG.epsilon_low,
                epsilon_high=CONFIG.epsilon_high,
                per_device_train_batch_size=2, num_generations=2,
            ),
            train_dataset=datasets.Dataset.from_dict({"prompt": ["a"] * 2}),
            processing_class=tokenizer,
        )  # fmt: skip
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def linear(inputs: Inputs) -> Tensor:
    trainer = _trainer(inputs.hidden.device.type)
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (*fused_head(inputs), None)
    mask = inputs.mask.long()
    return trainer._compute_loss(
        trainer.model,
        {
            "prompt_ids": inputs.ids[:, :1],
            "prompt_mask": mask[:, :1],
            "completion_ids": inputs.ids,
            "completion_mask": mask,
            "advantages": inputs.advantages,
            "num_items_in_batch": mask.sum(),
            "old_per_token_logps": inputs.old_logps,
        },
    )


METHODS = [
    Method("fused_head", ("linear",), linear, recomputes),
    Method("fused_head", ("logps",), lambda inputs: fused_head(inputs)[0], recomputes),
]
