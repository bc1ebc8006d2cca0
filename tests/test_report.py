"""The picture of a run: what is drawn, on which axes, at which size."""

import struct
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from fastgrpo.report import curves_figure, save_curves

KEY = "rewards/exact_match/mean"


def lines(n: int = 48, **more: float) -> list[dict[str, float | None]]:
    return [
        {
            "step": step,
            "reward": 0.1 + step / n,
            KEY: step / n,
            "entropy": 1 / step,
            "completions/mean_length": 4.0,
            **more,
        }
        for step in range(1, n + 1)
    ]


def panel(figure: Figure, title: str):
    (axes,) = [axes for axes in figure.axes if axes.get_title(loc="left").startswith(title)]
    return axes


def curve(axes, i: int) -> tuple[np.ndarray, np.ndarray]:
    return axes.lines[i].get_xdata(), axes.lines[i].get_ydata()


def test_every_panel_draws_its_metric_over_the_steps() -> None:
    metrics = lines(kl=0.25)
    figure = curves_figure(metrics, title="a run", accuracy_key=KEY, share=True)
    for title, key in (
        ("Reward", "reward"),
        ("Accuracy", KEY),
        ("Entropy", "entropy"),
        ("Completion length", "completions/mean_length"),
        ("KL", "kl"),
    ):
        axes = panel(figure, title)
        steps, values = curve(axes, 0)
        assert steps.tolist() == list(range(1, 49))
        assert values.tolist() == [line[key] for line in metrics]
        assert axes.get_xlabel() == "optimisation step"
        assert axes.get_ylabel()
    assert len(figure.axes) == 5
    assert figure.get_suptitle() == "a run"


def test_the_dark_line_is_the_running_mean() -> None:
    figure = curves_figure(lines(48), title="", accuracy_key=KEY, share=True)
    _, smooth = curve(panel(figure, "Entropy"), 1)
    # 48 steps: two on either side.
    assert smooth[20] == pytest.approx(np.mean([1 / step for step in range(19, 24)]))
    assert smooth[0] == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)
    assert smooth[-1] == pytest.approx((1 / 46 + 1 / 47 + 1 / 48) / 3)
    assert panel(figure, "Entropy").lines[1].get_label() == "mean of 5 steps"


def test_missing_values_are_gaps_and_spoil_no_mean() -> None:
    metrics = lines(48)
    metrics[20]["entropy"] = None
    figure = curves_figure(metrics, title="", accuracy_key=KEY, share=True)
    _, raw = curve(panel(figure, "Entropy"), 0)
    _, smooth = curve(panel(figure, "Entropy"), 1)
    assert np.flatnonzero(np.isnan(raw)).tolist() == [20]
    assert smooth[20] == pytest.approx(np.mean([1 / step for step in (19, 20, 22, 23)]))


def test_axes_include_zero_and_an_accuracy_has_its_whole_range() -> None:
    figure = curves_figure(lines(reward=-0.5), title="", accuracy_key=KEY, share=True)
    assert panel(figure, "Accuracy").get_ylim() == (0, 1.02)
    assert panel(figure, "Completion length").get_ylim() == pytest.approx((0, 4.32))
    low, high = panel(figure, "Reward").get_ylim()
    assert low < -0.5
    assert high >= 0


def test_a_graded_reward_is_no_accuracy_and_not_cut() -> None:
    for most in (3.0, 0.37):
        metrics = [line | {KEY: most} for line in lines()]
        figure = curves_figure(metrics, title="", accuracy_key=KEY, share=False)
        axes = panel(figure, "First reward")
        assert axes.get_ylim() == pytest.approx((0, 1.08 * most))
        assert axes.get_ylabel() == "mean reward"
        assert "%" not in axes.yaxis.get_major_formatter()(most)


def test_panels_without_data_say_so() -> None:
    figure = curves_figure(lines(kl=None), title="", accuracy_key="rewards/other/mean", share=True)
    for title, text in (("KL", "not computed (beta = 0)"), ("Accuracy", "not recorded")):
        axes = panel(figure, title)
        assert [t.get_text() for t in axes.texts] == [text]
        assert len(axes.lines) == 0


@pytest.mark.parametrize("n", [0, 1, 2, 300])
def test_the_picture_has_its_size_whatever_the_number_of_steps(tmp_path: Path, n: int) -> None:
    path = tmp_path / "curves.png"
    save_curves(lines(n), path, title=r"$\run$ {[", accuracy_key=KEY, share=True)
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert struct.unpack(">II", data[16:24]) == (1440, 840)
