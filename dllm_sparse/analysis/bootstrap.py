"""Paired bootstrap over items, vectorised: one matrix of resample counts is applied to every point at once.

Shapes: K points (values of p), N items, R resamples. Pure NumPy.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Link = Literal["identity", "exp", "bits"]
"""How a ratio of sums becomes the score: as it is (a mean), exp (a perplexity), or divided by ln 2 (bits)."""


@dataclass(frozen=True, slots=True)
class ItemValues:
    """What every item contributes to every point: score = link(sum numerator / sum denominator).

    `numerator` is [K, N], `denominator` [N]: ones for a mean, words or bytes for a perplexity (numerator = -nats).
    """

    numerator: Array
    denominator: Array
    link: Link = "identity"

    @property
    def items(self) -> int:
        """Number of items N."""
        return int(self.denominator.shape[0])

    def scores(self, counts: Array | None = None) -> Array:
        """Scores [K] of the sample, or [R, K] of the resamples `counts` [R, N]."""
        weights = np.ones(self.items) if counts is None else counts
        totals = weights @ self.denominator
        return _linked(weights @ self.numerator.T / totals[..., None], self.link)


def _linked(ratio: Array, link: Link) -> Array:
    if link == "exp":
        return np.exp(ratio)
    return ratio / np.log(2) if link == "bits" else ratio


def resample_counts(items: int, resamples: int, name: str, seed: int = 0) -> Array:
    """How often each item is drawn, [R, N], each row summing to N.

    The draw depends on (name, items, seed) alone: two models scored on the same items are resampled together, which
    is what makes their comparison paired.
    """
    digest = hashlib.sha256(f"{name}\n{items}\n{seed}".encode()).digest()
    generator = np.random.default_rng(int.from_bytes(digest[:8], "little"))
    drawn = generator.integers(items, size=(resamples, items))
    drawn += np.arange(resamples)[:, None] * items
    counts = np.bincount(drawn.ravel(), minlength=resamples * items)
    return counts.reshape(resamples, items).astype(np.float64)


def interval(samples: Array, level: float = 0.95) -> tuple[float, float] | None:
    """Percentile interval of resampled values [R]; None when some are undefined (NaN)."""
    if not samples.size or bool(np.isnan(samples).any()):
        return None
    tail = (1 - level) / 2
    low, high = np.quantile(samples, [tail, 1 - tail])
    return float(low), float(high)
