"""Checkpoints that are damaged, and what is kept of those that are not."""

import errno
import hashlib
import json
import os
import re
import shutil
import signal

import pytest
import torch
from small_models import save_small_model, small_model, small_tokenizer
from small_runs import assert_same_run, left_by, run_config
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

from fastgrpo.checkpoint import save_checkpoint
from fastgrpo.cli import main
from fastgrpo.run_checkpoints import RunCheckpoints
from fastgrpo.trainer import Trainer

REWARD = """
def letter_e(completions, **columns):
    return [text.count("e") + 0.1 * len(text) for text in completions]
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Return what makes the configuration of a run of three steps, each with its checkpoint."""
    root = tmp_path_factory.mktemp("runs")
    (root / "my_rewards.py").write_text(REWARD)
    rows = [{"prompt": f"Ann has {n} eggs.\n"} for n in range(2, 34)]
    (root / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = save_small_model(root / "model")

    def make(run, **values):
        values = {
            "max_steps": 3, "save_steps": 1, "per_device_train_batch_size": 8,
            "gradient_accumulation_steps": 1, "reward_timeout": None, "output_dir": str(run),
            **values,
        }  # fmt: skip
        return run_config(root, root / "problems.jsonl", model, **values)

    return make


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """Train to the end."""
    run = tmp_path_factory.mktemp("whole") / "run"
    Trainer(config(run)).train()
    return run


@pytest.fixture
def run(whole, tmp_path):
    """Return a copy of the run as it was killed after its last checkpoint."""
    run = shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(run / "final")
    (run / "summary.json").unlink()
    return run


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def truncate(path):
    os.truncate(path, path.stat().st_size - 1)


def half_delete(folder):
    """Leave what a process does that dies between two renames, and whose disk lost a file."""
    (folder / "config.json").unlink()
    folder.rename(folder.with_name(f".{folder.name}.old"))


DAMAGES = {
    "a bit of the model": (
        lambda path: flip(path / "model.safetensors"),
        r"model.safetensors is not what was saved: its SHA-256 differs",
    ),
    "a bit of the state": (
        lambda path: flip(next((path / "state").glob("*.safetensors"))),
        r"state/.*safetensors is not what was saved: its SHA-256 differs",
    ),
    "a truncated file": (
        lambda path: truncate(path / "state" / "trainer_state.json"),
        r"state/trainer_state.json has [\d,]+ bytes in place of [\d,]+",
    ),
    "a missing file": (
        lambda path: (path / "tokenizer.json").unlink(),
        "tokenizer.json is missing",
    ),
    "no state": (lambda path: shutil.rmtree(path / "state"), "state/.* is missing"),
    "no manifest": (lambda path: (path / "manifest.json").unlink(), "manifest.json is missing"),
    "half a manifest": (
        lambda path: truncate(path / "manifest.json") or truncate(path / "manifest.json"),
        "manifest.json cannot be read",
    ),
    "a torn rename": (half_delete, "config.json is missing"),
}


@pytest.mark.fault(
    "a bit flipped in the newest checkpoint, a file truncated or gone, its manifest too, a rename "
    "torn",
    "it gets another name, and the one before it is gone on from",
)
@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_is_put_aside(run, kind):
    do, problem = DAMAGES[kind]
    checkpoints = RunCheckpoints(run)
    do(checkpoints.of_step(3))
    found, (said,) = checkpoints.newest()
    assert found == checkpoints.of_step(2)
    assert re.fullmatch(
        rf"checkpoint step-3 is damaged \({problem}\) and is called damaged-step-3 from now on; "
        "the run goes on from the one before it",
        said,
    )
    assert (run / "checkpoints" / "damaged-step-3").is_dir()
    assert checkpoints.steps() == [1, 2]


@pytest.mark.fault(
    "a process killed between the two renames of a checkpoint that takes another's place",
    "the one that was there has its name again",
)
def test_what_was_to_be_replaced_has_its_name_again(run):
    checkpoints = RunCheckpoints(run)
    checkpoints.of_step(3).rename(run / "checkpoints" / ".step-3.old")
    (run / "checkpoints" / ".step-3.partial").mkdir()
    (run / "checkpoints" / ".step-1.deleted").mkdir()
    assert checkpoints.newest() == (checkpoints.of_step(3), [])
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"step-1", "step-2", "step-3"}


@pytest.mark.fault(
    "a bit flipped in the newest checkpoint of a run that is resumed",
    "a warning names the file, and the run ends as one without a fault",
)
def test_a_run_goes_on_from_the_checkpoint_before(run, whole, config, capsys):
    flip(run / "checkpoints" / "step-3" / "model.safetensors")
    Trainer(config(run), resume=True).train()
    (found, weights), (wanted, wanted_weights) = left_by(run), left_by(whole)
    (warning,) = [line for line in found["warnings"] if line not in wanted["warnings"]]
    assert warning["step"] == 2
    assert "step-3 is damaged (model.safetensors is not" in warning["text"]
    assert "step-3 is damaged (model.safetensors is not" in " ".join(
        capsys.readouterr().out.split()
    )
    found["warnings"].remove(warning)
    assert_same_run((found, weights), (wanted, wanted_weights))
    names = {path.name for path in (run / "checkpoints").iterdir()}
    assert names == {"step-1", "step-2", "step-3", "damaged-step-3"}


@pytest.mark.fault(
    "every checkpoint of a run is damaged", "one sentence names each, and nothing is begun anew"
)
def test_a_run_without_a_good_checkpoint_does_not_begin_again(run, config, tmp_path):
    for step in (1, 2, 3):
        truncate(run / "checkpoints" / f"step-{step}" / "model.safetensors")
    before = sorted(str(path) for path in run.rglob("*"))
    for _ in range(2):  # no less the second time
        with pytest.raises(ValueError, match="no checkpoint to go on from") as error:
            Trainer(config(run), resume=True)
        for step in (1, 2, 3):
            assert f"step-{step}: model.safetensors has" in str(error.value)
        assert sorted(str(path) for path in run.rglob("*")) == before
    for step in (1, 2, 3):
        shutil.rmtree(run / "checkpoints" / f"step-{step}")
    (run / "checkpoints" / "damaged-step-3").mkdir()
    with pytest.raises(ValueError, match="damaged-step-3 is damaged"):
        RunCheckpoints(run).newest()
    shutil.rmtree(run / "checkpoints")
    assert RunCheckpoints(run).newest() == (None, [])


def test_a_run_of_models_alone_does_not_begin_again(run):
    for step in (1, 2, 3):
        path = run / "checkpoints" / f"step-{step}"
        shutil.rmtree(path)
        save_checkpoint(path, small_model(), small_tokenizer())
    with pytest.raises(ValueError, match="step-3 is a model alone, as save_only_model has it;"):
        RunCheckpoints(run).newest()


@pytest.mark.fault(
    "a bit flipped in a checkpoint that fastgrpo eval is to measure", "it is refused by its name"
)
def test_a_damaged_checkpoint_is_not_measured(run, capsys):
    path = run / "checkpoints" / "step-2"
    flip(path / "state" / "trainer_state.json")  # what is measured is whole
    arguments = ["eval", str(run), "--checkpoint", "step-2", "--split", "train", "-n", "1"]
    arguments += ["--max-samples", "1", "--threshold", "1"]
    assert main(arguments) == 0
    flip(path / "model.safetensors")
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert f"checkpoint step-2 of {run} is damaged: model.safetensors is not what was saved" in said
    arguments[3] = str(path)  # as it is
    assert main(arguments) == 0


@pytest.mark.fault(
    "a disk that gives a read error, or memory that runs out, as a checkpoint is gone on from",
    "one sentence, and nothing of the run is changed",
)
@pytest.mark.parametrize(
    ("error", "status"),
    [(OSError(errno.EIO, os.strerror(errno.EIO)), 2), (torch.OutOfMemoryError("no memory"), 1)],
)
def test_what_ends_the_reading_of_a_checkpoint_is_told(
    run, config, monkeypatch, capsys, error, status
):
    def fail(*args):
        raise error

    monkeypatch.setattr(HuggingFaceStorageReader, "read_data", fail)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(type(error), match=re.escape(str(error))):
        Trainer(config(run), resume=True)
    command = ["train", f"{run}/config.yaml", f"output_dir={run}", "--resume", "auto"]
    assert main(command) == status
    assert f"\nfastgrpo: {error}\n" in capsys.readouterr().err
    after = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert {path: after[path] for path in before} == before


def test_a_manifest_has_size_and_hash_of_every_file(whole):
    for path in (whole / "final", whole / "checkpoints" / "step-3"):
        held = json.loads((path / "manifest.json").read_text())["files"]
        files = {p for p in path.rglob("*") if p.is_file() and p.name != "manifest.json"}
        assert held == {
            p.relative_to(path).as_posix(): {
                "bytes": len(p.read_bytes()), "sha256": hashlib.sha256(p.read_bytes()).hexdigest(),
            }
            for p in files
        }  # fmt: skip
        assert {"model.safetensors", "config.json", "tokenizer.json"} <= held.keys()
    assert {"state/trainer_state.json", "state/batches.safetensors"} <= held.keys()


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="needs /proc")
def test_all_is_on_the_disk_before_a_checkpoint_has_its_name(tmp_path, monkeypatch):
    done = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(descriptor):
        done.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def note_replace(source, target):
        files = {str(path) for path in (source, *source.rglob("*"))}
        assert files <= set(done)  # directories too
        done.append(f"renamed to {target}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    path = tmp_path / "checkpoints" / "step-1"
    save_checkpoint(path, small_model(), small_tokenizer())
    assert done[-3:] == [f"renamed to {path}", str(path.parent), str(tmp_path)]


@pytest.mark.fault(
    "a file gone from one of the checkpoints that save_total_limit keeps",
    "it does not count, gets another name, and one more that is whole is kept",
)
def test_of_checkpoints_the_whole_ones_are_kept(run):
    checkpoints = RunCheckpoints(run)
    (checkpoints.of_step(2) / "config.json").unlink()
    (said,) = checkpoints.remove_old(2)
    assert said == (
        "checkpoint step-2 is damaged (config.json is missing) and is called damaged-step-2 from "
        "now on; it does not count to save_total_limit"
    )
    assert checkpoints.steps() == [1, 3]
    assert checkpoints.remove_old(1) == []
    assert checkpoints.steps() == [3]
    (checkpoints.folder / "step-4").mkdir()  # without a file
    assert len(checkpoints.remove_old(1)) == 1
    assert checkpoints.steps() == [3]  # the last good one


@pytest.mark.fault(
    "a parameter that has become NaN, with save_total_limit: 1",
    "while steps are skipped nothing is saved but for a signal, and nothing is deleted",
)
def test_the_last_good_checkpoint_outlives_numbers_gone_wrong(config, tmp_path):
    trainer = Trainer(config(tmp_path / "run", max_steps=4, save_total_limit=1))
    take = trainer.take_step

    def spoil_then_take():
        if trainer.step == 2:
            next(trainer.policy.model.parameters()).data.fill_(float("nan"))
        return take()

    trainer.take_step = spoil_then_take
    trainer.train()
    checkpoints = trainer.run.checkpoints
    assert checkpoints.steps() == [2]
    assert trainer.saver.leave(signal.SIGTERM).number == signal.SIGTERM
    assert checkpoints.steps() == [2, 4]


@pytest.mark.fault(
    "an old checkpoint that cannot be deleted, as where a file of it is in use",
    "the run goes on, and so does every later one; its name is gone",
)
def test_what_cannot_be_deleted_ends_no_run(run, monkeypatch):
    checkpoints = RunCheckpoints(run)
    with monkeypatch.context() as patch:
        # Only as root could one here make a directory that cannot be deleted; it ends in rmdir.
        patch.setattr(os, "rmdir", refuse)
        assert checkpoints.remove_old(2) == []
        assert checkpoints.steps() == [2, 3]
        shutil.copytree(checkpoints.of_step(2), checkpoints.of_step(1))  # it comes again
        assert checkpoints.remove_old(2) == []
        assert checkpoints.newest() == (checkpoints.of_step(3), [])
    assert checkpoints.newest() == (checkpoints.of_step(3), [])
    assert {path.name for path in checkpoints.folder.iterdir()} == {"step-2", "step-3"}


def refuse(path, **options):
    raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), path)


@pytest.mark.fault("what adapters were put on is missing from the run", "one sentence")
def test_adapters_are_not_resumed_without_their_base(run):
    with pytest.raises(ValueError, match=r"run/base, which the adapters .* on, is damaged: it is"):
        RunCheckpoints(run).newest(on_base=True)
    assert RunCheckpoints(run).newest()[0] == RunCheckpoints(run).of_step(3)
