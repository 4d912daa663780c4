"""`compare`: two or more models, the same tasks, rule and average, and verdicts that an interval supports."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dllm_sparse.analysis.curves import Average, Curve
from dllm_sparse.analysis.differences import Difference, difference
from dllm_sparse.evaluation.critical import SiteCurves, SweepPlan, planned_points, site_curves
from dllm_sparse.evaluation.noise import likelihood_noise, nearest_knob
from dllm_sparse.evaluation.processes import Processes
from dllm_sparse.evaluation.published import as_published, published_settings
from dllm_sparse.evaluation.store import PointStore
from dllm_sparse.evaluation.sweep import Silent, Sweep, Watcher
from dllm_sparse.fields import plain_arguments
from dllm_sparse.report.critical import result_rows, run_facts
from dllm_sparse.report.result_folder import check_results
from dllm_sparse.report.sweep_files import write_sweep
from dllm_sparse.report.workload import Workload, chosen_sites, points_folder, record
from dllm_sparse.sparsity.checks import check_masks
from dllm_sparse.sparsity.config import Sites, SparsityConfig
from dllm_sparse.types import UsageError

if TYPE_CHECKING:
    from dllm_sparse.evaluation.options import ScoringOptions
    from dllm_sparse.models.language_model import LanguageModel
    from dllm_sparse.samplers.config import SamplerConfig

SCHEMA = "dllm-sparse/compare@1"


@dataclass(slots=True)
class Comparison:
    """What `compare` returns: curves per model and site, the JSON-ready value, and the files written."""

    curves: dict[str, dict[str, SiteCurves]]
    value: dict[str, Any]
    files: list[Path] = field(default_factory=list)
    seconds: float = 0.0
    reused: int = 0  # points found in the store
    computed: int = 0

    @property
    def verdicts(self) -> list[str]:
        """One sentence per site on the task average (or the only task)."""
        return [f"{entry['site']}: {entry['verdict']}" for entry in self.value["differences"] if entry["main"]]

    def rows(self) -> list[dict[str, Any]]:
        """One row per model, site and task."""
        return [
            row
            for model, sites in self.value["results"].items()
            for site, found in sites.items()
            for row in result_rows(model, site, found)
        ]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; equal for equal runs, interrupted or not."""
        return self.value


@plain_arguments
def compare(
    diffusion: LanguageModel | None = None,
    autoregressive: LanguageModel | None = None,
    tasks: str | Sequence[str] | Workload = ("tiny-cloze",),
    sites: str | Sequence[str] = "all_inputs",
    retain: float = 0.99,
    limit: int | None = None,
    out: str | Path | None = None,
    *,
    models: Sequence[LanguageModel] = (),
    grid: Sequence[float] | None = None,
    search: bool = False,
    published: bool = False,
    noise_seeds: int = 0,
    sparsity: SparsityConfig | None = None,
    scoring: ScoringOptions | None = None,
    sampler: SamplerConfig | None = None,
    average: Average = "element",
    resamples: int = 1000,
    allow_code: bool = False,
    points: str | Path | None = None,
    processes: Processes | None = None,
    watcher: Watcher | None = None,
) -> Comparison:
    """Sweeps every model at every site and compares critical sparsities, per task and averaged, items paired.

    Models: `diffusion`, `autoregressive`, and any more in `models`. `published` adds the paper's confounded settings
    for diffusion models next to the corrected ones. `noise_seeds` (2 or more) measures the Monte-Carlo noise at each
    diffusion model's first site. The rest as in `critical_sparsity`. Raises UsageError, TaskDataMissing.
    """
    started = time.perf_counter()
    if noise_seeds == 1 or noise_seeds < 0:
        raise UsageError(f"noise_seeds is {noise_seeds}; a spread needs at least 2, 0 leaves it out")
    for lm, kind in ((diffusion, "diffusion"), (autoregressive, "autoregressive")):
        if lm is not None and lm.kind != kind:
            raise UsageError(f"{lm.name} is not {kind} but {lm.kind}; models of any kind go into --model (`models`)")
    check_results(out, "compare.json")
    chosen = _named([lm for lm in (diffusion, autoregressive, *models) if lm is not None])
    plan = SweepPlan(None if grid is None else tuple(map(float, grid)), search, retain, resamples, average)
    wanted, base = chosen_sites(sites), sparsity or SparsityConfig()
    for lm in chosen.values():
        settings = published_settings(base).values() if published and lm.kind == "diffusion" else ()
        check_masks(lm, (base, *settings))
    workload = Workload.of(tasks, limit=limit, scoring=scoring, sampler=sampler, allow_code=allow_code)
    processes, watcher = processes or Processes(), watcher or Silent()
    watcher.planned(planned_points(plan, base.rule, len(workload.tasks), len(wanted)) * len(chosen))
    store = PointStore(points_folder(out, points))
    sweeps = {
        name: Sweep(lm, workload.tasks, settings=workload.settings, store=store, processes=processes, watcher=watcher)
        for name, lm in chosen.items()
    }
    curves: dict[str, dict[str, SiteCurves]] = {
        name: {site: site_curves(sweep, replace(base, sites=site), plan) for site in wanted}
        for name, sweep in sweeps.items()
    }
    value = _value(workload, plan, base, sweeps, curves)
    if published:
        value["as_published"] = _published(sweeps, plan, base, wanted, curves)
    if noise_seeds:
        value["likelihood_noise"] = _noise(sweeps, plan, curves, noise_seeds)
    result = Comparison(curves, value, seconds=time.perf_counter() - started)
    result.reused, result.computed = store.reused, store.computed
    if out is not None and processes.first:
        run = run_facts(result.seconds, store, processes)
        result.files = write_sweep(Path(out), "compare", value, result.rows(), run)
    processes.barrier()
    return result


def _named(models: Sequence[LanguageModel]) -> dict[str, LanguageModel]:
    """Models by the last part of their name; at least two, all different."""
    if len(models) < 2:
        raise UsageError("compare needs two models: give --diffusion and --autoregressive, or --model twice")
    names = [Path(lm.name).name for lm in models]
    if len({*names}) < len(names):
        names = [lm.name for lm in models]
    if len({*names}) < len(names):
        raise UsageError(f"the same model is given twice: {', '.join(names)}")
    return dict(zip(names, models, strict=True))


def _value(
    workload: Workload,
    plan: SweepPlan,
    base: SparsityConfig,
    sweeps: Mapping[str, Sweep],
    curves: Mapping[str, Mapping[str, SiteCurves]],
) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "config": record(workload, plan, base, sweeps),
        "results": {
            name: {site: found.to_dict(plan.retain) for site, found in sites.items()} for name, sites in curves.items()
        },
        "differences": list(differences(curves, plan)),
    }


def differences(curves: Mapping[str, Mapping[str, SiteCurves]], plan: SweepPlan) -> list[dict[str, Any]]:
    """Every pair of models, every site; the main curve first, then the tasks."""
    found = []
    for first, second in itertools.combinations(curves, 2):
        for site in curves[first]:
            one, two = curves[first][site], curves[second][site]
            pairs = {"average": (one.average, two.average)} if one.average and two.average else {}
            pairs |= {task: (one.tasks[task], two.tasks[task]) for task in one.tasks}
            for number, (task, (left, right)) in enumerate(pairs.items()):
                assert left is not None
                assert right is not None
                behind = [one.tasks, two.tasks] if task == "average" else [{task: left}, {task: right}]
                caveats = [
                    doubt
                    for name, tasks in zip((first, second), behind, strict=True)
                    for doubt in _doubts(name, tasks, plan)
                ]
                entry = _difference((first, second), (left, right), plan, caveats)
                found.append({"site": site, "task": task, "main": number == 0, **entry.to_dict()})
    return found


def _doubts(model: str, tasks: Mapping[str, Curve], plan: SweepPlan) -> list[str]:
    """What disqualifies a model's curve, or the average of several: a task that cannot tell better from worse."""
    found: dict[str, list[str]] = {"at chance": [], "below resolution": []}
    for task, curve in tasks.items():
        for flag in found.keys() & set(curve.summary(plan.retain)["flags"]):
            found[flag].append(task)
    return [f"{model} is {flag} on {', '.join(names)}" for flag, names in found.items() if names]


def _difference(
    names: tuple[str, str], curves: tuple[Curve, Curve], plan: SweepPlan, caveats: Sequence[str]
) -> Difference:
    results = [curve.critical(plan.average, plan.retain) for curve in curves]
    values = (results[0][0].crossing.value, results[1][0].crossing.value)
    censored = (results[0][0].censored, results[1][0].censored)
    return difference(names, values, (results[0][1], results[1][1]), censored=censored, caveats=caveats)


def _published(
    sweeps: Mapping[str, Sweep],
    plan: SweepPlan,
    base: SparsityConfig,
    sites: Sequence[Sites],
    curves: Mapping[str, Mapping[str, SiteCurves]],
) -> dict[str, Any]:
    """{model: {site: each published setting's critical sparsity and its distance from the corrected one}}."""
    found: dict[str, Any] = {}
    for name, sweep in sweeps.items():
        if sweep.lm.kind == "diffusion":
            found[name] = {}
            for site in sites:
                settings = published_settings(replace(base, sites=site))
                found[name][site] = as_published(sweep, settings, plan, curves[name][site])
    return found


def _noise(
    sweeps: Mapping[str, Sweep], plan: SweepPlan, curves: Mapping[str, Mapping[str, SiteCurves]], seeds: int
) -> dict[str, Any]:
    """Noise over seeds against noise over items, at the evaluated point nearest the crossing of the first site."""
    found: dict[str, Any] = {}
    for name, sweep in sweeps.items():
        if sweep.lm.kind == "diffusion":
            site = next(iter(curves[name].values()))
            main = site.main()
            crossing = main.critical(plan.average, plan.retain)[0].crossing.value
            p = nearest_knob(main.summary(plan.retain)["points"], crossing, plan.average)
            noise = likelihood_noise(sweep, replace(site.config, p=p), range(seeds), plan.resamples)
            found[name] = {"site": site.site, "p": p, "tasks": noise}
    return found
