"""The built-in rewards of form and length, by worked numbers."""

import pytest

from fastgrpo import rewards
from fastgrpo.rewards import Judges, soft_overlong_punishment, tag_count


@pytest.mark.parametrize(
    ("completion", "formatted", "tags"),
    [
        ("<think>a</think><answer>b</answer>", 1.0, 1.0),
        (" <think>a\nb</think>\n\n<answer>c</answer>\n", 1.0, 1.0),
        ("<think></think><answer></answer>", 1.0, 1.0),
        ("so <think>a</think><answer>b</answer>", 0.0, 1.0),
        ("<think>a</think> so <answer>b</answer>", 0.0, 1.0),
        ("<think>a</think><answer>b</answer>.", 0.0, 1.0),
        ("<answer>b</answer><think>a</think>", 0.0, 1.0),
        ("<think>a<think>b</think><answer>c</answer>", 0.0, 0.75),
        ("<think>a</think><answer>b</answer><answer>c</answer>", 0.0, 0.5),
        ("<think>a</think>", 0.0, 0.5),
        ("<answer>", 0.0, 0.25),
        ("", 0.0, 0.0),
    ],
)
def test_format_and_tag_count(completion, formatted, tags):
    messages = [{"role": "assistant", "content": completion}]
    assert rewards.format([completion, messages], prompts=["?"] * 2) == [formatted, formatted]
    assert tag_count([completion, messages], prompts=["?"] * 2) == [tags, tags]


def test_soft_overlong_punishment_of_dapo():
    # L = 10, C = 4: 0 up to 6 tokens, then -1/4 a token, -1 from 10 on.
    lengths = [0, 1, 6, 7, 8, 9, 10, 11, 99]
    punish = soft_overlong_punishment(10, 4)
    ids = [[7] * length for length in lengths]
    expected = [0, 0, 0, -0.25, -0.5, -0.75, -1, -1, -1]
    assert punish(completion_ids=ids, prompts=["?"] * 9) == expected
    with Judges(["soft_overlong_punishment"], soft_punish_cache=4, max_completion_length=10) as j:
        assert j.names == ["soft_overlong_punishment"]
        scores = j.score(prompts=["?"] * 9, completions=["a"] * 9, completion_ids=ids, columns={})
    assert scores.rewards_BK[:, 0].tolist() == expected


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (["accuracy"], {"soft_punish_cache": 4}, "soft_punish_cache: nothing reads it"),
        (["soft_overlong_punishment"], {}, "soft_punish_cache: 'soft_overlong_punishment' in rew"),
        (["soft_overlong_punishment"], {"soft_punish_cache": 0}, "between 1 and .* got 0"),
        (["soft_overlong_punishment"], {"soft_punish_cache": 11}, r"length \(10\), got 11"),
    ],
)
def test_the_tokens_of_soft_overlong_punishment_are_asked_for(names, options, message):
    with pytest.raises(ValueError, match=message):
        Judges(names, max_completion_length=10, **options)
