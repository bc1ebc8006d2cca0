"""The page of a run: its numbers, and what it refuses."""

import collections
import json
import math
import os
import re
import statistics

import pytest
import yaml
from made_up_run import chart_of, completion, made_up, write_lines
from small_runs import lines as read_lines

from fastgrpo.report import write_report
from fastgrpo.report.chart import Chart, Series, draw
from fastgrpo.report.completions import MOST_BYTES, MOST_CHARACTERS, browsable
from fastgrpo.report.files import read_run
from fastgrpo.report.page import about, headline
from fastgrpo.report.panels import curves, evaluations, others
from fastgrpo.report.totals import histograms, timings

DEEP = "[" * 100_000 + "]" * 100_000


def test_curves_hold_every_step_and_name_what_is_absent(tmp_path):
    run = read_run(made_up(tmp_path / "run"))
    charts, absent = curves(run)
    metrics = read_lines(run.path / "metrics.jsonl")
    for title, keys in (
        ("Reward", ["reward"]),
        ("Reward functions", ["rewards/accuracy/mean", "rewards/format/mean"]),
        ("Entropy", ["entropy"]),
    ):
        chart = chart_of(charts, title)
        assert [series.key for series in chart.series] == keys
        for series in chart.series:
            assert series.values == [line[series.key] for line in metrics]
    length = chart_of(charts, "Completion length").series[0]
    assert (length.low[4], length.high[4]) == (3, 205)
    assert {"KL to the reference", "Gradient norm"} <= set(absent)


def test_every_metric_has_a_chart(tmp_path):
    run = read_run(made_up(tmp_path / "run"))
    charts, _ = curves(run)
    failures = chart_of(charts, "Failures of reward functions")
    assert [s.name for s in failures.series] == ["rewards/format/timeouts"]
    assert failures.series[0].values == [s // 4 for s in range(1, 41)]
    logged, own = others(run)
    assert [c.title for c in logged] == ["my_rewards/share of <i>hints</i>"]
    assert logged[0].series[0].values == [s % 3 for s in range(1, 41)]
    assert [c.title for c in own] == ["num_tokens", "step_time", "advantages/std"]
    time_chart, _ = timings(run)
    drawn = [
        s.key for c in (*charts, *logged, *own, time_chart, *evaluations(run)) for s in c.series
    ]
    bands = {"completions/min_length", "completions/max_length"}
    metrics = read_lines(run.path / "metrics.jsonl")
    assert {name for line in metrics for name in line} - {"step"} - bands <= set(drawn)
    page = write_report(run.path).read_text()
    assert "my_<wbr>rewards/<wbr>share of &lt;i&gt;hints&lt;/<wbr>i&gt;" in page
    assert "3 more of the trainer" in page


def test_a_metric_of_a_few_steps_is_drawn_at_these(tmp_path):
    path = made_up(tmp_path / "run")
    with open(path / "metrics.jsonl", "a") as file:
        file.write('{"step": 20, "eval_completions/mean_length": 5, "eval_hints": 1}\n')
        file.write('{"step": 40, "eval_completions/mean_length": 7}\n')
    logged, own = others(read_run(path))
    chart = chart_of(own, "eval_completions/mean_length")
    assert [x[0] for x in chart.x] == [20, 40]
    assert (chart.style, chart.series[0].values) == ("points", [5, 7])
    assert chart_of(logged, "eval_hints").series[0].values == [1]


def test_a_run_of_objects_says_so(tmp_path):
    path = made_up(tmp_path / "run")
    for values, model in (
        ({"task": "arithmetic"}, "made on the spot (task arithmetic)"),
        ({}, "an object given to Trainer"),
    ):
        (path / "config.yaml").write_text(yaml.safe_dump(values))
        assert about(read_run(path)) == [("Model", model), ("Dataset", model)]


def test_a_long_run_is_drawn_in_bins_with_their_extremes(tmp_path):
    path = made_up(tmp_path / "run", n=2001)
    charts, _ = curves(read_run(path))
    chart = chart_of(charts, "Entropy")
    series = chart.series[0]
    # 2001 steps, 400 values at most: 6 steps each, of which step 7 has no entropy.
    assert chart.x[:2] == [(1, 6), (7, 12)]
    assert chart.x[-1] == (1999, 2001)
    assert series.values[1] == pytest.approx(statistics.fmean(1 / s for s in range(8, 13)))
    assert (series.low[1], series.high[1]) == (1 / 12, 1 / 8)
    length = chart_of(charts, "Completion length").series[0]
    assert (length.low[0], length.high[0]) == (3, 206)
    assert write_report(path).stat().st_size < 3e6
    assert "Every point stands for 6 steps" in (path / "report.html").read_text()


def test_evaluations_are_points_with_their_intervals(tmp_path):
    run = read_run(made_up(tmp_path / "run"))
    rewards, accuracy = evaluations(run)
    assert [x[0] for x in rewards.x] == [10, 20, 30, 40]
    assert rewards.series[0].values == [0.1, 0.2, 0.3, 0.4]
    assert [x[0] for x in accuracy.x] == [0, 20]
    series = accuracy.series[0]
    assert (series.values, series.low, series.high) == ([0.25, 0.45], [0.2, 0.2], [0.5, 0.5])


def evaluate(path, name, at, value=0.25, **found):
    """Write what an evaluation found, `at` seconds after the epoch."""
    found = {
        "checkpoint": "final",
        "split": "test",
        "num_prompts": 100,
        "num_samples": 4,
        "temperature": 1.0,
        "judge": "accuracy",
        "threshold": None,
        "metrics": {"pass@1": {"value": value, "low": 0.0, "high": 1.0}},
    } | found
    (path / "eval" / name).write_text(json.dumps(found))
    os.utime(path / "eval" / name, (at, at))


def accuracies(path):
    """Return the points of held-out accuracy by the names of their series."""
    (chart,) = [c for c in evaluations(read_run(path)) if c.title == "Held-out accuracy"]
    steps = [x[0] for x in chart.x]
    return {s.name: dict(zip(steps, s.values, strict=True)) for s in chart.series}


def without_evaluations(path):
    for found in (made_up(path) / "eval").iterdir():
        found.unlink()
    return path


def test_only_checkpoints_of_the_run_are_points_of_its_curve(tmp_path):
    path = without_evaluations(tmp_path / "run")
    names = ["base", "step-20", "final", "/other/run/final", "other/checkpoints/step-30", "a/base"]
    for i, checkpoint in enumerate(names):
        evaluate(path, f"{i}.json", at=i, value=i / 10, checkpoint=checkpoint)
    assert accuracies(path) == {"pass@1": {0: 0.0, 20: 0.1, 40: 0.2}}
    page = write_report(path).read_text()
    assert "<td>/other/run/final</td>" in page  # in the table


def test_of_two_evaluations_of_the_same_the_newer_counts(tmp_path):
    path = without_evaluations(tmp_path / "run")
    for name, at, value in (("final-test.json", 1, 0.5), ("final-test-2.json", 2, 0.9)):
        evaluate(path, name, at, value)
    assert accuracies(path) == {"pass@1": {40: 0.9}}
    evaluate(path, "final-test.json", 3, 0.6)  # removed and measured anew
    assert accuracies(path) == {"pass@1": {40: 0.6}}
    for i in range(2, 12):  # copied: all have the time of the copy
        evaluate(path, f"final-test-{i}.json", 3, i / 100)
    assert accuracies(path) == {"pass@1": {40: 0.11}}


def test_judges_and_thresholds_are_told_apart(tmp_path):
    path = without_evaluations(tmp_path / "run")
    over = "test, 100 prompts × 4, temperature 1.0"
    for i, found in enumerate(
        [
            {},
            {"judge": "format"},
            {"judge": "model", "threshold": 0.5},
            {"judge": "model", "threshold": 2},
        ]
    ):
        evaluate(path, f"{i}.json", at=i, value=i / 10, **found)
    assert accuracies(path) == {
        f"pass@1 ({over}, judge accuracy)": {40: 0.0},
        f"pass@1 ({over}, judge format)": {40: 0.1},
        f"pass@1 ({over}, judge model from 0.5 on)": {40: 0.2},
        f"pass@1 ({over}, judge model from 2 on)": {40: 0.3},
    }


def test_histograms_count_every_completion_of_the_tenths_and_those_not_judged(tmp_path):
    run = read_run(made_up(tmp_path / "run"))
    accuracy, form = histograms(run)
    # 40 generations: steps 1 to 4 against 37 to 40, two completions each.
    assert list(accuracy.x_text) == ["0", "1"]
    assert [s.values for s in accuracy.series] == [[8, 0], [4, 4]]
    assert accuracy.series[0].name == "first tenth, steps 1 to 4: 8 judged"
    assert list(form.x_text) == ["0.125", "0.25", "0.375", "0.5", "4.625", "4.75", "4.875", "5"]
    assert form.series[1].values == [0, 0, 0, 0, 1, 1, 1, 1]
    assert form.series[1].name == "last tenth, steps 37 to 40: 4 judged, 4 not"


def test_many_rewards_are_counted_in_intervals_that_lose_none(tmp_path):
    path = made_up(tmp_path / "run")
    values = [[math.sin(i + 100 * s) for i in range(50)] for s in range(40)]
    rewards = [{"step": s + 1, "rewards": {"sine": v}} for s, v in enumerate(values)]
    write_lines(path / "rewards.jsonl", rewards)
    (chart,) = histograms(read_run(path))
    first = [v for each in values[:4] for v in each]
    low, high = chart.x[0][0], chart.x[-1][1]
    assert low == min(first + [v for each in values[-4:] for v in each])
    for (a, b), count in zip(chart.x, chart.series[0].values, strict=True):
        assert count == sum(a <= v < b or v == b == high for v in first)
    assert sum(chart.series[0].values) == 200


def test_timings_add_up(tmp_path):
    chart, table = timings(read_run(made_up(tmp_path / "run")))
    assert [(t.name, t.median, t.total, t.share) for t in table] == [
        ("generate", 1.5, 60.0, 0.75),
        ("train", 0.5, 20.0, 0.25),
    ]
    assert [s.values[0] for s in chart.series] == [0.75, 0.25]


@pytest.mark.parametrize(
    "values", [[0.5, 0.51], [-3.0, -1.0], [0.0, 0.0], [1e-9, 2e-9], [12345.0, None], [7.0]]
)
def test_axes_include_zero_and_all_values(values):
    x = [(s, s) for s in range(1, len(values) + 1)]
    drawing = draw(Chart(title="", unit="", x=x, series=[Series(name="", key="", values=values)]))
    heights = drawing.data["heights"]
    known = [v for v in values if v is not None]
    assert heights["low"] <= min(0, *known, 0) <= max(0, *known, 0) <= heights["high"]
    labels = [text for _, text in drawing.y_ticks]
    assert "0" in labels
    assert len(set(labels)) == len(labels) >= 3
    ys = [float(y) for _, _, d in drawing.marks for y in re.findall(r"[ML][\d.]+ ([\d.]+)", d)]
    assert len(ys) == len(known)
    assert all(drawing.top <= y <= drawing.bottom for y in ys)


def test_completions_are_spread_over_the_run_and_long_texts_say_what_is_left_out(tmp_path):
    many = [completion(s, 2) | {"prompt": "p" * 1000} for s in range(1, 1001)]
    found = browsable(many)
    assert len(json.dumps(found)) <= MOST_BYTES
    assert (found["steps"][0], found["steps"][-1]) == (1, 1000)
    gaps = {b - a for a, b in zip(found["steps"][:-2], found["steps"][1:-1], strict=True)}
    assert len(gaps) == 1
    assert len(found["prompts"]) == 1
    text = found["completions"][0]["completion"][0]["text"]
    assert len(text) < MOST_CHARACTERS + 60
    assert f"[… {100_000 - MOST_CHARACTERS:,} characters left out here …]" in text
    assert found["completions"][0]["advantage"] == 0.25  # the mean, as in the live view
    assert found["completions"][0]["per_token"] == 3


@pytest.mark.parametrize(
    ("num_steps", "each", "text"),
    [
        (1, 400, "x" * MOST_CHARACTERS),
        (2, 400, "x" * MOST_CHARACTERS),
        (30, 40, "<&>" * 4000),  # six characters each on the page
        (2, 3, [{"role": "user", "content": "卵" * MOST_CHARACTERS}] * 100),
    ],
)
def test_the_page_stays_small_whatever_a_step_has(tmp_path, num_steps, each, text):
    path = made_up(tmp_path / "run")
    (path / "completions.jsonl").unlink()
    bare = write_report(path).stat().st_size
    lines = [
        completion(step, 0) | {"prompt": f"p{i}", "completion": text}
        for step in range(1, num_steps + 1)
        for i in range(each)
    ]
    write_lines(path / "completions.jsonl", lines)
    page = write_report(path).read_text()
    assert len(page.encode()) - bare < MOST_BYTES + 5000  # the controls
    found = browsable(lines)
    shown = found["completions"]
    counts = collections.Counter(entry["step"] for entry in shown)
    assert set(counts) <= set(found["steps"])
    if isinstance(text, str):
        assert (found["steps"][0], found["steps"][-1]) == (1, num_steps)
        assert len(set(counts.values())) == 1 and sum(counts.values()) * len(text) > MOST_BYTES / 10
        firsts = [found["prompts"][e["prompt"]][0]["text"] for e in shown if e["step"] == 1]
        assert firsts == [f"p{i}" for i in range(len(firsts))]
    assert f"{len(shown)} of {len(lines)} logged completions" in page
    assert "the first of each" in page and "completions.jsonl has all" in page


def test_what_fits_is_there(tmp_path):
    few = [completion(s, 0) | {"completion": "x" * 10_000} for s in (1, 1, 1, *range(2, 100))]
    found = browsable(few)
    assert len(found["completions"]) == 101 and not found["cut"]
    page = write_report(made_up(tmp_path / "run")).read_text()
    assert "12 of 12 logged completions, from 4 of 4 logged steps. Control" in page


def test_a_run_going_on_and_an_old_one_are_read(tmp_path):
    path = made_up(tmp_path / "run")
    with open(path / "metrics.jsonl", "ab") as file:
        file.write('{"step": 41, "reward": "é'.encode()[:-1])
    page = write_report(path, tmp_path / "page.html").read_text()
    assert "The last line of metrics.jsonl is not whole" in page
    assert "not finished: step 40 of 50" in page
    for name in ("rewards.jsonl", "warnings.jsonl", "completions.jsonl"):
        (path / name).unlink()
    for found in (path / "eval").iterdir():
        found.unlink()
    page = write_report(path).read_text()
    assert "Rewards given" not in page
    assert 'id="completions"' not in page
    assert 'id="warnings"' not in page
    assert "health warning" not in page


def test_numbers_at_the_top(tmp_path):
    path = made_up(tmp_path / "run")
    summary = {"steps": 40, "seconds": 3725.0, "versions": {"torch": "9.9"}}
    summary["test"] = {"greedy": {"before": 0.25, "after": 0.5}}
    (path / "summary.json").write_text(json.dumps(summary))
    page = write_report(path).read_text()
    shown = dict(re.findall(r'<span class="name">(.*?)</span><strong>(.*?)</strong>', page))
    # Means of the first four rewards, 0.1 to 0.4, and of the last, 3.7 to 4.
    assert shown == {
        "Test, greedy": "25.0% → 50.0%",
        "Reward": "0.25 → 3.85",
        "Tokens": "40 k",
        "Wall time": "1 h 2 min",
        "Tokens per second": "500",
        "Peak memory": "1.5 GiB",
    }
    assert "+25.0 points, accuracy on held-out prompts" in page  # the configuration's first
    assert "of completions, over all seconds of the steps" in page
    assert "finished, step 40 of 40" in page
    assert "torch 9.9" in page


def test_the_judge_is_that_of_the_summary_and_no_result_a_dash(tmp_path):
    path = made_up(tmp_path / "run")
    summary = {"steps": 40, "judge": "mine", "test": {}}
    summary["test"]["greedy"] = {"before": -1.2, "after": 2.31}
    summary["test"]["sampled"] = {"before": None, "after": 0.5}
    (path / "summary.json").write_text(json.dumps(summary))
    facts = {fact.name: fact for fact in headline(read_run(path))}
    assert facts["Test, greedy"].value == "-1.2 → 2.31"
    assert facts["Test, greedy"].detail == "+3.51, mine on held-out prompts"
    assert facts["Test, sampled"].value == "- → 0.5"
    assert facts["Test, sampled"].detail == "-, mine on held-out prompts"


def test_graded_rewards_between_0_and_1_are_no_percents(tmp_path):
    path = without_evaluations(tmp_path / "run")
    summary = {"steps": 40, "test": {"greedy": {"before": 0.37, "after": 0.5}}}
    (path / "summary.json").write_text(json.dumps(summary))
    graded = "Held-out reward and accuracy"
    for given, value, title, percent in (
        ([0.0, 1.0, None], "37.0% → 50.0%", "Held-out accuracy", True),
        ([0.0, 0.37, None], "0.37 → 0.5", graded, False),
        ([None], "0.37 → 0.5", graded, False),
    ):
        write_lines(path / "rewards.jsonl", [{"step": 1, "rewards": {"accuracy": given}}])
        run = read_run(path)
        assert next(headline(run)).value == value
        assert chart_of(evaluations(run), title).percent == percent


@pytest.mark.parametrize("iterations", [1, 2])
@pytest.mark.parametrize("count", [40, 39, 38, 37])
def test_the_rate_at_the_top_counts_every_token_and_second_once(tmp_path, iterations, count):
    """Two batches a generation, 100 and 300 tokens; sampling takes 10 s, a step 1 s."""
    path = made_up(tmp_path / "run")
    period = 2 * iterations
    rows, tokens = [], 0
    for i in range(count):
        own, seconds = (100, 300)[i % 2], 11.0 if i % period == 0 else 1.0
        tokens += own if i % period < 2 else 0
        rows.append(
            {
                "step": i + 1,
                "loss": 0.1,
                "num_tokens": 1000 * (i // period + 1),
                "step_time": seconds,
                "tokens_per_second": own / seconds,
            }
        )
    write_lines(path / "metrics.jsonl", rows)
    config = yaml.safe_load((path / "config.yaml").read_text())
    config |= {"num_iterations": iterations, "steps_per_generation": 4}
    config["gradient_accumulation_steps"] = 2
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    (fact,) = [fact for fact in headline(read_run(path)) if fact.name == "Tokens per second"]
    assert fact.value == f"{tokens / sum(row['step_time'] for row in rows):,.0f}"


def test_texts_of_a_run_cannot_reorder_the_page(tmp_path):
    path = made_up(tmp_path / "run")
    odd = "\u202e evil \x1b[31m \x00 \x9b \u2066<b>"
    write_lines(path / "warnings.jsonl", [{"step": 1, "text": odd + "\ud800"}])
    config = yaml.safe_load((path / "config.yaml").read_text())
    (path / "config.yaml").write_text(yaml.safe_dump(config | {"run_name": odd, odd: odd}))
    metrics = read_lines(path / "metrics.jsonl")
    metrics[-1] |= {f"rewards/{odd}/mean": 1.0, f"time/{odd}": 1.0}
    write_lines(path / "metrics.jsonl", metrics)
    write_lines(path / "rewards.jsonl", [{"step": 1, "rewards": {odd: [0.0, 1.0]}}])
    evaluate(path, "odd.json", at=1, checkpoint=odd, judge=odd, metrics={odd: {"value": 1}})
    (path / "summary.json").write_text(json.dumps({"judge": odd, "versions": {odd: odd}}))
    page = write_report(path).read_text()
    assert page.count("evil") > 10
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", page)


def test_no_text_of_a_run_becomes_markup(tmp_path):
    page = write_report(made_up(tmp_path / "run")).read_text()
    assert "<script>document.title" not in page
    assert "<img" not in page
    assert "<b>bold" not in page
    assert page.count("<script>") == 1


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda run: (run / "config.yaml").unlink(), "is no run directory"),
        (lambda run: (run / "metrics.jsonl").unlink(), "has no step in metrics.jsonl yet"),
        (
            lambda run: (run / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n'),
            "line 2 is no JSON object: repair or remove that line",
        ),
        (
            lambda run: (run / "rewards.jsonl").write_text('{"rewards": {}}\n'),
            "object 1 has no whole number as its step",
        ),
        (
            lambda run: write_lines(run / "metrics.jsonl", [{"step": 0, "eval_reward": 0.1}]),
            "has no step in metrics.jsonl yet",
        ),
        (
            lambda run: (run / "warnings.jsonl").write_text('{"text": "w"}\n'),
            "object 1 has no whole number as its step",
        ),
        (lambda run: (run / "warnings.jsonl").write_text('{"step": 1}\n'), "object 1 has no text"),
        (
            lambda run: (run / "eval" / "x.json").write_text('{"metrics": {}}'),
            "x.json is no result of `fastgrpo eval`",
        ),
        (
            lambda run: evaluate(run, "x.json", at=1, metrics={"pass@1": 0.5}),
            "x.json is no result of `fastgrpo eval`",
        ),
        (lambda run: (run / "summary.json").write_text(DEEP), "does not hold names and values"),
        (lambda run: (run / "config.yaml").write_text("[" * 2000), "does not hold names and"),
        (
            lambda run: (run / "completions.jsonl").write_text(f'{{"step": 1, "x": {DEEP}}}\n'),
            "line 1 is no JSON object: repair or remove that line",
        ),
        (lambda run: (run / "summary.json").write_text("{"), "does not hold names and values"),
        (lambda run: (run / "config.yaml").write_text("- a\n"), "does not hold names and values"),
    ],
)
def test_what_is_no_run_is_refused_in_a_sentence(tmp_path, spoil, sentence):
    path = made_up(tmp_path / "run")
    spoil(path)
    with pytest.raises(ValueError, match=re.escape(sentence)):
        write_report(path)
    assert not (path / "report.html").exists()


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    path = made_up(tmp_path / "run")
    with pytest.raises(ValueError, match="cannot be written"):
        write_report(path, tmp_path)
    with pytest.raises(ValueError, match="is no directory"):
        write_report(tmp_path / "nothing")
