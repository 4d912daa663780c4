"""Pictures of `laws`: axes follow the points, laws that do not hold look different, published laws stand beside."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dllm_sparse.figures import BLUE, GREY, figure_grid
from dllm_sparse.report.law_pictures import draw_laws, draw_run, draw_shape
from dllm_sparse.report.law_points import LawPoint
from dllm_sparse.report.laws import activation_laws
from tests.report.test_laws import TOKENS, logarithmic, synthetic

pytest.importorskip("matplotlib")


def test_a_law_is_drawn_with_its_band_and_no_law_without() -> None:
    holds, not_so = activation_laws([*synthetic("silu", ["0.2B"]), *logarithmic("log")], samples=20).value["runs"]
    _, axes = figure_grid(1, 2)
    for axis, run in zip(axes[0], (holds, not_so), strict=True):
        draw_run(axis, run, [])
        low, high = axis.get_ylim()
        seen = run["activation_ratio"]
        assert 0 <= low <= min(seen) <= max(seen) <= high <= 1
    law, none = axes[0]
    assert law.lines[0].get_color() == BLUE
    assert len(law.collections) == 1
    assert max(law.lines[-1].get_xdata()) > 5 * max(TOKENS)
    assert none.lines[0].get_color() == GREY
    assert not none.collections
    assert max(max(line.get_xdata()) for line in none.lines) <= max(TOKENS)
    assert "no limit" in none.get_title()


def test_a_band_that_explodes_does_not_flatten_the_points() -> None:
    (run,) = activation_laws(synthetic("silu", ["0.2B"]), samples=0).value["runs"]
    curve = run["forms"]["silu"]["curve"]
    curve["low"] = [-250.0 for _ in curve["low"]]
    curve["high"] = [None for _ in curve["high"]]
    _, axes = figure_grid(1, 1)
    draw_run(axes[0][0], run, [])
    low, high = axes[0][0].get_ylim()
    assert high - low < 2.3 * np.ptp(run["activation_ratio"])


def test_points_left_out_are_hollow() -> None:
    points = [LawPoint("0.2B", 0.5, 0.9), *synthetic("silu", ["0.2B"])]
    (run,) = activation_laws(points, samples=0, skip_warmup=0.003).value["runs"]
    _, axes = figure_grid(1, 1)
    draw_run(axes[0][0], run, points[:1])
    assert axes[0][0].lines[0].get_markerfacecolor() == "none"
    assert axes[0][0].get_ylim()[1] > 0.9


def test_shapes_have_one_label_each() -> None:
    points = [LawPoint(f"r{r}", 1.0 + i, 0.1 + 1e-4 * r, "", "", 1e6, r) for r in (14, 27, 75, 144.0) for i in range(4)]
    (fit,) = activation_laws(points, samples=0).value["width_depth"]
    figure, axes = figure_grid(1, 1)
    draw_shape(axes[0][0], fit)
    figure.canvas.draw()
    axis = axes[0][0].xaxis
    assert [label.get_text() for label in axis.get_ticklabels()] == ["14", "27", "75", "144"]
    assert [text.get_text() for text in axis.get_ticklabels(minor=True) if text.get_text()] == []


def test_all_pictures_are_written(tmp_path: Path) -> None:
    points = [*synthetic("silu", ["0.2B"]), *synthetic("relu", ["0.4B"]), *logarithmic("log")]
    value = activation_laws(points, samples=0, published=True).value
    assert [path.name for path, _ in draw_laws(tmp_path, value, points)] == ["laws.png", "beside.png"]
    nothing = activation_laws([], published=True).value
    assert [path.name for path, _ in draw_laws(tmp_path, nothing, [])] == ["beside.png"]
