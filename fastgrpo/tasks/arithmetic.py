"""The default task, made on the spot: two-digit addition for a model of 334 thousand weights.

`12+34=` is answered by the sum as three digits, the lowest first (`640` for 046), then the end of
the sequence: reversed, a digit depends only on its column and a carry, which a tiny model can
learn in seconds.

B examples in a batch, N examples in a split, T tokens of an example (prompt, answer, end),
A tokens of a completion (answer, end).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

CHARACTERS = "0123456789+="
EOS_TOKEN = "<eos>"
PAD_TOKEN = "<pad>"
ANSWER_DIGITS = 3
MAX_COMPLETION_LENGTH = ANSWER_DIGITS + 1  # the end of the sequence is a token too

VALIDATION_SIZE = 500
TEST_SIZE = 1000

_SPLIT_SEED = 0  # the splits stay the same whatever a run's seed is
_BATCH_SIZE = 64
_LEARNING_RATE = 2e-3
_WARMUP_STEPS = 30
_CHECK_EVERY = 20


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Make the character tokenizer: one token a character, no begin-of-sequence token.

    Returns:
        A tokenizer that saves and reloads like any other; a character outside its twelve is an
        error, never an unknown token.
    """
    vocabulary = {token: i for i, token in enumerate([*CHARACTERS, EOS_TOKEN, PAD_TOKEN])}
    # The stubs of tokenizers give a default to none of its arguments.
    backend: Any = Tokenizer(WordLevel(vocabulary))  # pyright: ignore[reportCallIssue]
    backend.pre_tokenizer = Split(Regex("."), "isolated")
    backend.decoder = Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=EOS_TOKEN,
        pad_token=PAD_TOKEN,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen3ForCausalLM:
    """Make an untrained Qwen3 policy of 334 thousand parameters with a tied head.

    Args:
        tokenizer: gives the vocabulary size and the special token ids.
        seed: of the initial weights; the global random state is left as it was.

    Returns:
        The model in fp32 on the CPU.
    """
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=24,
        max_position_embeddings=32,
        tie_word_embeddings=True,
        # About 1 / sqrt(hidden): with the usual 0.02, made for wide models, learning starts late.
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=tokenizer.vocab[EOS_TOKEN],
        pad_token_id=tokenizer.vocab[PAD_TOKEN],
    )
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would seed the GPUs as well, which the fork does not restore.
        torch.default_generator.manual_seed(seed)
        return Qwen3ForCausalLM(config)


def build_dataset() -> DatasetDict:
    """Make the 10,000 sums of two numbers below 100, in three disjoint splits.

    Returns:
        `train` (8,500), `validation` (500, for the gate of the warm start) and `test` (1,000, which
        nothing but the final accuracies may read), each with the columns `prompt` and `answer`.
    """
    from datasets import Dataset, DatasetDict

    pairs = [(a, b) for a in range(100) for b in range(100)]
    random.Random(_SPLIT_SEED).shuffle(pairs)
    rows = [
        {"prompt": f"{a:02d}+{b:02d}=", "answer": f"{a + b:0{ANSWER_DIGITS}d}"[::-1]}
        for a, b in pairs
    ]
    held_out = VALIDATION_SIZE + TEST_SIZE
    splits = {
        "train": rows[held_out:],
        "validation": rows[:VALIDATION_SIZE],
        "test": rows[VALIDATION_SIZE:held_out],
    }
    return DatasetDict({name: Dataset.from_list(some) for name, some in splits.items()})


def exact_match(completions: list[str], answer: list[str], **columns: Any) -> list[float]:
    """Reward 1 for the right answer and nothing else, else 0 (TRL's signature)."""
    return [float(text == right) for text, right in zip(completions, answer, strict=True)]


def three_digits(completions: list[str], **columns: Any) -> list[float]:
    """Reward 1 for exactly three digits, right or wrong, else 0 (TRL's signature)."""
    return [
        float(len(text) == ANSWER_DIGITS and text.isascii() and text.isdigit())
        for text in completions
    ]


def warm_start(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    dataset: Dataset,
    sampled_accuracy: Callable[[], float],
    *,
    gate: float,
    seed: int,
    max_steps: int = 2000,
    on_step: Callable[[int, float], None] | None = None,
) -> int:
    """Teach the model by example until it is right often enough for GRPO to take over.

    The gate is an accuracy, not a number of steps, because seeds differ by a factor of two in
    the steps they need.

    Args:
        model: trained in place.
        tokenizer: encodes the examples.
        dataset: the split to train on, with the columns `prompt` and `answer`.
        sampled_accuracy: measures the model on the validation split, between 0 and 1; called
            every 20 steps.
        gate: the accuracy at which to stop.
        seed: of the order of the examples; the global random state is not used.
        max_steps: give up after so many.
        on_step: called after each step with the number of steps done and their last loss.

    Returns:
        The number of steps taken.

    Raises:
        RuntimeError: the gate was not reached.
    """
    ids_NT = _encode(tokenizer, dataset).to(model.device)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0, betas=(0.9, 0.99))
    accuracy = 0.0
    for step in range(1, max_steps + 1):
        rows_B = torch.randint(len(ids_NT), (_BATCH_SIZE,), generator=generator)
        for group in optimizer.param_groups:
            group["lr"] = _LEARNING_RATE * min(1.0, step / _WARMUP_STEPS)
        model.train()
        loss = _completion_loss(model, ids_NT[rows_B.to(ids_NT.device)])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if on_step is not None:
            on_step(step, loss.item())
        if step % _CHECK_EVERY == 0:
            accuracy = sampled_accuracy()
            if accuracy >= gate:
                optimizer.zero_grad()
                return step
    raise RuntimeError(
        f"the warm start reached a sampled accuracy of {accuracy:.3f} in {max_steps} steps, below "
        f"its gate of {gate}: allow more steps, lower the gate or try another seed"
    )


def _encode(tokenizer: PreTrainedTokenizerFast, dataset: Dataset) -> torch.Tensor:
    """Return the ids (N, T) of prompt, answer and end; every example is equally long."""
    examples = [
        prompt + answer + EOS_TOKEN
        for prompt, answer in zip(dataset["prompt"], dataset["answer"], strict=True)
    ]
    return torch.tensor(tokenizer(examples)["input_ids"])


def _completion_loss(model: Qwen3ForCausalLM, ids_BT: torch.Tensor) -> torch.Tensor:
    """Return the mean cross-entropy of the completion tokens; a vocabulary of 14 fits anywhere."""
    logits_BAV = model(
        input_ids=ids_BT[:, :-1], logits_to_keep=MAX_COMPLETION_LENGTH, use_cache=False
    ).logits
    targets_BA = ids_BT[:, -MAX_COMPLETION_LENGTH:]
    return F.cross_entropy(logits_BAV.flatten(0, 1), targets_BA.flatten())
