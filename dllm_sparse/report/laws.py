"""`activation_laws`: fits, bands, tests and files for the activation laws of one or many runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from dllm_sparse.analysis.critical import finite
from dllm_sparse.analysis.law_checks import FormChoice, choose_form, corrected_aic, fit_width_depth, scale_test
from dllm_sparse.analysis.law_forms import PUBLISHED, Array, Form, activation_law
from dllm_sparse.analysis.law_limits import limit_interval, open_questions
from dllm_sparse.analysis.laws import LawFit, bootstrap_band, bootstrap_fits, fit_activation_law
from dllm_sparse.evaluation.fingerprints import git_revision, versions
from dllm_sparse.fields import plain_arguments
from dllm_sparse.report.law_files import write_laws
from dllm_sparse.report.law_points import LawPoint
from dllm_sparse.report.law_text import law_row
from dllm_sparse.report.result_folder import check_results
from dllm_sparse.types import UsageError

SCHEMA = "dllm-sparse/laws@1"
T = TypeVar("T")
FormChoiceName = Literal["auto", "relu", "silu"]
PUBLISHED_PARAMETERS = {"0.1B": 1.08e8, "0.2B": 2.41e8, "0.4B": 4.52e8, "0.8B": 7.60e8, "1.2B": 1.18e9, "2.4B": 2.44e9}
"""Non-embedding parameters of the paper's models (app. G)."""
_GRID = 80
_ALIKE = 0.25  # sizes, or ratios of width to depth, that differ less count as the same


@dataclass(slots=True)
class LawsReport:
    """What `activation_laws` returns: the JSON-ready value, the points, and the files written."""

    value: dict[str, Any]
    points: list[LawPoint]
    files: list[Path] = field(default_factory=list)

    def rows(self) -> list[dict[str, Any]]:
        """One row per run and form: what the table and the CSV summary show."""
        return [law_row(run) for run in self.value["runs"]]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return self.value


@plain_arguments
def activation_laws(
    points: Sequence[LawPoint],
    form: FormChoiceName = "auto",
    *,
    samples: int = 200,
    extrapolate: float = 10.0,
    published: bool = False,
    skip_warmup: float = 0.0,
    seed: int = 0,
    out: str | Path | None = None,
) -> LawsReport:
    """Fits every run, tests scale and width-depth where the runs allow it, and writes JSON, CSV, PNG and HTML.

    `form="auto"` fits both and keeps the one with the larger Akaike weight. `extrapolate` is how many times the last D
    the curves reach. `skip_warmup` drops points below that share of a run's last D (the paper drops warm-up points).
    `published` adds the paper's own curves. Raises UsageError for data that cannot be fitted, or none at all.
    """
    if samples < 0 or extrapolate < 1 or not 0 <= skip_warmup < 1:
        raise UsageError("samples must be at least 0, extrapolate at least 1, skip_warmup in [0, 1)")
    if not points and not published:
        raise UsageError("no points to fit; give a CSV file or a run folder, or --published")
    check_results(out, "laws.json")
    runs = [
        _run(name, _kept(here, skip_warmup), form, samples, extrapolate, seed) for name, here in _by_run(points).items()
    ]
    value = {
        "schema": SCHEMA,
        "config": {
            "form": form,
            "samples": samples,
            "extrapolate": extrapolate,
            "skip_warmup": skip_warmup,
            "seed": seed,
            "versions": versions(),
            "git_revision": git_revision(),
        },
        "runs": runs,
        "scale": _scales(runs),
        "width_depth": _width_depths(points),
        "published": _published(runs, extrapolate) if published else None,
    }
    report = LawsReport(value, list(points))
    if out is not None:
        report.files = write_laws(Path(out), value, report.points)
    return report


def _by_run(points: Sequence[LawPoint]) -> dict[str, list[LawPoint]]:
    runs: dict[str, list[LawPoint]] = {}
    for point in sorted(points, key=lambda point: point.tokens_billions):
        runs.setdefault(point.run, []).append(point)
    return runs


def _kept(points: list[LawPoint], skip_warmup: float) -> list[LawPoint]:
    last = points[-1].tokens_billions
    return [point for point in points if point.tokens_billions >= skip_warmup * last]


def _run(
    name: str, points: list[LawPoint], form: FormChoiceName, samples: int, extrapolate: float, seed: int
) -> dict[str, Any]:
    """Everything about one run."""
    d = np.array([point.tokens_billions for point in points])
    a = np.array([point.activation_ratio for point in points])
    found: dict[str, Any] = {
        "run": name,
        "points": len(points),
        "tokens_billions": d.tolist(),
        "activation_ratio": a.tolist(),
        **{key: getattr(points[-1], key) for key in ("kind", "activation", "parameters", "width_depth", "cett")},
    }
    try:
        choice = choose_form(d, a)
        if form != "auto" and form not in choice.fits:
            fit_activation_law(d, a, form=form)  # says why
    except UsageError as error:
        return {**found, "best": None, "problem": str(error), "forms": {}}
    chosen: Form = choice.best if form == "auto" else form
    forms = {key: _form(choice, key, d, a, extrapolate) for key in choice.fits}
    forms[chosen] |= _intervals(choice.fits[chosen], forms[chosen]["curve"], d, a, samples, seed)
    return {**found, "best": chosen, "problem": None, "forms": forms}


def _form(choice: FormChoice, form: Form, d: Array, a: Array, extrapolate: float) -> dict[str, Any]:
    """One form's fit with its tests and curve."""
    fit = choice.fits[form]
    grid = np.geomspace(d.min(), d.max() * extrapolate, _GRID)
    low, high = fit.band(grid)
    return {
        **fit.to_dict(),
        "aicc": finite(corrected_aic(fit)),
        "akaike_weight": choice.weights[form],
        "trend_p_value": finite(choice.trend_p_values[form]),
        "rejected": form in choice.rejected,
        "curve": {
            "tokens_billions": grid.tolist(),
            "activation_ratio": fit.predict(grid).tolist(),
            "low": [finite(x) for x in low],
            "high": [finite(x) for x in high],
        },
        "limit_interval": None,
        "open": [],
        "bootstrap": None,
    }


def _intervals(fit: LawFit, curve: dict[str, Any], d: Array, a: Array, samples: int, seed: int) -> dict[str, Any]:
    """What the kept form says of its limit, and bootstrap intervals of its parameters and curve."""
    interval = limit_interval(fit, d, a)
    value: dict[str, Any] = {"limit_interval": list(interval), "open": open_questions(fit, interval, d, a)}
    if samples:
        drawn = bootstrap_fits(fit, d, a, samples, seed)
        ends = np.quantile(drawn, [0.025, 0.975], axis=0)
        value["bootstrap"] = {name: ends[:, place].tolist() for place, name in enumerate(fit.parameters)}
        low, high = bootstrap_band(fit.form, drawn, curve["tokens_billions"])
        value["curve"] = {**curve, "bootstrap_low": low.tolist(), "bootstrap_high": high.tolist()}
    return value


def _scales(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The scale test for every kind, activation and shape with at least two sizes whose laws hold and fix the limit.

    Shapes are compared with their like, as in the paper: width over depth moves the limit too.
    """
    known = [row for row in map(law_row, runs) if row["parameters"] and row["determined"] and not row["rejected"]]
    found = []
    for kind, activation in sorted({(row["kind"], row["activation"]) for row in known}):
        here = [row for row in known if (row["kind"], row["activation"]) == (kind, activation)]
        for group in _alike(here, lambda row: row["width_depth"] or 0.0):
            if len({row["parameters"] for row in group}) < 2:
                continue
            sizes, limits, errors = ([row[key] for row in group] for key in ("parameters", "limit", "limit_error"))
            found.append({"kind": kind, "activation": activation, **scale_test(sizes, limits, errors).to_dict()})
    return found


def _width_depths(points: Sequence[LawPoint]) -> list[dict[str, Any]]:
    """The piecewise fit for every kind, activation and size with at least 4 shapes, on each run's last point."""
    last = [here[-1] for here in _by_run(points).values() if here[-1].width_depth and here[-1].parameters]
    found = []
    for kind, activation in sorted({(point.kind, point.activation) for point in last}):
        here = [point for point in last if (point.kind, point.activation) == (kind, activation)]
        for group in _alike(here, lambda point: point.parameters or 0.0):
            if len({point.width_depth for point in group}) < 4:
                continue
            ratio = np.array([point.width_depth for point in group], dtype=np.float64)
            activations = np.array([point.activation_ratio for point in group])
            fit = fit_width_depth(ratio, activations)
            value = {"kind": kind, "activation": activation, "parameters": group[0].parameters, **fit.to_dict()}
            values = {"width_depth": ratio.tolist(), "activation_ratio": activations.tolist()}
            found.append({**value, "values": values | {"loss": [point.loss for point in group]}})
    return found


def _alike(things: Sequence[T], size: Callable[[T], float]) -> list[list[T]]:
    """Sorted into groups whose sizes lie within a quarter of the group's smallest."""
    groups: list[list[T]] = []
    for thing in sorted(things, key=size):
        if groups and size(thing) <= size(groups[-1][0]) * (1 + _ALIKE):
            groups[-1].append(thing)
        else:
            groups.append([thing])
    return groups


def _published(runs: Sequence[dict[str, Any]], extrapolate: float) -> dict[str, Any]:
    """The paper's curves over its own range and that of the runs; its limits put to the scale test."""
    ends = [end for run in runs for end in (min(run["tokens_billions"]), max(run["tokens_billions"]) * extrapolate)]
    grid = np.geomspace(min([1.0, *ends]), max([300.0, *ends]), _GRID)
    curves = [
        {
            "form": form,
            "size": size,
            "parameters": parameters,
            "tokens_billions": grid.tolist(),
            "activation_ratio": activation_law(form, grid, **parameters).tolist(),
        }
        for form, sizes in PUBLISHED.items()
        for size, parameters in sizes.items()
    ]
    scale = {
        form: scale_test([PUBLISHED_PARAMETERS[s] for s in sizes], [sizes[s]["A0"] for s in sizes]).to_dict()
        for form, sizes in PUBLISHED.items()
    }
    return {"source": "arXiv 2411.02335, app. G", "curves": curves, "scale": scale, "bottleneck": 114}
