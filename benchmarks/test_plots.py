"""The pictures of a made-up run are written, repeat, and show what was measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from . import plots
from .test_report import MIB, NAIVE, OURS, ceiling, record, run

PNG = b"\x89PNG\r\n\x1a\n"


def test_pictures_are_written_and_repeat(tmp_path: Path) -> None:
    longer = [r | {"N": 128, "ratio_to_ceiling": 1.5} for r in (OURS, NAIVE)]
    gone = record("verl", "triton", status="not installed")
    one, two = run(OURS, NAIVE, gone), run(OURS, NAIVE, gone, *longer)
    two["ceilings"].append(ceiling(128))
    for made, caption in (
        (one, "Time and extra memory by"),
        (two, "Time and extra memory against"),
    ):
        drawings = plots.drawings(made, "loss_cpu")
        assert drawings[0].caption.startswith(caption)
        assert [x.name for x in drawings] == [
            "loss_cpu_H32_V1000_float32.png", "loss_cpu_roofline.png",
        ]  # fmt: skip
        for drawing in drawings:
            files = []
            for _ in range(2):
                drawing.save(tmp_path)
                files.append((tmp_path / drawing.name).read_bytes())
            assert files[0] == files[1] and files[0].startswith(PNG) and len(files[0]) > 10_000


def test_lines_have_the_measured_points() -> None:
    longer = OURS | {"N": 128, "ms_total": [1.0, 2.0, 3.0], "peak_extra_bytes": 5 * MIB}
    figure = plots.drawings(run(OURS, NAIVE, longer), "loss_cpu")[0].draw()
    time, memory = figure.axes
    points = [(list(x.get_xdata()), list(x.get_ydata())) for x in time.lines]
    assert points[0] == ([64, 128], [20.0, 2.0]) and points[1] == ([64], [44.0])
    assert time.lines[1].get_linestyle() == "None"  # one point makes no line
    assert list(memory.lines[0].get_ydata()) == [2.0, 5.0]


def test_no_ratio_to_a_ceiling_makes_no_panel() -> None:
    both = [OURS, OURS | {"N": 128}]
    for ratios, panels in (([None, None], 2), ([None, 1.5], 3)):
        records = [r | {"ratio_to_ceiling": x} for r, x in zip(both, ratios, strict=True)]
        figure = plots.drawings(run(*records, ceilings=[]), "loss_cpu")[0].draw()
        assert len(figure.axes) == panels


@pytest.mark.filterwarnings("error")
def test_several_shapes_give_a_picture_each(tmp_path: Path) -> None:
    shapes = [{}, {"H": 16, "V": 2000, "N": 32}, {"H": 8, "frozen": True}]
    failed = record("verl", "triton", status="failed: out of memory")
    records = [r | shape for shape in shapes for r in (OURS, NAIVE | {"flops": None}, failed)]
    made = run(*records, ceilings=[ceiling() | shape for shape in shapes])
    drawings = plots.drawings(made, "loss_cpu")
    assert [drawing.name for drawing in drawings] == [
        "loss_cpu_H32_V1000_float32.png", "loss_cpu_H16_V2000_float32.png",
        "loss_cpu_H8_V1000_float32.png", "loss_cpu_roofline.png",
    ]  # fmt: skip
    for drawing in drawings:
        drawing.save(tmp_path)
    assert len(drawings[-1].draw().axes) == 2  # a frozen head alone has no roof
