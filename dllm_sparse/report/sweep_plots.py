"""Curves of retained score against sparsity, a panel per site, a band per curve. matplotlib is imported inside."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dllm_sparse.figures import COLOURS, figure_grid, save_figure
from dllm_sparse.report.sweep_results import results_by_model


def plot_curves(value: Mapping[str, Any], out: Path) -> list[Path]:
    """Writes `curves.png`; nothing where matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        return []
    by_model = results_by_model(value)
    sites = list(next(iter(by_model.values())))
    columns = min(len(sites), 3)
    rows = math.ceil(len(sites) / columns)
    figure, grid = figure_grid(rows, columns, (4.6, 3.4))
    axes = grid.flatten()
    for axis, site in zip(axes, sites, strict=False):
        _panel(axis, site, {model: found[site] for model, found in by_model.items()}, value["config"]["plan"]["retain"])
    for axis in axes[len(sites) :]:
        axis.set_axis_off()
    axes[0].legend(fontsize=7, loc="lower left")
    return [save_figure(out / "curves.png", figure)]


def _panel(axis: Any, site: str, by_model: Mapping[str, Any], retain: float) -> None:
    """One site: the average of every model in bold, its tasks thin; the line at `retain`."""
    for number, (model, found) in enumerate(by_model.items()):
        colour = COLOURS[number % len(COLOURS)]
        main = found["average"] or next(iter(found["tasks"].values()))
        if found["average"] is not None and len(found["tasks"]) > 1:
            for entry in found["tasks"].values():
                axis.plot(*_line(entry["points"]), color=colour, linewidth=0.6, alpha=0.5)
        points = sorted(main["points"], key=lambda point: point["element"])
        axis.plot(*_line(points), color=colour, linewidth=1.8, marker="o", markersize=2.5, label=model)
        banded = [point for point in points if point["kept_interval"] is not None]
        if banded:
            axis.fill_between(
                [100 * point["element"] for point in banded],
                [100 * point["kept_interval"][0] for point in banded],
                [100 * point["kept_interval"][1] for point in banded],
                color=colour,
                alpha=0.15,
                linewidth=0,
            )
    axis.axhline(100 * retain, color="black", linewidth=0.7, linestyle="--")
    axis.set(title=site, xlabel="sparsity (% of entries)", ylabel="score kept (% of dense)", xlim=(0, 100))
    axis.set_ylim(bottom=max(axis.get_ylim()[0], 0), top=min(axis.get_ylim()[1], 130))


def _line(points: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[float]]:
    drawn = sorted((point for point in points if point["kept"] is not None), key=lambda point: point["element"])
    return [100 * point["element"] for point in drawn], [100 * point["kept"] for point in drawn]
