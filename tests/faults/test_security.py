"""What a checkpoint, a dataset, a name or the environment could smuggle in or out."""

import ast
import functools
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from small_models import save_small_model, small_tokenizer
from small_runs import lines, run_config
from transformers.utils import import_utils

import fastgrpo
from fastgrpo.adapters import load_adapters
from fastgrpo.config import config_from
from fastgrpo.data import load_prompts
from fastgrpo.loading import load_model
from fastgrpo.rewards import RewardModel
from fastgrpo.run_directory import RunDirectory
from fastgrpo.setup import notes

PACKAGE = Path(fastgrpo.__file__).parent
TOKEN = "hf_" + "Secret0123" * 4

# What can run the code of a file, and where it is used on what this very run has written itself.
UNPICKLING = {
    "distributed.py": ["pickle.loads"],  # of an error that was just pickled: can it be?
    "rewards/functions.py": ["importlib.import_module('dill').loads"],  # a function of the user's
    "rewards/worker.py": ["pickle.loads", "pickle.loads"],  # what the parent has sent
}
RUNS_CODE = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load", "np.load"),
    *("numpy.load", "pickle.load", "pickle.Unpickler", "marshal.loads", "joblib.load", "dill.load"),
    *("yaml.load", "yaml.unsafe_load", "yaml.full_load", "shelve.open", "read_pickle"),
}


@functools.cache
def calls() -> list[tuple[str, ast.Call, str]]:
    """Return every call in the package: its file, itself, and what is called."""
    roots = [PACKAGE, PACKAGE.parent / "kernels" / "fastgrpo_kernels"]
    return [
        (str(file.relative_to(root)), node, ast.unparse(node.func))
        for root in roots
        for file in root.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call)
    ]


@pytest.mark.fault(
    "a line of ours that would unpickle or evaluate what came from elsewhere",
    "the tests fail: there is none, but for what a run has just written itself",
)
def test_nothing_is_unpickled_or_evaluated():
    found: dict[str, list[str]] = {}
    for file, node, called in calls():
        assert called not in RUNS_CODE, f"{file}:{node.lineno}"
        assert not any(k.arg in ("allow_pickle", "weights_only") for k in node.keywords), file
        if called.endswith(".loads") and called != "json.loads":
            found.setdefault(file, []).append(called)
    assert found == UNPICKLING


def test_all_weights_are_asked_for_in_safetensors():
    models = [
        node
        for _, node, called in calls()
        if called.endswith(".from_pretrained")
        and not called.startswith(("AutoConfig", "AutoTokenizer", "PeftModel"))
    ]
    asked = [ast.unparse(node) for node in models]
    assert len(asked) == 2  # the policy, whose options `load_from` completes, and reward models
    assert sum("use_safetensors=True" in text for text in asked) == 1
    assert 'options["use_safetensors"] = True' in (PACKAGE / "loading.py").read_text()


class Bomb:
    """Makes a file where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def load_policy(path: Path):
    return load_model(config_from({"model_name_or_path": str(path), "dataset_name": "x"}))


def load_reward_model(path: Path):
    return RewardModel(str(path), device="cpu")


def pickled(path: Path, mark: Path | None) -> Path:
    """Put the weights of a checkpoint into a pickle, with what runs code beside them."""
    (file,) = path.glob("*.safetensors")
    weights = load_file(file)
    file.unlink()
    name = "adapter_model.bin" if file.stem.startswith("adapter") else "pytorch_model.bin"
    torch.save(weights | ({} if mark is None else {"bomb": Bomb(mark)}), path / name)
    return path


@pytest.mark.fault(
    "a checkpoint, adapters or a reward model in pytorch_model.bin, harmless or with code in it",
    "refused with the remedy; the code does not run",
)
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("harmful", [True, False])
@pytest.mark.parametrize("kind", ["policy", "adapters", "reward model"])
def test_no_weights_are_unpickled(tmp_path, kind, harmful):
    mark = tmp_path / "mark"
    save_small_model(tmp_path / "model")
    if kind == "adapters":
        from peft import LoraConfig, get_peft_model

        base = load_policy(tmp_path / "model")
        model = get_peft_model(base, LoraConfig(target_modules=["q_proj"], r=2))
        model.save_pretrained(tmp_path / "weights")
        load = lambda path: load_adapters(load_policy(tmp_path / "model"), path)  # noqa: E731
    elif kind == "policy":
        save_small_model(tmp_path / "weights")
        load = load_policy
    else:
        from transformers import AutoConfig, AutoModelForSequenceClassification

        config = AutoConfig.from_pretrained(tmp_path / "model", num_labels=1)
        model = AutoModelForSequenceClassification.from_config(config)
        model.save_pretrained(tmp_path / "weights")
        small_tokenizer().save_pretrained(tmp_path / "weights")
        load = load_reward_model
    load(tmp_path / "weights")  # as it is, it is good
    path = pickled(tmp_path / "weights", mark if harmful else None)
    with pytest.raises(ValueError, match=r"model.bin and no safetensors, .* save_pretrained$"):
        load(path)
    assert not mark.exists()


@pytest.mark.fault(
    "a config.json that names a kernel on the Hub as its attention, or flash attention that is not "
    "installed, for which transformers would fetch one, or Python files beside it",
    "refused, or the model is built without them, unless trust_remote_code: true; then it is noted",
)
def test_a_configuration_brings_no_code(tmp_path, monkeypatch):
    monkeypatch.setattr(import_utils, "is_flash_attn_2_available", lambda: False)
    save_small_model(tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    plain = json.loads(file.read_text())
    for key in ("attn_implementation", "_attn_implementation"):
        file.write_text(json.dumps(plain | {key: "somebody/kernel"}))
        with pytest.raises(ValueError, match=r"'somebody/kernel' in its config\.json, which"):
            load_policy(tmp_path / "model")
    file.write_text(json.dumps(plain | {"attn_implementation": "flash_attention_2"}))
    with pytest.raises(ValueError, match=r"'flash_attention_2' in .*, install the package, or set"):
        load_policy(tmp_path / "model")
    asked = {"dataset_name": "x", "attn_implementation": "sdpa"}
    load_model(config_from(asked | {"model_name_or_path": str(tmp_path / "model")}))
    (tmp_path / "model" / "own.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')\n")
    code = {name: f"own.{name}" for name in ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")}
    file.write_text(json.dumps(plain | {"auto_map": code}))
    load_policy(tmp_path / "model")
    file.write_text(json.dumps(plain | {"auto_map": code, "model_type": "own"}))
    with pytest.raises(ValueError, match=r"without the Python .* trust_remote_code: true if you"):
        load_policy(tmp_path / "model")
    assert not (tmp_path / "mark").exists()


def test_trusted_code_is_noted(start):
    trainer = start(trust_remote_code=True)
    (note,) = [x for x in notes(trainer.config, trainer.policy) if "trust_remote_code" in x]
    assert note.startswith("note: trust_remote_code: Python files that come with models and tok")


@pytest.mark.fault(
    "a folder of data with pickles, arrays of objects, a loading script or an archive of them",
    "refused in a sentence; no code of it runs",
)
@pytest.mark.parametrize("kind", ["train.pkl", "train.npy", "folder.py", "train.tar"])
def test_no_code_of_a_dataset_runs(tmp_path, kind):
    mark, folder = tmp_path / "mark", tmp_path / "folder"
    folder.mkdir()
    bomb = pickle.dumps({"prompt": [Bomb(mark)]})
    if kind == "folder.py":
        bomb = f"from pathlib import Path\nPath({str(mark)!r}).touch()\n".encode()
    if kind == "train.tar":
        import io
        import tarfile

        with tarfile.open(folder / kind, "w") as archive:
            for suffix in ("pkl", "pyd", "pth", "npy"):
                member = tarfile.TarInfo(f"a.{suffix}")
                member.size = len(bomb)
                archive.addfile(member, io.BytesIO(bomb))
    else:
        (folder / kind).write_bytes(bomb)
    with pytest.raises(ValueError, match=r"folder.* (did not load|has the unknown extension)"):
        load_prompts(str(folder), "train")
    assert not mark.exists()


AUDITED = """
import sys
found = []
sys.addaudithook(lambda event, args: found.append(args) if event == "pickle.find_class" else None)
from fastgrpo.cli import main
for arguments in (
    ["train", "run.yaml", "max_steps=2"],
    ["train", "run.yaml", "max_steps=3", "--resume", "auto"],
    ["eval", "run", "-n", "2", "--split=train", "--max-samples=2", "--threshold=0.5"],
    ["report", "run"],
):
    found.clear()
    assert main(arguments) == 0, arguments
    assert found == [], (arguments, found)
"""


@pytest.mark.slow
@pytest.mark.fault(
    "training, resuming, evaluating and reporting, with every secret the environment can have",
    "the process unpickles nothing, and no file of the run or line of its output has a secret",
)
def test_a_run_unpickles_nothing_and_keeps_secrets(tmp_path, word_problems):
    model = save_small_model(tmp_path / "model")
    config = run_config(tmp_path, word_problems, model, save_steps=1, beta=0.1, output_dir="run")
    values = config.flat() | {"reward_funcs": [f"{tmp_path}/my_rewards.py:letter_e", "tag_count"]}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    keys = ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "OPENAI_API_KEY", "MY_PASSWORD")
    secrets = {key: f"{TOKEN}{i}" for i, key in enumerate(keys)}
    environment = os.environ | secrets | {"HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, sys.path))
    command = [sys.executable, "-c", AUDITED]
    options = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
    done = subprocess.run(command, **options)
    assert done.returncode == 0, done.stderr
    (tmp_path / "my_rewards.py").write_text(
        "import os\n\ndef letter_e(**columns):\n    raise ValueError(len(os.environ))\n"
    )
    command = [sys.executable, "-m", "fastgrpo", "train", "run.yaml", "output_dir=failed"]
    failed = subprocess.run(command, **options)
    assert failed.returncode == 1
    said = done.stdout + done.stderr + failed.stdout + failed.stderr
    assert "letter_e" in said and TOKEN not in said
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 20
    assert [path for path in written if TOKEN.encode() in path.read_bytes()] == []


@pytest.mark.slow
@pytest.mark.fault(
    "names of a run, a column and a reward function that are paths",
    "everything is written into the run directory, or the name is refused",
)
def test_names_are_no_paths(start, tmp_path, monkeypatch):
    place = tmp_path / "a" / "b" / "c"  # ../../away is within what is looked at
    place.mkdir(parents=True)
    monkeypatch.chdir(place)
    name, rows = "../../away", lines(tmp_path / "problems.jsonl")
    named = [{**row, name: "a", "/tmp/x": "b"} for row in rows]
    (tmp_path / "named.jsonl").write_text("".join(json.dumps(row) + "\n" for row in named))

    def judge(completions, log_extra, log_metric, **columns):
        assert name in columns
        log_extra(name, columns[name])
        log_metric(name, 1.0)
        return [float(len(text)) for text in completions]

    judge.__name__ = name
    before = {path for path in tmp_path.rglob("*") if "run" not in path.parts}
    from fastgrpo.assets import load_assets
    from fastgrpo.trainer import Trainer

    config = start().config
    values = config.flat() | {
        "dataset_name": str(tmp_path / "named.jsonl"),
        "run_name": name,
        "output_dir": "mine",
        "reward_timeout": None,
        "logging_steps": 1,
    }
    config = config_from(values)
    trainer = Trainer(config, load_assets(config), reward_funcs=[judge])
    trainer.train()
    after = {path for path in tmp_path.rglob("*") if "run" not in path.parts}
    run = place / "mine"
    assert {path for path in after - before if run not in path.parents} == {run}
    (line, *_) = lines(run / "completions.jsonl")
    assert line["rewards"].keys() == {name}
    assert line["extra"] == {name: "a"}
    unnamed = config_from(values | {"output_dir": None})
    with pytest.raises(ValueError, match=r"run_name: .* a name without .*, got '\.\./\.\./away';"):
        RunDirectory(unnamed, name)
    assert not (place / "runs").exists()


@pytest.mark.fault(
    "output_dir is a symbolic link: to an empty directory, to nothing, to what holds something",
    "the run is written where it points; else it is refused, and what it points to is untouched",
)
def test_links_as_run_directories(tmp_path):
    made = {"model_name_or_path": "m", "dataset_name": "d"}
    (tmp_path / "scratch").mkdir()
    (tmp_path / "empty").symlink_to(tmp_path / "scratch")
    run = RunDirectory(config_from(made | {"output_dir": str(tmp_path / "empty")}), "x")
    assert (tmp_path / "scratch" / "config.yaml").exists()
    assert (tmp_path / "empty").is_symlink()
    run.discard()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    for target in ("full", "nothing"):
        link = tmp_path / f"to {target}"
        link.symlink_to(tmp_path / target)
        with pytest.raises(ValueError, match=rf"output_dir: .*to {target}"):
            RunDirectory(config_from(made | {"output_dir": str(link)}), "x")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["file"]
