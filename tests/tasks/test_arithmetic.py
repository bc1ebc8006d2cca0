"""The embedded task: its tokenizer, model, dataset, rewards and warm start.

B examples, T tokens.
"""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset, DatasetDict
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3ForCausalLM

from fastgrpo.tasks import arithmetic
from fastgrpo.tasks.arithmetic import (
    build_dataset,
    build_model,
    build_tokenizer,
    exact_match,
    three_digits,
    warm_start,
)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def dataset() -> DatasetDict:
    return build_dataset()


def test_encoding_is_one_token_a_character_and_decodes_to_the_same_text(tokenizer) -> None:
    assert tokenizer("12+34=640")["input_ids"] == [1, 2, 10, 3, 4, 11, 6, 4, 0]
    for text in ("12+34=", "0123456789+=", "640", ""):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer("640<eos>")["input_ids"] == [6, 4, 0, tokenizer.eos_token_id]
    assert tokenizer.decode([6, 4, 0, 12, 13], skip_special_tokens=True) == "640"
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == (
        "<eos>",
        "<pad>",
        None,
    )
    assert len(tokenizer) == 14


def test_unknown_characters_are_errors(tokenizer) -> None:
    with pytest.raises(Exception, match="UNK"):
        tokenizer("12-34=")


def test_prompts_are_padded_on_the_left(tokenizer) -> None:
    padded = tokenizer(["1+2=", "12+34="], padding=True)
    assert padded["input_ids"] == [[13, 13, 1, 10, 2, 11], [1, 2, 10, 3, 4, 11]]
    assert padded["attention_mask"] == [[0, 0, 1, 1, 1, 1], [1] * 6]


def test_a_saved_checkpoint_reloads_to_the_same_behaviour(tokenizer, tmp_path: Path) -> None:
    model = build_model(tokenizer, seed=3).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    texts = ["12+34=640<eos>", "1+2="]
    assert again(texts, padding=True).data == tokenizer(texts, padding=True).data
    assert again.decode([1, 2, 10, 12, 13]) == tokenizer.decode([1, 2, 10, 12, 13])
    assert again.decode([1, 2, 10, 12, 13], skip_special_tokens=True) == "12+"
    assert again.get_vocab() == tokenizer.get_vocab()
    assert (again.eos_token_id, again.pad_token_id, again.bos_token_id) == (12, 13, None)

    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids_BT = torch.tensor(tokenizer(["12+34=640", "99+99=891"])["input_ids"])
    with torch.no_grad():
        torch.testing.assert_close(reloaded(ids_BT).logits, model(ids_BT).logits, rtol=0, atol=0)
    assert isinstance(reloaded, Qwen3ForCausalLM)
    assert reloaded.generation_config.eos_token_id == 12
    assert reloaded.lm_head.weight is reloaded.model.embed_tokens.weight


def test_the_seed_decides_the_weights_and_the_global_state_is_left_alone(tokenizer) -> None:
    state = torch.get_rng_state()
    models = [build_model(tokenizer, seed) for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), state)
    first, same, other = (model.lm_head.weight for model in models)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert models[0].num_parameters() == 333_936


def test_splits_are_disjoint_whole_and_always_the_same(dataset: DatasetDict) -> None:
    assert {name: len(split) for name, split in dataset.items()} == {
        "train": 8500,
        "validation": 500,
        "test": 1000,
    }
    prompts = [prompt for split in dataset.values() for prompt in split["prompt"]]
    assert set(prompts) == {f"{a:02d}+{b:02d}=" for a in range(100) for b in range(100)}
    assert len(prompts) == 10_000
    torch.manual_seed(123)
    again = build_dataset()
    assert all(again[name].to_dict() == dataset[name].to_dict() for name in dataset)


def test_answers_are_the_reversed_sums(dataset: DatasetDict) -> None:
    for split in dataset.values():
        assert split.column_names == ["prompt", "answer"]
        for prompt, answer in zip(split["prompt"], split["answer"], strict=True):
            assert len(answer) == 3
            assert int(answer[::-1]) == int(prompt[:2]) + int(prompt[3:5])


def test_exact_match_rewards_the_answer_and_nothing_else() -> None:
    completions = ["640", "046", "6400", "64", "", " 640"]
    assert exact_match(completions, answer=["640"] * 6, prompts=["12+34="] * 6) == [
        1,
        0,
        0,
        0,
        0,
        0,
    ]
    with pytest.raises(ValueError, match="shorter"):
        exact_match(["640", "640"], answer=["640"])


def test_three_digits_rewards_the_form_alone() -> None:
    completions = ["640", "999", "64", "6400", "6+0", "", "²²²", "६४०"]
    assert three_digits(completions, answer=["640"] * 8) == [1, 1, 0, 0, 0, 0, 0, 0]


def test_the_warm_start_stops_at_the_gate_and_teaches(tokenizer, dataset: DatasetDict) -> None:
    model = build_model(tokenizer, seed=0)
    accuracies = iter([0.1, 0.27, 0.28, 1.0])
    losses: dict[int, float] = {}
    state = torch.get_rng_state()
    steps = warm_start(
        model,
        tokenizer,
        dataset["train"],
        lambda: next(accuracies),
        gate=0.28,
        seed=0,
        on_step=losses.__setitem__,
    )
    assert steps == 60
    assert next(accuracies) == 1.0
    assert list(losses) == list(range(1, 61))
    assert torch.equal(torch.get_rng_state(), state)
    # Guessing digits evenly and knowing the last, the end, costs 3/4 ln 10.
    guess = 0.75 * math.log(10)
    assert losses[1] > 1.2 * guess
    assert losses[60] < 0.9 * guess


def test_only_completion_tokens_are_learned(tokenizer) -> None:
    model = build_model(tokenizer, seed=0)
    examples = Dataset.from_dict({"prompt": ["12+34=", "99+99="], "answer": ["640", "891"]})
    ids_BT = arithmetic._encode(tokenizer, examples)
    assert ids_BT.tolist()[0] == [1, 2, 10, 3, 4, 11, 6, 4, 0, 12]
    loss = arithmetic._completion_loss(model, ids_BT)
    logps_BTV = model(ids_BT).logits.log_softmax(-1)
    logps_BT = logps_BTV[:, :-1].gather(2, ids_BT[:, 1:, None])[..., 0]
    torch.testing.assert_close(loss, -logps_BT[:, 5:].mean())
    assert abs(loss - F.cross_entropy(logps_BTV[:, :-1].mT, ids_BT[:, 1:])) > 0.01


def test_a_gate_that_is_not_reached_is_an_error(tokenizer, dataset: DatasetDict) -> None:
    model = build_model(tokenizer, seed=0)
    with pytest.raises(
        RuntimeError, match=r"accuracy of 0\.070 in 20 steps, below its gate of 0\.3"
    ):
        warm_start(model, tokenizer, dataset["train"], lambda: 0.07, gate=0.3, seed=0, max_steps=20)
