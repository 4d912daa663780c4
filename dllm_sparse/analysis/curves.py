"""A curve of score against sparsity with its resamples, for one task or the average of several. Pure NumPy.

Shapes: K points in order of p (dense first), R resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from dllm_sparse.analysis.bootstrap import Array, ItemValues, interval, resample_counts
from dllm_sparse.analysis.critical import Critical, critical, finite, flags, retention

Average = Literal["element", "hook_mean"]
AVERAGES: tuple[Average, ...] = ("element", "hook_mean")


@dataclass(frozen=True, slots=True)
class Curve:
    """Scores [K] and resampled scores [R, K] at settings p [K] with sparsities [K] under both averages."""

    name: str
    p: Array
    element: Array
    hook_mean: Array
    scores: Array
    resampled: Array
    higher_is_better: bool = True
    items: int = 0
    chance: float | None = None

    @property
    def kept(self) -> Array:
        """Share of the dense score left at each point."""
        return retention(self.scores, self.scores[0], higher_is_better=self.higher_is_better)

    def critical(self, average: Average, retain: float) -> tuple[Critical, Array]:
        """Critical sparsity under one average, and its resampled crossings [R]."""
        sparsity: Array = getattr(self, average)
        # Dense first whatever it measures; the others by sparsity, not by p: a curve is score against sparsity.
        order = np.concatenate(([0], 1 + np.argsort(sparsity[1:], kind="stable")))
        resampled = retention(self.resampled, self.resampled[:, 0], higher_is_better=self.higher_is_better)
        return critical(sparsity[order], self.kept[order], resampled[:, order], retain)

    def summary(self, retain: float) -> dict[str, Any]:
        """JSON-ready: the points with intervals, the critical sparsities, what to beware of."""
        resampled = retention(self.resampled, self.resampled[:, 0], higher_is_better=self.higher_is_better)
        dense = interval(self.resampled[:, 0])
        found = []
        if self.chance is not None:
            found = flags(float(self.scores[0]), dense[0] if dense else None, self.chance, retain, self.items)
        return {
            "items": self.items,
            "chance": self.chance,
            "dense_score": float(self.scores[0]),
            "dense_interval": dense,
            "flags": found,
            "critical": {average: self.critical(average, retain)[0].to_dict() for average in AVERAGES},
            "points": [
                {
                    "p": float(self.p[k]),
                    "element": float(self.element[k]),
                    "hook_mean": float(self.hook_mean[k]),
                    "score": float(self.scores[k]),
                    "kept": finite(self.kept[k]),
                    "kept_interval": interval(resampled[:, k]),
                }
                for k in range(len(self.p))
            ],
        }


def task_curve(
    name: str,
    values: ItemValues,
    p: Sequence[float],
    sparsity: dict[Average, Sequence[float]],
    *,
    higher_is_better: bool,
    chance: float | None,
    resamples: int,
) -> Curve:
    """The curve of one task; items are resampled by its name and their number, hence paired across models."""
    counts = resample_counts(values.items, resamples, name)
    return Curve(
        name=name,
        p=np.array(p),
        element=np.array(sparsity["element"]),
        hook_mean=np.array(sparsity["hook_mean"]),
        scores=values.scores(),
        resampled=values.scores(counts),
        higher_is_better=higher_is_better,
        items=values.items,
        chance=chance,
    )


def average_curve(curves: Sequence[Curve]) -> Curve | None:
    """Unweighted mean of scores and sparsities over tasks scored in [0, 1] (the paper's average); None without any.

    Perplexities have no common scale with accuracies and stay out.
    """
    scored = [curve for curve in curves if curve.chance is not None]
    if not scored:
        return None
    return Curve(
        name="average",
        p=scored[0].p,
        element=np.mean([curve.element for curve in scored], axis=0),
        hook_mean=np.mean([curve.hook_mean for curve in scored], axis=0),
        scores=np.mean([curve.scores for curve in scored], axis=0),
        resampled=np.mean([curve.resampled for curve in scored], axis=0),
        items=sum(curve.items for curve in scored),
        chance=float(np.mean([curve.chance for curve in scored])),
    )
