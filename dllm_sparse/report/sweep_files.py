"""Files of a sweep: JSON of everything, CSV of the curves and of the critical sparsities, PNG, HTML. All atomic."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dllm_sparse.analysis.exploitable import TOKENS
from dllm_sparse.files import write_csv, write_json, write_text
from dllm_sparse.report.sweep_page import sweep_page
from dllm_sparse.report.sweep_plots import plot_curves
from dllm_sparse.report.sweep_results import results_by_model
from dllm_sparse.sparsity.gains import FFNGain


def write_sweep(
    out: Path, name: str, value: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], run: Mapping[str, Any]
) -> list[Path]:
    """Writes the files of a result under `out` and returns their paths.

    `<name>.json` is equal for equal runs; what differs (date, seconds, what was reused) is in `run.json`.
    """
    files = [
        write_json(out / f"{name}.json", value),
        write_csv(out / f"{name}.csv", rows),
        write_csv(out / "points.csv", list(point_rows(value))),
        *plot_curves(value, out),
        write_text(out / f"{name}.html", sweep_page(name, value, rows)),
        write_json(out / "run.json", {"date": datetime.now(UTC).isoformat(timespec="seconds"), **run}),
    ]
    return files


def point_rows(value: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Long format: one row per model, site, task and p."""
    for model, sites in results_by_model(value).items():
        for site, found in sites.items():
            for task, entry in found["tasks"].items():
                for point in entry["points"]:
                    low, high = point["kept_interval"] or (None, None)
                    yield {
                        "model": model,
                        "site": site,
                        "task": task,
                        "p": point["p"],
                        "sparsity_element": point["element"],
                        "sparsity_hook_mean": point["hook_mean"],
                        **_exploitable(point),
                        "score": point["score"],
                        "kept": point["kept"],
                        "kept_low": low,
                        "kept_high": high,
                    }


def _exploitable(point: Mapping[str, Any]) -> dict[str, Any]:
    """What the FFN gains at best where 1, 8 and 32 neighbouring tokens share a pass over the weights."""
    found = point["exploitable"]
    return {f"{gain}_T{group}": found.get(group, {}).get(gain) for gain in FFNGain.__annotations__ for group in TOKENS}
