"""Reward models: their number is that of the model on the unpadded text, and what is refused."""

import math
from pathlib import Path

import pytest
import torch
from small_models import CHAT_TEMPLATE, save_small_model, small_tokenizer
from transformers import AutoModelForSequenceClassification, Qwen3Config

from fastgrpo.rewards import Judges, RewardError, RewardModel, reward_model_bytes

TEXTS = [("2+2=", "4"), ("What is 7 times 6? ", "It is 42, I think."), ("a", "")]
MESSAGES = [{"role": "user", "content": "2+2="}], [{"role": "assistant", "content": "4"}]


def save_reward_model(path: Path, num_labels: int = 1, **tokenizer_options) -> str:
    tokenizer = small_tokenizer()
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=256,
        initializer_range=0.3, pad_token_id=tokenizer.pad_token_id, num_labels=num_labels,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(3)
        AutoModelForSequenceClassification.from_config(config).save_pretrained(path)
    for name, value in tokenizer_options.items():
        setattr(tokenizer, name, value)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    return save_reward_model(tmp_path_factory.mktemp("hub") / "tiny-judge")


def alone(checkpoint: str, text: str) -> float:
    """Read one text without padding, and take the head's product with its last hidden state."""
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint)
    ids = torch.tensor([small_tokenizer()(text)["input_ids"]])
    with torch.no_grad():
        hidden = model.model(ids).last_hidden_state[0, -1]
        return float(model.score.weight[0] @ hidden)


def score(judges: Judges, pairs) -> list[float]:
    prompts, completions = map(list, zip(*pairs, strict=True))
    ids = [[1]] * len(prompts)
    scores = judges.score(prompts=prompts, completions=completions, completion_ids=ids, columns={})
    return scores.rewards_BK[:, 0].tolist()


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_scores_are_those_of_each_text_alone(checkpoint, batch_size):
    expected = [alone(checkpoint, prompt + completion) for prompt, completion in TEXTS]
    assert max(expected) - min(expected) > 0.1
    model = RewardModel(checkpoint, device="cpu", batch_size=batch_size)
    with Judges([model, "format"]) as judges:
        assert judges.names == ["tiny-judge", "format"]
        # Rounding in fp32 of sums that are about 1.
        assert score(judges, TEXTS) == pytest.approx(expected, abs=2e-5)
    assert not model.model.training
    assert model.model.dtype == torch.float32


def test_messages_are_read_with_the_models_own_template(tmp_path):
    own = save_reward_model(tmp_path / "judge", chat_template=CHAT_TEMPLATE + "{{ end }}")
    expected = alone(own, "[user]2+2=\n[assistant]4\n!")
    with Judges([own], chat_template_kwargs={"end": "!"}, batch_size=3) as judges:
        model = judges.functions[0]
        assert model.template_options == {"end": "!"} and model.batch_size == 3
    with Judges([RewardModel(own, device="cpu", chat_template_kwargs={"end": "!"})]) as judges:
        assert score(judges, [MESSAGES]) == pytest.approx([expected], abs=2e-5)


def test_a_module_is_taken_as_it_is(checkpoint):
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint).double().train()
    with Judges([model]) as judges:
        assert judges.names == ["tiny-judge"]
        expected = [alone(checkpoint, prompt + completion) for prompt, completion in TEXTS]
        assert score(judges, TEXTS) == pytest.approx(expected, abs=2e-5)
        assert model.dtype == torch.float64


def test_a_module_from_no_checkpoint_needs_its_tokenizer(checkpoint):
    config = AutoModelForSequenceClassification.from_pretrained(checkpoint).config
    config._name_or_path = ""
    model = AutoModelForSequenceClassification.from_config(config)
    with pytest.raises(
        ValueError, match=r"not loaded from a checkpoint.*give RewardModel\(model, tokenizer\)"
    ):
        Judges([model])
    with Judges([RewardModel(model, small_tokenizer())]) as judges:
        assert judges.names == ["Qwen3ForSequenceClassification"]
        assert all(map(math.isfinite, score(judges, TEXTS)))


def test_the_end_token_pads_where_there_is_no_padding_token(tmp_path):
    path = save_reward_model(tmp_path / "judge", pad_token=None)
    expected = [alone(path, prompt + completion) for prompt, completion in TEXTS]
    with Judges([RewardModel(path, device="cpu")]) as judges:
        assert score(judges, TEXTS) == pytest.approx(expected, abs=2e-5)
    path = save_reward_model(tmp_path / "other", pad_token=None, eos_token=None)
    with pytest.raises(ValueError, match=r"'other': .*neither a padding nor an end token"):
        Judges([path])


def test_what_is_no_reward_model_is_refused(tmp_path):
    language_model = save_small_model(tmp_path / "policy")
    with pytest.raises(ValueError, match="is a Qwen3ForCausalLM, which has no classification head"):
        Judges([language_model])
    with pytest.raises(ValueError, match="has 3 labels; a reward model has 1"):
        Judges([save_reward_model(tmp_path / "three", num_labels=3)])
    with pytest.raises(ValueError, match=r"there is no .*empty/config.json"):
        (tmp_path / "empty").mkdir()
        Judges([str(tmp_path / "empty")])
    with pytest.raises(ValueError, match=r"there is no .*nowhere/config.json"):
        Judges(["./nowhere"])


def test_a_checkpoint_without_its_head_is_refused(tmp_path):
    path = save_reward_model(tmp_path / "headless")
    model = AutoModelForSequenceClassification.from_pretrained(path)
    model.save_pretrained(path, state_dict=model.model.state_dict(prefix="model."))
    with pytest.raises(ValueError, match=r"checkpoint has no score.weight; those would be random"):
        Judges([path])


def test_what_the_model_cannot_read_is_an_error_of_that_function(checkpoint, tmp_path):
    with Judges([checkpoint], reward_errors="none") as judges:
        assert math.isnan(score(judges, [("a" * 200, "b" * 57)])[0])
        assert not math.isnan(score(judges, [("a" * 200, "b" * 56)])[0])
    plain = save_reward_model(tmp_path / "plain", chat_template=None)
    with (
        Judges([plain]) as judges,
        pytest.raises(RewardError, match="'plain' has no chat template, and the prompts are mess"),
    ):
        score(judges, [MESSAGES])


def test_bytes_are_known_from_the_configuration_alone(checkpoint, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint)
    sizes = [x.numel() for x in (*model.parameters(), *model.buffers())]
    (tmp_path / "config.json").write_text((Path(checkpoint) / "config.json").read_text())
    assert reward_model_bytes(["accuracy", str(tmp_path)], on_gpu=False) == 4 * sum(sizes)
    in_fp32 = 4 * sum(x.numel() for x in model.buffers())  # of the rotary embedding
    weights = 2 * sum(x.numel() for x in model.parameters())
    assert reward_model_bytes(["accuracy_reward", "a.b.c", "./mine.py:f"], on_gpu=True) == 0
    assert reward_model_bytes([str(tmp_path), "mine.py:f"], on_gpu=True) == weights + in_fp32


@pytest.mark.gpu
def test_on_a_gpu_weights_are_bf16(checkpoint):
    expected = [alone(checkpoint, prompt + completion) for prompt, completion in TEXTS]
    with Judges([checkpoint]) as judges:
        assert judges.functions[0].model.dtype == torch.bfloat16
        assert judges.functions[0].model.device.type == "cuda"
        found = torch.tensor(score(judges, TEXTS))
    # Eight bits of mantissa over two layers.
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0.05, atol=0.05)
