"""What trainers are measured on: models, prompts and rewards, made on the spot from fixed seeds.

P prompts, G completions a prompt, B = P * G completions of T tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_QWEN = {
    "vocab_size": 151_936, "num_key_value_heads": 2, "rope_theta": 1e6, "rms_norm_eps": 1e-6,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    # The policy of fastgrpo.tasks.arithmetic: a step is nearly all overhead.
    "demo": (
        "Qwen3",
        {
            "vocab_size": 14, "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 24,
        },
    ),
    # Completions long enough that sampling and training weigh about the same.
    "toy": (
        "Qwen3",
        {
            "vocab_size": 100, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        },
    ),
    # As large as a CPU can take. Half of the weights are the head's, of Qwen2.5-0.5B a quarter.
    "small": (
        "Qwen2",
        {
            "vocab_size": 32_000, "hidden_size": 256, "intermediate_size": 1408,
            "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2,
        },
    ),
    "Qwen2.5-0.5B": (
        "Qwen2",
        _QWEN
        | {
            "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
            "num_attention_heads": 14,
        },
    ),
    "Qwen2.5-1.5B": (
        "Qwen2",
        _QWEN
        | {
            "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
            "num_attention_heads": 12,
        },
    ),
}  # fmt: skip
POSITIONS = 2**17
PAD, EOS = "<pad>", "<eos>"


@dataclass(frozen=True)
class TrainerCell:
    """One measurement, the same for both trainers."""

    model: str
    prompts: int  # P, of an optimisation step
    num_generations: int  # G
    completion_length: int  # T
    prompt_length: int  # of the longest prompt; the shortest has half of it
    micro_batch: int  # completions in a forward and backward pass
    rho: float = 1.0  # share of groups with an advantage other than 0
    dtype: str = "float32"  # bfloat16: products under autocast, parameters stay in float32
    gradient_checkpointing: bool = False
    steps: int = 3  # that are timed
    threads: int | None = None  # of PyTorch on a CPU; None: its default

    @property
    def completions(self) -> int:
        return self.prompts * self.num_generations

    @property
    def N(self) -> int:
        return self.completions * self.completion_length

    @property
    def V(self) -> int:
        return MODELS[self.model][1]["vocab_size"]

    def facts(self) -> dict[str, Any]:
        """Return what identifies the cell in a record."""
        H = MODELS[self.model][1]["hidden_size"]
        return {"N": self.N, "H": H, "V": self.V, "frozen": False, **asdict(self)}


@dataclass(frozen=True)
class Task:
    """What a trainer is given."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    dataset: Dataset


def make_task(cell: TrainerCell, device: str) -> Task:
    """Make the model, the tokenizer and the prompts of a cell, the same in every process.

    The dataset holds the prompts of one step, so that every step has all of them, in whatever
    order, and exactly the share of degenerate groups that was asked for.
    """
    import transformers
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    # A token is the number that is its id. The end of the sequence has an id of its own, the first
    # that the head has no row for: both trainers look for it, and no completion can end early.
    words = {PAD: 0} | {str(i): i for i in range(1, cell.V)} | {EOS: cell.V}
    backend: Any = Tokenizer(WordLevel(words))  # pyright: ignore[reportCallIssue]
    backend.pre_tokenizer = WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=EOS, pad_token=PAD, padding_side="left"
    )
    family, shape = MODELS[cell.model]
    config = getattr(transformers, f"{family}Config")(
        **shape,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = getattr(transformers, f"{family}ForCausalLM")(config)
    rng = random.Random(0)
    lengths = [
        rng.randint(cell.prompt_length // 2, cell.prompt_length) for _ in range(cell.prompts)
    ]
    prompts = [" ".join(str(rng.randrange(1, cell.V)) for _ in range(n)) for n in lengths]
    judged = [p < round(cell.prompts * cell.rho) for p in range(cell.prompts)]
    return Task(model, tokenizer, Dataset.from_dict({"prompt": prompts, "judged": judged}))


def mean_id(completion_ids: list[list[int]], judged: list[bool], **columns: Any) -> list[float]:
    """Reward the mean id of a completion's tokens; where a prompt is not judged, 1 for all."""
    return [
        sum(ids) / len(ids) if counts else 1.0
        for ids, counts in zip(completion_ids, judged, strict=True)
    ]


def given_completions(prompt_ids: list[int], cell: TrainerCell, length: int) -> list[list[int]]:
    """Return the completions of a prompt that are given instead of sampled, in every process."""
    rng = random.Random(repr(prompt_ids))
    return [[rng.randrange(cell.V) for _ in range(length)] for _ in range(cell.num_generations)]


def quick_cells() -> list[TrainerCell]:
    """Return a miniature for a CPU: do both trainers run, and does the harness work?"""
    return [TrainerCell("demo", 4, 4, 6, 8, 8, rho, threads=1) for rho in (1.0, 0.5)]


def cpu_cells() -> list[TrainerCell]:
    """Return the demo as it is configured, longer ones, and a head that weighs as a real one's."""
    return [
        TrainerCell("demo", 32, 8, 4, 6, 256, steps=20, threads=1),
        *(TrainerCell("toy", 32, 8, 32, 8, 256, rho, steps=10, threads=1) for rho in (1.0, 0.5)),
        *(TrainerCell("small", 2, 8, 32, 16, 8, rho) for rho in (1.0, 0.5)),
    ]


def gpu_cells() -> list[TrainerCell]:
    """Return a step of 64 completions of 512 tokens of the two small Qwen2.5."""
    return [_qwen(name, 8, 512, rho) for name in MODELS if "Qwen" in name for rho in (1.0, 0.5)]


def memory_cell(length: int) -> TrainerCell:
    """Return one group in one pass; the optimizer of anything larger would not fit in 24 GB."""
    return _qwen("Qwen2.5-0.5B", 1, length, 1.0)


def _qwen(name: str, prompts: int, length: int, rho: float) -> TrainerCell:
    return TrainerCell(
        name, prompts, 8, length, 128, 8, rho,
        dtype="bfloat16", gradient_checkpointing=True,
    )  # fmt: skip
