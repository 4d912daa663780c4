"""Pictures without a window, written atomically; matplotlib (extra `plots`) is imported when one is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dllm_sparse.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, ORANGE, GREY = "#0072b2", "#c04f00", "#6b7580"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's, distinguishable without colour vision."""


def figure_grid(rows: int, columns: int, size: tuple[float, float] = (5.2, 3.4)) -> tuple[Figure, Any]:
    """A figure and its axes [rows][columns], each of `size` inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def save_figure(path: Path, figure: Figure, dpi: int = 150) -> Path:
    """Writes the picture as PNG and returns the path."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=dpi, format="png")
    return path
