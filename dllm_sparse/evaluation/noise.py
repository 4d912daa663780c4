"""Is the noise of the likelihood estimate below the noise of having finitely many items? Measured, not assumed.

The same points are scored under several seeds of the Monte-Carlo estimator; the spread over seeds is set against the
bootstrap's spread over items.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dllm_sparse.analysis.bootstrap import Array, resample_counts
from dllm_sparse.analysis.critical import finite, retention
from dllm_sparse.evaluation.sweep import Sweep, dense, stacked
from dllm_sparse.sparsity.config import SparsityConfig


def likelihood_noise(
    sweep: Sweep, config: SparsityConfig, seeds: Sequence[int], resamples: int = 1000
) -> dict[str, dict[str, Any]]:
    """Per task: standard deviations over seeds and over items, of the dense score and of the share kept at `config`.

    The seeds replace each task's own. Points are stored like any others.
    """
    found: dict[str, list[Array]] = {task.name: [] for task in sweep.tasks}
    items: dict[str, tuple[float, float]] = {}
    for seed in seeds:
        seeded = sweep.with_seed(seed)
        for task in seeded.tasks:
            points = [seeded.point(task, dense(config)), seeded.point(task, config)]
            values = stacked(points)
            found[task.name].append(values.scores())
            if task.name not in items:
                drawn = values.scores(resample_counts(values.items, resamples, task.name))
                items[task.name] = (float(drawn[:, 0].std()), float(_kept(drawn).std()))
    return {name: _summary(np.array(scores), *items[name]) for name, scores in found.items()}


def _summary(scores: Array, item_sd: float, item_sd_kept: float) -> dict[str, Any]:
    kept = _kept(scores)
    return {
        "seeds": len(scores),
        "dense_scores": scores[:, 0].tolist(),
        "seed_sd_dense": float(scores[:, 0].std(ddof=1)),
        "item_sd_dense": item_sd,
        "kept": [finite(value) for value in kept],
        "seed_sd_kept": finite(kept.std(ddof=1)),
        "item_sd_kept": finite(item_sd_kept),
    }


def _kept(scores: Array) -> Array:
    """Second column over the first; NaN where that is 0."""
    return retention(scores[:, 1:], scores[:, 0])[:, 0]


def nearest_knob(points: Sequence[dict[str, Any]], crossing: float, average: str) -> float:
    """The evaluated knob (not the dense one) whose sparsity is nearest the crossing."""
    return float(min(points[1:], key=lambda point: abs(point[average] - crossing))["p"])
