"""A tool in the middle of completions: read by the model, and no gradient from what it says."""

import json
import re
import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from small_models import small_model, small_tokenizer
from small_runs import lines

from fastgrpo.batch import make_batch
from fastgrpo.config import load_config
from fastgrpo.data import encode_prompt
from fastgrpo.loss import batch_loss
from fastgrpo.model import Policy
from fastgrpo.rollout import SamplingParams
from fastgrpo.rollout.static import StaticCacheRollout
from fastgrpo.rollout_fn import Engine, play
from fastgrpo.trainer import Trainer
from fastgrpo_kernels import GRPOLossConfig

CALCULATOR = Path("benchmarks/examples/calculator.py")
EXAMPLE = runpy.run_path(str(CALCULATOR))
TOKENIZER = small_tokenizer()
PROMPT, WITH_TOOL = "12+30?", "<<12+30=42>>So 42"
TEMPERATURE = 0.9


def of_the_tool(text):
    """Return where in a completion the calculator speaks, a character a token."""
    return [i for call in re.finditer(r"<<[^<>=]*=([^>]*>>)", text) for i in range(*call.span(1))]


@pytest.fixture(scope="module")
def taught():
    """A model that calls the calculator in half of its answers and guesses in the others."""
    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.99))
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        guesses = torch.randint(10, 100, (6,), generator=generator).tolist()
        texts = [WITH_TOOL] * 6 + [f"So {guess}" for guess in guesses]
        rows = TOKENIZER([f"{PROMPT}{text}<eos>" for text in texts])["input_ids"]
        ids = torch.nn.utils.rnn.pad_sequence(list(map(torch.tensor, rows)), batch_first=True)
        own = ids != TOKENIZER.pad_token_id
        own[:, : len(PROMPT)] = False
        own[:6, [len(PROMPT) + i for i in of_the_tool(WITH_TOOL)]] = False
        logits = model(ids[:, :-1]).logits
        F.cross_entropy(logits[own[:, 1:]], ids[:, 1:][own[:, 1:]]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def engine(model, temperature=TEMPERATURE, length=24):
    policy = Policy(model, TOKENIZER, bf16=False)
    rollout = StaticCacheRollout(
        model, eos_token_ids=policy.eos_token_ids, pad_token_id=policy.pad_token_id
    )
    sampling = SamplingParams(max_completion_length=length, temperature=temperature)
    return policy, Engine(
        rollout, policy, sampling, [0], encode=lambda text: encode_prompt(text, TOKENIZER)
    )


def text_of(drawn):
    return TOKENIZER.decode(drawn.completion_ids, skip_special_tokens=True)


def greedily(model, drawn):
    """Return the likeliest token after each, that of the tool where it has spoken."""
    ids = torch.tensor([drawn.prompt_ids + drawn.completion_ids])
    with torch.no_grad():
        likeliest = model(ids).logits[0].argmax(-1)[len(drawn.prompt_ids) - 1 : -1].tolist()
    tool = of_the_tool(text_of(drawn))
    return [
        t if i in tool else best
        for i, (t, best) in enumerate(zip(drawn.completion_ids, likeliest, strict=True))
    ]


@pytest.mark.parametrize(
    "expression, value",
    [
        ("12+30", "42"),
        (" 48/2 ", "24"),
        ("-3*(2.5-1)", "-4.5"),
        ("1/3", "0.333333333333"),
        ("0.1+0.2", "0.3"),
        ("1/0", "error"),
        ("", "error"),
        ("2**9", "error"),
        ("().__class__", "error"),
        ("'a'*3", "error"),
        ("1e999*1", "inf"),
    ],
)
def test_the_calculator(expression, value):
    assert EXAMPLE["calculate"](expression) == value


def test_results_stand_where_the_model_called(taught):
    _, one = engine(taught)
    drawn, others = play(EXAMPLE["rollout"], [PROMPT] * 32, {}, one)
    texts = list(map(text_of, drawn))
    called = [text.startswith("<<12+30=42>>") for text in texts]
    assert 8 <= sum(called) <= 24
    assert others == {"calls": [text.count(">>") for text in texts]}
    for i, x in enumerate(drawn):
        expected = [t not in of_the_tool(texts[i]) for t in range(len(x.completion_ids))]
        assert (x.counted or [True] * len(expected)) == expected
        assert x.finished == (x.completion_ids[-1] == TOKENIZER.eos_token_id)
        with torch.no_grad():
            logits = taught(torch.tensor([x.prompt_ids + x.completion_ids])).logits[0]
        logps = (logits[len(x.prompt_ids) - 1 : -1] / TEMPERATURE).log_softmax(-1)
        logps = logps.gather(-1, torch.tensor(x.completion_ids)[:, None])[:, 0]
        # A later turn reads what an earlier one has decoded: other products of the same numbers.
        expected_logps = torch.where(torch.tensor(expected), logps, 0.0)
        torch.testing.assert_close(x.logps, expected_logps, atol=5e-5, rtol=1e-5)


def test_evaluation_calls_too_and_no_room_is_no_result(taught):
    _, greedy = engine(taught, temperature=0.0)
    (first, second), _ = play(EXAMPLE["rollout"], [PROMPT] * 2, {}, greedy)
    assert text_of(first) == text_of(second)
    assert first.completion_ids == greedily(taught, first)
    for length in range(1, 20):
        _, one = engine(taught, length=length)
        for x in play(EXAMPLE["rollout"], [PROMPT] * 8, {}, one)[0]:
            text = text_of(x)
            assert len(x.completion_ids) <= length
            assert len(x.completion_ids) == length or x.finished or text.endswith("=")
            # A result is there as a whole, with room for a word of the model's, or not at all.
            assert x.counted is None or x.counted[-1]
            assert not re.search(r"<<[^<>=]*=[^>]+>?$", text)


def played(model):
    """Return completions with tool tokens in some, advantages, and their batch."""
    policy, one = engine(model)
    drawn, _ = play(EXAMPLE["rollout"], [PROMPT] * 24, {}, one)
    advantages = torch.linspace(-1.0, 1.5, 24)
    batch = make_batch(
        [x.prompt_ids for x in drawn],
        [x.completion_ids for x in drawn],
        [x.logps for x in drawn],
        advantages,
        [x.counted for x in drawn],
        device="cpu",
    )
    return policy, drawn, advantages, batch


def gradients(policy, batch, beta=0.0):
    config = GRPOLossConfig(loss_type="dapo", temperature=TEMPERATURE, beta=beta)
    policy.model.zero_grad()
    with policy.packing():
        output = batch_loss(policy, batch, config, batch)
        output.loss.backward()
    found = {name: p.grad.clone() for name, p in policy.model.named_parameters()}
    return output.loss.detach(), found


def test_tool_tokens_are_masked_and_nothing_said_of_them_is_used(taught):
    policy, drawn, _, batch = played(taught)
    begin, tool = 0, torch.zeros(len(batch.input_ids), dtype=torch.bool)
    for x in drawn:
        first = begin + len(x.prompt_ids) - 1  # predicts the first token of the completion
        for t in of_the_tool(text_of(x)):
            tool[first + t] = True
        own = batch.mask[begin : begin + len(x.prompt_ids) + len(x.completion_ids)].nonzero()
        counted = x.counted or [True] * len(x.completion_ids)
        assert own[:, 0].tolist() == [
            len(x.prompt_ids) - 1 + t for t, is_own in enumerate(counted) if is_own
        ]
        begin += len(x.prompt_ids) + len(x.completion_ids)
    assert tool.sum() >= 20
    assert not batch.mask[tool].any()

    batch = replace(
        batch, old_logps=batch.sampling_logps + 0.1, ref_logps=batch.sampling_logps - 0.2
    )
    loss, expected = gradients(policy, batch, beta=0.1)
    assert loss != 0
    for value in (1e3, float("nan")):
        changed = {
            name: getattr(batch, name).masked_fill(tool, value)
            for name in ("advantages", "sampling_logps", "old_logps", "ref_logps")
        }
        other, found = gradients(policy, replace(batch, **changed), beta=0.1)
        assert torch.equal(other, loss)
        for name, gradient in found.items():
            assert torch.equal(gradient, expected[name]), name


def plain_gradients(model, sequences):
    """Return loss and gradients by autograd through the logits of each sequence alone.

    On-policy the ratio is 1, so a token's gradient is that of its log-prob times its advantage.
    """
    model.zero_grad()
    total, count = 0.0, sum(sum(own) for *_, own, _ in sequences)
    for prompt, completion, own, advantage in sequences:
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        logps = (logits / TEMPERATURE).log_softmax(-1)
        logps = logps.gather(-1, torch.tensor(completion)[:, None])[:, 0]
        ratio = (logps - logps.detach()).exp()
        loss = -(ratio * advantage)[torch.tensor(own)].sum() / count
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same_gradients(found, expected):
    """Compare in fp32: sums of the same products in another order."""
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        scale = expected[name].abs().max().item()
        torch.testing.assert_close(gradient, expected[name], atol=1e-5 * scale, rtol=1e-4)


def test_gradients_are_those_of_the_models_own_tokens_behind_the_tools(taught):
    policy, drawn, advantages, batch = played(taught)
    loss, found = gradients(policy, batch)
    sequences = []
    for x, advantage in zip(drawn, advantages.tolist(), strict=True):
        tool = of_the_tool(text_of(x))
        own = [t not in tool for t in range(len(x.completion_ids))]
        sequences.append((x.prompt_ids, x.completion_ids, own, advantage))
    expected_loss, expected = plain_gradients(taught, sequences)
    assert loss.item() == pytest.approx(expected_loss, abs=1e-6)
    assert_same_gradients(found, expected)

    # The comparison would tell: with tool tokens in the sum the gradients are others.
    everything = [(p, c, [True] * len(c), a) for p, c, _, a in sequences]
    _, wrong = plain_gradients(taught, everything)
    name = "model.embed_tokens.weight"
    assert (found[name] - wrong[name]).abs().max() > 0.05 * expected[name].abs().max()


def test_the_model_reads_what_the_tool_says(taught):
    ids = TOKENIZER([PROMPT + WITH_TOOL, PROMPT + WITH_TOOL.replace("=42>", "=97>")])["input_ids"]
    with torch.no_grad():
        logps = taught(torch.tensor(ids)).logits.log_softmax(-1)
    first = len(PROMPT) + WITH_TOOL.index("42")
    assert torch.equal(logps[0, :first], logps[1, :first])
    after = (logps[0, first:] - logps[1, first:]).abs().amax(-1)
    assert after.min() > 1e-3


def test_a_run_from_a_file_learns_to_call(taught, tmp_path):
    model = taught.__class__(taught.config)
    model.load_state_dict(taught.state_dict())
    model.save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    rows = [json.dumps({"prompt": PROMPT, "answer": "42"}) + "\n" for _ in range(8)]
    (tmp_path / "sums.jsonl").write_text("".join(rows))
    (tmp_path / "judge.py").write_text(
        "def right(completions, answer, **columns):\n"
        "    assert len(columns['calls']) == len(completions)\n"
        "    return [float(f'={a}>>' in text) for text, a in zip(completions, answer)]\n"
    )
    (tmp_path / "run.yaml").write_text(
        f"""
        model_name_or_path: {tmp_path}/model
        dataset_name: {tmp_path}/sums.jsonl
        output_dir: {tmp_path}/run
        reward_funcs: ["{tmp_path}/judge.py:right"]
        rollout_fn: {CALCULATOR}:rollout
        num_generations: 8
        per_device_train_batch_size: 32
        max_completion_length: 24
        temperature: {TEMPERATURE}
        learning_rate: 3e-3
        lr_scheduler_type: constant
        loss_type: dapo
        max_grad_norm: 0
        max_steps: 4
        logging_steps: 1
        num_completions_to_log: 32
        cpu_threads: 1
        bf16: false
        save_strategy: "no"
        """
    )
    trainer = Trainer(load_config(tmp_path / "run.yaml"))
    steps = []

    def keep_gradients(*_):
        named = trainer.policy.model.named_parameters()
        steps.append({name: p.grad.cpu() for name, p in named})

    trainer.learner.optimizer.register_step_pre_hook(keep_gradients)
    trainer.train()

    metrics = lines(tmp_path / "run" / "metrics.jsonl")
    rewards = [line["rewards/right/mean"] for line in metrics]
    assert 0.2 < rewards[0] < 0.6
    assert sum(rewards[1:]) / 3 > 0.8
    completions = lines(tmp_path / "run" / "completions.jsonl")
    for line in completions:
        assert line["extra"] == {"calls": line["completion"].count(">>")}
    assert_same_gradients(steps[0], first_step(taught, completions))


def first_step(model, completions):
    """Return the gradients of a run's first step from the completions it has logged."""
    sequences = []
    for line in [line for line in completions if line["step"] == 1]:
        text = line["completion"]
        ids = TOKENIZER(text + ("<eos>" if line["finished"] else ""))["input_ids"]
        own = [t not in of_the_tool(text) for t in range(len(ids))]
        sequences.append((TOKENIZER(PROMPT)["input_ids"], ids, own, line["advantage"]))
    return plain_gradients(model, sequences)[1]
