"""What several processes refuse, and how a failure of one is told from those it causes."""

from __future__ import annotations

import re

import pytest
import torch
from torch.distributed import HashStore

from fastgrpo import distributed
from fastgrpo.cli import main
from fastgrpo.distributed import is_first_to_fail, is_restarted, join_world, lost_peer, sendable


def test_a_run_that_may_be_restarted_needs_a_directory_with_a_name(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "1")
    assert main(["train", str(place / "config.yaml"), "output_dir=null", "max_steps=1"]) == 2
    (said,) = re.findall("^fastgrpo: (?!loading)(.*)$", capsys.readouterr().err, re.MULTILINE)
    assert said.startswith("output_dir: with --max-restarts torchrun starts a run again")
    assert said.endswith("set output_dir, or leave --max-restarts out")
    assert not (place / "runs").exists()


def test_more_processes_than_gpus_are_refused(monkeypatch):
    """The process group is joined first, so that they can settle who says so."""
    joined: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(distributed.dist, "is_torchelastic_launched", lambda: True)
    monkeypatch.setattr(distributed, "rendezvous", lambda *_, **__: iter([(HashStore(), 1, 4)]))
    monkeypatch.setattr(
        distributed.dist, "init_process_group", lambda backend, **_: joined.append(backend)
    )
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ValueError) as error:
        join_world()
    assert str(error.value) == (
        "torchrun has started 4 processes on a machine with 2 GPUs: lower --nproc-per-node to 2"
    )
    assert joined == ["cpu:gloo,cuda:nccl"]


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (["use_vllm=true"], "use_vllm: is for one process, and not with parallel; leave it out"),
        (["load_in_4bit=true", "use_peft=true"], "load_in_4bit: is for one process, and not with"),
        (["optim=adamw_8bit"], "optim: is for one process, and not with parallel; write adamw_t"),
        (
            ["dtype=bfloat16", "bf16_updates=master_weights"],
            "bf16_updates: is for one process, and not with parallel; write dtype: float32",
        ),
        (["offload_optimizer=true"], "offload_optimizer: is for one process, and not with parall"),
        (
            ["task=arithmetic", "use_peft=true", "model_name_or_path=null", "dataset_name=null"],
            "use_peft: is for one process, and not with parallel; leave it out beside task",
        ),
        (["torch_compile=true"], "torch_compile: is for one process, and not with parallel; leave"),
        (["parallel={data: 2}"], "parallel: must be ddp, or {data: N, shard: M} with whole numb"),
        (
            ["parallel={data: 2, shard: 4}"],
            "parallel: {'data': 2, 'shard': 4} is for the processes that torchrun starts; put "
            "torchrun --nproc-per-node N -m in front of fastgrpo, or leave parallel out",
        ),
    ],
)
def test_what_several_processes_cannot_do_is_refused(place, monkeypatch, capsys, values, sentence):
    monkeypatch.chdir(place)
    if not values[0].startswith("parallel"):
        values = [*values, "parallel={data: 1, shard: 1}"]
    assert main(["train", str(place / "config.yaml"), *values]) == 2
    *before, last = capsys.readouterr().err.splitlines()
    assert sentence in last
    assert len(before) <= 2  # what is loaded, and which file is wrong
    assert not (place / "run").exists()


def test_a_process_alone_is_the_first_to_fail_and_never_restarted(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")  # of a job this process is no part of
    assert is_first_to_fail()
    assert not is_restarted()


class Peculiar(Exception):
    def __init__(self, code: int, text: str) -> None:
        super().__init__(f"{code}: {text}")


def test_what_one_process_raises_for_all_can_be_told_by_all():
    """Exceptions whose arguments are not those of their text cannot be read back from a pickle."""
    common = ValueError("mend it")
    assert sendable(common) is common
    told = sendable(Peculiar(3, "disk is full"))
    assert type(told) is RuntimeError
    assert str(told) == "Peculiar: 3: disk is full"


@pytest.mark.parametrize(
    ("text", "lost"),
    [
        ("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:3871", True),
        ("Read error [127.0.0.1]:2081: Connection reset by peer", True),
        ("ncclRemoteError: a remote process exited or there was a network error", True),
        ("Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1b000", False),
    ],
)
def test_a_lost_peer_is_told_from_what_is_wrong_here(text, lost):
    assert lost_peer(RuntimeError(text)) == lost
    assert not lost_peer(ValueError(text))
