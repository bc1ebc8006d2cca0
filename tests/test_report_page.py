"""The page of a run: its numbers in Python, then what a browser makes of it."""

import itertools
import json
import math
import re
import statistics

import numpy as np
import pytest
import yaml
from browser import Browser, find_browser
from small_runs import lines as read_lines

from fastgrpo.report import write_report
from fastgrpo.report.chart import Chart, Series, draw
from fastgrpo.report.completions import MOST_BYTES, MOST_CHARACTERS, browsable
from fastgrpo.report.files import read_run
from fastgrpo.report.page import TEMPLATE
from fastgrpo.report.panels import curves, evaluations
from fastgrpo.report.totals import histograms, timings

HOSTILE = (
    "</script><script>document.title = 'pwned'</script>"
    "<img src=x onerror=\"document.title = 'pwned'\"><b>bold</b> &amp; {{ 7 * 7 }}"
)
STRANGE = "a\x00b\x1b[31m \u202eevil\u202c \ud800 שלום"


def write_lines(path, objects):
    path.write_text("".join(json.dumps(x) + "\n" for x in objects))


def made_up(path, n=40, **files):
    """Write a run of n steps with everything a run directory can hold."""
    path.mkdir()
    config = {
        "model_name_or_path": "some/model",
        "dataset_name": "some/data",
        "reward_funcs": ["accuracy", "format"],
        "max_steps": 50,
        "learning_rate": 0.5,
        "temperature": 1.0,
        "of_tomorrow": HOSTILE,
    }
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    write_lines(path / "metrics.jsonl", [step_line(s) for s in range(1, n + 1)])
    rewards = [
        {"step": s, "rewards": {"accuracy": [float(s > 5), 0.0], "format": [None, s / 8]}}
        for s in range(1, n + 1)
    ]
    write_lines(path / "rewards.jsonl", rewards)
    completions = [completion(s, i) for s in range(10, n + 1, 10) for i in range(3)]
    write_lines(path / "completions.jsonl", completions)
    write_lines(path / "warnings.jsonl", [{"step": 3, "text": f"no signal {HOSTILE}"}])
    (path / "eval").mkdir()
    for step in (0, 20):
        metrics = {"pass@1": {"value": 0.25 + step / 100, "low": 0.2, "high": 0.5}}
        found = {
            "checkpoint": f"run/checkpoints/step-{step}",
            "split": "test",
            "num_prompts": 100,
            "num_samples": 4,
            "temperature": 1.0,
            "metrics": metrics,
        }
        (path / "eval" / f"{step}.json").write_text(json.dumps(found))
    return path


def step_line(s):
    line = {
        "step": s,
        "reward": 0.1 * s,
        "rewards/accuracy/mean": s / 50,
        "rewards/format/mean": 0.5,
        "entropy": None if s == 7 else 1 / s,
        "loss": 1e-5 * (-1) ** s,
        "completions/mean_length": 100.0 + s,
        "completions/min_length": 3,
        "completions/max_length": 200 + s,
        "completions/clipped_ratio": 0.25,
        "num_tokens": 1000 * s,
        "step_time": 2.0,
        "time/generate": 1.5,
        "time/train": 0.5,
        "tokens_per_second": 500.0,
        "memory/peak_gib": 1.5,
    }
    return line | ({"eval_reward": s / 100} if s % 10 == 0 else {})


def completion(s, i):
    return {
        "step": s,
        "prompt": [{"role": "user", "content": f"question {s}"}],
        "completion": [HOSTILE, STRANGE, "x" * 100_000][i],
        "rewards": {"accuracy": float(i), "format": None},
        "advantage": [0.5, -0.25, 0.5] if i == 2 else i - 0.5,
        "num_tokens": 10 + i,
        "finished": i != 1,
        "extra": {"difficulty": "hard"},
    }


# ---- the numbers


def chart_of(charts, title):
    (found,) = [chart for chart in charts if chart.title == title]
    return found


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


# ---- in a browser

needs_browser = pytest.mark.skipif(
    find_browser() is None,
    reason="no Chromium or Chrome on the path; FASTGRPO_BROWSER may name one",
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


def assert_quiet(browser):
    """Nothing was asked for but the page itself, and nothing complained."""
    asked = [request["request"]["url"] for request in browser.told("Network.requestWillBeSent")]
    assert len(asked) == 1
    assert asked[0].startswith("file://")
    for event in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
        assert browser.told(event) == []


def readout(browser, title):
    """Return where a chart's read-out is, and its values by name of the metric."""
    return browser.value(
        f"""(() => {{
          const figure = document.querySelector('figure[data-title="{title}"]');
          const data = [...figure.querySelectorAll("data")];
          return [
            figure.querySelector(".at").textContent,
            Object.fromEntries(data.map((d) => [d.dataset.key, [Number(d.value), d.textContent]])),
          ];
        }})()"""
    )


@needs_browser
def test_the_page_of_a_real_run_shows_its_numbers(browser, start, tmp_path):
    trainer = start(max_steps=3, logging_steps=1)
    trainer.train()
    run = tmp_path / "run"
    browser.size(1440)
    browser.media("light")
    browser.open(write_report(run))
    metrics = read_lines(run / "metrics.jsonl")
    titles = browser.value(
        "[...document.querySelectorAll('figure.chart')].map(f => f.dataset.title)"
    )
    seen = {}
    for title in titles:
        at, values = readout(browser, title)
        seen |= {key: value for key, (value, _) in values.items()} if "last: step 3" in at else {}
    for key in ("reward", "entropy", "grad_norm", "loss", "learning_rate", "tokens_per_second"):
        assert seen[key] == pytest.approx(metrics[-1][key], rel=1e-5)  # six digits
    # The first step, by keyboard; charts over the same steps follow.
    browser.value("document.querySelector('figure[data-title=\"Reward\"]').focus()")
    browser.press("Home")
    for title, key in (("Reward", "reward"), ("Entropy", "entropy")):
        at, values = readout(browser, title)
        assert at == "step 1"
        assert values[key][0] == pytest.approx(metrics[0][key], rel=1e-5)
        assert float(values[key][1]) == pytest.approx(metrics[0][key], rel=5e-4)  # four digits
    logged = read_lines(run / "completions.jsonl")
    last = [line for line in logged if line["step"] == 3]
    texts = browser.value("[...document.querySelectorAll('.card pre')].map(p => p.textContent)")
    assert texts[0] == last[0]["prompt"]
    assert len(texts) == 2 * len(last)
    assert_quiet(browser)


@needs_browser
def test_pointing_at_a_chart_reads_the_step_below(browser, tmp_path):
    browser.size(1440)
    browser.open(write_report(made_up(tmp_path / "run")))
    box = browser.value(
        "(() => { const plot = document.querySelector('figure[data-title=\"Reward\"] .plot');"
        "plot.scrollIntoView({block: 'center'}); const b = plot.getBoundingClientRect();"
        "return [b.left, b.top, b.width, b.height]; })()"
    )
    run = read_run(tmp_path / "run")
    drawing = draw(chart_of(curves(run)[0], "Reward"))
    x = drawing.data["x"][19]
    browser.point(box[0] + x / 420 * box[2], box[1] + box[3] / 2)
    at, values = readout(browser, "Reward")
    assert (at, values["reward"]) == ("step 20", [2.0, "2"])
    assert readout(browser, "Entropy")[1]["entropy"] == [0.05, "0.05"]
    browser.point(1, 1)
    assert readout(browser, "Reward")[0] == "last: step 40"


def cards(browser):
    return browser.value(
        "[...document.querySelectorAll('.card')].map(c => c.querySelector('header').textContent)"
    )


def choose(browser, control, value):
    browser.value(
        f"(() => {{ const c = document.getElementById('{control}'); c.value = {value!r};"
        "c.dispatchEvent(new Event('change')); c.dispatchEvent(new Event('input')); })()"
    )


@needs_browser
def test_completions_are_chosen_sorted_and_shown_as_text(browser, tmp_path):
    browser.size(1440)
    browser.open(write_report(made_up(tmp_path / "run")))
    assert all(text.startswith("step 40") for text in cards(browser))
    choose(browser, "step", "20")
    assert cards(browser) == [
        "step 20advantage -0.510 tokensfinished",
        "step 20advantage +0.511 tokenstruncated",
        "step 20advantage +0.75 (sum of 3 per-token advantages)12 tokensfinished",
    ]
    texts = browser.value("[...document.querySelectorAll('.card pre')].map(p => p.textContent)")
    assert texts[:3] == ["question 20", HOSTILE, "hard"]
    assert texts[4] == "a␀b␛[31m ⟨U+202E⟩evil⟨U+202C⟩ \ufffd שלום".replace("\ufffd", "\ud800")
    assert "accuracy 0format not judged" in browser.value(
        "document.querySelector('.scores').textContent"
    )
    choose(browser, "sort", "1")  # by advantage
    order = [re.search(r"advantage (\S+?) ?(?:\(|1)", text)[1] for text in cards(browser)]
    assert order == ["+0.75", "+0.5", "-0.5"]
    choose(browser, "show", "truncated")
    assert len(cards(browser)) == 1
    choose(browser, "step", "")
    assert len(cards(browser)) == 4
    choose(browser, "show", "")
    choose(browser, "text", "QUESTION 30")
    assert [text[:7] for text in cards(browser)] == ["step 30"] * 3
    assert browser.value("document.title").startswith("run ")
    assert browser.value("document.querySelectorAll('img, main script:not([type])').length") == 0
    assert_quiet(browser)


@needs_browser
@pytest.mark.parametrize("width", [390, 1440])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_cut_off_and_all_is_readable(browser, tmp_path, width, scheme):
    path = made_up(tmp_path / "run")
    browser.size(width)
    browser.media(scheme)
    browser.open(write_report(path))
    choose(browser, "step", "")
    assert browser.value("document.documentElement.scrollWidth") <= width
    wide = "[...document.querySelectorAll('pre')].filter(p => p.scrollWidth > p.clientWidth).length"
    assert browser.value(wide) == 0
    outside = """[...document.querySelectorAll('svg.plot text')].filter((t) => {
      const a = t.getBoundingClientRect(), b = t.ownerSVGElement.getBoundingClientRect();
      return a.left < b.left || a.right > b.right || a.top < b.top - 1 || a.bottom > b.bottom + 1;
    }).map((t) => t.textContent)"""
    assert browser.value(outside) == []
    overlapping = """[...document.querySelectorAll('svg.plot')].filter((plot) => {
      const labels = [...plot.querySelectorAll('text.x:not(.label)')];
      const boxes = labels.map((t) => t.getBoundingClientRect());
      return boxes.some((b, i) => i && b.left < boxes[i - 1].right);
    }).length"""
    assert browser.value(overlapping) == 0
    # WCAG: 4.5 for text, 3 for lines, on their cards.
    colours = browser.value(
        """(() => {
          const of = (selector, name) => getComputedStyle(document.querySelector(selector))[name];
          const lines = [0, 1, 2, 3, 4, 5, 6, 7].map((i) => {
            const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
            path.setAttribute("class", `line s${i}`);
            document.querySelector("svg.plot").append(path);
            return getComputedStyle(path).stroke;
          });
          return {
            card: of(".chart", "backgroundColor"), text: [of(".unit", "color"), of("h3", "color"),
            of(".plot text", "fill")], lines,
          };
        })()"""
    )
    card = luminance(colours["card"])
    assert (card < 0.1) == (scheme == "dark")
    assert min(contrast(luminance(text), card) for text in colours["text"]) >= 4.5
    assert min(contrast(luminance(line), card) for line in colours["lines"]) >= 3
    assert_quiet(browser)


def luminance(colour):
    """Relative luminance of an sRGB colour, as WCAG defines it."""
    channels = [int(c) / 255 for c in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a, b):
    return (max(a, b) + 0.05) / (min(a, b) + 0.05)


# What people who lack one kind of cone see: Machado, Oliveira, Fernandes (2009), severity 1.
VISION = {
    "normal": np.eye(3),
    "protan": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deutan": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritan": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}
XYZ = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
WHITE = np.array([0.9505, 1.0, 1.089])


def cielab(hexadecimal, vision):
    rgb = np.array([int(hexadecimal[i : i + 2], 16) / 255 for i in (0, 2, 4)])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    x = XYZ @ np.clip(np.array(VISION[vision]) @ linear, 0, 1) / WHITE
    f = np.where(x > 0.008856, np.cbrt(x), 7.787 * x + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("vision", VISION)
def test_colours_of_curves_are_told_apart(vision):
    colours = re.findall(r"--c\d: #(\w{6})", (TEMPLATE / "page.css").read_text())
    assert len(colours) == 16
    for scheme in (colours[:8], colours[8:]):
        for a, b in itertools.combinations(scheme, 2):
            assert np.linalg.norm(cielab(a, vision) - cielab(b, vision)) >= 20, (a, b)


@needs_browser
def test_it_prints(browser, tmp_path):
    browser.size(1000)
    browser.open(write_report(made_up(tmp_path / "run")))
    pdf = browser.pdf()
    assert pdf.startswith(b"%PDF")
    assert 2 <= len(re.findall(rb"/Type\s*/Page\b(?!s)", pdf)) <= 12
