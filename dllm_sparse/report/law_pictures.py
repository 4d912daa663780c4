"""Pictures of `laws`: one axis per run, laws that hold beside the published ones, width over depth."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np

from dllm_sparse.figures import BLUE, COLOURS, GREY, ORANGE, figure_grid, save_figure
from dllm_sparse.report.law_points import LawPoint
from dllm_sparse.report.law_text import law_row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MARKERS = "os^Dv"
_COLUMNS = 4
_WORDS = 48  # characters a line, above an axis
_PUBLISHED_RANGE = (10.0, 300.0)  # billions of tokens; nearer to 0 the published silu laws leave [0, 1]

Picture = tuple[Path, str]


def draw_laws(out: Path, value: dict[str, Any], points: Sequence[LawPoint]) -> list[Picture]:
    """laws.png, beside.png and width-depth.png with their captions; none where matplotlib is missing."""
    if find_spec("matplotlib") is None:
        return []
    pictures = []
    if value["runs"]:
        pictures.append(_runs(out / "laws.png", value["runs"], points))
    if value["published"]:
        pictures.append(draw_beside(out / "beside.png", value))
    if value["width_depth"]:
        pictures.append(_shapes(out / "width-depth.png", value["width_depth"]))
    return pictures


def _runs(path: Path, runs: Sequence[dict[str, Any]], points: Sequence[LawPoint]) -> Picture:
    columns = min(_COLUMNS, len(runs))
    figure, axes = figure_grid(-(-len(runs) // columns), columns, (3.6, 2.8))
    for axis, run in zip(axes.flat, runs, strict=False):
        left_out = [p for p in points if p.run == run["run"] and p.tokens_billions < min(run["tokens_billions"])]
        draw_run(axis, run, left_out)
    for axis in axes.flat[len(runs) :]:
        axis.set_visible(False)
    return save_figure(path, figure, dpi=100), (
        "Activation ratio over training, one run each (axes differ). Filled: fitted points, hollow: left out as "
        "warm-up. Line and band: fit and 95 % band, dotted beyond the data. Grey and dashed: no law, and why"
    )


def draw_run(axis: Axes, run: dict[str, Any], left_out: Sequence[LawPoint]) -> None:
    """A run's points, those `left_out` of the fit hollow; its law as line and band where it holds, and the verdict."""
    holds, said = _verdict(run)
    colour = BLUE if holds else GREY
    early = [(point.tokens_billions, point.activation_ratio) for point in left_out]
    if early:
        axis.plot(*zip(*early, strict=True), "o", color=GREY, markerfacecolor="none", markersize=4)
    axis.plot(run["tokens_billions"], run["activation_ratio"], "o", color=colour, markersize=4)
    seen = [*run["activation_ratio"], *(ratio for _, ratio in early)]
    if run["best"] is not None:
        _draw_curve(axis, run, colour, holds)
        if holds:
            # A band that explodes must not flatten the points: their range on either side is the most it gets.
            room = max(np.ptp(seen), 1e-6)
            ends = np.concatenate(_band(run["forms"][run["best"]]["curve"]))
            seen += np.clip(ends[np.isfinite(ends)], min(seen) - room, max(seen) + room).tolist()
    edge = 0.06 * max(np.ptp(seen), 1e-3)
    _tokens_axis(axis)
    axis.set_ylim(max(min(seen) - edge, 0.0), min(max(seen) + edge, 1.0))
    axis.set_title(f"{run['run']}\n{fill(said, _WORDS)}", fontsize=8, color=colour)


def _tokens_axis(axis: Axes) -> None:
    """A logarithmic axis of tokens with few, plain labels, however short it is."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set(xscale="log", xlabel="D (billions of tokens)", ylabel="activation ratio")
    low, high = axis.get_xlim()
    axis.xaxis.set_major_locator(LogLocator(subs=(1.0,) if high > 100 * low else (1.0, 2.0, 5.0)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())


def _verdict(run: dict[str, Any]) -> tuple[bool, str]:
    """Whether the run has a law that fixes its limit, and what to write above its axis."""
    row = law_row(run)
    if row["best"] is None:
        return False, "not fitted"
    if row["rejected"]:
        return False, f"no law: {row['best']} form refused for lack of fit (p\u00a0=\u00a0{row['trend_p_value']:.1g})"
    if not row["determined"]:
        return False, f"{row['best']} form, no limit: {row['open']}"
    return True, f"{row['best']} form, limit {row['limit']:.3f} [{row['limit_low']:.3f}, {row['limit_high']:.3f}]"


def _band(curve: dict[str, Any]) -> tuple[list[float], list[float]]:
    """By bootstrap where there is one, else by the delta method; what is not finite is NaN."""
    found = (curve.get(f"bootstrap_{end}", curve[end]) for end in ("low", "high"))
    low, high = ([float("nan") if x is None else x for x in end] for end in found)
    return low, high


def _draw_curve(axis: Axes, run: dict[str, Any], colour: str, holds: bool, label: str | None = None) -> None:
    """A law that holds: line, band, dotted beyond the data. One that does not: dashed over the data alone."""
    curve, last = run["forms"][run["best"]]["curve"], max(run["tokens_billions"])
    d, a = np.array(curve["tokens_billions"]), np.array(curve["activation_ratio"])
    if not holds:
        axis.plot(d[d <= last], a[d <= last], "--", color=colour, linewidth=1.1)
        return
    axis.fill_between(d, *_band(curve), color=colour, alpha=0.2, linewidth=0)
    axis.plot(d[d <= last], a[d <= last], "-", color=colour, linewidth=1.4, label=label)
    axis.plot(d[d >= last], a[d >= last], ":", color=colour, linewidth=1.4)


def draw_beside(path: Path, value: dict[str, Any], dpi: int = 150) -> Picture:
    """The published laws and, on one scale, every run whose law holds; one axis per form."""
    published = value["published"]["curves"]
    forms = sorted({curve["form"] for curve in published})
    figure, axes = figure_grid(1, len(forms), (5.2, 4.2))
    for axis, form in zip(axes[0], forms, strict=True):
        _draw_published(axis, [curve for curve in published if curve["form"] == form])
        mine = [run for run in value["runs"] if run["best"] == form and _verdict(run)[0]]
        for number, run in enumerate(mine):
            colour = COLOURS[number % len(COLOURS)]
            marker = _MARKERS[number // len(COLOURS) % len(_MARKERS)]
            axis.plot(run["tokens_billions"], run["activation_ratio"], marker, color=colour, markersize=3)
            _draw_curve(axis, run, colour, True, run["run"])
        _tokens_axis(axis)
        axis.set_title(f"{form} form", fontsize=10)
        axis.legend(fontsize=7, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.17), frameon=False)
    return save_figure(path, figure, dpi), (
        "Laws that hold, with 95 % bands (dotted beyond the data), beside the published ones (grey to black by size, "
        "from 10 billion tokens on)"
    )


def _draw_published(axis: Axes, curves: Sequence[dict[str, Any]]) -> None:
    for number, curve in enumerate(curves):
        d, a = np.array(curve["tokens_billions"]), np.array(curve["activation_ratio"])
        shown = (d >= _PUBLISHED_RANGE[0]) & (d <= _PUBLISHED_RANGE[1])
        shade = str(0.72 - 0.72 * number / max(len(curves) - 1, 1))
        axis.plot(d[shown], a[shown], color=shade, linewidth=1.0, label=f"published {curve['size']}")


def _shapes(path: Path, fits: Sequence[dict[str, Any]]) -> Picture:
    figure, axes = figure_grid(1, len(fits))
    for axis, fit in zip(axes[0], fits, strict=True):
        draw_shape(axis, fit)
    return save_figure(path, figure), (
        "Activation ratio of each run's last point against width over depth, one size per axis; the fitted line is "
        "dashed where it does not beat a constant (p < 0.05)"
    )


def draw_shape(axis: Axes, fit: dict[str, Any]) -> None:
    """Activation against width over depth of one size, and the fitted line."""
    values = fit["values"]
    pairs = sorted(zip(values["width_depth"], values["activation_ratio"], strict=True))
    axis.plot(*zip(*pairs, strict=True), "o", color=BLUE, markersize=5)
    proven = fit["slope_p_value"] is not None and fit["slope_p_value"] < 0.05
    grid = np.geomspace(pairs[0][0], pairs[-1][0], 101)
    line = fit["level"] + fit["slope"] * np.minimum(grid - fit["bottleneck"], 0)
    axis.plot(grid, line, "-" if proven else "--", color=BLUE if proven else GREY, linewidth=1.3)
    bends = fit["knee_p_value"] is not None and fit["knee_p_value"] < 0.05
    if bends:
        axis.axvline(fit["bottleneck"], color=ORANGE, linestyle=":", linewidth=1)
    name = f"{fit['kind']} {fit['activation']}".strip() or "runs"
    p_value = "-" if fit["slope_p_value"] is None else f"{fit['slope_p_value']:.2g}"
    said = f"bottleneck at {fit['bottleneck']:.0f}" if bends else "no proven bottleneck"
    axis.set_title(f"{name}, {fit['parameters'] / 1e6:.3g}M parameters\nslope p = {p_value}, {said}", fontsize=9)
    axis.set(xlabel="width / layers", ylabel="activation ratio", xscale="log")
    axis.set_xticks([x for x, _ in pairs], [f"{x:.3g}" for x, _ in pairs])
    axis.minorticks_off()
    axis.margins(0.08)
