"""What the READMEs say: their commands run, their links lead somewhere, their numbers are those."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
GUIDES = ("README.md", "fastgrpo/README.md", "fastgrpo/PARALLEL.md", "benchmarks/README.md")


def between(mark):
    return README.partition(f"<!-- {mark} -->")[2].partition(f"<!-- /{mark} -->")[0]


def run(command, directory, **options):
    scripts = str(Path(sys.executable).parent)
    environment = os.environ | {
        "PATH": os.pathsep.join([scripts, os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
    }
    done = subprocess.run(
        command, cwd=directory, env=environment, capture_output=True, text=True, **options
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_tour_is_one(tmp_path):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    said = {}
    for language, block in re.findall(r"```(\w+)\n(.*?)```", between("tour"), re.DOTALL):
        commands = block.splitlines() if language == "sh" else [block]
        for command in commands:
            how = {"shell": True} if language == "sh" else {}
            given = command if language == "sh" else [sys.executable, "-c", command]
            said[command.split()[1] if language == "sh" else "python"] = run(given, tmp_path, **how)
    assert list(said) == ["train", "eval", "report", "python"]
    run_path = tmp_path / "runs" / "demo"

    test = json.loads((run_path / "summary.json").read_text())["test"]
    for how in ("greedy", "sampled"):
        assert test[how]["after"] > test[how]["before"] + 0.2
        assert f"{test[how]['after']:.1%}" in said["train"]

    (found,) = [json.loads(p.read_text()) for p in (run_path / "eval").glob("*.json")]
    pass_1, pass_8 = (found["metrics"][f"pass@{k}"] for k in (1, 8))
    # The test at the end of training was one sample of each of the same prompts.
    assert pass_1["value"] == pytest.approx(test["sampled"]["after"], abs=0.04)
    assert pass_1["low"] < pass_1["value"] < pass_1["high"] < pass_8["value"] <= 1
    assert "pass@8" in said["eval"]

    page = (run_path / "report.html").read_text(encoding="utf-8")
    assert said["report"].strip().endswith("report.html")
    assert "exact_match" in page

    answer = re.search(r"12\+34=\s*([\d ]+)", said["python"])
    assert answer is not None, said["python"]


def test_the_planned_memory_is_that_of_the_configurations():
    """Which tests/test_configs.py holds to the plan."""
    rows = re.findall(r"\[(\S+)\]\((configs/\S+)\) .*\| (.+) \|$", between("configs"), re.MULTILINE)
    assert {path for _, path, _ in rows} == {f"configs/{p.name}" for p in ROOT.glob("configs/*")}
    for name, path, planned in rows:
        text = (ROOT / path).read_text(encoding="utf-8")
        found = re.search(r"([\d.]+) GiB in (\w+)", text)
        assert path == f"configs/{name}.yaml"
        assert planned == (f"{found[1]} in {found[2]}" if found else "-")


@pytest.mark.parametrize("page", GUIDES)
def test_links_lead_somewhere(page):
    guide = ROOT / page
    links = re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", guide.read_text(encoding="utf-8"))
    assert links
    missing = [link for link in links if not (guide.parent / link).exists()]
    assert not missing


def test_every_key_that_a_guide_names_is_one():
    from fastgrpo.config import TrainConfig
    from fastgrpo.config.trl import translate

    keys = TrainConfig().flat().keys()
    text = (ROOT / "fastgrpo" / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([a-z][a-z0-9_]+): [^`]*`", text))
    assert len(named) > 20
    for key in named - keys:  # TRL's names of ours
        _, problems = translate({key: 1})
        assert not problems, key
