"""Files of `laws`: JSON, CSV of points and fits, PNG with bands, a page."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dllm_sparse.files import write_json, write_text
from dllm_sparse.report.law_points import LawPoint, point_rows
from dllm_sparse.report.law_text import law_row, sentences
from dllm_sparse.report.pictures_page import Part, pictures_page, shown
from dllm_sparse.report.plots import GREY, figure_grid, save_figure
from dllm_sparse.report.sweep_files import write_csv

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's, distinguishable without colour vision."""


def write_laws(out: Path, value: dict[str, Any], points: Sequence[LawPoint]) -> list[Path]:
    """Writes laws.json, laws.csv, points.csv, laws.png (and width-depth.png) and laws.html; returns the paths."""
    fits = [law_row(run) for run in value["runs"]]
    files = [write_json(out / "laws.json", value), write_csv(out / "laws.csv", fits)]
    files.append(write_csv(out / "points.csv", point_rows(points)))
    pictures = draw_laws(out, value)
    rows = [[shown(cell) for cell in row.values()] for row in fits]
    headers = list(fits[0]) if fits else []
    parts = [
        Part("Summary", sentences(value)),
        *(Part(path.stem, picture=(path, caption)) for path, caption in pictures),
    ]
    if rows:
        parts.append(Part("Fits", headers=headers, rows=rows))
    parts.append(Part("What the words mean", _MEANINGS))
    page = pictures_page("Activation laws", f"{len(value['runs'])} runs", parts)
    return [*files, *(path for path, _ in pictures), write_text(out / "laws.html", page)]


_MEANINGS = (
    "Activation ratio: share of (token, neuron) pairs that stay active under CETT-PPL-p%, as far as the points say so.",
    "relu form: A(D) = exp(-c D^alpha + b) + A0; silu form: A(D) = A0 - c / D^alpha; D in billions of tokens.",
    "Bands: 95 % for the curve (not for new points); by bootstrap where there is one, else by the delta method.",
    "Akaike weight: how the two forms share the evidence, corrected for few points.",
    "Lack of fit: p-value of a smooth trend left in the residuals; a form is refused where it is below 0.01.",
)


def draw_laws(out: Path, value: dict[str, Any]) -> list[tuple[Path, str]]:
    """The pictures and their captions; none where matplotlib is missing."""
    if find_spec("matplotlib") is None:
        return []
    figure, axes = figure_grid(1, 1)
    for number, run in enumerate(value["runs"]):
        _draw_run(axes[0][0], run, COLOURS[number % len(COLOURS)])
    for curve in (value["published"] or {"curves": []})["curves"]:
        _draw_published(axes[0][0], curve)
    axes[0][0].set(xlabel="D (billions of tokens)", ylabel="activation ratio", xscale="log")
    if value["runs"]:
        axes[0][0].legend(fontsize=7)
    caption = "Activation ratio over training: points, fitted curve, 95 % band; dotted beyond the data"
    pictures = [(save_figure(out / "laws.png", figure), caption)]
    if value["width_depth"]:
        figure, axes = figure_grid(1, 1)
        for number, fit in enumerate(value["width_depth"]):
            _draw_shape(axes[0][0], fit, COLOURS[number % len(COLOURS)])
        axes[0][0].set(xlabel="width / layers", ylabel="activation ratio", xscale="log")
        axes[0][0].legend(fontsize=7)
        pictures.append((save_figure(out / "width-depth.png", figure), "Activation ratio against width over depth"))
    return pictures


def _draw_run(axis: Axes, run: dict[str, Any], colour: str) -> None:
    axis.plot(run["tokens_billions"], run["activation_ratio"], "o", color=colour, markersize=3.5, label=run["run"])
    if run["best"] is None:
        return
    curve = run["forms"][run["best"]]["curve"]
    low, high = (curve.get(f"bootstrap_{end}", curve[end]) for end in ("low", "high"))
    axis.fill_between(curve["tokens_billions"], low, high, color=colour, alpha=0.18, linewidth=0)
    last = max(run["tokens_billions"])
    inside = [(d, a) for d, a in zip(curve["tokens_billions"], curve["activation_ratio"], strict=True) if d <= last]
    beyond = [(d, a) for d, a in zip(curve["tokens_billions"], curve["activation_ratio"], strict=True) if d >= last]
    for part, style in ((inside, "-"), (beyond, ":")):
        if part:
            axis.plot(*zip(*part, strict=True), style, color=colour, linewidth=1.3)


def _draw_published(axis: Axes, curve: dict[str, Any]) -> None:
    axis.plot(curve["tokens_billions"], curve["activation_ratio"], "--", color=GREY, linewidth=0.8)
    end = (curve["tokens_billions"][-1], curve["activation_ratio"][-1])
    axis.annotate(f"{curve['form']} {curve['size']}", end, fontsize=5, color=GREY)


def _draw_shape(axis: Axes, fit: dict[str, Any], colour: str) -> None:
    values = fit["values"]
    name = f"{fit['kind']} {fit['activation']}".strip() or "runs"
    axis.plot(values["width_depth"], values["activation_ratio"], "o", color=colour, markersize=4, label=name)
    low, high = min(values["width_depth"]), max(values["width_depth"])
    grid = [low * (high / low) ** (step / 100) for step in range(101)]
    axis.plot(grid, [fit["level"] + fit["slope"] * min(x - fit["bottleneck"], 0) for x in grid], color=colour)
    axis.axvline(fit["bottleneck"], color=colour, linestyle=":", linewidth=0.8)
