"""A first signal stops a run after its step and saves it, a second one ends it at once."""

import os
import pickle
import signal
import threading

import pytest
from small_models import save_small_model
from small_runs import assert_same_run, left_by, lines, run_config
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

from fastgrpo.cli import main
from fastgrpo.run_directory import RunDirectory
from fastgrpo.signals import SIGNALS, Interrupted, Stopped
from fastgrpo.trainer import Trainer

JUDGE = """
import os
from pathlib import Path

def letter_e(completions, **columns):
    left = Path(__file__).with_name("signals")
    if left.exists():
        calls, *numbers = map(int, left.read_text().split())
        left.write_text(" ".join(map(str, [calls - 1, *numbers])))
        if calls == 0:
            for number in numbers:
                os.kill(os.getpid(), number)
    return [text.count("e") + 0.1 * len(text) for text in completions]
"""


CALLS = {
    "eval_strategy": "steps", "eval_steps": 2, "dataset_test_split": "test", "max_eval_samples": 4,
    "per_device_eval_batch_size": 4,
}  # fmt: skip
"""Of the judge: 0 and 1 before training; 2 and 7 of steps 1 and 3; 3 to 6 of the evaluation after
step 2, and 8 to 11 of that after step 4; 12 and 13 after training."""


@pytest.fixture
def start(tmp_path, two_splits):
    """Make a trainer of 4 steps, two on a generation, that gets signals in a call of its judge."""
    (tmp_path / "judge.py").write_text(JUDGE)
    model = save_small_model(tmp_path / "model")

    def make(*numbers, call=1, run="run", resume=False, **values):
        (tmp_path / "signals").write_text(" ".join(map(str, (call, *map(int, numbers)))))
        values = {
            "reward_funcs": [f"{tmp_path}/judge.py:letter_e"], "reward_timeout": None,
            "num_iterations": 2, "max_steps": 4, "output_dir": str(tmp_path / run),
            "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1,
            "save_strategy": "no", **values,
        }  # fmt: skip
        return Trainer(run_config(tmp_path, two_splits, model, **values), resume=resume)

    return make


def checkpoints(trainer):
    return sorted(path.name for path in trainer.run.path.glob("checkpoints/*"))


def steps(trainer):
    return [line["step"] for line in lines(trainer.run.path / "metrics.jsonl")]


@pytest.mark.fault(
    "SIGINT, SIGTERM or SIGUSR1 in the midst of a step or of an evaluation",
    "the step is finished, an evaluation left for later, both are saved; what goes on from there "
    "is the run that was not stopped",
)
def test_a_signal_stops_a_run_after_its_step(start, tmp_path, capsys):
    before = [signal.getsignal(each) for each in SIGNALS]
    summary = start(run="whole", **CALLS).train()
    whole = left_by(tmp_path / "whole")
    for number, call, step in ((SIGNALS[-1], 7, 3), (signal.SIGTERM, 4, 2), (signal.SIGINT, 12, 4)):
        trainer = start(number, call=call, run=number.name, **CALLS)
        with pytest.raises(Stopped) as stopped:
            trainer.train()
        run = trainer.run.path
        assert str(stopped.value) == (
            f"stopped by {number.name} after step {step}, saved in {run}/checkpoints/step-{step}; "
            f"start it again with output_dir={run} and --resume auto to go on"
        )
        assert stopped.value.number == number
        assert [signal.getsignal(each) for each in SIGNALS] == before
        assert "stopping after this step; again to stop now\n" in capsys.readouterr().out
        assert checkpoints(trainer) == [f"step-{step}"]
        assert (run / "final").exists() == (step == 4)  # in the test after training
        if step == 2:  # it ends again, soon after the evaluation that had been left
            with pytest.raises(KeyboardInterrupt):
                again = start(number, signal.SIGINT, call=4, run=number.name, resume=True, **CALLS)
                again.train()
            assert steps(again) == [1, 2]
        resumed = start(run=number.name, resume=True, **CALLS).train()
        assert resumed["test"] == summary["test"]
        assert_same_run(left_by(run), whole)


@pytest.mark.fault(
    "a second signal", "the run ends at once, and checkpoints that were there are whole"
)
def test_a_second_signal_ends_a_run_at_once(start):
    before = [signal.getsignal(each) for each in SIGNALS]
    trainer = start(signal.SIGTERM, signal.SIGINT, save_strategy="steps", save_steps=2)
    with pytest.raises(KeyboardInterrupt) as ended:
        trainer.train()
    assert not isinstance(ended.value, Interrupted)  # but Python's own, whose handler was there
    assert [signal.getsignal(each) for each in SIGNALS] == before
    assert checkpoints(trainer) == ["step-2"] and steps(trainer) == [1, 2]


@pytest.mark.slow
@pytest.mark.fault(
    "a signal while a resumed run reads its checkpoint, and once it has taken lines back",
    "the run ends at once with 128 + N, and can be resumed as before",
)
def test_a_signal_as_a_run_is_resumed_ends_it_with_its_own_status(start, monkeypatch, capsys):
    trainer = start(save_strategy="steps", save_steps=2, max_steps=2)
    trainer.train()
    run = trainer.run.path
    command = ["train", f"{run}/config.yaml", "max_steps=4", "--resume", "auto"]
    for owner, name, number in (
        (HuggingFaceStorageReader, "read_data", signal.SIGTERM),
        (RunDirectory, "cut", SIGNALS[-1]),
    ):
        with monkeypatch.context() as patch:
            was = getattr(owner, name)

            def ended(*args, was=was, number=number):
                was(*args)
                os.kill(os.getpid(), number)

            patch.setattr(owner, name, ended)
            assert main(command) == 128 + number
        assert capsys.readouterr().err.endswith("\nfastgrpo: interrupted\n")
    assert main(command) == 0
    assert [line["step"] for line in lines(run / "metrics.jsonl")] == [1, 2, 3, 4]


def test_another_process_can_be_told_of_a_signal():
    """PyTorch does, of what ends the reading or writing of a checkpoint."""
    told = pickle.loads(pickle.dumps(Stopped(signal.SIGTERM, "after step 3")))
    assert (type(told), told.number, str(told)) == (Stopped, signal.SIGTERM, "after step 3")


@pytest.mark.fault("a signal with save_only_model", "the model alone is saved, and it is said")
def test_of_a_run_that_keeps_no_state_the_model_is_saved(start):
    values = {"save_strategy": "steps", "save_steps": 9, "save_only_model": True}
    trainer = start(signal.SIGINT, call=0, **values)
    with pytest.raises(Stopped, match="step-1, the model alone: there is no going on from it"):
        trainer.train()
    left = {path.name for path in trainer.run.path.glob("checkpoints/step-1/*")}
    assert "model.safetensors" in left and "state" not in left


def test_handlers_of_ones_own_and_other_threads_are_let_be(start):
    got = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: got.append(number))
    try:
        assert start(signal.SIGUSR1, call=0, max_steps=1).train()["steps"] == 1
        assert got == [signal.SIGUSR1]
    finally:
        signal.signal(signal.SIGUSR1, before)
    trainer, done = start(run="other", max_steps=1), []
    thread = threading.Thread(target=lambda: done.append(trainer.train()))
    thread.start()
    thread.join()
    assert done[0]["steps"] == 1


def test_signals_that_are_ignored_stay_so(start):
    """As of a process that a shell has started in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert start(signal.SIGINT, call=0, max_steps=1).train()["steps"] == 1
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_what_is_sent_twice_at_once_under_torchrun_is_one_signal():
    from fastgrpo.signals import StopAsked, StopRequest

    for joined in (True, False):
        stop = StopRequest(lambda number: number, joined=joined)
        with stop.listening(lambda text: None):
            os.kill(os.getpid(), signal.SIGTERM)
            if joined:
                os.kill(os.getpid(), signal.SIGUSR1)
            else:
                with pytest.raises(KeyboardInterrupt):
                    os.kill(os.getpid(), signal.SIGINT)
            with pytest.raises(StopAsked) as asked:
                stop.check()
        assert asked.value.number == signal.SIGTERM
        stop.check()  # nobody listens any more
