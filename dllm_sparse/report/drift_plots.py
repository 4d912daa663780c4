"""A drift report's pictures as PNG, for papers and terminals without a browser. Needs matplotlib (extra `plots`)."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from dllm_sparse.figures import BLUE, GREY, figure_grid, save_figure
from dllm_sparse.report.schema import CurveValues, DriftReport, RuleVariant
from dllm_sparse.report.summary import overall, site_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def write_plots(folder: Path, report: DriftReport) -> list[Path]:
    """Writes similarity.png, layers.png and unions.png of the main rule; nothing where matplotlib is missing."""
    if find_spec("matplotlib") is None:
        return []
    main, name = report["variants"][0], "step" if report["model"]["kind"] == "diffusion" else "token"
    pictures = {"similarity": _similarity(main, name), "layers": _layers(main, name), "unions": _unions(main)}
    return [save_figure(folder / f"{title}.png", picture) for title, picture in pictures.items()]


def _similarity(variant: RuleVariant, name: str) -> Figure:
    """Stability and drift over the steps, one row per site."""
    sites = site_names(variant)
    figure, axes = figure_grid(len(sites), 2)
    for row, site in enumerate(sites):
        curve = overall(variant, site)
        if curve is not None:
            _line(axes[row][0], curve, "jaccard", f"{site}: to the {name} before", name)
            _line(axes[row][1], curve, "drift", f"{site}: to the reference", name)
    axes[0][0].legend(fontsize=8, loc="lower right")
    return figure


def _line(axis: Axes, curve: CurveValues, key: str, title: str, name: str) -> None:
    values = curve[key]  # type: ignore[literal-required]
    steps, nan = range(len(values["micro"])), float("nan")
    series = {part: [nan if v is None else v for v in values[part]] for part in ("micro", "low", "high", "chance")}
    axis.fill_between(steps, series["low"], series["high"], color=BLUE, alpha=0.25, linewidth=0)
    axis.plot(steps, series["micro"], color=BLUE, label="Jaccard, 95 % interval")
    axis.plot(steps, series["chance"], color=GREY, linestyle="--", label="chance")
    axis.set(title=title, xlabel=name, ylabel="Jaccard", ylim=(0, 1))


def _layers(variant: RuleVariant, name: str) -> Figure:
    """Layer by step heatmaps, 0 to 1."""
    sites = site_names(variant)
    figure, axes = figure_grid(len(sites), 2)
    for row, site in enumerate(sites):
        for column, key in enumerate(("jaccard", "drift")):
            curves = [c for c in variant["curves"] if c["site"] == site and c["layer"] is not None]
            lines = [c[key]["micro"] for c in curves if c["tokens"] == "response"]  # type: ignore[literal-required]
            grid = [[float("nan") if value is None else value for value in line] for line in lines]
            if not grid:
                continue
            image = axes[row][column].imshow(grid, vmin=0, vmax=1, cmap="viridis", aspect="auto", origin="upper")
            what = f"to the {name} before" if key == "jaccard" else "to the reference"
            axes[row][column].set(title=f"{site}: {what}", xlabel=name, ylabel="layer")
            figure.colorbar(image, ax=axes[row][column], label="Jaccard")
    return figure


def _unions(variant: RuleVariant) -> Figure:
    """Union density against the number of neighbouring tokens."""
    sites = site_names(variant)
    figure, axes = figure_grid(1, len(sites))
    for column, site in enumerate(sites):
        found = [u for u in variant["unions"] if u["site"] == site and u["layer"] is None and u["tokens"] is not None]
        tokens, axis = [u["tokens"] for u in found], axes[0][column]
        axis.plot(tokens, [u["density"] for u in found], color=BLUE, marker="o", label="union of T masks")
        axis.plot(tokens, [u["independent"] for u in found], color=GREY, linestyle="--", label="independent tokens")
        axis.set(title=site, xlabel="neighbouring tokens T", ylabel="channels needed", ylim=(0, 1.02))
        axis.set_xscale("log", base=2)
        axis.set_xticks(tokens, [str(size) for size in tokens])
        axis.legend(fontsize=8, loc="lower right")
    return figure
