"""Critical sparsity of one model: the grid or the search, site by site, and the curves that come of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dllm_sparse.analysis.curves import Average, Curve, average_curve, task_curve
from dllm_sparse.analysis.exploitable import mean_shares
from dllm_sparse.analysis.search import Evaluated, next_p
from dllm_sparse.evaluation.protocols import PAPER_GRID
from dllm_sparse.evaluation.sweep import Sweep, dense, stacked
from dllm_sparse.fields import check_fields
from dllm_sparse.sparsity.config import IDENTITY, SparsityConfig
from dllm_sparse.sparsity.gains import ffn_gain
from dllm_sparse.types import UsageError

SEARCH_EVALUATIONS = 8
"""Most evaluations a search spends per site, the dense run included."""


@dataclass(frozen=True, slots=True)
class SweepPlan:
    """Which settings are evaluated and how the line is drawn.

    `grid`: knobs besides the dense run (None: the paper's for top-p). `search`: instead of the grid, or after it where
    one is given, at most 7 knobs that bracket the crossing of the task average (of the only task, where there is one)
    to +-1 point of sparsity.
    """

    grid: tuple[float, ...] | None = None
    search: bool = False
    retain: float = 0.99
    resamples: int = 1000
    average: Average = "element"

    def __post_init__(self) -> None:
        check_fields(self, ranged=("retain",))
        if self.grid is not None and not self.grid:
            raise UsageError("the grid is empty; give values of p such as 0.95,0.9,0.8, or leave it out")
        if not 0 < self.retain <= 1:
            raise UsageError(f"retain is {self.retain}; allowed: above 0, at most 1 (for example 0.99)")
        if self.resamples < 100:
            raise UsageError(f"resamples is {self.resamples}; an interval needs at least 100")

    def knobs(self, rule: str) -> tuple[float, ...]:
        """The grid besides the dense run; empty for a search alone."""
        if self.grid is None and self.search:
            return ()
        if self.grid is None and rule != "top_p":
            raise UsageError(f"there is no published grid for rule {rule!r}; give one with --grid")
        identity = IDENTITY[rule]  # type: ignore[index]
        knobs = dict.fromkeys(self.grid if self.grid is not None else PAPER_GRID)
        return tuple(knob for knob in knobs if knob != identity)

    def evaluations(self, rule: str) -> int:
        """The most evaluations one site needs, the dense run included."""
        return 1 + len(self.knobs(rule)) + (SEARCH_EVALUATIONS - 1 if self.search else 0)


@dataclass(slots=True)
class SiteCurves:
    """All that is known about one site: a curve per task, their average, and the stored points."""

    site: str
    config: SparsityConfig
    tasks: dict[str, Curve]
    average: Curve | None
    points: dict[str, list[dict[str, Any]]]

    def main(self) -> Curve:
        """The curve a single number is read from: the average, or the only task there is."""
        return self.average if self.average is not None else next(iter(self.tasks.values()))

    def to_dict(self, retain: float) -> dict[str, Any]:
        """JSON-ready."""
        tasks = {}
        for name, curve in self.tasks.items():
            tasks[name] = curve.summary(retain)
            for point, stored in zip(tasks[name]["points"], self.points[name], strict=True):
                point["sparsity"], point["exploitable"] = stored["sparsity"], stored["exploitable"]
        average = None
        if self.average is not None:
            average = self.average.summary(retain)
            scored = {name: task for name, task in tasks.items() if task["chance"] is not None}
            average["flags"] = [f"{name} {flag}" for name, task in scored.items() for flag in task["flags"]]
            for number, point in enumerate(average["points"]):
                point["exploitable"] = _mean([self.points[name][number]["exploitable"] for name in scored])
        return {"sparsity": self.config.to_dict(), "average": average, "tasks": tasks}


def _mean(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Exploitable sparsity of the average of tasks: the unweighted mean, as for their scores and sparsities."""
    means = mean_shares([{group: entry["sites"] for group, entry in one.items()} for one in found])
    return {group: {"sites": sites, **ffn_gain(sites)} for group, sites in means.items()}


def site_curves(sweep: Sweep, config: SparsityConfig, plan: SweepPlan) -> SiteCurves:
    """Evaluates one site of one model: the dense run first, then the grid or the search."""
    found: dict[float, dict[str, dict[str, Any]]] = {}
    for setting in (dense(config), *(replace(config, p=knob) for knob in plan.knobs(config.rule))):
        _evaluate(sweep, setting, found)
    for _ in range(SEARCH_EVALUATIONS - 1 if plan.search else 0):
        curve = _assembled(sweep, config, plan, found).main()
        sparsity = getattr(curve, plan.average)
        points = [Evaluated(*map(float, values)) for values in zip(curve.p, sparsity, curve.kept, strict=True)]
        knob = next_p(config.rule, points, plan.retain)
        if knob is None:
            break
        _evaluate(sweep, replace(config, p=knob), found)
    return _assembled(sweep, config, plan, found)


def _evaluate(sweep: Sweep, config: SparsityConfig, found: dict[float, dict[str, dict[str, Any]]]) -> None:
    found[config.p] = {task.name: sweep.point(task, config) for task in sweep.tasks}


def _assembled(
    sweep: Sweep, config: SparsityConfig, plan: SweepPlan, found: Mapping[float, Mapping[str, dict[str, Any]]]
) -> SiteCurves:
    knobs = list(found)
    curves, points = {}, {}
    for task in sweep.tasks:
        points[task.name] = [found[knob][task.name] for knob in knobs]
        sparsity: dict[Average, Sequence[float]] = {
            "element": [point["sparsity"]["mean"] for point in points[task.name]],
            "hook_mean": [point["sparsity"]["hook_mean"] for point in points[task.name]],
        }
        curves[task.name] = task_curve(
            task.name,
            stacked(points[task.name]),
            knobs,
            sparsity,
            higher_is_better=task.higher_is_better,
            chance=task.chance,
            resamples=plan.resamples,
        )
    return SiteCurves(config.sites, config, curves, average_curve(list(curves.values())), points)


def planned_points(plan: SweepPlan, rule: str, tasks: int, sites: int) -> int:
    """Points of a whole run (the most a search may need)."""
    return plan.evaluations(rule) * tasks * sites
