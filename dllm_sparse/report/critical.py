"""`critical_sparsity`: how much of the FFN can be switched off before a model loses more than a given share."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dllm_sparse.analysis.curves import AVERAGES, Average
from dllm_sparse.analysis.exploitable import TOKENS
from dllm_sparse.evaluation.critical import SiteCurves, SweepPlan, planned_points, site_curves
from dllm_sparse.evaluation.processes import Processes
from dllm_sparse.evaluation.store import PointStore
from dllm_sparse.evaluation.sweep import Silent, Sweep, Watcher
from dllm_sparse.fields import plain_arguments
from dllm_sparse.report.result_folder import check_results
from dllm_sparse.report.sweep_files import write_sweep
from dllm_sparse.report.workload import Workload, chosen_sites, points_folder, record
from dllm_sparse.sparsity.checks import check_masks
from dllm_sparse.sparsity.config import SparsityConfig

if TYPE_CHECKING:
    from dllm_sparse.evaluation.options import ScoringOptions
    from dllm_sparse.models.language_model import LanguageModel
    from dllm_sparse.samplers.config import SamplerConfig

SCHEMA = "dllm-sparse/critical-sparsity@1"


@dataclass(slots=True)
class CriticalReport:
    """What `critical_sparsity` returns: curves per site, the JSON-ready value, and the files written."""

    model: str
    sites: dict[str, SiteCurves]
    value: dict[str, Any]
    files: list[Path] = field(default_factory=list)
    seconds: float = 0.0
    reused: int = 0  # points found in the store
    computed: int = 0

    def critical(self, site: str, task: str | None = None, average: Average = "element") -> float:
        """Interpolated critical sparsity in [0, 1] of a site, for one task or the task average (None)."""
        curves = self.sites[site]
        curve = curves.main() if task is None else curves.tasks[task]
        return curve.critical(average, self.value["config"]["plan"]["retain"])[0].crossing.value

    def rows(self) -> list[dict[str, Any]]:
        """One row per site and task (and average): what the table and the CSV summary show."""
        return [row for site, found in self.value["results"].items() for row in result_rows(self.model, site, found)]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; equal for equal runs, interrupted or not."""
        return self.value


@plain_arguments
def critical_sparsity(
    lm: LanguageModel,
    tasks: str | Sequence[str] | Workload = ("tiny-cloze",),
    sites: str | Sequence[str] = "all_inputs",
    grid: Sequence[float] | None = None,
    retain: float = 0.99,
    limit: int | None = None,
    out: str | Path | None = None,
    *,
    search: bool = False,
    sparsity: SparsityConfig | None = None,
    scoring: ScoringOptions | None = None,
    sampler: SamplerConfig | None = None,
    average: Average = "element",
    resamples: int = 1000,
    protocol: str | None = None,
    allow_code: bool = False,
    points: str | Path | None = None,
    processes: Processes | None = None,
    watcher: Watcher | None = None,
) -> CriticalReport:
    """Sweeps p (or searches) at each site and finds the largest sparsity that keeps `retain` of the dense score.

    `tasks`: one name, several, or a Workload loaded before (limit, scoring, sampler and protocol are then its own).
    `sites`: one, several, or "all". `grid`: values of p besides the dense run; None is the paper's 26 points, `search`
    needs at most 8. `sparsity` gives rule, scope and the like (its p and sites are replaced). `limit` uses the first N
    items of each task. With `out`, points are stored there (or under `points`) as they finish, so that the same call
    resumes, and JSON, CSV, PNG and HTML are written. Raises UsageError, TaskDataMissing.
    """
    started = time.perf_counter()
    check_results(out, "critical-sparsity.json")
    plan = SweepPlan(
        grid=None if grid is None else tuple(float(p) for p in grid),
        search=search,
        retain=retain,
        resamples=resamples,
        average=average,
    )
    wanted = chosen_sites(sites)
    base = sparsity or SparsityConfig()
    check_masks(lm, [base])
    workload = Workload.of(
        tasks, limit=limit, scoring=scoring, sampler=sampler, published=protocol, allow_code=allow_code
    )
    processes = processes or Processes()
    watcher = watcher or Silent()
    watcher.planned(planned_points(plan, base.rule, len(workload.tasks), len(wanted)))
    sweep = Sweep(
        lm,
        workload.tasks,
        settings=workload.settings,
        store=PointStore(points_folder(out, points)),
        processes=processes,
        watcher=watcher,
    )
    curves: dict[str, SiteCurves] = {site: site_curves(sweep, replace(base, sites=site), plan) for site in wanted}
    value = {
        "schema": SCHEMA,
        "model": lm.name,
        "config": record(workload, plan, base, {lm.name: sweep}),
        "results": {site: found.to_dict(retain) for site, found in curves.items()},
    }
    report = CriticalReport(lm.name, curves, value, seconds=time.perf_counter() - started)
    report.reused, report.computed = sweep.store.reused, sweep.store.computed
    if out is not None and processes.first:
        run = run_facts(report.seconds, sweep.store, processes)
        report.files = write_sweep(Path(out), "critical-sparsity", value, report.rows(), run)
    processes.barrier()
    return report


def run_facts(seconds: float, store: PointStore, processes: Processes) -> dict[str, Any]:
    """What differs between equal runs: time, reuse, processes."""
    return {
        "seconds": seconds,
        "points_reused": store.reused,
        "points_computed": store.computed,
        "processes": processes.world,
    }


def result_rows(model: str, site: str, found: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of one site's result: the tasks, then their average."""
    entries = {**found["tasks"], **({} if found["average"] is None else {"average": found["average"]})}
    rows = []
    for task, entry in entries.items():
        row: dict[str, Any] = {"model": model, "site": site, "task": task, "items": entry["items"]}
        row["dense_score"] = entry["dense_score"]
        for average in AVERAGES:
            found_critical = entry["critical"][average]
            for reading in ("crossing", "grid_max"):
                for part in ("value", "low", "high"):
                    name = f"{average}_{reading}" + ("" if part == "value" else f"_{part}")
                    row[name] = found_critical[reading][part]
            row[f"{average}_censored"] = found_critical["censored"]
            best = _at_grid_max(entry, average)
            for tokens in TOKENS:
                row[f"{average}_exploitable_T{tokens}"] = best.get(tokens, {}).get("ffn_bytes_saved")
        row["flags"] = "; ".join(entry["flags"])
        rows.append(row)
    return rows


def _at_grid_max(entry: dict[str, Any], average: Average) -> dict[str, Any]:
    """What can be skipped at the point the grid maximum was measured at; nothing where there is none."""
    best = entry["critical"][average]["grid_max"]["value"]
    there = [point for point in entry["points"] if point[average] == best and point["kept"] is not None]
    return dict(max(there, key=lambda point: float(point["kept"]))["exploitable"]) if there else {}
