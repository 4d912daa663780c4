"""Fits of the lab's points (`lab.py`), and the small files kept of them."""

from __future__ import annotations

import argparse
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from lab_runs import LARGE, Run

import dllm_sparse as ds
from dllm_sparse.files import write_json
from dllm_sparse.report.law_pictures import draw_beside
from dllm_sparse.report.law_points import LawPoint
from dllm_sparse.report.law_text import sentences

WARM_UPS = (0.03, 0.06, 0.1)  # share of a run's tokens left out of the fit; the first was chosen before the runs


def fit_and_keep(points: list[LawPoint], facts: dict[str, Any], asked: argparse.Namespace) -> None:
    """Fits whatever is measured and keeps small files."""
    if not points:
        print("nothing is measured yet")
        return
    top_p = [replace(p, activation_ratio=p.top_p_ratio) for p in points if p.top_p_ratio is not None]
    asked.keep.mkdir(parents=True, exist_ok=True)
    fitted: dict[str, Any] = {}
    for name, chosen in (("cett", points), ("top_p", top_p)):
        with tempfile.TemporaryDirectory() as folder:
            # The published laws are of CETT-PPL-1 %; beside top-p they would compare two measures.
            report = ds.activation_laws(chosen, skip_warmup=WARM_UPS[0], published=name == "cett", out=folder)
            for path in report.files:
                if path.suffix == ".png":
                    keep_picture(path, asked.keep / f"{name}_{path.name}")
                elif path.suffix == ".csv":
                    shutil.copy(path, asked.keep / f"{name}_{path.name}")
        fitted[name] = {
            "sentences": sentences(report.value),
            "laws": [without_curves(run) for run in report.value["runs"]],
            "scale": report.value["scale"],
            "width_depth": report.value["width_depth"],
            "by_warm_up_left_out": {str(skip): limits(chosen, skip) for skip in WARM_UPS},
        }
        if name == "cett" and asked.figure is not None:
            draw_beside(asked.figure, pictured(report.value), dpi=110)
        print("\n".join([name, *fitted[name]["sentences"]]))
    write_json(asked.keep / "lab.json", {**facts, "fits": fitted})


def limits(points: list[LawPoint], skip: float) -> dict[str, Any]:
    """Limit and exponent of every run with more of its beginning left out: do they move?"""
    keys = ("best", "limit", "limit_low", "limit_high", "alpha", "trend_p_value", "rejected", "determined", "open")
    rows = ds.activation_laws(points, samples=0, skip_warmup=skip).rows()
    return {row["run"]: {key: row[key] for key in keys} for row in rows}


def pictured(value: dict[str, Any]) -> dict[str, Any]:
    """The large ReLU models and the published ReLU laws alone."""
    names = [Run(kind, "relu", *LARGE).name for kind in ("diffusion", "autoregressive")]  # type: ignore[arg-type]
    curves = [curve for curve in value["published"]["curves"] if curve["form"] == "relu"]
    runs = [run for run in value["runs"] if run["run"] in names]
    return {**value, "runs": runs, "published": {**value["published"], "curves": curves}}


def keep_picture(source: Path, target: Path) -> None:
    """A copy in 64 colours, a third of the size: these files live in the repository."""
    from PIL import Image  # matplotlib needs it, so a picture implies it

    Image.open(source).convert("RGB").quantize(64).save(target, optimize=True)


def without_curves(run: dict[str, Any]) -> dict[str, Any]:
    """A fit without its drawn curve: the parameters say the same."""
    forms = {name: {k: v for k, v in form.items() if k != "curve"} for name, form in run["forms"].items()}
    return {**run, "forms": forms}
