"""Tokens and passwords stay out of configurations, and so out of runs, trackers and reports."""

import pytest

from fastgrpo.config import ConfigError, config_from

TOKEN = "hf_" + "Secret0123" * 4


@pytest.mark.fault(
    "a token or a password in a value of the configuration",
    "refused without being said again; nothing of it is written",
)
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_name_or_path", f"https://{TOKEN}@huggingface.co/some/model"),
        ("dataset_name", "https://me:hunter2@example.com/data.jsonl"),
        ("project", TOKEN),
        ("chat_template_kwargs", {"key": ["a", TOKEN]}),
        ("reward_funcs", [f"mine.py:{TOKEN}"]),
        ("learning_rate", TOKEN),
        ("loss_type", TOKEN),
        ("hub_token", TOKEN),
        ("tokn", TOKEN),
        ("dataset_name", "hf_oauth_eyJhbGciOiJFZERTQSJ9.hunter2eyJzY29wZSI6WyJvcGVuaWQiXX0"),
        ("dataset_name", "https://ghp_hunter2@github.com/x.jsonl"),
        ("dataset_name", "https://h/x.jsonl?token=hunter2"),
        ("project", "sk-proj-hunter2-hunter2-hunter2"),
    ],
)
def test_no_secret_gets_into_a_configuration(key, value):
    with pytest.raises(ConfigError, match=rf"^{key}: holds what looks like a token") as caught:
        config_from({"model_name_or_path": "m", "dataset_name": "d", key: value})
    assert TOKEN not in str(caught.value) and "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "value", ["hf_internal_testing_tiny_random_llama_of_many_words", "me/sk-learn", "a?b=c", "a@b"]
)
def test_what_is_no_secret_is_taken(value):
    made = {"model_name_or_path": value, "dataset_name": "d"}
    assert config_from(made).model_name_or_path == value
