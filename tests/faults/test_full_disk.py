"""What cannot be written: a limit on the size of files stands for a disk that is full."""

import errno
import json
import os
import shutil
import stat
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
from small_models import small_model, small_tokenizer
from small_runs import lines
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

from fastgrpo import saving
from fastgrpo.checkpoint import begin_checkpoint, finish_checkpoint, save_checkpoint
from fastgrpo.cli import main
from fastgrpo.durable import WriteError, write_whole, writing
from fastgrpo.json_lines import append_lines, read_lines
from fastgrpo.manifest import damage
from fastgrpo.run_directory import RunDirectory
from fastgrpo.trainer import Trainer

resource = pytest.importorskip("resource", reason="not on Windows")


@contextmanager
def full_at(size):
    """Let no file become larger, as the kernel has it: the write that would is cut short."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def saves(monkeypatch):
    """Count the checkpoints of a run, and let those of which `fails` says so fail halfway."""
    begin, state = saving.Saver.save, {"count": 0, "fails": lambda path, count: False}

    def counted(self, path, **options):
        state["count"] += 1
        if not state["fails"](path, state["count"]):
            return begin(self, path, **options)
        with full_at(20_000):
            return begin(self, path, **options)

    monkeypatch.setattr(saving.Saver, "save", counted)
    return state


SENTENCE = (
    "{} could not be written: File too large; make room, or mend what is in the way, before you "
    "go on"
)
QUICK = {
    "reward": "silent", "save_strategy": "steps", "save_steps": 1, "reward_timeout": None,
    "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1,
}  # fmt: skip


@pytest.mark.fault(
    "a disk that is full as a checkpoint is written",
    "one sentence, nothing left of the checkpoint, those before it are whole, and exit status 1",
)
def test_a_checkpoint_that_cannot_be_written_stops_the_run(start, saves):
    saves["fails"] = lambda path, count: count == 3
    trainer = start(**QUICK, max_steps=4)
    path = trainer.run.checkpoints.of_step(3)
    with pytest.raises(WriteError) as error:
        trainer.train()
    assert str(error.value) == SENTENCE.format(path)
    assert [p.name for p in sorted(path.parent.iterdir())] == ["step-1", "step-2"]
    assert trainer.run.checkpoints.newest() == (trainer.run.checkpoints.of_step(2), [])
    assert [line["step"] for line in lines(trainer.run.path / "metrics.jsonl")] == [1, 2, 3]


@pytest.mark.fault(
    "a disk that is full as a checkpoint is written, with save_errors: none",
    "a warning and a count in the metrics, the next checkpoint is written; the final one must be",
)
def test_a_run_goes_on_without_a_checkpoint_if_it_may(start, saves, capsys):
    saves["fails"] = lambda path, count: count in (1, 3) or path.name == "final"
    trainer = start(**QUICK, max_steps=4, save_errors="none", save_total_limit=1)
    with pytest.raises(WriteError) as error:
        trainer.train()
    run = trainer.run.path
    assert str(error.value) == SENTENCE.format(run / "final")
    metrics = lines(run / "metrics.jsonl")
    assert [line["checkpoints/failed"] for line in metrics] == [0, 1, 0, 1]
    told = [
        line for line in lines(run / "warnings.jsonl") if "could not be written" in line["text"]
    ]
    assert [line["step"] for line in told] == [1, 3]
    for line in told:
        failed = SENTENCE.format(run / "checkpoints" / f"step-{line['step']}")
        assert line["text"] == f"{failed}; the run goes on, since save_errors is none"
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-4"]
    assert not list(run.glob(".*.partial"))


def test_the_command_tells_of_a_full_disk_in_one_sentence(start, saves, tmp_path, capsys):
    config = start("other", **QUICK).run.path / "config.yaml"
    saves["fails"] = lambda path, count: True
    assert main(["train", str(config), f"output_dir={tmp_path / 'run'}"]) == 1
    said = capsys.readouterr().err
    assert f"fastgrpo: {SENTENCE.format(tmp_path / 'run' / 'checkpoints' / 'step-1')}\n" in said
    assert "Traceback" not in said


@pytest.mark.fault(
    "a disk that is full as a resumed run takes lines back",
    "one sentence and exit code 1, for the run may have changed; it can be resumed as before",
)
def test_a_run_that_cannot_take_lines_back(start, capsys, monkeypatch):
    trainer = start(**QUICK, max_steps=1)
    trainer.train()
    run, cut = trainer.run.path, RunDirectory.cut

    def full(*args):
        with full_at(10):
            cut(*args)

    command = ["train", f"{run}/config.yaml", "max_steps=2", "--resume", "auto"]
    monkeypatch.setattr(RunDirectory, "cut", full)
    assert main(command) == 1
    assert capsys.readouterr().err.endswith(f"\nfastgrpo: {SENTENCE.format(run / 'config.yaml')}\n")
    monkeypatch.setattr(RunDirectory, "cut", cut)
    assert main(command) == 0


@pytest.mark.parametrize("size", [0, 100, 20_000])
def test_nothing_is_left_of_a_checkpoint_wherever_it_fails(tmp_path, size):
    path = tmp_path / "step-1"
    save_checkpoint(path, small_model(), small_tokenizer())
    before = {p: p.read_bytes() for p in path.rglob("*")}
    with full_at(size), pytest.raises(WriteError, match="File too large"):
        save_checkpoint(path, small_model(seed=1), small_tokenizer())
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p != path} == before


def test_what_is_no_matter_of_the_disk_is_raised_as_it_is(tmp_path):
    with pytest.raises(KeyError), writing(tmp_path):
        raise KeyError("a slip")


@pytest.mark.fault("a second signal while PyTorch writes a checkpoint", "the run ends by it")
def test_a_signal_in_a_save_is_no_failure_of_it(start, monkeypatch):
    def interrupted(self, plan, planner):
        raise KeyboardInterrupt

    monkeypatch.setattr(HuggingFaceStorageWriter, "write_data", interrupted)
    with pytest.raises(KeyboardInterrupt):
        start(**QUICK, save_errors="none").train()


@pytest.mark.fault(
    "a disk that is full at the end of a run, as its curves are drawn",
    "one sentence and no piece of a picture; the run is not finished, and --resume auto ends it",
)
def test_curves_that_cannot_be_written(start):
    run = start(**QUICK, max_steps=1).run
    run.add_metrics({"step": 1, "reward": 1.0, "rewards/silent/mean": 1.0})
    with full_at(1_000), pytest.raises(WriteError) as error:
        run.finish("rewards/silent/mean")
    assert str(error.value) == SENTENCE.format(run.path / "curves.png")
    left = {path.name for path in run.path.iterdir()}
    assert not [name for name in left if "curves" in name or "summary" in name]


@pytest.mark.fault(
    "a disk that is full in the midst of a line of metrics or completions",
    "what was written of it is taken back, one sentence, and the run stops",
)
def test_a_line_that_cannot_be_written_whole_is_taken_back(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append_lines(path, [{"step": 1}])
    before = path.read_bytes()
    with full_at(len(before) + 20), pytest.raises(WriteError) as error:
        append_lines(path, [{"step": 2, "text": "x" * 100}])
    assert str(error.value) == SENTENCE.format(path)
    assert path.read_bytes() == before
    append_lines(path, [{"step": 2}])
    assert read_lines(path) == [{"step": 1}, {"step": 2}]


def test_a_run_whose_lines_cannot_be_written_stops(start):
    trainer = start(**QUICK)
    write = trainer.journal.step

    def step(metrics, **options):
        with full_at(300):
            write(metrics, **options)

    trainer.journal.step = step
    with pytest.raises(WriteError, match="could not be written: File too large"):
        trainer.train()
    assert (trainer.run.path / "metrics.jsonl").read_bytes() == b""


def test_a_file_that_cannot_be_replaced_is_as_it_was(tmp_path):
    path = tmp_path / "config.yaml"
    write_whole(path, "a: 1\n")
    with full_at(4), pytest.raises(WriteError, match="could not be written"):
        write_whole(path, "a: 123456\n")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("config.yaml", "a: 1\n")]


@pytest.fixture
def own():
    """Be someone whom permissions bind, and return a directory of theirs."""
    root = os.geteuid() == 0
    with tempfile.TemporaryDirectory() as folder:  # above pytest's are some of root's alone
        if root:
            os.chown(folder, 65534, 65534)
            os.seteuid(65534)
        try:
            yield Path(folder)
        finally:
            if root:
                os.seteuid(0)


@pytest.mark.fault(
    "output_dir is in a directory that may not be listed, and a file that came with the model is "
    "read-only",
    "checkpoints are written",
)
def test_a_checkpoint_takes_no_more_than_the_right_to_write_it(own):
    path = own / "scratch" / "mine" / "final"
    path.parent.mkdir(parents=True)
    code = begin_checkpoint(path) / "modeling.py"
    code.touch()
    code.chmod(0o444)
    (own / "scratch").chmod(0o311)
    try:
        finish_checkpoint(path, small_model(), small_tokenizer())
        assert damage(path) is None
    finally:
        (own / "scratch").chmod(0o755)


@pytest.mark.fault(
    "a file system that does not sync directories", "all is written; a file is synced or refused"
)
def test_names_are_left_to_a_file_system_that_does_not_sync_them(tmp_path, monkeypatch):
    fsync = os.fsync
    refused: dict[str, int] = {}

    def refuse(descriptor):  # there is no such file system here
        is_directory = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        number = refused.get("directories" if is_directory else "files")
        if number is not None:
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    for refused["directories"] in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
        write_whole(tmp_path / "config.yaml", "a: 1\n")
        save_checkpoint(tmp_path / "final", small_model(), small_tokenizer())
    for what, number in (("directories", errno.EIO), ("files", errno.EINVAL)):
        refused[what] = number
        with pytest.raises(WriteError, match=os.strerror(number)):
            write_whole(tmp_path / "config.yaml", "a: 2\n")


@pytest.fixture
def disk(tmp_path):
    """Mount a file system of 4 MiB, if this process may."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("cannot mount a file system here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.fault(
    "a file system that is really full", "the checkpoint before is whole, and so are all lines"
)
def test_a_disk_that_is_full(start, disk):
    trainer = start(**QUICK, output_dir=str(disk / "run"), max_steps=20)
    with pytest.raises(WriteError, match="No space left on device"):
        trainer.train()
    steps = trainer.run.checkpoints.steps()
    newest = trainer.run.checkpoints.of_step(len(steps))
    assert steps and trainer.run.checkpoints.newest() == (newest, [])
    for name in ("metrics", "completions", "rewards"):
        text = (trainer.run.path / f"{name}.jsonl").read_text()
        assert text.endswith("\n") and all(json.loads(line) for line in text.splitlines())
    shutil.rmtree(trainer.run.checkpoints.of_step(1))
    trainer = Trainer(trainer.config, resume=True)  # there is room now
    assert trainer.step == len(steps)
    trainer.journal.__exit__(None, None, None)
