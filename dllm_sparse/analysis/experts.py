"""What experts do under one rule: sparsity of each, routing counts, both averages, and who stands out. Pure numbers.

Input are the `by_expert` rows of sparsity counts. Source: arXiv 2509.00454, MoE section; outliers by Tukey's fences.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dllm_sparse.types import UsageError

Row = Mapping[str, Any]
FENCE = 1.5
"""Interquartile ranges beyond the quartiles of its layer at which an expert counts as an outlier."""
FEWEST_TOKENS = 16
"""Experts that saw fewer tokens have a sparsity too noisy to be called an outlier."""


@dataclass(frozen=True, slots=True)
class LayerExperts:
    """The experts of one layer at one site. `token_weighted` pools entries, `unweighted` is the mean over experts."""

    layer: int
    site: str
    experts: int  # that saw a token
    token_weighted: float
    unweighted: float
    lowest: float
    highest: float
    routing_cv: float  # standard deviation over mean of the routing counts: 0 is perfect balance
    outliers: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def by_layer(rows: Sequence[Row], experts: int) -> list[LayerExperts]:
    """A summary per layer and site of rows (layer, site, expert, tokens, entries, sparsity); `experts` per layer."""
    found = []
    for layer, site in sorted({(row["layer"], row["site"]) for row in rows}):
        here = [row for row in rows if (row["layer"], row["site"]) == (layer, site)]
        sparsity = np.array([row["sparsity"] for row in here])
        entries = np.array([row["entries"] for row in here], dtype=np.float64)
        tokens = np.zeros(experts)
        tokens[[row["expert"] for row in here]] = [row["tokens"] for row in here]
        found.append(
            LayerExperts(
                layer=layer,
                site=site,
                experts=len(here),
                token_weighted=float(sparsity @ entries / entries.sum()),
                unweighted=float(sparsity.mean()),
                lowest=float(sparsity.min()),
                highest=float(sparsity.max()),
                routing_cv=float(tokens.std() / tokens.mean()),
                outliers=tuple(_outliers(here)),
            )
        )
    return found


def _outliers(rows: Sequence[Row]) -> list[int]:
    """Experts outside the fences of their layer, among those with enough tokens."""
    heard = [row for row in rows if row["tokens"] >= FEWEST_TOKENS]
    if len(heard) < 4:
        return []
    low, high = np.quantile([row["sparsity"] for row in heard], [0.25, 0.75])
    reach = FENCE * (high - low)
    return [row["expert"] for row in heard if not low - reach <= row["sparsity"] <= high + reach]


def heatmap(rows: Sequence[Row], site: str, value: str = "sparsity") -> NDArray[np.float64]:
    """The table [layers, experts] of `sparsity` or `tokens` at a site; NaN where no token went."""
    here = [row for row in rows if row["site"] == site]
    if not here:
        raise UsageError(f"no expert was seen at site {site!r}")
    table = np.full((1 + max(row["layer"] for row in here), 1 + max(row["expert"] for row in here)), np.nan)
    for row in here:
        table[row["layer"], row["expert"]] = row[value]
    return table


def interpolated(low: Sequence[Row], high: Sequence[Row], share: float) -> list[dict[str, Any]]:
    """The rows between those of two settings, `share` of the way from the first to the second.

    At the share where the model's own score crosses its line these are the experts' critical sparsities.
    """
    after = {(row["layer"], row["site"], row["expert"]): row for row in high}
    found = []
    for row in low:
        other = after.get((row["layer"], row["site"], row["expert"]))
        if other is not None:
            between = row["sparsity"] + share * (other["sparsity"] - row["sparsity"])
            found.append({**row, "sparsity": between})
    return found
