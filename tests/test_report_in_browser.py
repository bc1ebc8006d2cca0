"""The page of a run in a headless browser, and its colours."""

import itertools
import re

import numpy as np
import pytest
from browser import Browser, find_browser
from made_up_run import HOSTILE, chart_of, made_up
from small_runs import lines as read_lines

from fastgrpo.report import write_report
from fastgrpo.report.chart import NUM_COLOURS, WIDTH, draw
from fastgrpo.report.files import read_run
from fastgrpo.report.page import TEMPLATE
from fastgrpo.report.panels import curves

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
    browser.point(box[0] + x / WIDTH * box[2], box[1] + box[3] / 2)
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
        "step 20advantage +0.25 (mean of 3 tokens)12 tokens5 of toolsfinished",
    ]
    texts = browser.value("[...document.querySelectorAll('.card pre')].map(p => p.textContent)")
    assert texts[:3] == ["question 20", HOSTILE, "hard"]
    assert texts[4] == "a␀b␛[31m ⟨U+202E⟩evil⟨U+202C⟩ \ufffd שלום".replace("\ufffd", "\ud800")
    assert "accuracy 0format not judged" in browser.value(
        "document.querySelector('.scores').textContent"
    )
    choose(browser, "sort", "1")  # by advantage
    order = [re.search(r"advantage (\S+?) ?(?:\(|1)", text)[1] for text in cards(browser)]
    assert order == ["+0.5", "+0.25", "-0.5"]
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
    assert len(colours) == 2 * NUM_COLOURS
    for scheme in (colours[:NUM_COLOURS], colours[NUM_COLOURS:]):
        for a, b in itertools.combinations(scheme, 2):
            assert np.linalg.norm(cielab(a, vision) - cielab(b, vision)) >= 20, (a, b)


@needs_browser
def test_it_prints(browser, tmp_path):
    browser.size(1000)
    browser.open(write_report(made_up(tmp_path / "run")))
    pdf = browser.pdf()
    assert pdf.startswith(b"%PDF")
    assert 2 <= len(re.findall(rb"/Type\s*/Page\b(?!s)", pdf)) <= 12
