"""What arrives in each tracker, read back from what it wrote."""

import html
import json
import math
import re
import shutil
import sqlite3
import struct
import sys
import time
from importlib.util import find_spec

import pytest

from fastgrpo import trackers
from fastgrpo.config import config_from
from fastgrpo.run_directory import RunDirectory
from fastgrpo.trackers import Tracker, build_trackers, check_trackers, tracked_name
from fastgrpo.trainer import Trainer

STEPS = [
    {"step": 1, "reward": 0.25, "rewards/judge/mean": 0.5, "kl": None, "loss": math.nan},
    {"step": 2, "reward": 0.75, "rewards/judge/mean": 1.0, "eval_reward": 0.125},
]
SAMPLES = [
    {
        "step": 2,
        "prompt": [{"role": "user", "content": "1+1="}],
        "completion": "a | b\n<b>`x`</b>",
        "rewards": {"judge": 1.0, "other": None},
        "advantage": [0.25, 0.75],
    }
]
COLUMNS = ["step", "prompt", "completion", "judge", "other", "advantage"]
MESSAGES = '[{"role": "user", "content": "1+1="}]'


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a short run to one tracker; skipped where its package is not installed."""

    def run(name, **values):
        monkeypatch.setenv("WANDB_MODE", "offline")
        monkeypatch.setenv("WANDB_SILENT", "true")
        monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
        if name == "trackio" and name in sys.modules:
            pytest.skip("trackio was imported before its folder could be named")
        pytest.importorskip(name)
        monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
        path = tmp_path / "my-run"
        path.mkdir()
        config = config_from({"task": "arithmetic", "report_to": [name], "seed": 7, **values})
        said = []
        (tracker,) = build_trackers(config, path, said.append)
        for metrics in STEPS:
            tracker.log(metrics, metrics["step"])
        tracker.completions(SAMPLES, 2)
        tracker.close()
        assert said == []
        return path

    return run


def test_tensorboard_has_the_numbers_the_configuration_and_the_completions(write):
    path = write("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(path / "tensorboard"))
    events.Reload()
    found = {
        name: [(event.step, event.value) for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }
    assert math.isnan(found.pop("train/loss")[0][1])
    assert found == {
        "train/reward": [(1, 0.25), (2, 0.75)],
        "train/rewards/judge/mean": [(1, 0.5), (2, 1.0)],
        "eval/reward": [(2, 0.125)],
    }
    (arguments,) = events.Tensors("args/text_summary")
    assert '"seed": 7' in arguments.tensor_proto.string_val[0].decode()
    (table,) = events.Tensors("completions/text_summary")
    assert table.step == 2
    head, line, row = table.tensor_proto.string_val[0].decode().splitlines()
    assert head == f"| {' | '.join(COLUMNS)} |"
    assert line == "| --- | --- | --- | --- | --- | --- |"
    cells = [html.unescape(cell) for cell in row.removeprefix("| ").removesuffix(" |").split(" | ")]
    assert cells == ["2", MESSAGES, "a | b<br><b>`x`</b>", "1", "", "0.5"]


HOSTILE = (
    "![t](http://evil.example/x.png) **bold** __u__ [click](http://evil.example) `code` "
    '<http://evil.example> <img src="http://evil.example/y.png"> \\* &amp; | ~~~'
)


def test_no_text_of_a_completion_is_markup_in_tensorboard():
    """Its page turns Markdown into HTML, whose pictures the viewer's browser would fetch."""
    plugin_util = pytest.importorskip("tensorboard.plugin_util")
    lines = [["completion"], ["---"], [f"{HOSTILE}\n# second line\n\n    third\r\n---"]]
    table = trackers.markdown_table(lines[0], lines[2:])
    page = plugin_util.markdown_to_safe_html(table)
    tags = re.findall(r"<(/?\w+)", page)
    assert set(tags) == {
        t for tag in ("table", "thead", "tbody", "tr", "th", "td") for t in (tag, f"/{tag}")
    } | {"br"}
    (cell,) = re.findall(r"<td>(.*?)</td>", page, re.DOTALL)
    shown = html.unescape(cell.replace("<br>", "\n"))
    assert shown.split("\n") == [HOSTILE, "# second line", "", "    third", "---"]


def leveldb_records(log):
    """Yield the records of a log in LevelDB's format, which W&B puts its own 7 bytes before."""
    record, i = b"", 0
    while i + 7 <= len(log):
        room = 32768 - (i + 7) % 32768  # blocks count those 7 bytes
        if room < 7:
            i += room
            continue
        length, kind = struct.unpack_from("<HB", log, i + 4)
        record += log[i + 7 : i + 7 + length]
        i += 7 + length
        if kind in (1, 4):  # a whole one, or the last part of one
            yield record
            record = b""


# Its folders of media files are removed when the interpreter ends, or whenever they are collected.
@pytest.mark.filterwarnings("ignore:Implicitly cleaning up:ResourceWarning")
def test_wandb_has_the_numbers_the_configuration_and_the_completions(write):
    path = write("wandb", run_name="named", project="a-project")
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = path.glob("wandb/offline-run-*/*.wandb")
    records, deadline = [], time.monotonic() + 30
    while not any(record.HasField("exit") for record in records):  # another process writes it
        assert time.monotonic() < deadline
        records = [Record.FromString(x) for x in leveldb_records(file.read_bytes()[7:])]
    history, config, run, ended = [], {}, None, None
    for record in records:
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run = run or (record.run.project, record.run.display_name)
        elif kind == "config":
            config |= {item.key: json.loads(item.value_json) for item in record.config.update}
        elif kind == "exit":
            ended = record.exit.exit_code
        elif kind == "history":
            items = {item.nested_key[0] or item.key: item for item in record.history.item}
            history.append({n: json.loads(i.value_json) for n, i in items.items() if n[0] != "_"})
    assert run == ("a-project", "named")
    assert config["seed"] == 7 and config["report_to"] == ["wandb"]
    assert ended == 0
    first, second, third = history
    assert math.isnan(float(first.pop("train/loss")))
    assert first == {"train/reward": 0.25, "train/rewards/judge/mean": 0.5, "train/global_step": 1}
    assert second == {
        "train/reward": 0.75,
        "train/rewards/judge/mean": 1.0,
        "eval/reward": 0.125,
        "train/global_step": 2,
    }
    assert third["train/global_step"] == 2
    (table,) = path.glob("wandb/offline-run-*/files/media/table/*.json")
    table = json.loads(table.read_text())
    assert table["columns"] == COLUMNS
    assert table["data"] == [[2, MESSAGES, "a | b\n<b>`x`</b>", 1.0, None, 0.5]]


def test_trackio_has_the_numbers_the_configuration_and_the_completions(write, tmp_path):
    write("trackio", project="a-project")
    with sqlite3.connect(tmp_path / "trackio" / "a-project.db") as base:
        rows = base.execute("select run_name, step, metrics from metrics order by id").fetchall()
        ((config,),) = base.execute("select config from configs").fetchall()
    base.close()
    assert {name for name, _, _ in rows} == {"my-run"}
    assert [step for _, step, _ in rows] == [1, 2, 2]
    first, second, third = (json.loads(text) for _, _, text in rows)
    assert first["train/reward"] == 0.25 and first["train/global_step"] == 1
    assert second == {
        "train/reward": 0.75,
        "train/rewards/judge/mean": 1.0,
        "eval/reward": 0.125,
        "train/global_step": 2,
    }
    (row,) = third["completions"]["_value"]
    assert row["completion"] == "a | b\n<b>`x`</b>" and row["prompt"] == MESSAGES
    assert row["judge"] == 1.0 and row["advantage"] == 0.5
    assert json.loads(config)["seed"] == 7


@pytest.mark.slow
def test_names_are_those_of_transformers_callbacks():
    from transformers.integrations.integration_utils import rewrite_logs

    for name in ("reward", "rewards/judge/mean", "eval_reward", "eval_rewards/a/mean", "evaluated"):
        assert list(rewrite_logs({name: 0})) == [tracked_name(name)]


class Broken:
    def __init__(self):
        self.calls = 0

    def numbers(self, metrics, step):
        self.calls += 1
        raise ConnectionError("no route to host")

    table = numbers

    def close(self, *, failed):
        self.calls += 1
        raise TimeoutError


def test_a_tracker_that_fails_is_told_of_once_and_tried_again():
    said, broken = [], Broken()
    tracker = Tracker("wandb", broken, said.append)
    tracker.log({"reward": 1.0}, 1)
    tracker.log({"reward": 1.0}, 2)
    tracker.log({"name": "no number"}, 3)
    tracker.completions([], 3)
    tracker.close(failed=True)
    assert broken.calls == 3
    (text,) = said
    assert text.startswith("warning: wandb failed, ConnectionError: no route to host; the run goes")


class Interrupted(Broken):
    def numbers(self, metrics, step):
        raise KeyboardInterrupt


def test_an_interrupt_in_a_tracker_is_one():
    with pytest.raises(KeyboardInterrupt):
        Tracker("wandb", Interrupted(), print).log({"reward": 1.0}, 1)


def test_what_cannot_start_says_so_and_closes_the_others(tmp_path, monkeypatch):
    closed = []

    class Fine(Broken):
        def __init__(self, config, path):
            pass

        def close(self, *, failed):
            closed.append(failed)

    def refuses(config, path):
        raise PermissionError("not logged in")

    monkeypatch.setattr(trackers, "BACKENDS", {"fine": Fine, "wandb": refuses})
    monkeypatch.setattr(trackers, "_installed", lambda package: True)
    config = config_from({"task": "arithmetic", "report_to": ["fine", "wandb"]})
    sentence = "report_to: wandb cannot be started, PermissionError: not logged in; make it work"
    with pytest.raises(ValueError, match=sentence):
        build_trackers(config, tmp_path)
    assert closed == [True]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")
def test_a_run_that_is_refused_is_no_news_to_trackers(start, monkeypatch):
    told = []

    class Told(Broken):
        def __init__(self, config, path):
            told.append("begun")

        def close(self, *, failed):
            told.append(failed)

    monkeypatch.setattr(trackers, "BACKENDS", {"told": Told})
    monkeypatch.setattr(trackers, "_installed", lambda package: True)
    trainer = start(report_to=["told"], save_strategy="steps")
    trainer.journal.warn(1, "of a step that comes again")
    trainer.saver.save_step()
    trainer.run.close()  # and no more, as if it had been killed
    (trainer.run.checkpoints.of_step(0) / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"no checkpoint to go on from \(step-0"):
        Trainer(trainer.config, resume=True)
    assert told == ["begun"]
    shutil.rmtree(trainer.run.checkpoints.folder)
    monkeypatch.setattr(RunDirectory, "cut", lambda *_: 1 / 0)  # later than what refuses most runs
    with pytest.raises(ZeroDivisionError):
        Trainer(trainer.config, resume=True)
    assert told == ["begun", "begun", True]


def test_none_all_and_single_names():
    installed = [name for name in trackers.BACKENDS if find_spec(name) is not None]
    assert check_trackers([]) == check_trackers(["none"]) == check_trackers("none") == []
    assert check_trackers("all") == check_trackers(["all"]) == installed
    for name in installed:
        assert check_trackers(name) == check_trackers([name, name]) == [name]


@pytest.mark.parametrize(
    ("report_to", "sentence"),
    [
        ("wandbb", "'wandbb' is not one of tensorboard, wandb, trackio, did you mean 'wandb'?"),
        (["none", "tensorboard"], "'none' is not one of .*, which stands alone"),
    ],
)
def test_unknown_trackers_are_named(report_to, sentence):
    with pytest.raises(ValueError, match=sentence):
        check_trackers(report_to)


def test_a_folder_of_that_name_is_no_package(tmp_path, monkeypatch):
    if find_spec("wandb") is not None:
        pytest.skip("wandb is installed")
    (tmp_path / "wandb").mkdir()  # as it leaves one in the working directory
    monkeypatch.syspath_prepend(str(tmp_path))
    assert find_spec("wandb") is not None
    with pytest.raises(ValueError, match=r"needs wandb, .*; pip install 'fastgrpo\[wandb\]'"):
        check_trackers(["wandb"])
