"""The script that counts what GPUs send each other, by hand; `test_traffic.py` has what they do.

L layers, H hidden, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import GPTNeoXJapaneseConfig, Qwen3Config

from benchmarks import communication
from benchmarks.communication import Step

L, H, V = 3, 8, 37  # 37 rows: pieces of 2, 4 and 8 are padded


def architecture(*, tie: bool) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=V, hidden_size=H, intermediate_size=12, num_hidden_layers=L,
        num_attention_heads=2, num_key_value_heads=1, head_dim=4, max_position_embeddings=64,
        tie_word_embeddings=tie, bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip


# q, o: 8 x 8; k, v: 4 x 8; gate, up: 12 x 8; down: 8 x 12; norms: 8, 8 and, of q and k, 4, 4.
LAYER = 2 * 64 + 2 * 32 + 3 * 96 + 2 * 8 + 2 * 4
UNTIED = 2 * V * H + H
ADAPTER_ROWS = (
    2 * (8 + 8) + 2 * (4 + 8) + 2 * (12 + 8) + (8 + 12)
)  # of all linear layers, at rank 1


def found(step: Step, *, tie: bool = False) -> dict[str, float]:
    """Return the bytes sent, by what."""
    groups = communication.parameter_groups(architecture(tie=tie), step)
    return {each.what: each.sent for each in communication.collectives(groups, step)}


def padded(rows: int, columns: int, pieces: int) -> int:
    return -(-rows // pieces) * pieces * columns


@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_a_sharded_model(tie: bool, bf16: bool) -> None:
    """Two pieces: of everything gathered or reduced each rank sends half."""
    root = (1 if tie else 2) * padded(V, H, 2) + H
    size = 2 if bf16 else 4
    assert found(Step(shard=2, micro_batches=3, bf16=bf16), tie=tie) == {
        "sampling: everything": (L * LAYER + root) * size / 2,
        "embeddings and head, once": root * size / 2,
        "layers, forward": 3 * L * LAYER * size / 2,
        "layers, backward": 3 * L * LAYER * size / 2,
        "gradients of layers": 3 * L * LAYER * 4 / 2,
        "gradients of embeddings and head, once": root * 4 / 2,
        "gradients between copies, once": 0,
    }


def test_copies_send_their_gradients_once() -> None:
    """DDP: of a ring of 4 each sends every gradient 2 * 3 / 4 times, whatever the passes."""
    sent = found(Step(data=4, micro_batches=3))
    assert sent.pop("gradients between copies, once") == 1.5 * 4 * (L * LAYER + UNTIED)
    assert set(sent.values()) == {0}


def test_copies_of_pieces() -> None:
    """HSDP: what is between copies is a piece; within a copy it is as without others."""
    sent = found(Step(data=3, shard=4, micro_batches=2))
    alone = found(Step(shard=4, micro_batches=2))
    everything = L * LAYER + 2 * padded(V, H, 4) + H
    between = sent.pop("gradients between copies, once")
    assert between == pytest.approx(2 * 2 / 3 * 4 * everything / 4, rel=1e-12)
    assert alone.pop("gradients between copies, once") == 0
    assert sent == alone


def test_only_gradients_of_adapters_move() -> None:
    """Frozen parameters are gathered all the same."""
    r = 4
    step = Step(data=2, shard=4, micro_batches=2, lora_r=r, beta=True)
    layer, root = LAYER + r * ADAPTER_ROWS, 2 * padded(V, H, 4) + H
    assert found(step) == {
        "sampling: everything": (L * layer + root) * 2 * 3 / 4,
        "log-probs of the reference": 2 * L * layer * 2 * 3 / 4,
        "embeddings and head, once": root * 2 * 3 / 4,
        "layers, forward": 2 * L * layer * 2 * 3 / 4,
        "layers, backward": 2 * L * layer * 2 * 3 / 4,
        "gradients of layers": 2 * L * r * ADAPTER_ROWS * 4 * 3 / 4,
        "gradients of embeddings and head, once": 0,
        "gradients between copies, once": L * r * ADAPTER_ROWS / 4 * 4 * 2 * 1 / 2,
    }


def test_what_each_rank_holds() -> None:
    step = Step(shard=2, beta=True)
    groups = communication.parameter_groups(architecture(tie=True), step)
    root = padded(V, H, 2) + H
    everything = L * LAYER + root
    assert communication.memory(groups, step) == {
        "parameters": everything * 4 // 2,
        "states of AdamW": everything * 8 // 2,
        "reference": everything * 4 // 2,
        "gradients": everything * 4 // 2,
        "layers at work, with gradient": 2 * 2 * LAYER + (2 + 4) * LAYER,
        "embeddings and head, with gradient": (2 + 4) * root,
        "together in training": everything * 20 // 2 + 10 * LAYER + 6 * root,
        "the whole model while sampling": everything * 2,
        "together while sampling": everything * 16 // 2 + everything * 2,
    }


def test_what_each_rank_holds_beside_adapters() -> None:
    """Frozen parameters are bf16, adapters fp32, and the reference is the model without them."""
    step = Step(shard=2, beta=True, lora_r=2)
    groups = communication.parameter_groups(architecture(tie=True), step)
    adapters, root = 2 * ADAPTER_ROWS, padded(V, H, 2) + H
    held = communication.memory(groups, step)
    assert "reference" not in held
    assert held["parameters"] == (2 * (L * LAYER + root) + 4 * L * adapters) // 2
    assert held["states of AdamW"] == 8 * L * adapters // 2
    assert held["gradients"] == 4 * L * adapters // 2
    assert held["layers at work, with gradient"] == 3 * 2 * (LAYER + adapters)
    assert held["embeddings and head, with gradient"] == 2 * root


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["./nowhere"], "./nowhere is not a model directory"),
        (["--data", "1", "2", "--shard", "1", "2", "4"], "--data has 2 values and --shard 3"),
        (["--shard", "0"], "shard must be at least 1, got 0"),
        (["--bandwidth", "300", "-1"], "must be above 0 and finite, got -1"),
    ],
)
def test_what_it_refuses(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    architecture(tie=True).save_pretrained(tmp_path)
    model = [str(tmp_path)] if arguments[0].startswith("--") else []
    with pytest.raises(SystemExit):
        communication.main(model + arguments)
    assert said in " ".join(capsys.readouterr().err.split())


def test_models_without_layers_are_refused() -> None:
    without = GPTNeoXJapaneseConfig(
        hidden_size=8, num_attention_heads=2, num_hidden_layers=2, vocab_size=V,
        bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    with pytest.raises(ValueError, match="GPTNeoXJapaneseForCausalLM has no layers to shard"):
        communication.parameter_groups(without, Step())


def test_what_it_prints_without_markdown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same numbers, from the file itself too; two copies by two pieces, with seconds."""
    architecture(tie=True).save_pretrained(tmp_path)
    arguments = [str(tmp_path / "config.json"), "--data", "2", "--shard", "2", "--fp32"]
    communication.main([*arguments, "--bandwidth", "1e-6", "5e-7"])
    said = capsys.readouterr().out
    everything = L * LAYER + padded(V, H, 2) + H
    within, between = 4 * (3 * everything + L * LAYER) / 2, 4 * everything / 2
    assert f"{everything - H:,} parameters" in said  # what is there, without padding
    assert communication.number(within / 1e3 + between / 5e2) in said
