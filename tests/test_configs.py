"""Every configuration in configs/ fits the card of its name, as its comment says, and runs."""

import json
import re
from pathlib import Path

import pytest
import torch
from four_bits import wide_model
from small_models import CHAT_TEMPLATE, small_model
from small_runs import lines
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from fastgrpo.config import load_config
from fastgrpo.memory import Planner
from fastgrpo.memory.plan import GIB
from fastgrpo.memory.report import planned_device
from fastgrpo.trainer import Trainer

CONFIGS = Path("configs")
MODELS = Path(__file__).parent / "model_configs"
PARAMETERS = {  # as the model cards count them
    "Qwen2.5-0.5B-Instruct": 494_032_768,
    "Qwen2.5-1.5B-Instruct": 1_543_714_304,
    "Qwen2.5-7B-Instruct": 7_615_616_512,
}


def each_config(*fast):
    """Parametrize a test by all configurations for a card; those not named here are slow."""
    names = sorted(path.stem for path in CONFIGS.glob("*gb.yaml"))
    marks = {name: [] if name in fast else [pytest.mark.slow] for name in names}
    return pytest.mark.parametrize("name", [pytest.param(x, marks=marks[x]) for x in names])


@each_config("gsm8k_qwen2.5_0.5b_24gb")
def test_it_fits_its_card_as_its_comment_says(name):
    """Plan it by the command in its comment, and with the vLLM that another comment proposes."""
    text = (CONFIGS / f"{name}.yaml").read_text()
    command = r"#  fastgrpo plan (\S+) --gpu-memory (\S+) --prompt-length (\d+)\n"
    path, gpu_memory, prompt_length = re.search(command, text).groups()
    assert path == f"configs/{name}.yaml"
    config = load_config(path)
    model = Path(config.model_name_or_path).name
    architecture = AutoConfig.from_pretrained(MODELS / model)
    planner = Planner(architecture, planned_device(gpu_memory), int(prompt_length))
    plan = planner.plan(config)
    assert plan.fits
    adapters = plan.num_trainable if config.use_peft else 0
    assert plan.num_parameters == PARAMETERS[model] + adapters
    vllm = re.findall(r"^# (use_vllm|vllm_\w+): (\S+)$", text, re.MULTILINE)
    assert bool(vllm) != config.load_in_4bit  # which vLLM cannot take
    assert planner.plan(load_config(path, map("=".join, vllm))).fits
    said = f"GPU yet: {plan.peak / GIB:.2f} GiB in {plan.peak_phase}, the largest phase,"
    assert f"# Planned, not measured on a {said} according to\n" in text
    # Log-probs hold a chunk of logits, 256 MiB, and 32 bytes a token, but no gradient of the head.
    logps = plan.phases.get("log-probs", {})
    assert logps.get("loss", 0) <= 2**28 + 32 * plan.microbatch_tokens
    # A card has what its name says but for a share that it keeps for error correction.
    nominal = int(re.fullmatch(r".*_(\d+)gb", name)[1]) * GIB
    assert 0.9 * nominal < plan.device.total_memory < nominal


ROWS = {
    "openai/gsm8k": lambda n: {
        "question": f"What is {n} times 0, and then {n % 8} more?",
        "answer": f"First 0.\n#### {n % 8}",
    },
    "nlile/hendrycks-MATH-benchmark": lambda n: {
        "problem": f"Find ${n}x$ for $x = 0$, plus {n % 8}.",
        "solution": f"It is \\boxed{{{n % 8}}}.",
        "answer": str(n % 8),
        "subject": "Algebra",
        "level": 1,
        "unique_id": f"train/{n}.json",
    },
    "open-r1/DAPO-Math-17k-Processed": lambda n: {
        "prompt": f"Find {n} times 0, plus {n % 8}.",
        "solution": str(n % 8),
        "data_source": "math_dapo",
        "source_prompt": [{"content": f"Solve: {n}", "role": "user"}],
        "ability": "MATH",
        "reward_model": {"ground_truth": str(n % 8), "style": "rule"},
        "extra_info": {"index": str(n)},
    },
}
"""What a row of each dataset on the Hub has, by its columns and their types."""


def stand_in(dataset, folder):
    """Write a dataset of the same splits and columns."""
    folder.mkdir()
    for split, count in (("train", 288), ("test", 4)):
        rows = (json.dumps(ROWS[dataset](n)) + "\n" for n in range(count))
        (folder / f"{split}.jsonl").write_text("".join(rows))
    return str(folder)


def save_guesser(folder, *, wide):
    """Save a random model whose tokens are digits and tags: by chance it is right now and then."""
    tokens = ["<pad>", "<eos>", "?", *"01234567", "<think>", "</think>", "<answer>", "</answer>"]
    backend = Tokenizer(WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="?"))
    backend.pre_tokenizer = Split(Regex(r"</?\w+>|[\s\S]"), "isolated")
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="?",
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
    config = (wide_model() if wide else small_model("qwen2")).config
    config.vocab_size = len(tokens)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)


@each_config("dapo17k_qwen2.5_7b_dapo_141gb")
def test_it_runs_on_a_small_model_and_data_of_the_same_columns(tmp_path, name):
    """All its options together, but for sizes; bitsandbytes has 4 and 8 bits on a CPU too."""
    path = CONFIGS / f"{name}.yaml"
    named = load_config(path)
    overrides = [
        f"model_name_or_path={save_guesser(tmp_path / 'model', wide=named.load_in_4bit)}",
        f"dataset_name={stand_in(named.dataset_name, tmp_path / 'data')}",
        "dataset_config=null",
        f"output_dir={tmp_path / 'run'}",
        f"per_device_train_batch_size={4 * named.num_generations}",
        "max_completion_length=12",
        "max_tokens_per_microbatch=512",
        "max_eval_samples=4",
        "max_steps=2",
        "eval_steps=1",
        "save_steps=1",
        "warmup_steps=0",
    ]
    if named.soft_punish_cache:
        overrides.append("soft_punish_cache=6")
    config = load_config(path, overrides)
    summary = Trainer(config).train()
    assert summary["test"]["greedy"]["before"] <= 1
    metrics = lines(tmp_path / "run" / "metrics.jsonl")
    assert len(metrics) == 2
    for step in metrics:
        assert step["grad_norm"] > 0
        weights = config.reward_weights or [1.0]
        means = [step[f"rewards/{reward}/mean"] for reward in config.reward_funcs]
        expected = sum(weight * mean for weight, mean in zip(weights, means, strict=True))
        assert step["reward"] == pytest.approx(expected, abs=1e-6)
    saved = sorted(x.name for x in (tmp_path / "run" / "checkpoints").iterdir())
    assert saved[-1] == "step-2" and len(saved) <= config.save_total_limit
