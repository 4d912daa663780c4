"""Files of `layers`: JSON, CSV per layer (and per expert), PNG, a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dllm_sparse.analysis.experts import heatmap
from dllm_sparse.figures import BLUE, COLOURS, GREY, ORANGE, figure_grid, save_figure
from dllm_sparse.files import write_csv, write_json, write_text
from dllm_sparse.report.pictures_page import Part, pictures_page, shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MEANINGS = (
    "Effective rank: exp of the entropy of the normalised singular values of a site's dense activations.",
    "It is exact over all tokens together, not a mean over batches. Normalised: divided by the width.",
    "Critical: sparsity of the layer where the model's perplexity crosses the line under one p for all layers.",
    "Critical alone: the most this layer tolerates when no other is touched.",
    "Allocations keep the mean of p over layers; `weights` looks at the weights only, `sensitivity` at measurements.",
    "Outlier: an expert beyond 1.5 interquartile ranges of its layer's quartiles, with at least 16 tokens.",
)


def write_layers(
    out: Path, value: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], run: Mapping[str, Any]
) -> list[Path]:
    """Writes layers.json, .csv, .png, .html and run.json, for a mixture also experts.csv and experts.png."""
    files = [write_json(out / "layers.json", value), write_csv(out / "layers.csv", rows)]
    experts = value["experts"]
    if experts is not None:
        files.append(write_csv(out / "experts.csv", experts["rows"]))
    pictures = draw_layers(out, value, rows)
    parts = [
        Part("Summary", summary(value)),
        *(Part(path.stem, picture=(path, caption)) for path, caption in pictures),
        Part("Layers", headers=list(rows[0]), rows=[[shown(cell, 3) for cell in row.values()] for row in rows]),
    ]
    if experts is not None:
        table = [[shown(cell, 3) for cell in row.values()] for row in experts["layers"]]
        parts.append(Part("Experts per layer", headers=list(experts["layers"][0]), rows=table))
    parts.append(Part("What the words mean", _MEANINGS))
    page = pictures_page("Layer by layer", str(value["model"]), parts)
    files += [path for path, _ in pictures]
    files.append(write_text(out / "layers.html", page))
    return [*files, write_json(out / "run.json", {"date": datetime.now(UTC).isoformat(timespec="seconds"), **run})]


def summary(value: Mapping[str, Any]) -> list[str]:
    """What came out, in sentences."""
    uniform = value["uniform"]
    bound = "at least " if uniform["censored"] else ""
    kept = 100 * value["config"]["retain"]
    found = [f"One p for all layers: critical sparsity {bound}{100 * uniform['critical']:.1f} % ({kept:g} % kept)."]
    if value["alone"]:
        alone = sorted(value["alone"], key=lambda entry: entry["critical"])
        found.append(
            f"Alone, layer {alone[0]['layer']} tolerates least ({100 * alone[0]['critical']:.0f} %) and layer "
            f"{alone[-1]['layer']} most ({100 * alone[-1]['critical']:.0f} %)."
        )
    names = {"weights": "the weights (data-free)", "weights_reversed": "the weights, reversed (data-free)"}
    for name, entry in value["allocations"].items():
        found.append(
            f"p spread over layers by {names.get(name, 'measured sensitivity (uses data)')}: critical sparsity "
            f"{100 * entry['critical']:.1f} %, {100 * entry['added']:+.1f} points."
        )
    few = [rank for rank in value["ranks"] if rank["tokens"] < 2 * rank["width"]]
    if few:
        worst = max(few, key=lambda rank: rank["width"] / rank["tokens"])
        found.append(
            f"Effective ranks are held down by the text: {worst['tokens']} tokens for {worst['width']} features at "
            f"site {worst['site']}; give more with --text."
        )
    if value["experts"] is not None:
        layers = value["experts"]["layers"]
        outliers = sum(len(layer["outliers"]) for layer in layers)
        low, high = min(layer["lowest"] for layer in layers), max(layer["highest"] for layer in layers)
        found.append(
            f"Experts at the critical point range from {100 * low:.0f} to {100 * high:.0f} % sparsity; {outliers} are "
            "outliers of their layer."
        )
    return found


def draw_layers(out: Path, value: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[tuple[Path, str]]:
    """The pictures and their captions; none where matplotlib is missing."""
    if find_spec("matplotlib") is None:
        return []
    figure, axes = figure_grid(1, 2)
    layers = [row["layer"] for row in rows]
    for site, colour in (("input", BLUE), ("intermediate", ORANGE), ("gate", GREY), ("up", COLOURS[2])):
        _line(axes[0][0], layers, [row[f"normalised_rank_{site}"] for row in rows], colour, site)
        _line(axes[0][1], layers, [row[f"critical_{site}"] for row in rows], colour, site)
    _line(axes[0][1], layers, [row["critical_alone"] for row in rows], "black", "layer alone", dashed=True)
    axes[0][0].set(title="effective rank / width", xlabel="layer", ylim=(0, None))
    axes[0][1].set(title="sparsity at the critical point", xlabel="layer", ylim=(0, None))
    for axis in axes[0]:
        if axis.lines:
            axis.legend(fontsize=7)
    caption = (
        "Left: normalised effective rank of the dense activations. Right: sparsity where perplexity crosses the line"
    )
    pictures = [(save_figure(out / "layers.png", figure), caption)]
    if value["experts"] is not None:
        pictures.append(
            (_draw_experts(out, value["experts"]["rows"]), "Experts: sparsity at the critical point, routing")
        )
    return pictures


def _line(
    axis: Axes, x: Sequence[int], y: Sequence[float | None], colour: str, label: str, dashed: bool = False
) -> None:
    if any(value is not None for value in y):
        shown_values = [float("nan") if value is None else value for value in y]
        axis.plot(x, shown_values, "--" if dashed else "-", color=colour, marker="o", markersize=2.5, label=label)


def _draw_experts(out: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    sites = list(dict.fromkeys(row["site"] for row in rows))
    figure, axes = figure_grid(1, len(sites) + 1)
    for axis, site in zip(axes[0], sites, strict=False):
        image = axis.imshow(heatmap(rows, site), vmin=0, vmax=1, cmap="viridis", aspect="auto")
        axis.set(title=f"sparsity, {site}", xlabel="expert", ylabel="layer")
        figure.colorbar(image, ax=axis)
    image = axes[0][-1].imshow(heatmap(rows, sites[0], "tokens"), cmap="cividis", aspect="auto")
    axes[0][-1].set(title="tokens routed", xlabel="expert", ylabel="layer")
    figure.colorbar(image, ax=axes[0][-1])
    return save_figure(out / "experts.png", figure)
