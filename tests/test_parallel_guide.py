"""The guide to several GPUs: its tables are what the script prints, its keys are keys."""

from __future__ import annotations

import re
import shlex
from functools import reduce
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from benchmarks import communication
from fastgrpo.config import TrainConfig

GUIDE = Path(__file__).parents[1] / "fastgrpo" / "PARALLEL.md"


def commands() -> list[tuple[str, str]]:
    """Return the arguments of the guide's commands, and what follows each."""
    text = GUIDE.read_text(encoding="utf-8")
    parts = text.split("```sh\npython -m benchmarks.communication ")[1:]
    return [(part.partition("\n```\n\n")[0], part.partition("\n```\n\n")[2]) for part in parts]


@pytest.mark.parametrize("index", range(4))
def test_the_tables_of_the_guide(index: int, capsys: pytest.CaptureFixture[str]) -> None:
    found = commands()
    assert len(found) == 4
    arguments, follows = found[index]
    communication.main(shlex.split(arguments.replace("\\\n", " ")))
    assert follows.startswith(capsys.readouterr().out + "\n")


def carried_over() -> list[tuple[list[str], list[str]]]:
    """Return what is in backticks in each row of the guide's table: our keys, and verl's."""
    text = GUIDE.read_text(encoding="utf-8").partition("| here | verl")[2].partition("\n\n")[0]
    rows = [line.split(" | ") for line in text.splitlines()[2:]]
    return [(re.findall(r"`(.+?)`", row[0]), re.findall(r"`(.+?)`", row[1])) for row in rows]


def test_our_keys_are_keys() -> None:
    keys = TrainConfig().flat().keys()
    ours = [key.partition(":")[0] for row, _ in carried_over() for key in row]
    assert len(ours) > 30 and set(ours) <= keys


@pytest.mark.peers
def test_verls_keys_are_verls() -> None:
    spec = find_spec("verl")
    if spec is None or spec.origin is None:
        pytest.skip("verl is not installed")
    options = Path(spec.origin).parent / "trainer/config/_generated_ppo_trainer.yaml"
    there = yaml.safe_load(options.read_text(encoding="utf-8"))
    short = {"A.": "actor.", "M.": "model.", "R.": "rollout."}
    for _, keys in carried_over():
        for key in keys:
            name = key.partition("=")[0]
            if name[:2] in short:
                name = f"actor_rollout_ref.{short[name[:2]]}{name[2:]}"
            *path, last = name.split(".")
            assert last in reduce(lambda node, part: node[part], path, there), key
