"""The roofline picture of docs/kernels.md and the table beside it, from the kept results of an H200. No GPU needed.

    python benchmarks/roofline_h200.py

reads `results/engine_h200.json` and `results/kernels_h200.json`, writes `assets/roofline-h200.png`, and replaces the
table between the marks in `docs/kernels.md`. To be run again when those results change; a test compares.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from dllm_sparse.bench.floors import KNOWN_RATES
from dllm_sparse.figures import BLUE, GREY, ORANGE, figure_grid, save_figure
from dllm_sparse.models.shapes import shape_config

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "kernels.md"
BEGIN, END = "<!-- table: benchmarks/roofline_h200.py -->", "<!-- end of the table -->"
RATES = KNOWN_RATES["H200", "bfloat16"]
STEP, DENSE, SPARSE = "whole dense step", "one FFN layer, dense (cuBLAS)", "one FFN layer, sparse"
COLOURS = {STEP: BLUE, DENSE: GREY, SPARSE: ORANGE}
PICTURED = {1: BLUE, 8: ORANGE}
"""Tokens of a forward whose layers are in the picture; the table has all."""


class Point(NamedTuple):
    """FLOPs per byte and TFLOP/s reached."""

    kind: str
    label: str
    intensity: float
    reached: float

    @property
    def share(self) -> float:
        """Of the roof at this intensity."""
        return self.reached * 1e12 / min(self.intensity * RATES.bandwidth, RATES.flops)


def read(name: str) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    return value


def table(kernels: dict[str, Any]) -> str:
    """One line per row of `bench kernels`, in microseconds of one FFN layer."""
    lines = [
        "| tokens | union density | dense (cuBLAS) | sparse | selection in it | floor | share of it | speed-up |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in kernels["rows"]:
        us = {name: timing["median"] for name, timing in row["microseconds"].items()}
        dense = min(us["dense"], us["dense_by_output"])
        cells = [row["tokens"], f"{row['measured_density']:.2f}", f"{dense:.1f}", f"{us['sparse']:.1f}"]
        cells += [f"{us['selection']:.1f}", f"{row['sparse_floor']:.1f}", f"{row['share_of_floor']:.0%}"]
        lines.append("| " + " | ".join(map(str, [*cells, f"{row['speed_up']:.2f}x"])) + " |")
    return "\n".join(lines)


def layer_points(kernels: dict[str, Any]) -> list[Point]:
    """One FFN layer, dense and sparse."""
    shape = shape_config(kernels["shape"])
    points = []
    for row in kernels["rows"]:
        us = {name: timing["median"] for name, timing in row["microseconds"].items()}
        tokens, density = row["tokens"], row["measured_density"]
        if tokens not in PICTURED:
            continue
        flops = 2 * 3 * shape.width * shape.ffn_width * tokens
        if (DENSE, f"T={tokens}") not in {point[:2] for point in points}:
            dense = min(us["dense"], us["dense_by_output"])
            points.append(Point(DENSE, f"T={tokens}", tokens, flops / dense / 1e6))
        reached = flops * density / us["sparse"] / 1e6
        points.append(Point(SPARSE, f"T={tokens}, {density:.0%} of the rows", tokens, reached))
    return points


def step_points(engine: dict[str, Any]) -> list[Point]:
    """Whole dense steps."""
    return [
        Point(
            STEP,
            f"T={step['tokens']:.0f}",
            step["flops"] / step["bytes"],
            step["flops"] / step["ms"]["median"] / 1e9,
        )
        for row in engine["rows"]
        if row["model"].startswith("llada-8b") and row["sparsity"] is None
        for step in row["steps"]
    ]


def draw(engine: dict[str, Any], kernels: dict[str, Any]) -> Path:
    """Left the roofline, right the time of one layer against the density of its masks."""
    figure, axes = figure_grid(1, 2, size=(5.4, 4.2))
    _roofline(axes[0][0], [*layer_points(kernels), *step_points(engine)])
    _density(axes[0][1], kernels)
    return save_figure(ROOT / "assets" / "roofline-h200.png", figure, dpi=110)


def _roofline(axis: Any, points: list[Point]) -> None:
    ridge = RATES.flops / RATES.bandwidth
    roof = [(x, min(x * RATES.bandwidth, RATES.flops) / 1e12) for x in (0.2, ridge, 20_000)]
    axis.plot(*zip(*roof, strict=True), color="black", linewidth=1, label="4.3 TB/s, 790 TFLOP/s")
    for kind, colour in COLOURS.items():
        here = [point for point in points if point.kind == kind]
        places = [point.intensity for point in here], [point.reached for point in here]
        axis.plot(*places, "o", color=colour, markersize=4, label=kind)
        for point in here:
            axis.annotate(
                f"{point.label}: {point.share:.0%}",
                (point.intensity, point.reached),
                xytext=(-6, 3) if kind == DENSE else (6, -8) if kind == STEP else (6, -2),
                ha="right" if kind == DENSE else "left",
                textcoords="offset points",
                fontsize=7,
            )
    axis.set(xscale="log", yscale="log", xlabel="FLOPs per byte that must be read", ylabel="TFLOP/s that must be done")
    axis.set(xlim=(0.2, 20_000), ylim=(0.8, 1500))
    axis.set_title("LLaDA-8B, bf16, H200: share of the roof reached", fontsize=9)
    axis.legend(fontsize=7, loc="lower right")
    axis.grid(alpha=0.25)


def _density(axis: Any, kernels: dict[str, Any]) -> None:
    rows = kernels["rows"]
    floor = rows[0]["dense_floor"]
    axis.plot([0, 1], [0, floor], color="black", linewidth=1, label="floor: listed rows at 4.3 TB/s")
    for tokens, colour in PICTURED.items():
        here = sorted((row for row in rows if row["tokens"] == tokens), key=lambda row: row["measured_density"])
        dense = min(min(row["microseconds"][name]["median"] for name in ("dense", "dense_by_output")) for row in here)
        axis.axhline(dense, color=colour, linestyle=":", linewidth=1, label=f"dense, T={tokens}")
        times = [row["microseconds"]["sparse"]["median"] for row in here]
        axis.plot([row["measured_density"] for row in here], times, "o-", color=colour, label=f"sparse, T={tokens}")
    axis.set(xlabel="share of the weight rows some token kept", ylabel="µs, one FFN layer", xlim=(0, 1), ylim=(0, 100))
    axis.set_title("Selection of both sites included", fontsize=9)
    axis.legend(fontsize=7, loc="lower right")
    axis.grid(alpha=0.25)


def main() -> None:
    kernels = read("kernels_h200.json")
    print(draw(read("engine_h200.json"), kernels))
    text = PAGE.read_text(encoding="utf-8")
    head, _, rest = text.partition(BEGIN)
    PAGE.write_text(f"{head}{BEGIN}\n{table(kernels)}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
    print(PAGE)


if __name__ == "__main__":
    main()
