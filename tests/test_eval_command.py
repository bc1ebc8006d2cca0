"""Evaluations of small runs, as they are, and what is left of them."""

import json
import shutil
from datetime import UTC, datetime
from functools import cache
from itertools import combinations
from pathlib import Path
from statistics import fmean

import pytest
import torch
import yaml
from datasets import Dataset, DatasetDict
from small_models import save_small_model
from small_runs import lines

from fastgrpo.cli import main
from fastgrpo.report import write_report
from fastgrpo.rewards.answers import is_right

REWARDS = """
def has_e(completions, answer, **columns):
    assert len(answer) == len(completions)
    return [float("e" in text) for text in completions]

def share_of_e(completions, **columns):
    return [text.count("e") / max(len(text), 1) for text in completions]

def shy(prompts, completions, **columns):
    # It judges no completion of the first prompt, and of the others not those that begin with a.
    return [
        None if "Ann has 100 " in prompt or text[:1] in "abcdefgh" else float("e" in text)
        for prompt, text in zip(prompts, completions)
    ]

def fails(completions, **columns):
    raise RuntimeError("no judge \\x1b[2J today")

def at_step(completions, trainer_state, **columns):
    return [float(trainer_state.global_step)] * len(completions)

def even_turns(completions, turns, **columns):
    return [float(count % 2 == 0) for count in turns]

def counting(prompts, engine):
    drawn = engine.generate([engine.encode(prompt) for prompt in prompts])
    return {
        "prompt_ids": [one.prompt_ids for one in drawn],
        "completion_ids": [one.completion_ids for one in drawn],
        "logprobs": [one.logps for one in drawn],
        "turns": [len(one.completion_ids) for one in drawn],
    }

def nothing(prompts, engine, **columns):
    return {"prompt_ids": []}
"""


def problems(numbers):
    return Dataset.from_list(
        [{"prompt": f"Ann has {n} eggs. How many?\n", "answer": str(n)} for n in numbers]
    )


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """Make a directory with data, rewards, a model and a configuration."""
    path = tmp_path_factory.mktemp("workshop")
    splits = {
        "train": problems(range(2, 34)),
        "test": problems(range(100, 112)),
        "both": problems(range(31, 36)),
    }
    DatasetDict(splits).save_to_disk(str(path / "problems"))
    (path / "judges.py").write_text(REWARDS)
    model = save_small_model(path / "model")
    (path / "tiny.yaml").write_text(
        f"model_name_or_path: {model}\n"
        f"dataset_name: {path}/problems\n"
        "dataset_test_split: test\n"
        f"reward_funcs: [{path}/judges.py:has_e, {path}/judges.py:share_of_e]\n"
        "reward_timeout: null\n"
        "num_generations: 4\n"
        "per_device_train_batch_size: 16\n"
        "max_completion_length: 8\n"
        "learning_rate: 3e-2\n"
        "max_steps: 6\n"
        "save_steps: 3\n"
        "cpu_threads: 1\n"
    )
    return path


@pytest.fixture(scope="module")
def run(workshop):
    assert main(["train", str(workshop / "tiny.yaml"), f"output_dir={workshop}/run"]) == 0
    return workshop / "run"


def found(path):
    return json.loads(path.read_text())


def evaluate(run, *arguments):
    """Run the command and return the newest file of estimates."""
    before = set(run.glob("eval/*.json")) if run.is_dir() else set()
    assert main(["eval", str(run), *map(str, arguments)]) == 0
    (path,) = set(run.glob("eval/*.json")) - before
    return path


def test_the_final_checkpoint_is_what_the_run_has_measured(run):
    """The same weights, prompts and random numbers give the accuracies of summary.json."""
    summary = found(run / "summary.json")["test"]
    sampled = found(evaluate(run, "-n", 1))
    assert sampled["metrics"]["pass@1"]["value"] == pytest.approx(summary["sampled"]["after"])
    greedy = found(evaluate(run, "--temperature", 0))
    assert greedy["metrics"]["pass@1"]["value"] == pytest.approx(summary["greedy"]["after"])
    assert (greedy["num_samples"], greedy["temperature"]) == (1, 0.0)
    base = found(evaluate(run, "--checkpoint", "base", "-n", 1))
    assert base["metrics"]["pass@1"]["value"] == pytest.approx(summary["sampled"]["before"])
    assert summary["sampled"]["after"] > summary["sampled"]["before"]  # it has learnt something


@cache
def same(one, other):
    return one == other or (is_right(one, other) and is_right(other, one))


def test_the_files_say_what_was_measured_and_the_numbers_follow_from_the_completions(run, capsys):
    path = evaluate(run, "-n", 6, "-k", "1,3", "--checkpoint", "step-3", "seed=7")
    results, completions = found(path), lines(path.with_suffix(".jsonl"))
    assert path.name == "step-3-test.json"
    expected = {
        "checkpoint": "step-3", "split": "test", "num_prompts": 12, "num_samples": 6,
        "temperature": 1.0, "judge": "has_e", "threshold": None, "seed": 7, "num_not_judged": 0,
    }  # fmt: skip
    assert {key: results[key] for key in expected} == expected
    assert results["versions"]["torch"] == torch.__version__
    assert results["seconds"] > 0
    assert list(results["metrics"]) == ["pass@1", "pass@3", "maj@3"]

    assert [line["row"] for line in completions] == [i // 6 for i in range(72)]
    assert completions[6]["prompt"] == "Ann has 101 eggs. How many?\n"
    groups = [completions[i : i + 6] for i in range(0, 72, 6)]
    for line in completions:
        assert line["right"] == ("e" in line["completion"]) == bool(line["rewards"]["has_e"])
        assert line["answer"] == line["completion"].strip()  # no answer of these has a box
    passed, voted = [], []
    for group in groups:
        draws = list(combinations(group, 3))
        passed.append(fmean(any(line["right"] for line in draw) for draw in draws))
        shares = []
        for draw in draws:
            votes = [sum(same(x["answer"], y["answer"]) for y in draw) for x in draw]
            # Random texts: either two are the same, or all three win a third of the time.
            top = [line for line, n in zip(draw, votes, strict=True) if n == max(votes)]
            shares.append(fmean(line["right"] for line in top))
        voted.append(fmean(shares))
    rights = [line["right"] for line in completions]
    values = {name: metric["value"] for name, metric in results["metrics"].items()}
    assert values == pytest.approx(
        {"pass@1": fmean(rights), "pass@3": fmean(passed), "maj@3": fmean(voted)}
    )
    assert 0 < values["pass@1"] < values["pass@3"] < 1
    for metric in results["metrics"].values():
        assert 0 < metric["low"] < metric["value"] < metric["high"] < 1
        assert metric["num_prompts"] == 12
    averages = results["averages"]
    for name in ("has_e", "share_of_e"):
        mean = fmean(line["rewards"][name] for line in completions)
        assert averages[f"rewards/{name}/mean"] == pytest.approx(mean, rel=1e-6)
    assert averages["completions/mean_length"] == fmean(line["num_tokens"] for line in completions)
    truncated = fmean(not line["finished"] for line in completions)
    assert averages["completions/clipped_ratio"] == pytest.approx(truncated)

    printed = capsys.readouterr().out
    title = " ".join(printed.split())
    assert f"step-3 of {run} on test: 12 prompts × 6, temperature 1, judge has_e" in title
    metric = results["metrics"]["pass@3"]
    row = next(line for line in printed.splitlines() if "pass@3" in line)
    for share in metric["value"], metric["low"], metric["high"]:
        assert f"{share:.1%}" in row
    assert f"results: {path}" in printed


def test_the_same_seed_gives_the_same_completions_and_no_file_is_written_twice(run):
    first = evaluate(run, "-n", 2, "--max-samples", 5)
    second = evaluate(run, "-n", 2, "--max-samples", 5)
    third = evaluate(run, "-n", 2, "--max-samples", 5, "seed=1")
    assert len({first, second, third}) == 3
    texts = [p.with_suffix(".jsonl").read_text() for p in (first, second, third)]
    assert texts[0] == texts[1] != texts[2]
    assert found(first)["metrics"] == found(second)["metrics"]
    assert found(first)["num_prompts"] == 5


def test_completions_are_kept_where_comparing_them_is_interrupted(
    run, tmp_path, monkeypatch, capsys
):
    def interrupt(verdicts, *, by_answer):
        raise KeyboardInterrupt

    arguments = ["eval", str(run), "-n", "2", "--max-samples", "3", "--out", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr("fastgrpo.evaluation.command.count_votes", interrupt)
        assert main(arguments) == 130
    assert capsys.readouterr().err.endswith("fastgrpo: interrupted\n")
    assert [path.name for path in tmp_path.iterdir()] == ["final-test.jsonl"]
    assert len(lines(tmp_path / "final-test.jsonl")) == 6
    start = datetime.now(UTC).replace(microsecond=0)
    assert main(arguments) == 0
    assert {path.name for path in tmp_path.iterdir()} == {
        "final-test.jsonl", "final-test-2.jsonl", "final-test-2.json",
    }  # fmt: skip
    written = datetime.fromisoformat(found(tmp_path / "final-test-2.json")["time"])
    assert start <= written <= datetime.now(UTC)


def test_comparing_answers_is_not_silent_for_long(run, tmp_path, monkeypatch, capsys):
    arguments = ["eval", str(run), "-n", "2", "--max-samples", "3", "--out", str(tmp_path)]
    assert main(arguments) == 0
    quick = capsys.readouterr().out
    assert "compare answers\n" in quick and "compared" not in quick
    monkeypatch.setattr("fastgrpo.evaluation.command._SILENCE_S", 0.0)
    assert main(arguments) == 0
    slow = capsys.readouterr().out
    assert [f"compared those to {i} of 3 prompts\n" in slow for i in (1, 2, 3)] == [True] * 3
    assert main([*arguments, "-k", "1"]) == 0  # there is no vote
    assert "compare answers" not in capsys.readouterr().out


def test_prompts_that_are_trained_on_are_counted(workshop, run, tmp_path, capsys):
    assert found(evaluate(run, "-n", 1, "--max-samples", 2))["num_seen_in_training"] == 0
    assert "trained on" not in capsys.readouterr().out
    assert found(evaluate(run, "-n", 1, "--split", "both"))["num_seen_in_training"] == 3
    assert "note: 3 of 5 prompts are in 'train', which is trained on" in capsys.readouterr().out
    # Those of another dataset, too; what cannot be looked up is not known.
    path = tmp_path / "others.jsonl"
    problems([500, 33]).to_json(str(path))
    other = [f"dataset_name={path}", "dataset_test_split=null"]
    assert found(evaluate(run, "-n", 1, "--split", "train", *other))["num_seen_in_training"] == 1
    moved = workshop / "elsewhere"
    (workshop / "problems").rename(moved)
    try:
        results = found(evaluate(run, "-n", 1, "--split", "train", *other))
    finally:
        moved.rename(workshop / "problems")
    assert results["num_seen_in_training"] is None
    assert "Not known: dataset" in capsys.readouterr().out


def test_rewards_are_told_the_step_of_the_checkpoint(workshop, run):
    override = f"reward_funcs=[{workshop}/judges.py:at_step]"
    for checkpoint, step in (("step-3", 3), ("final", 6), ("base", 0), (run / "final", 6)):
        arguments = ["-n", 1, "--max-samples", 1, "--threshold", 0, "--checkpoint", checkpoint]
        path = evaluate(run, *arguments, override)
        assert [line["rewards"]["at_step"] for line in lines(path.with_suffix(".jsonl"))] == [step]


def test_what_a_rollout_function_adds_serves_the_rewards(workshop, run, capsys):
    judge = f"reward_funcs=[{workshop}/judges.py:even_turns]"
    path = evaluate(run, "-n", 2, judge, f"rollout_fn={workshop}/judges.py:counting")
    for line in lines(path.with_suffix(".jsonl")):
        assert line["right"] == (line["extra"]["turns"] % 2 == 0) == (line["num_tokens"] % 2 == 0)
    capsys.readouterr()
    assert main(["eval", str(run), f"rollout_fn={workshop}/judges.py:nothing"]) == 1
    error = capsys.readouterr().err
    assert "rollout_fn 'nothing' returned nothing under completion_ids, logprobs" in error
    assert "Traceback" not in error


def test_objects_that_a_run_was_given_have_to_be_named(run, tmp_path, capsys):
    shutil.copy(run / "config.yaml", tmp_path)
    objects = {"reward_funcs": ["has_e", "share_of_e"], "rollout_fn": "counting"}
    (tmp_path / "objects.json").write_text(json.dumps(objects))
    for overrides, sentence in (
        (["rollout_fn=null"], "reward_funcs: the run was given has_e, share_of_e as objects of "
         "Python, and config.yaml does not say where to find them; name them, "
         "reward_funcs=[path.py:function]"),
        (["reward_funcs=[accuracy]"], "rollout_fn: the run was given counting as objects"),
        (["reward_funcs=[accuracy]", "rollout_fn=null"], "has no checkpoint 'final'"),
    ):  # fmt: skip
        assert main(["eval", str(tmp_path), *overrides]) == 2
        assert sentence in capsys.readouterr().err


def test_a_page_of_the_run_shows_its_evaluations(run, capsys):
    evaluate(run, "-n", 2)
    capsys.readouterr()
    assert main(["report", str(run), "--out", str(run / "page.html")]) == 0
    assert capsys.readouterr().out == f"{run}/page.html\n"
    page = (run / "page.html").read_text()
    assert "pass@2" in page
    assert "maj@2" in page
    assert "test, 12 prompts × 2, temperature 1.0" in page
    assert write_report(run) == run / "report.html"


def test_a_threshold_makes_right_and_wrong_of_any_reward(run, capsys):
    arguments = ["eval", str(run), "--judge", "share_of_e", "-n", "2"]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "of 'share_of_e' is neither wrong (0) nor right (1); say with --threshold" in error
    path = evaluate(run, *arguments[2:], "--threshold", 0.2)
    results, completions = found(path), lines(path.with_suffix(".jsonl"))
    assert results["threshold"] == 0.2
    rights = [line["rewards"]["share_of_e"] >= 0.2 for line in completions]
    assert rights == [line["right"] for line in completions]
    assert results["metrics"]["pass@1"]["value"] == pytest.approx(fmean(rights))
    assert 0 < sum(rights) < sum(line["rewards"]["has_e"] for line in completions)


def test_what_is_not_judged_neither_counts_nor_votes(workshop, run, capsys):
    override = f"reward_funcs=[{workshop}/judges.py:shy]"
    path = evaluate(run, "-n", 4, "-k", "1,2,4", override)
    results, completions = found(path), lines(path.with_suffix(".jsonl"))
    groups = [completions[i : i + 4] for i in range(0, 48, 4)]
    judged = [[line["right"] for line in g if line["right"] is not None] for g in groups]
    assert judged[0] == []
    missing = sum(4 - len(group) for group in judged)
    assert 4 < missing < 48
    assert results["num_not_judged"] == missing
    assert f"shy did not judge {missing} of 48 completions" in capsys.readouterr().out
    for k in (1, 2, 4):
        enough = [group for group in judged if len(group) >= k]
        metric = results["metrics"][f"pass@{k}"]
        assert metric["num_prompts"] == len(enough)
        expected = [fmean(map(any, combinations(group, k))) for group in enough]
        assert metric["value"] == pytest.approx(fmean(expected))


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_adapters_are_measured_on_the_model_they_were_trained_on(workshop, tmp_path, dtype):
    pytest.importorskip("peft")
    run = workshop / f"adapters-{dtype}"
    options = ["use_peft=true", f"dtype={dtype}", f"output_dir={run}", "max_steps=3"]
    assert main(["train", str(workshop / "tiny.yaml"), *options]) == 0
    assert (run / "final" / "adapter_config.json").is_file()
    summary = found(run / "summary.json")["test"]["sampled"]
    value = {
        name: found(evaluate(run, "--checkpoint", name, "-n", 1))["metrics"]["pass@1"]["value"]
        for name in ("base", "final")
    }
    assert value["base"] == pytest.approx(summary["before"])
    assert value["final"] == pytest.approx(summary["after"])
    assert value["final"] != value["base"]
    # From anywhere, too: adapters name their model.
    shutil.copytree(run / "final", tmp_path / "adapters")
    again = found(evaluate(run, "--checkpoint", tmp_path / "adapters", "-n", 1))
    assert again["metrics"]["pass@1"]["value"] == value["final"]
    assert again["checkpoint"] == str(tmp_path / "adapters")


def test_a_configuration_is_measured_untrained(workshop, run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["eval", str(workshop / "tiny.yaml"), "-n", "1"]) == 0
    path = tmp_path / "runs" / "eval-tiny" / "base-test.json"
    before = found(run / "summary.json")["test"]["sampled"]["before"]
    assert found(path)["metrics"]["pass@1"]["value"] == pytest.approx(before)
    assert "results: runs/eval-tiny/base-test.json" in capsys.readouterr().out
    # A model by its directory, results elsewhere.
    final = run / "final"
    arguments = ["--checkpoint", str(final), "-n", "1", "--out", str(tmp_path / "here")]
    assert main(["eval", str(workshop / "tiny.yaml"), *arguments]) == 0
    after = found(run / "summary.json")["test"]["sampled"]["after"]
    (path,) = (tmp_path / "here").glob("*.json")
    assert found(path)["metrics"]["pass@1"]["value"] == pytest.approx(after)
    assert found(path)["checkpoint"] == str(final)


def test_prompts_of_a_split_the_configuration_does_not_name(workshop):
    text = (workshop / "tiny.yaml").read_text().replace("dataset_test_split: test\n", "")
    (workshop / "no_test.yaml").write_text(text)
    options = ["-n", "1", "--split", "both", "--max-samples", "3", "--out", str(workshop / "three")]
    assert main(["eval", str(workshop / "no_test.yaml"), *options]) == 0
    (path,) = (workshop / "three").glob("*.json")
    assert (found(path)["num_prompts"], found(path)["split"]) == (3, "both")


def test_a_task_is_measured_on_the_split_it_makes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    demo = Path(__file__).parents[1] / "configs" / "demo_arithmetic.yaml"
    options = [
        "warm_start_accuracy=0.001", "max_steps=1", "save_strategy=no", "use_peft=true",
        "output_dir=run", "max_eval_samples=40",
    ]  # fmt: skip
    assert main(["train", str(demo), *options]) == 0
    summary = found(tmp_path / "run" / "summary.json")["test"]["sampled"]
    # The base of these adapters is the model after its warm start, wherever the run lies now.
    (tmp_path / "run").rename("moved")
    results = found(evaluate(Path("moved"), "-n", 1, "--checkpoint", "base"))
    assert results["metrics"]["pass@1"]["value"] == pytest.approx(summary["before"])
    again = found(evaluate(Path("moved"), "-n", 1))
    assert again["metrics"]["pass@1"]["value"] == pytest.approx(summary["after"])
    assert (again["judge"], again["num_prompts"]) == ("exact_match", 40)
    assert again["num_seen_in_training"] == 0
    capsys.readouterr()
    assert main(["eval", "moved", "-n", "1", "--split", "train", "--max-samples", "3"]) == 0
    assert "note: 3 of 3 prompts are in 'train', which is trained on" in capsys.readouterr().out
    # What GRPO began with is never taken for the model before its warm start.
    shutil.rmtree("moved/base")
    assert main(["eval", "moved", "--checkpoint", "base"]) == 2
    assert "began with a model that its task had warmed up" in capsys.readouterr().err
    # Untrained it answers nothing, and is said to answer nothing with some confidence.
    assert main(["eval", str(demo), "-n", "2", "max_eval_samples=30"]) == 0
    assert "before its warm start" in capsys.readouterr().out
    results = found(Path("runs/eval-demo_arithmetic/base-test.json"))
    assert results["metrics"]["pass@2"]["value"] < 0.1
    assert results["metrics"]["pass@2"]["high"] > 0.1


def test_evaluations_in_training_say_how_many_prompts_can_be_solved(workshop):
    run = workshop / "watched"
    options = ["eval_strategy=steps", "eval_steps=2", "num_generations_eval=3", "max_steps=2"]
    config = str(workshop / "tiny.yaml")
    assert main(["train", config, f"output_dir={run}", "save_strategy=no", *options]) == 0
    line = lines(run / "metrics.jsonl")[-1]
    results = found(evaluate(run, "-n", 3))
    assert line["eval_pass@3"] == pytest.approx(results["metrics"]["pass@3"]["value"])
    assert line["eval_rewards/has_e/mean"] == pytest.approx(results["metrics"]["pass@1"]["value"])
    assert line["eval_completions/mean_length"] == results["averages"]["completions/mean_length"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["-n", "2", "-k", "1,4"], "-k: must be between 1 and the samples of a prompt, which are 2,"
         " got 4; give --num-samples 4 or more"),
        (["-k", "0"], "-k: must be between 1 and the samples of a prompt, which are 4, got 0"),
        (["-n", "0"], "--num-samples: must be at least 1, got 0"),
        (["--temperature", "0", "-n", "4"], "--temperature 0 gives the same completion every time"),
        (["--temperature", "-1"], "--temperature: must be 0 (greedy) or more, got -1.0"),
        (["--max-samples", "0"], "--max-samples: must be at least 1, got 0"),
        (["--threshold", "nan"], "--threshold: must be finite, got nan"),
        (["--checkpoint", "step-4"], "has no checkpoint 'step-4' (checkpoints: step-3, step-6, "
         "final); say with --checkpoint which"),
        (["--checkpoint", "./none"], "./none is not a model directory"),
        (["--judge", "has_f"], "--judge: the run has no reward function 'has_f'; it has has_e, "
         "share_of_e"),
        (["--split", "validation"], "has no split 'validation'; it has train, test, both"),
        (["dataset_test_split=null"], "the configuration names no split beside 'train', which is "
         "trained on; say with --split which prompts to measure"),
        (["dataset_test_split=train"], "names no split beside 'train'"),
        (["num_generation=4"], "num_generation: unknown key; did you mean num_generations?"),
        (["reward_funcs=[accuracy:nope]"], "accuracy"),
        (["max_completion_length=250"], "max_completion_length: the prompt of row 0 has 28 tokens"),
    ],
)  # fmt: skip
def test_wrong_input_is_one_sentence_and_nothing_is_written(run, capsys, arguments, sentence):
    before = set(run.rglob("*"))
    assert main(["eval", str(run), *arguments]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert "Traceback" not in error
    assert set(run.rglob("*")) == before


def test_what_bounds_an_evaluation_needs_none_during_training(workshop, run, tmp_path, capsys):
    """Of an override, and of a run that measured prompts which were given as objects."""
    for keys in ((), ("dataset_name", "dataset_test_split")):
        path = tmp_path / "-".join(("run", *keys))
        shutil.copytree(run, path, ignore=shutil.ignore_patterns("eval"))
        values = yaml.safe_load((path / "config.yaml").read_text())
        values |= dict.fromkeys(keys)
        asked = {"max_eval_samples": 3, "num_generations_eval": 2}
        overrides = [f"{key}={value}" for key, value in asked.items()]
        if keys:
            values |= {"max_eval_samples": 3}
            overrides = [f"dataset_name={workshop}/problems", "num_generations_eval=2"]
        (path / "config.yaml").write_text(yaml.safe_dump(values | {"eval_strategy": "no"}))
        results = found(evaluate(path, *overrides, "--split", "test"))
        assert (results["num_prompts"], results["num_samples"]) == (3, 2)


def test_what_is_no_run_is_named(workshop, run, tmp_path, capsys):
    assert main(["eval", str(tmp_path)]) == 2
    assert "is no run directory, it holds no config.yaml" in capsys.readouterr().err
    assert main(["eval", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml: no such file" in capsys.readouterr().err
    assert main(["eval", str(workshop / "tiny.yaml"), "--checkpoint", "final"]) == 2
    assert "has no checkpoint 'final' (checkpoints: none)" in capsys.readouterr().err
    assert main(["report", str(tmp_path)]) == 2
    assert "is no run directory" in capsys.readouterr().err
    # A run that was interrupted.
    shutil.copy(run / "config.yaml", tmp_path)
    assert main(["eval", str(tmp_path)]) == 2
    assert "has no checkpoint 'final' (checkpoints: none)" in capsys.readouterr().err


def test_a_judge_that_fails_ends_the_evaluation_with_a_sentence(workshop, run, capsys):
    before = set(run.rglob("*"))
    assert main(["eval", str(run), f"reward_funcs=[{workshop}/judges.py:fails]"]) == 1
    error = capsys.readouterr().err
    assert "reward function 'fails' raised RuntimeError: no judge \ufffd[2J today" in error
    assert "Traceback" not in error
    assert set(run.rglob("*")) == before


@pytest.mark.parametrize("arguments", [["-k", "1,b"], ["-n", "few"], ["--chekpoint", "final"]])
def test_options_that_cannot_be_read_are_refused(run, capsys, arguments):
    with pytest.raises(SystemExit) as error:
        main(["eval", str(run), *arguments])
    assert error.value.code == 2
    assert next(a for a in reversed(arguments) if a != "final") in capsys.readouterr().err
