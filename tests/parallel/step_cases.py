"""Optimisation steps on given batches, by any number of processes: what each case is made of.

A case is run by `run` in the same words whether this process is one of several or the only one, on
the same batches of all completions. Completions are random, of very unequal lengths; nothing is
sampled, so that what differs between two runs is the order of additions alone.

B completions of a step, N tokens of all of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from small_models import CONFIGS, small_tokenizer
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from transformers import AutoModelForCausalLM, Gemma2Config, PhiConfig

from fastgrpo.assets import Assets
from fastgrpo.batch import Batch, make_batch
from fastgrpo.config import config_from
from fastgrpo.trainer import Trainer

B = 16
PER_DEVICE = 2  # a step of one process has 8 micro-batches, one of 4 processes 2 on each

FAMILIES = {
    **CONFIGS,
    "gemma2": partial(
        Gemma2Config,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention"],
        head_dim=8,
        final_logit_softcapping=5.0,
        attn_logit_softcapping=10.0,
    ),
    "phi": PhiConfig,  # its head has a bias
}


@dataclass(frozen=True)
class Case:
    """What is trained and how, and how near each other two ways to add the same are."""

    options: dict[str, Any] = field(default_factory=dict)
    """Of the configuration."""
    family: str = "qwen3"
    tie: bool = False
    dtype: torch.dtype = torch.float32
    frozen_head: bool = False
    kind: str = "unequal"
    """Of the batches, see `completions`."""
    generations: int = 2
    """How many."""
    bf16: bool = False
    """One process that is not sharded rounds products to bf16 at other places."""


def grpo(**options: Any) -> dict[str, Any]:
    return {"loss_type": "grpo", **options}


# Two optimisation steps on old completions: the ratio of the second is no longer 1, and is clipped.
AGAIN = {"num_iterations": 2}
TWICE = AGAIN | {"epsilon": 0.1}
REFERENCE = AGAIN | {"beta": 0.1}
BUDGET = {"max_tokens_per_microbatch": 48}

ONE = {"generations": 1}
ESSENTIAL = {
    "dapo": Case(),
    "grpo, again": Case(grpo(**TWICE), **ONE),
    "gspo, tied": Case(
        grpo(importance_sampling_level="sequence", **AGAIN, epsilon=0.04), tie=True, **ONE
    ),
    "lora": Case({"use_peft": True}, **ONE),
    "reference": Case(REFERENCE | {"steps_per_generation": 2}, tie=True),
    # The first step of the second generation has no signal, and log-probs were asked before it.
    "late": Case({"steps_per_generation": 2, "weight_decay": 0.5}, kind="late"),
    "idle rank": Case(kind="one", **ONE),
    "budget": Case(BUDGET, **ONE),
}

# Norms are of the parts of one copy, and a reference that moves is in parts too.
COPIES = {
    "dapo, copied": Case(),
    "clipped gradient": Case({"max_grad_norm": 1e-3}),
    "reference offloaded moves, tied": Case(
        REFERENCE | {"offload_ref_model": True, "sync_ref_model": True, "ref_model_sync_steps": 1},
        tie=True,
    ),
}

LOSSES = {
    "grpo": Case(grpo()),
    "dr_grpo": Case({"loss_type": "dr_grpo"} | TWICE),
    "bnpo": Case({"loss_type": "bnpo"} | TWICE),
    "bnpo, entropy": Case({"loss_type": "bnpo", "entropy_coef": 0.1}),
    "cispo": Case({"loss_type": "cispo", "epsilon_high": 1.05} | AGAIN),
    "luspo": Case({"loss_type": "luspo"} | TWICE),
    "sapo": Case({"loss_type": "sapo"} | AGAIN),
    "vespo": Case({"loss_type": "vespo"} | AGAIN),
    "gmpo": Case({"loss_type": "gmpo"} | AGAIN),
    "gspo of dapo": Case({"importance_sampling_level": "sequence", "epsilon": 0.04} | AGAIN),
    "quantile": Case({"top_entropy_quantile": 0.5}),
    "quantile, entropy": Case({"top_entropy_quantile": 0.5, "entropy_coef": 0.1} | TWICE),
    "entropy": Case({"entropy_coef": 0.1}),
    "adaptive entropy": Case(
        {"use_adaptive_entropy": True, "entropy_target": 10.0, "entropy_coef": 0.05}
    ),
    "off-policy mask": Case({"off_policy_mask_threshold": 0.1}),
    "empty ones skipped": Case(grpo(skip_empty_sequences=True), kind="masked some"),
    "not filtered": Case({"filter_zero_advantages": False}),
    "two steps of a generation": Case({"steps_per_generation": 2}),
    "two steps, twice": Case({"steps_per_generation": 2} | TWICE),
    "budget, grpo, twice": Case(grpo(**BUDGET, **TWICE)),
    "gradient as it is": Case({"max_grad_norm": 0.0}),
    "weight decay": Case({"weight_decay": 0.5}),
}
REFERENCES = {
    "reference": Case(REFERENCE),
    "reference moves": Case(
        REFERENCE
        | {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5}
    ),
    "reference offloaded": Case(REFERENCE | {"offload_ref_model": True}),
    "reference below adapters": Case(REFERENCE | {"use_peft": True}),
    "reference, corrected": Case(REFERENCE | {"use_bias_correction_kl": True}),
    "reference, silent": Case(REFERENCE, kind="silent"),
}
MODELS = {
    "tied": Case(tie=True),
    "lora, tied": Case({"use_peft": True}, tie=True),
    "lora on bf16": Case({"use_peft": True, "dtype": "bfloat16"}, dtype=torch.bfloat16, bf16=True),
    "frozen head": Case(frozen_head=True),
    "frozen tied head": Case(frozen_head=True, tie=True),
    "activations kept": Case({"gradient_checkpointing": False}),
    "activations offloaded": Case({"activation_offloading": True}),
    "padded": Case({"padding_free": False}),
    "padded, budget": Case({"padding_free": False} | BUDGET),
    "llama": Case(family="llama"),
    "llama, tied": Case(family="llama", tie=True),
    "gemma2": Case(family="gemma2"),
    "gemma3": Case(family="gemma3", tie=True),
    "cohere": Case(family="cohere", tie=True),
    "granite": Case(family="granite"),
    "qwen2": Case(family="qwen2"),
    "phi, whose head has a bias": Case(family="phi"),
    "mixed precision": Case({"bf16": True}, bf16=True),
    "mixed precision, tied": Case({"bf16": True} | REFERENCE, tie=True, bf16=True),
}
STEPS = {
    "one with signal": Case(kind="one"),
    "one with signal, twice": Case(TWICE, kind="one"),
    "one with signal, tied": Case(kind="one", tie=True),
    "three with signal": Case(kind="three"),
    "no signal": Case(kind="silent"),
    "no signal, not filtered": Case({"filter_zero_advantages": False}, kind="silent"),
    "no signal, lora": Case({"use_peft": True}, kind="silent"),
    "signal, then none": Case(TWICE, kind="then silent"),
    "all masked": Case(kind="masked"),
    "all masked, not filtered": Case({"filter_zero_advantages": False}, kind="masked"),
    "all masked, bnpo": Case({"loss_type": "bnpo"}, kind="masked"),
    "all masked, quantile": Case({"top_entropy_quantile": 0.5, "entropy_coef": 0.1}, kind="masked"),
    "all masked, reference": Case(REFERENCE, kind="masked"),
    "some masked": Case(kind="masked some"),
    "some masked, bnpo": Case({"loss_type": "bnpo"}, kind="masked some"),
    "some masked, quantile": Case({"top_entropy_quantile": 0.5}, kind="masked some"),
    "one long": Case(kind="one long"),
    "three completions, bnpo": Case({"loss_type": "bnpo"}, kind="few"),
    "three completions, quantile": Case({"top_entropy_quantile": 0.5}, kind="few"),
    "three completions, reference": Case(REFERENCE, kind="few"),
    "one with signal, two steps": Case({"steps_per_generation": 2}, kind="one"),
    "three completions": Case({"filter_zero_advantages": False}, kind="few"),
}
# The passes of bnpo are the same for any number of processes, and so are their roundings to bf16.
MIXED = {
    "untied": Case({"bf16": True, "loss_type": "bnpo"}, generations=1),
    "tied": Case({"bf16": True, "loss_type": "bnpo"}, tie=True, generations=1),
    "lora": Case({"bf16": True, "loss_type": "bnpo", "use_peft": True}, generations=1),
}
ALL = {
    "essential": ESSENTIAL,
    "copies": COPIES,
    "losses": LOSSES,
    "references": REFERENCES,
    "models": MODELS,
    "steps": STEPS,
    "mixed": MIXED,
}


def completions(kind: str, seed: int, vocabulary: int, count: int = B) -> Batch:
    """Make up a generation; of the first four completions the advantages are 0.

    Args:
        kind: "unequal", or what it says of the advantages, the lengths or what counts.
        seed: of all that is random.
        vocabulary: ids are below it.
        count: of completions.
    """
    rng = torch.Generator().manual_seed(seed)
    count = 3 if kind == "few" else count
    # Most are short and a few are long, so that ranks could have very different loads.
    lengths = [1 + int(40 * u**3) for u in torch.rand(count, generator=rng).tolist()]
    if kind == "one long":
        lengths = [60 if i == 7 else 2 for i in range(count)]
    prompts = [
        torch.randint(2, vocabulary, (3 + i // 4,), generator=rng).tolist() for i in range(count)
    ]
    ids = [torch.randint(2, vocabulary, (n,), generator=rng).tolist() for n in lengths]
    logps = [-4.6 + 0.3 * torch.randn(n, generator=rng) for n in lengths]
    advantages = torch.randn(count, generator=rng)
    if kind != "few":
        advantages[:4] = 0
    if kind == "one" or kind == "three":
        advantages[{"one": 5, "three": 7}[kind] :] = 0
    if kind == "late" and seed > 1:
        advantages[:-4] = 0
    if kind == "silent" or (kind == "then silent" and seed > 1):
        advantages[:] = 0
    counted = [torch.rand(n, generator=rng) < 0.9 for n in lengths]
    if kind == "masked some":
        counted = [mask & (i % 3 == 1) for i, mask in enumerate(counted)]
    if kind == "masked":
        counted = [mask & False for mask in counted]
    return make_batch(
        prompts, ids, logps, advantages, [mask.tolist() for mask in counted], device="cpu"
    )


def model_of(case: Case) -> Any:
    tokenizer = small_tokenizer()
    config = FAMILIES[case.family](
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=case.tie,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():  # of some families biases and gains start where gradients are 0
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
    model.to(case.dtype)
    if case.frozen_head:
        model.get_output_embeddings().requires_grad_(False)
    return model


def trainer_of(case: Case, directory: Path, mesh: Any, size: int) -> Trainer:
    """Make a trainer of `size` processes; mesh None: one that is not sharded."""
    tokenizer = small_tokenizer()
    config = config_from(
        {
            "output_dir": str(directory),
            "num_generations": 4,
            "per_device_train_batch_size": PER_DEVICE,
            "gradient_accumulation_steps": B // PER_DEVICE // size,
            "max_completion_length": 41,
            "learning_rate": 1e-2,
            "adam_epsilon": 1e-3,
            "lr_scheduler_type": "constant",
            "max_steps": 8,
            "save_strategy": "no",
            "reward_funcs": ["accuracy"],
            **({"parallel": mesh} if mesh is not None else {}),
            **steps_of(case, size),
        }
    )
    rows = Dataset.from_dict({"prompt": ["a"] * 8, "answer": ["b"] * 8})
    assets = Assets(model=model_of(case), tokenizer=tokenizer, train_dataset=rows)
    return Trainer(config, assets)


def steps_of(case: Case, size: int) -> dict[str, Any]:
    """Return a case's options with the passes that a generation serves on so many processes."""
    options = dict(case.options)
    if "steps_per_generation" in options:
        options["steps_per_generation"] *= B // PER_DEVICE // size
    return options


def weights(trainer: Trainer) -> dict[str, Tensor]:
    state = trainer.policy.state_dict(trainer.policy.model)
    return {name: x.clone() for name, x in state.items()}


def run(case: Case, directory: Path, mesh: Any = None, size: int = 1) -> dict[str, Any]:
    """Learn from some generations; return metrics and norms of each step, and what was learnt.

    All ranks call it; tensors are whole, and only those of the first rank are there.
    """
    trainer = trainer_of(case, directory, mesh, size)
    config, learner, policy = trainer.config, trainer.learner, trainer.policy
    parts = config.optimizer_steps_per_generation
    steps: list[dict[str, float]] = []
    logps: list[Tensor | None] = []
    start = weights(trainer)
    for generation in range(1, case.generations + 1):
        found = completions(case.kind, generation, len(policy.tokenizer), B * parts)
        learner.add_logps(found)
        logps += [found.old_logps, found.ref_logps]
        size_of_step = len(found) // parts
        batches = [
            found.select(range(i * size_of_step, (i + 1) * size_of_step)) for i in range(parts)
        ]
        for batch in batches * config.num_iterations:
            steps.append(learner.optimise(batch))
            if learner.reference is not None:
                learner.reference.sync(len(steps))
        logps += [batch.old_logps for batch in batches]
    options = StateDictOptions(
        full_state_dict=True, cpu_offload=True, flatten_optimizer_state_dict=True
    )
    moments = get_optimizer_state_dict(policy.model, learner.optimizer, options=options)
    return {
        "steps": steps,
        "logps": logps,
        "moved": {name: x - start[name] for name, x in weights(trainer).items()},
        "moments": {
            name: x.clone()
            for name, x in moments.items()
            if name.endswith(("exp_avg", "exp_avg_sq"))
        },
        "parts": [
            x.to_local() if hasattr(x, "to_local") else x
            for x in map(Tensor.detach, policy.model.parameters())
        ],
    }
