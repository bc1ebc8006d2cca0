"""The page of a run: its numbers, and what it refuses."""

import json
import math
import re
import statistics

import pytest
from made_up_run import chart_of, completion, made_up, write_lines
from small_runs import lines as read_lines

from fastgrpo.report import write_report
from fastgrpo.report.chart import Chart, Series, draw
from fastgrpo.report.completions import MOST_BYTES, MOST_CHARACTERS, browsable
from fastgrpo.report.files import read_run
from fastgrpo.report.panels import curves, evaluations
from fastgrpo.report.totals import histograms, timings


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
    assert found["completions"][0]["advantage"] == 0.75
    assert found["completions"][0]["per_token"] == 3


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
    assert "+25.0 points" in page
    assert "finished, step 40 of 40" in page
    assert "torch 9.9" in page


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
