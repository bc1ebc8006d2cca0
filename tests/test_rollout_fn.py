"""The hook: what its function is given, and what is said of what it returns."""

import math
from dataclasses import replace

import pytest
import torch
from small_models import small_model, small_tokenizer

from fastgrpo.data import encode_prompt
from fastgrpo.model import Policy
from fastgrpo.prompt_order import hashed_seed
from fastgrpo.rollout import SamplingParams
from fastgrpo.rollout.static import StaticCacheRollout
from fastgrpo.rollout_fn import Engine, RolloutError, load_rollout_fn, play, taken_columns

POLICY = Policy(small_model(), small_tokenizer(), bf16=False)
TOKENIZER = POLICY.tokenizer
PROMPTS = ["one", "one", "one", "one", "three?", "three?"]
SAMPLING = SamplingParams(max_completion_length=8, temperature=0.9)


def rollout_of(policy):
    return StaticCacheRollout(
        policy.model, eos_token_ids=policy.eos_token_ids, pad_token_id=policy.pad_token_id
    )


def engine(sampling=SAMPLING, seeds=(0, 0)):
    rollout = rollout_of(POLICY)
    encode = lambda prompt: encode_prompt(prompt, TOKENIZER, system_prompt="Count.")  # noqa: E731
    return Engine(rollout, POLICY, sampling, seeds, encode=encode)


def plain(prompts, engine, **columns):
    """Do what the engine does by itself."""
    drawn = engine.generate([engine.encode(prompt) for prompt in prompts])
    return {
        "prompt_ids": [one.prompt_ids for one in drawn],
        "completion_ids": [one.completion_ids for one in drawn],
        "logprobs": [one.logps.tolist() for one in drawn],
    }


def test_a_function_that_only_samples_makes_what_the_engine_makes():
    prompt_ids = [encode_prompt(prompt, TOKENIZER, system_prompt="Count.") for prompt in PROMPTS]
    generator = torch.Generator().manual_seed(hashed_seed("rollout_fn", 0, 0))
    seeds = torch.randint(2**62, (3,), generator=generator).tolist()
    completions = rollout_of(POLICY).generate(prompt_ids[::2], 2, SAMPLING, seeds)
    expected = completions.drawn(prompt_ids[::2], 2)
    for returns in (lambda rows: rows, lambda rows: [torch.tensor(row) for row in rows]):

        def rollout(prompts, engine, returns=returns):
            return {key: returns(rows) for key, rows in plain(prompts, engine).items()}

        drawn, others = play(rollout, PROMPTS, {"answer": [1] * 6}, engine())
        assert others == {}
        for one, other in zip(drawn, expected, strict=True):
            assert torch.equal(one.logps, other.logps)
            assert one.logps.dtype == torch.float32
            assert replace(one, logps=other.logps) == replace(other, prompt_ids=one.prompt_ids)
            assert one.prompt_ids == other.prompt_ids
    assert len({tuple(one.completion_ids) for one in drawn}) == 6
    assert drawn[0].prompt_ids == TOKENIZER("[system]Count.\n[user]one\n[assistant]")["input_ids"]


def test_seeds_fix_what_is_sampled_call_by_call_and_zero_is_greedy():
    each, state = [], torch.get_rng_state()
    for seeds in ([3, 5], [3, 5], [3, 6], [35]):
        one = engine(seeds=seeds)
        turns = [play(plain, PROMPTS, {}, one)[0] for _ in range(2)]
        each.append([[x.completion_ids for x in drawn] for drawn in turns])
    assert torch.equal(torch.get_rng_state(), state)
    assert each[0] == each[1]
    assert len({str(turn) for turns in each[1:] for turn in turns}) == 6
    greedy, _ = play(plain, PROMPTS, {}, engine(replace(SAMPLING, temperature=0.0)))
    for one in greedy:
        with torch.no_grad():
            logits = POLICY.model(torch.tensor([one.prompt_ids + one.completion_ids])).logits[0]
        expected = logits.argmax(-1)[len(one.prompt_ids) - 1 : -1].tolist()
        assert one.completion_ids == expected


def test_prompts_that_are_equal_are_read_once_and_others_as_they_are():
    fed, ids = [], TOKENIZER(PROMPTS)["input_ids"]
    hook = POLICY.model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: fed.append(tuple(args[0].shape))
    )
    one = engine()
    assert [len(x.completion_ids) for x in one.generate(ids, max_completion_length=2)] == [2] * 6
    one.generate([ids[0]] * 5 + [ids[4]], max_completion_length=1)
    drawn = one.generate(ids, max_completion_length=[3, 3, 1, 1, 2, 2])
    hook.remove()
    assert fed == [(3, 6), (6, 1), (6, 6), (3, 6), (4, 1), (2, 1)]
    assert [len(x.completion_ids) for x in drawn] == [3, 3, 1, 1, 2, 2]
    assert [x.prompt_ids for x in drawn] == ids
    assert one.generate([]) == []
    with pytest.raises(ValueError, match="max_completion_length has 2 entries for 6 prompts"):
        one.generate(ids, max_completion_length=[3, 3])


def test_further_tokens_end_a_completion():
    one, letters = engine(), set(range(2, 60))
    drawn = one.generate(TOKENIZER(PROMPTS)["input_ids"], stop_token_ids=letters)
    stopped = [x for x in drawn if x.completion_ids[-1] in letters]
    assert len(stopped) >= 4
    assert all(x.finished for x in stopped)
    assert not letters.intersection(t for x in drawn for t in x.completion_ids[:-1])


def test_columns_go_to_those_that_take_them_and_may_be_changed():
    seen, prompts = [], [[{"role": "user", "content": "hi"}]] * 2
    columns = {"answer": ["1", "2"], "given": [[1]] * 2}

    def some(prompts, engine, answer, missing=None):
        seen.append((answer, missing))
        prompts[0].append({"role": "user", "content": "changed"})
        return plain(prompts, engine)

    def all_of_them(prompts, engine, **columns):
        seen.append(columns)
        columns["given"][0].append(2)
        return {**plain(prompts, engine), "turns": (2, 3), "tensor": torch.tensor([0.5, 1.5])}

    drawn, others = play(some, prompts, columns, engine())
    assert others == {}
    assert "changed" in TOKENIZER.decode(drawn[0].prompt_ids)
    assert "changed" not in TOKENIZER.decode(drawn[1].prompt_ids)
    _, others = play(all_of_them, prompts, columns, engine())
    assert others == {"turns": [2, 3], "tensor": [0.5, 1.5]}
    assert seen == [(["1", "2"], None), {"answer": ["1", "2"], "given": [[1, 2], [1]]}]
    assert columns["given"] == [[1], [1]]
    assert prompts == [[{"role": "user", "content": "hi"}]] * 2

    with pytest.raises(RolloutError, match=r"'some' .* columns given: missing .* 'answer'"):
        taken_columns(some, ["given"])
    with pytest.raises(RolloutError, match=r"'all_of_them' .* multiple values .* 'engine'"):
        taken_columns(all_of_them, ["engine"])
    with pytest.raises(RolloutError, match=r"'<lambda>' .* columns \(none\): too many positional"):
        taken_columns(lambda prompts: {}, [])


def test_an_exception_names_the_function():
    def broken(prompts, engine):
        raise KeyError("tool")

    with pytest.raises(KeyError) as caught:
        play(broken, PROMPTS, {}, engine())
    assert caught.value.__notes__ == ["raised by the rollout_fn 'broken'"]


def given(**values):
    """Return a rollout of two completions, of which some things are as given."""
    output = {
        "prompt_ids": [[5, 6], [7]],
        "completion_ids": [[8, 9, 1], [10, 11, 12, 13]],
        "logprobs": [[-1.0, -2.0, -3.0], [-1.0, -2.0, math.nan, -4.0]],
        "env_mask": [[1, 1, 1], [1, 1, 0, 1]],
        **values,
    }
    output = {key: value for key, value in output.items() if value is not None}
    return play(lambda prompts, engine: output, ["a", "b"], {"answer": [1, 2]}, engine())


def test_tokens_that_do_not_count_are_marked_and_the_last_that_does_may_end():
    (first, second), _ = given()
    assert (first.counted, first.finished) == (None, True)
    assert (second.counted, second.finished) == ([True, True, False, True], False)
    assert second.logps.tolist() == [-1.0, -2.0, 0.0, -4.0]
    assert (second.prompt_ids, second.completion_ids) == ([7], [10, 11, 12, 13])
    for ids, mask, finished in [
        ([10, 1, 12, 13], [1, 1, 0, 0], True),  # the environment has the last word
        ([10, 11, 12, 1], [True, True, True, False], False),
        ([1, 11, 12, 13], [0, 0, 0, 0], False),
    ]:
        rows = {"completion_ids": [[8, 9, 1], ids], "env_mask": [[1, 1, 1], mask]}
        (_, one), _ = given(**rows, logprobs=[[0.0] * 3, [0.0] * 4])
        assert one.finished is finished
        assert one.counted == list(map(bool, mask))


@pytest.mark.parametrize(
    "wrong, match",
    [
        ({"logprobs": None}, "nothing under logprobs; return prompt_ids, completion_ids, logprobs"),
        ({"prompt_ids": [[5]]}, "1 entries under 'prompt_ids' for 2 prompts; give one for each"),
        ({"turns": 3}, "3 under 'turns' for 2 prompts; give one for each"),
        ({"turns": "ab"}, "'ab' under 'turns' for 2 prompts"),
        ({"answer": [1, 2]}, "something under 'answer', which is an argument of reward functions"),
        ({"completions": ["", ""]}, "something under 'completions'"),
        ({"prompt_ids": [[5], []]}, r"no token in prompt_ids\[1\]; give at least one"),
        ({"completion_ids": [[], [10, 11, 12, 13]]}, r"no token in completion_ids\[0\]"),
        ({"completion_ids": [[8, 9, 99], [1] * 4]}, r"the token id 99 in completion_ids\[0\]"),
        ({"prompt_ids": [[5], [-1]]}, r"the token id -1 in prompt_ids\[1\]"),
        ({"prompt_ids": [[5.0], [1]]}, r"torch.float32 in prompt_ids\[0\]; token ids are integers"),
        ({"prompt_ids": ["ab", [1]]}, r"'ab' as prompt_ids\[0\]; give it as a list of numbers"),
        ({"prompt_ids": [[[5]], [1]]}, r"\[\[5\]\] as prompt_ids\[0\]"),
        ({"logprobs": [[-1.0] * 3, None]}, r"None as logprobs\[1\]; give it as a list of numbers"),
        ({"logprobs": [[-1.0] * 2, [-1.0] * 4]}, r"2 values in logprobs\[0\] for the 3 tokens of"),
        ({"env_mask": [[1] * 3, [1] * 5]}, r"5 values in env_mask\[1\] for the 4 tokens of"),
        ({"env_mask": [[1, 2, 1], [0] * 4]}, r"2 in env_mask\[0\]; it is 1 for tokens of the mod"),
        ({"env_mask": None}, r"nan in logprobs\[1\] for a token of the model; .* \(give 0 in env_"),
        ({"logprobs": [[0.3, -1, -1], [-1.0] * 4]}, r"0.3\d* in logprobs\[0\] .* not above 0"),
        (
            {"completion_ids": [[8] * 9, [9] * 4], "logprobs": [[-1.0] * 9, [-1.0] * 4],
             "env_mask": None},
            r"9 tokens in completion_ids\[0\]; max_completion_length is 8, and tools",
        ),
        ({"prompt_ids": [[5], [9] * 253]}, r"253 \+ 4 tokens as .* 1; the model has 256 positions"),
    ],
)  # fmt: skip
def test_what_breaks_the_contract_is_said_in_a_sentence(wrong, match):
    with pytest.raises(RolloutError, match=r"^rollout_fn '<lambda>' returned " + match):
        given(**wrong)


def test_nothing_at_all_is_no_mapping():
    with pytest.raises(RolloutError, match="returned None; return a mapping with prompt_ids, com"):
        play(lambda prompts, engine: None, ["a"], {}, engine())


def test_functions_are_found_by_their_names(tmp_path, monkeypatch):
    (tmp_path / "my_rollouts.py").write_text(
        "def rollout(prompts, engine):\n    return {}\n\nasync def late(prompts, engine): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    names = ["my_rollouts:rollout", "my_rollouts.rollout", f"{tmp_path}/my_rollouts.py:rollout"]
    for name in names:
        assert load_rollout_fn(name).__name__ == "rollout"
    assert load_rollout_fn(plain) is plain
    with pytest.raises(RolloutError, match=r"'late' is async, .* asyncio.run"):
        load_rollout_fn("my_rollouts:late")
    for name in ("rollout", ":rollout", "my_rollouts:", "my_rollouts.py"):
        with pytest.raises(RolloutError, match=f"'{name}' names no function; give 'module:func"):
            load_rollout_fn(name)
    with pytest.raises(ValueError, match="'my_rollouts' has no function 'other'"):
        load_rollout_fn("my_rollouts:other")
    with pytest.raises(ModuleNotFoundError, match="no module 'no_such_rollouts'"):
        load_rollout_fn("no_such_rollouts:rollout")
    with pytest.raises(FileNotFoundError, match="there"):
        load_rollout_fn(f"{tmp_path}/there.py:rollout")
