"""Files of `laws`: JSON, CSV of points and fits, PNG with bands, a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dllm_sparse.files import write_csv, write_json, write_text
from dllm_sparse.report.law_pictures import draw_laws
from dllm_sparse.report.law_points import LawPoint, point_rows
from dllm_sparse.report.law_text import law_row, sentences
from dllm_sparse.report.pictures_page import Part, pictures_page, shown


def write_laws(out: Path, value: dict[str, Any], points: Sequence[LawPoint]) -> list[Path]:
    """Writes laws.json, laws.csv, points.csv, the pictures and laws.html; returns the paths."""
    fits = [law_row(run) for run in value["runs"]]
    files = [write_json(out / "laws.json", value), write_csv(out / "laws.csv", fits)]
    files.append(write_csv(out / "points.csv", point_rows(points)))
    pictures = draw_laws(out, value, points)
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
    "Limit: A0 and its 95 % profile interval; the column `open` says why a run does not determine it.",
    "Bands: 95 % for the curve (not for new points); by bootstrap where there is one, else by the delta method.",
    "Akaike weight: how the two forms share the evidence, corrected for few points.",
    "Lack of fit: p-value of a smooth trend left in the residuals; a form is refused where it is below 0.01.",
)
