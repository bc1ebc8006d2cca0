"""Wrong input ends with one sentence before anything is written, or does not matter."""

import json
import re
import sys
from pathlib import Path

import pytest
from fuzzing import assert_sentences
from small_models import save_small_model, small_model, small_tokenizer
from small_runs import lines

from fastgrpo.cli import main
from fastgrpo.config import ConfigError, config_from, load_config

JUDGES = """
def largest_id(completion_ids, **columns):
    return [float(max(ids)) for ids in completion_ids]
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Write a model, prompts and a configuration that would run, where the process is."""
    monkeypatch.chdir(tmp_path)
    save_small_model(Path("model"))
    write_prompts([f"{n}+1=" for n in range(8)])
    Path("judges.py").write_text(JUDGES)
    Path("run.yaml").write_text(
        "model_name_or_path: model\ndataset_name: prompts.jsonl\noutput_dir: run\n"
        "reward_funcs: [judges.py:largest_id]\nmax_steps: 2\nnum_generations: 2\n"
        "max_completion_length: 4\nsave_strategy: no\nlogging_steps: 1\ncpu_threads: 1\n"
    )
    return tmp_path


def write_prompts(prompts):
    rows = [json.dumps({"prompt": prompt}) for prompt in prompts]
    Path("prompts.jsonl").write_text("\n".join(rows))


def change(path, **values):
    """Set keys of a JSON file."""
    path = Path(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture
def refused(place, capsys):
    """Run what must be refused, and return the sentence."""

    def refuse(*overrides, config="run.yaml"):
        before = {path.name for path in place.iterdir()}
        capsys.readouterr()
        assert main(["train", str(config), *overrides]) == 2
        told = capsys.readouterr().err.partition("fastgrpo: loading ")[2].partition("\n")[2]
        text = told[told.index("fastgrpo: ") + len("fastgrpo: ") :].rstrip("\n")
        assert_sentences(ValueError(text), "")
        assert len(text.splitlines()) <= 2  # the second is of a configuration, with its first key
        assert {path.name for path in place.iterdir()} == before
        return text

    return refuse


def trains(*overrides):
    """Run what must go well, and return its completions."""
    assert main(["train", "run.yaml", *overrides]) == 0
    run = dict(o.split("=") for o in overrides).get("output_dir", "run")
    assert [line["step"] for line in lines(Path(run, "metrics.jsonl"))] == [1, 2]
    return lines(Path(run, "completions.jsonl"))


@pytest.mark.fault("YAML that would be taken for something else", "a sentence with the line")
@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("seed: 1\nbeta: 0\nseed: 2\n", "line 3: seed is given twice, first in line 1; leave one"),
        ("chat_template_kwargs:\n  a: 1\n  b: 2\n  a: 3\n", "line 4: a is given twice, first in"),
        ("seed: 1\n\tbeta: 0\n", "line 2: cannot be read as YAML: .* indent with spaces, not"),
        ("seed: 1\n---\nseed: 2\n", "line 2: .* a second document begins; leave one of them"),
        ("seed: 1\non: 2\n", "line 2: a key must be text, got 'on'; write it in quotes"),
        ("a: &a [1, 1]\n" + "b: &b [*a, *a]\n", "\na: unknown key.*\nb: unknown key"),
        ("a: &a [*a]\n", "line 1: lists and pairs are nested too deeply"),
        ("seed: !!python/object:os.system x\n", "line 1: the tag !!python/object:os.system is not"),
        (f"seed: {'9' * 5000}\n", "line 1: a number of 5000 characters; write a shorter one"),
        (f"seed: {10**30}\n", "seed: must be at most 9223372036854775807 in size, got 10000"),
        ("seed: 010\n", "seed: must be a whole number, got '010'"),
        ("seed: 4294967296\n", "seed: must be from 0 to 4294967295"),
        ("reward_timeout: 1:30\n", "reward_timeout: must be a number, got '1:30'"),
        ("beta: 1e999\n", "beta: must be a finite number"),
        ("run_name: '\0'\n", r"line 1: has the character U\+0000, which YAML does not take"),
        ('run_name: "\\ud800"\n', r"run_name: has a character that no text has, got '\\ud800'"),
        (b"seed: 1\nrun_name: \xe9\n", "line 2: is not UTF-8; save the file in that encoding"),
        (b"x" * 1_000_001, "is longer than 1000000 bytes; name a YAML file"),
    ],
)
def test_yaml_says_what_it_seems_to_say(tmp_path, text, sentence):
    path = tmp_path / "run.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=sentence) as error:
        load_config(path)
    assert str(error.value).startswith(f"{path}:")


@pytest.mark.fault("aliases that stand for a billion values", "a sentence, at once")
def test_aliases_are_counted_wherever_they_stand(tmp_path):
    path = tmp_path / "run.yaml"
    text = "a: &a [x, x, x, x, x, x, x, x, x]\n"
    for old, new in zip("abcdefgh", "bcdefghi", strict=True):
        text += f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n"
    path.write_text(text)
    with pytest.raises(ConfigError, match="there are more than 10000 values up to here"):
        load_config(path)


def test_what_yaml_has_of_use_is_taken(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_bytes(
        "\ufeffbeta: &b 0.1 # shared\r\nentropy_coef: *b\r\nseed: 1_000\r\nrun_name: 2024-01-01\r\n"
        "learning_rate: 1e-6\r\nbf16: off\r\n".encode()
    )
    config = load_config(path)
    assert (config.loss.beta, config.loss.entropy_coef, config.seed) == (0.1, 0.1, 1000)
    assert (config.run_name, config.learning_rate, config.bf16) == ("2024-01-01", 1e-6, False)


@pytest.mark.fault("an override given twice", "a sentence")
def test_an_override_is_given_once(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("seed: 1\n")
    with pytest.raises(ConfigError, match="seed: is given twice on the command line; leave one"):
        load_config(path, ["seed=2", "beta=0", "seed=3"])


@pytest.mark.fault("a key that no argument can have", "a sentence")
def test_pairs_have_texts_as_keys():
    with pytest.raises(ConfigError, match="lr_scheduler_kwargs: must have texts as keys, got 1"):
        config_from({"lr_scheduler_kwargs": {1: 2}})


@pytest.mark.fault("a configuration that is no file, or has no end", "a sentence")
@pytest.mark.parametrize("config", ["nowhere.yaml", "model", "/dev/zero", "a" * 300, "model\0"])
def test_a_configuration_is_a_file(refused, config):
    assert refused(config=config).startswith(config[:50].rstrip("\0"))


@pytest.mark.fault("a command, or a value of its options, that there is not", "a sentence")
@pytest.mark.parametrize(
    "arguments", [["nothing"], ["train", "run.yaml", "--resume", "x"], ["plan"], [""], ["eval"]]
)
def test_what_there_is_no_command_for(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert "fastgrpo" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.fault("groups of one completion", "a sentence")
def test_a_group_has_two(refused):
    assert "num_generations: must be at least 2, got 1" in refused("num_generations=1")


@pytest.mark.fault("an output_dir that cannot be one", "a sentence before the model is loaded")
@pytest.mark.parametrize(
    ("directory", "sentence"),
    [
        ("run.yaml", "run.yaml exists and is not an empty directory; choose another name"),
        ("run.yaml/run", "run.yaml/run cannot be made, since .*run.yaml is no directory; choose"),
        ("x" * 300, r"x\.\.\.x+ cannot be made \(File name too long\); choose another name"),
    ],
)
def test_a_run_has_a_directory(refused, directory, sentence, monkeypatch):
    monkeypatch.setattr("fastgrpo.trainer.load_assets", None)  # it would be called
    assert re.match(f"output_dir: .*{sentence}", refused(f"output_dir={directory}"))


WEIGHTS = "model/model.safetensors"


def cut_off(path):
    path = Path(path)
    path.write_bytes(path.read_bytes()[:-100])


DAMAGES = {
    "no weights": (
        lambda: Path(WEIGHTS).unlink(),
        "cannot be loaded: .*no file named model.safetensors",
    ),
    "weights cut off": (
        lambda: cut_off(WEIGHTS),
        "cannot be loaded: .*not fully covered; save it again",
    ),
    "empty weights": (
        lambda: Path(WEIGHTS).write_bytes(b""),
        "cannot be loaded: .*; save it again",
    ),
    "another width": (
        lambda: change("model/config.json", hidden_size=64),
        r"model.embed_tokens.weight \(and 19 more\) has another shape than in the weights",
    ),
    "more layers": (
        lambda: change(
            "model/config.json", num_hidden_layers=3, layer_types=["full_attention"] * 3
        ),
        r"model.layers.2.input_layernorm.weight \(and 10 more\) is not in the weights of",
    ),
    "a head of its own": (
        lambda: change("model/config.json", tie_word_embeddings=False),
        "lm_head.weight is not in the weights of model, and would be random; save the model",
    ),
    "another kind": (
        lambda: change("model/config.json", model_type="x"),
        "cannot be loaded: .*model type `x`",
    ),
    "a width in letters": (
        lambda: change("model/config.json", hidden_size="x"),
        "cannot be loaded: .*expected int, got str",
    ),
    "no heads": (
        lambda: change("model/config.json", num_attention_heads=0),
        "cannot be loaded: .*; save it again",
    ),
    "config cut off": (
        lambda: cut_off("model/config.json"),
        "cannot be loaded: .*config file",
    ),
    "tokenizer cut off": (
        lambda: cut_off("model/tokenizer.json"),
        "cannot be loaded: .*; save it again",
    ),
    "empty tokenizer": (
        lambda: Path("model/tokenizer.json").write_text("{}"),
        "cannot be loaded: .*; save it again",
    ),
}


@pytest.mark.fault("a model directory that is damaged, or not of one model", "a sentence")
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_model_is_whole(refused, damage):
    do, sentence = DAMAGES[damage]
    do()
    assert re.match(f"model_name_or_path: .*{sentence}", refused())


def save_tokenizer(**values):
    tokenizer = small_tokenizer()
    for name, value in values.items():
        setattr(tokenizer, name, value)
    tokenizer.save_pretrained("model")


MESSAGES = [{"role": "user", "content": "hello"}]


@pytest.mark.fault("messages, and a tokenizer without a chat template", "a sentence with the row")
def test_messages_need_a_template(refused):
    for path in Path("model").glob("*.jinja"):
        path.unlink()
    save_tokenizer(chat_template=None)
    write_prompts([MESSAGES, MESSAGES])
    assert refused().startswith("row 0 of the dataset: a prompt of messages or a system prompt")


@pytest.mark.fault("messages that the chat template refuses", "a sentence with the row")
def test_templates_may_refuse(refused):
    save_tokenizer(
        chat_template="{% for m in messages %}{{ raise_exception('no role ' + m.role) if m.role != "
        "'user' else m.content }}{% endfor %}"
    )
    write_prompts([MESSAGES, [{"role": "alien", "content": "hello"}]])
    assert refused().startswith("row 1 of the dataset: the chat template does not take the prompt")


@pytest.mark.fault("a prompt longer than the model's context", "a sentence with the row")
def test_prompts_leave_room(refused):
    write_prompts(["a", "a" * 253])
    assert refused().startswith(
        "max_completion_length: the prompt of row 1 has 253 tokens, which with 4 of the completion "
        "exceeds the 256 that the model has room for; lower max_completion_length, or leave such"
    )


@pytest.mark.fault("a vocabulary larger than the head", "a sentence with the row and the token")
def test_ids_have_embeddings(refused):
    tokenizer = small_tokenizer()
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained("model")
    write_prompts(["a", "a<new>"])
    assert refused().startswith(
        "the prompt of row 1 has the token id 99, and the model has embeddings of 99 tokens; take"
    )


@pytest.mark.fault("no token that ends a completion, or one without embedding", "a sentence")
@pytest.mark.parametrize(
    ("new", "sentence"),
    [
        (None, "neither the tokenizer nor"),
        ("<new>", "the end-of-sequence token has the id 99, and"),
    ],
)
def test_something_ends_completions(refused, new, sentence):
    save_tokenizer(eos_token=new)
    for name in ("config.json", "generation_config.json"):
        change(Path("model", name), eos_token_id=None)
    assert refused().startswith(sentence)


@pytest.mark.slow
@pytest.mark.fault("no token to pad with, or one without embedding", "the run, as with another")
def test_padding_is_any_token(place):
    expected = trains()
    for number, pad in enumerate((None, "<new>")):
        save_tokenizer(pad_token=pad)
        for name in ("config.json", "generation_config.json"):
            change(Path("model", name), pad_token_id=None)
        assert trains(f"output_dir=run{number}") == expected


@pytest.mark.slow
@pytest.mark.fault("a head larger than the vocabulary", "the run; ids stay within the head")
def test_padded_heads(place):
    model = small_model(vocab_size=192)
    model.save_pretrained("model")
    trains()
    ids = [
        x for line in lines(place / "run" / "rewards.jsonl") for x in line["rewards"]["largest_id"]
    ]
    assert len(small_tokenizer()) <= max(ids) < 192


@pytest.mark.slow
@pytest.mark.fault("fewer prompts than a step has", "the run, with prompts used again")
def test_few_prompts(place):
    write_prompts(["1+1="])
    assert {line["prompt"] for line in trains()} == {"1+1="}


if sys.platform == "linux":

    @pytest.mark.fault("a path that no directory can be made at", "a sentence")
    def test_no_directory_can_be_made_there(refused):
        assert "output_dir: /proc/run cannot be made" in refused("output_dir=/proc/run")
