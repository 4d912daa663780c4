"""Critical sparsity: the most that can go while a model keeps a given share of its own dense score. Pure NumPy.

Two readings of a curve that need not be monotone (the definition of arXiv 2509.00454 leaves it open):
grid maximum = the largest measured sparsity that still passes; crossing = where the curve first falls below the
line, linearly interpolated between the two points around it.
Shapes: K points sorted by sparsity with the dense run first, R resamples.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dllm_sparse.analysis.bootstrap import Array, interval


@dataclass(frozen=True, slots=True)
class Estimate:
    """One critical sparsity with its interval. NaN and None where there is none: the dense score was 0."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class Critical:
    """Both readings of one curve under one average. `censored`: nothing measured fell below the line."""

    grid_max: Estimate
    crossing: Estimate
    censored: bool
    bracket: tuple[float, float | None]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values: NaN becomes None."""
        values = asdict(self)
        for reading in ("grid_max", "crossing"):
            values[reading]["value"] = finite(values[reading]["value"])
        return values


def finite(value: float) -> float | None:
    """The number, or None for NaN and infinities, which JSON does not have."""
    return float(value) if np.isfinite(value) else None


def retention(scores: Array, dense: Array, *, higher_is_better: bool = True) -> Array:
    """Share of the dense score that is left: scores [..., K] and dense [...] -> [..., K]; NaN where dense is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        kept: Array = scores / dense[..., None] if higher_is_better else dense[..., None] / scores
    return np.where(np.isfinite(kept), kept, np.nan)


def grid_maximum(sparsity: Array, kept: Array, retain: float) -> Array:
    """Largest sparsity [K] whose retention [..., K] is at least `retain`; NaN where the dense score was 0."""
    best = np.where(kept >= retain, sparsity, -np.inf).max(-1)
    return np.where(np.isfinite(best), best, np.nan)


def first_crossing(sparsity: Array, kept: Array, retain: float) -> tuple[Array, NDArray[np.bool_]]:
    """Where the curve first falls below `retain`, and whether it does: ([...], [...] bool).

    A curve that never does gives its last sparsity: a lower bound.
    """
    failed = ~(kept >= retain)
    crossed = failed.any(-1)
    after = np.where(crossed, failed.argmax(-1), kept.shape[-1] - 1)
    before = np.maximum(after - 1, 0)
    high, low = _at(kept, before), _at(kept, after)
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where(crossed, (high - retain) / (high - low), 1.0)
    value = sparsity[before] + share * (sparsity[after] - sparsity[before])
    undefined = np.isnan(kept).any(-1)
    return np.where(undefined, np.nan, value), np.asarray(crossed & ~undefined)


def critical(
    sparsity: Array, kept: Array, resampled: Array, retain: float, level: float = 0.95
) -> tuple[Critical, Array]:
    """Estimates from a curve (sparsity [K], retention [K]) and its resamples [R, K]; also the crossings [R]."""
    value, crossed = first_crossing(sparsity, kept, retain)
    crossings, _ = first_crossing(sparsity, resampled, retain)
    fails = np.flatnonzero(~(kept >= retain))
    first = int(fails[0]) if fails.size else len(sparsity)
    bracket = (float(sparsity[max(first - 1, 0)]), float(sparsity[first]) if fails.size else None)
    best = grid_maximum(sparsity, kept, retain)
    best_interval = interval(grid_maximum(sparsity, resampled, retain), level)
    result = Critical(
        grid_max=_estimate(float(best), best_interval),
        crossing=_estimate(float(value), interval(crossings, level)),
        censored=not bool(crossed),
        bracket=bracket,
    )
    return result, crossings


def flags(dense: float, dense_low: float | None, chance: float, retain: float, items: int) -> list[str]:
    """What a reader must know before trusting a task, from a dense score that is a mean over items in [0, 1].

    `at chance`: the lower end `dense_low` of its interval does not exceed the chance level. `below resolution`: fewer
    than one item may fail before the line is crossed. `few deciding items`: fewer than five, where the bootstrap
    interval is too narrow (simulated coverage 0.73-0.93 instead of 0.95).
    """
    found = []
    if dense <= chance or (dense_low is not None and dense_low <= chance):
        found.append("at chance")
    deciding = dense * (1 - retain) * items
    if deciding < 1:
        found.append("below resolution")
    elif deciding < 5:
        found.append("few deciding items")
    return found


def _estimate(value: float, ends: tuple[float, float] | None) -> Estimate:
    return Estimate(value, *(ends or (None, None)))


def _at(values: Array, index: NDArray[np.intp]) -> Array:
    return np.asarray(np.take_along_axis(values, np.asarray(index)[..., None], -1)[..., 0])
