"""The roofline: FLOPs per byte against FLOP/s, with what the device sustains as the roof. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dllm_sparse.report.plots import BLUE, GREY, ORANGE, figure_grid, save_figure

_COLOURS = {"decode": BLUE, "cached": BLUE, "prefill": ORANGE, "full": ORANGE}


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
        axis.plot(intensity, reached, "o", color=_COLOURS[step["forward"]])
        note = f"{step['forward']}, {step['tokens']:.0f} tokens\n{step['share_of_floor']:.0%}"
        axis.annotate(note, (intensity, reached), xytext=(0, 6), ha="center", textcoords="offset points", fontsize=7)
    title = f"{rows[0]['model']}, {rows[0]['dtype']}, {rows[0]['execution']}\n{rows[0]['machine']['device']}"
    axis.set(title=title, xlabel="FLOPs per byte", ylabel="TFLOP/s", xscale="log", yscale="log")
    axis.title.set_fontsize(9)
    axis.legend(fontsize=8, loc="lower right")
    return save_figure(path, figure)
