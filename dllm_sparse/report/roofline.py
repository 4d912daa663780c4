"""The roofline, and the break-even map of the sparse kernels. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dllm_sparse.figures import BLUE, GREY, ORANGE, figure_grid, save_figure

_LONG = ("prefill", "full")  # forwards of whole prompts or canvases; the others feed a token or a block


def write_roofline(path: Path, rows: Sequence[dict[str, Any]]) -> Path | None:
    """One point per kind of forward and workload of `bench engine` rows; None where matplotlib is missing."""
    if find_spec("matplotlib") is None:
        return None
    rates = rows[0]["rates"]
    figure, axes = figure_grid(1, 1)
    axis = axes[0][0]
    ridge = rates["flops"] / rates["bandwidth"]
    steps = [step for row in rows for step in row["steps"]]
    intensities = [step["flops"] / step["bytes"] for step in steps]
    left, right = min([*intensities, ridge]) / 4, max([*intensities, ridge]) * 4
    roof = [(x, min(x * rates["bandwidth"], rates["flops"]) / 1e12) for x in (left, ridge, right)]
    axis.plot(*zip(*roof, strict=True), color=GREY, label=f"roof ({rates['source']})")
    for step, intensity in zip(steps, intensities, strict=True):
        reached = step["flops"] / step["ms"]["median"] / 1e9
        axis.plot(intensity, reached, "o", color=ORANGE if step["forward"] in _LONG else BLUE)
        note = f"{step['forward']}, {step['tokens']:.0f} tokens\n{step['share_of_floor']:.0%}"
        axis.annotate(note, (intensity, reached), xytext=(0, 6), ha="center", textcoords="offset points", fontsize=7)
    title = f"{rows[0]['model']}, {rows[0]['dtype']}, {rows[0]['execution']}\n{rows[0]['machine']['device']}"
    axis.set(title=title, xlabel="FLOPs per byte", ylabel="TFLOP/s", xscale="log", yscale="log")
    axis.title.set_fontsize(9)
    axis.legend(fontsize=8, loc="lower right")
    return save_figure(path, figure)


def write_break_even(path: Path, value: dict[str, Any]) -> Path | None:
    """Speed-up of `bench kernels` rows over tokens and density; None where matplotlib is missing."""
    if find_spec("matplotlib") is None:
        return None
    rows = value["rows"]
    tokens = sorted({row["tokens"] for row in rows})
    densities = sorted({row["density"] for row in rows})
    gains = {(row["tokens"], row["density"]): row["speed_up"] for row in rows}
    figure, axes = figure_grid(1, 1)
    axis = axes[0][0]
    table = [[gains[t, d] for t in tokens] for d in densities]
    axis.imshow(table, cmap="RdBu", vmin=0.0, vmax=2.0, aspect="auto", origin="lower")
    for y, line in enumerate(table):
        for x, gain in enumerate(line):
            axis.text(x, y, f"{gain:.2f}", ha="center", va="center", fontsize=8)
    axis.set_xticks(range(len(tokens)), [str(t) for t in tokens])
    axis.set_yticks(range(len(densities)), [str(d) for d in densities])
    title = f"{value['shape']}: sparse FFN over cuBLAS\n{rows[0]['machine']['device']}"
    axis.set(title=title, xlabel="tokens of a forward", ylabel="union density of the masks")
    axis.title.set_fontsize(9)
    return save_figure(path, figure)
