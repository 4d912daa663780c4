"""`steps.csv`: the report's curves in long format, one line per rule, site, layer, selection of tokens and step."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dllm_sparse.files import write_csv
from dllm_sparse.report.schema import DriftReport, RuleVariant

_SIMILARITY = ("micro", "token_mean", "chance", "corrected", "low", "high")


def write_steps(path: Path, report: DriftReport) -> Path:
    """Writes the table; an empty cell is a value that does not exist, layer `all` pools the layers."""
    return write_csv(path, [line for variant in report["variants"] for line in _lines(variant)], columns=["scope"])


def _lines(variant: RuleVariant) -> Iterator[dict[str, Any]]:
    for curve in variant["curves"]:
        for step, facts in enumerate(variant["steps"]):
            if not curve["count"][step]:
                continue
            line: dict[str, Any] = {
                "scope": variant["scope"],
                "site": curve["site"],
                "layer": "all" if curve["layer"] is None else curve["layer"],
                "tokens": curve["tokens"],
                "step": step,
                **facts,
                "count": curve["count"][step],
                "density": curve["density"][step],
            }
            line |= {f"jaccard_{name}": curve["jaccard"][name][step] for name in _SIMILARITY}  # type: ignore[literal-required]
            line |= {f"drift_{name}": curve["drift"][name][step] for name in _SIMILARITY}  # type: ignore[literal-required]
            moved = curve["movement"]
            line |= {"change_median": moved["median"][step], "change_p90": moved["p90"][step]}
            yield line | {f"share_above_{tau}": share[step] for tau, share in moved["share_above"].items()}
