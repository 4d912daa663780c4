"""Verdicts of a comparison: what disqualifies a task disqualifies the average it is part of."""

from __future__ import annotations

import numpy as np

import dllm_sparse as ds
from dllm_sparse.analysis.bootstrap import ItemValues
from dllm_sparse.analysis.curves import Curve, average_curve, task_curve
from dllm_sparse.evaluation.critical import SiteCurves, SweepPlan
from dllm_sparse.report.compare import differences

SPARSITY = [0.0, 0.3, 0.6, 0.9]


def curve(name: str, scores: list[float], chance: float, items: int = 2000) -> Curve:
    """A task whose first items are answered rightly, as many as the score says."""
    hits = np.array([np.arange(items) < score * items for score in scores], dtype=np.float64)
    averages = {"element": SPARSITY, "hook_mean": SPARSITY}
    values = ItemValues(hits, np.ones(items))
    knobs = [1.0, 0.9, 0.7, 0.5]
    return task_curve(name, values, knobs, averages, higher_is_better=True, chance=chance, resamples=200)  # type: ignore[arg-type]


def site(*curves: Curve) -> dict[str, SiteCurves]:
    tasks = {one.name: one for one in curves}
    config = ds.SparsityConfig(sites="up")
    return {"up": SiteCurves("up", config, tasks, average_curve(list(curves)), {})}


def test_a_task_at_chance_leaves_the_average_undecided() -> None:
    strong, weak = [0.9, 0.9, 0.89, 0.3], [0.9, 0.85, 0.5, 0.3]
    plan = SweepPlan(grid=(0.9, 0.7, 0.5))
    main, task = differences({"a": site(curve("t", strong, 0.0)), "b": site(curve("t", weak, 0.0))}, plan)
    assert (main["task"], task["task"]) == ("average", "t")
    assert main["separated"]
    assert main["verdict"].startswith("a tolerates")
    guessed = [0.25] * 4
    curves = {
        "a": site(curve("t", strong, 0.0), curve("g", guessed, 0.25)),
        "b": site(curve("t", weak, 0.0), curve("g", guessed, 0.25)),
    }
    main, task, guessing = differences(curves, plan)
    assert not main["separated"]
    assert "a is at chance on g; b is at chance on g" in main["verdict"]
    assert task["separated"], "the sound task is judged as before"
    assert not guessing["separated"]
