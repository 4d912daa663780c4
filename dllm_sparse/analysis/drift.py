"""From counts to statistics: how similar active sets stay over steps, how wide their unions are, how far values move.

Every ratio is formed once, from sums over prompts, layers and tokens. Intervals are 95 % percentile intervals of a
bootstrap over prompts. Legend: R prompts, S steps, N resamples.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from dllm_sparse.analysis.bootstrap import resample_counts
from dllm_sparse.analysis.masks import Floats, chance_corrected, chance_level, half_life, independent_union
from dllm_sparse.analysis.tallies import (
    CHANGE_RANGE,
    PER_TOKEN_ONE,
    TAUS,
    WINDOW_SIZES,
    Column,
    MaskCounts,
    SiteTally,
    change_edges,
)
from dllm_sparse.types import SiteName, TokenClass

RESAMPLES = 1000

TOKEN_GROUPS: Mapping[str, tuple[TokenClass, ...]] = MappingProxyType(
    {
        "response": (TokenClass.MASKED, TokenClass.COMMITTED, TokenClass.DECODED),
        "masked": (TokenClass.MASKED,),
        "committed": (TokenClass.COMMITTED,),
        "decoded": (TokenClass.DECODED,),
        "prompt": (TokenClass.PROMPT,),
        "all": (TokenClass.PROMPT, TokenClass.MASKED, TokenClass.COMMITTED, TokenClass.DECODED),
    }
)
"""The selections of tokens a statistic is formed over; `response` is every position that is not prompt."""


@dataclass(frozen=True, slots=True)
class Similarity:
    """Jaccard of two sets of masks, per step [S] or over all steps []: NaN where nothing was compared.

    `chance` is d / (2 - d) at the mean density d of the two; `low` and `high` bound `micro` (NaN for one prompt).
    """

    micro: Floats
    token_mean: Floats
    chance: Floats
    low: Floats
    high: Floats

    @property
    def corrected(self) -> Floats:
        """(micro - chance) / (1 - chance): 0 for independent masks, 1 for equal ones."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return chance_corrected(self.micro, self.chance)


@dataclass(frozen=True, slots=True)
class Curve:
    """One site, one layer (None: all), one selection of tokens, over the steps [S]. Changes are relative L2 norms."""

    site: SiteName
    layer: int | None
    tokens: str
    count: Floats
    density: Floats
    jaccard: Similarity
    drift: Similarity
    jaccard_overall: Similarity
    density_overall: float
    moved_median: Floats
    moved_p90: Floats
    moved_share: dict[float, Floats]
    moved_overall: dict[str, float]

    @property
    def half_life(self) -> float | None:
        """Steps until the chance-corrected drift has fallen to one half; None if it never does."""
        return half_life(self.drift.corrected.tolist())


@dataclass(frozen=True, slots=True)
class Union:
    """Density of the union of T neighbouring masks at a site; `tokens` None is the whole block (or prompt)."""

    site: SiteName
    layer: int | None
    tokens: int | None
    density: float
    low: float
    high: float
    independent: float | None


@dataclass(frozen=True, slots=True)
class Lag:
    """Similarity of masks `delta` steps apart, the later at each step of `similarity` [S]."""

    site: SiteName
    layer: int | None
    tokens: str
    delta: int
    similarity: Similarity


class Statistics:
    """All statistics of a set of counts; the resamples are drawn once, from a fixed seed."""

    def __init__(self, counts: MaskCounts) -> None:
        self.counts = counts
        self._weights = resample_counts(counts.prompts, RESAMPLES, "drift") if counts.prompts > 1 else None

    def selections(self) -> Iterator[tuple[SiteName, int | None]]:
        """Every (site, layer) to report, all layers together (None) first."""
        for name in self.counts.site_names:
            for layer in (None, *self.counts.layers):
                yield name, layer

    def token_groups(self) -> list[str]:
        """The selections of tokens that occur in these counts."""
        tallies = list(self.counts.sites.values())
        seen = sum(tally.steps[..., Column.TOKENS].sum((0, 1)) for tally in tallies).tolist() if tallies else []  # type: ignore[union-attr]
        return [name for name, classes in TOKEN_GROUPS.items() if any(seen[kind] for kind in classes)]

    def curve(self, site: SiteName, layer: int | None, tokens: str) -> Curve:
        """Statistics of one selection over the steps."""
        classes = list(TOKEN_GROUPS[tokens])
        tallies = self.counts.at(site, layer)
        sums = sum(tally.steps[:, :, classes].sum(2).double().numpy() for tally in tallies)
        assert isinstance(sums, np.ndarray)
        changes = sum(tally.changes[:, classes].sum(1).double().numpy() for tally in tallies)
        assert isinstance(changes, np.ndarray)
        width = mean_width(tallies)
        total = sums.sum(0)
        pairs = total[:, Column.PAIRS]
        shares = {tau: ratio(total[:, Column.MOVED + place], pairs) for place, tau in enumerate(TAUS)}
        every_step = sums.sum(1, keepdims=True)
        moved = total[:, Column.MOVED :].sum(0)
        overall = {f"share_above_{tau:g}": float(ratio(moved[at], pairs.sum())) for at, tau in enumerate(TAUS)}
        overall |= {"median": float(quantile(changes.sum(0), 0.5)), "p90": float(quantile(changes.sum(0), 0.9))}
        return Curve(
            site=site,
            layer=layer,
            tokens=tokens,
            count=total[:, Column.TOKENS] / len(tallies),
            density=ratio(total[:, Column.KEPT], total[:, Column.TOKENS] * width),
            jaccard=self._similarity(sums[..., Column.PAIRS : Column.REFERENCE_TOKENS], width),
            drift=self._similarity(sums[..., Column.REFERENCE_TOKENS : Column.MOVED], width),
            jaccard_overall=self._similarity(every_step[..., Column.PAIRS : Column.REFERENCE_TOKENS], width),
            density_overall=float(ratio(total[:, Column.KEPT].sum(), total[:, Column.TOKENS].sum() * width)),
            moved_median=quantile(changes, 0.5),
            moved_p90=quantile(changes, 0.9),
            moved_share=shares,
            moved_overall=overall,
        )

    def unions(self, site: SiteName, layer: int | None) -> list[Union]:
        """Union densities over T = 1, 2, 4, ... neighbours and over the block, all steps and prompts pooled."""
        tallies = self.counts.at(site, layer)
        sums = sum(tally.unions.sum(1).double().numpy() for tally in tallies)
        assert isinstance(sums, np.ndarray)
        kept, entries = sums[..., 0], sums[..., 1] * mean_width(tallies)
        density = ratio(kept.sum(0), entries.sum(0))
        low, high = self._interval(kept, entries)
        own = float(density[0])
        return [
            Union(
                site=site,
                layer=layer,
                tokens=size,
                density=float(density[place]),
                low=float(low[place]),
                high=float(high[place]),
                independent=None if size is None else independent_union(own, size),
            )
            for place, size in enumerate((*WINDOW_SIZES, None))
            if entries[:, place].sum() > 0
        ]

    def lags(self, site: SiteName, layer: int | None, tokens: str) -> list[Lag]:
        """Similarities to the snapshots, one entry per delta."""
        classes, tallies = list(TOKEN_GROUPS[tokens]), self.counts.at(site, layer)
        found = []
        for place, delta in enumerate(self.counts.deltas):
            sums = sum(tally.snapshots[:, :, place, classes].sum(2).double().numpy() for tally in tallies)
            assert isinstance(sums, np.ndarray)
            found.append(Lag(site, layer, tokens, delta, self._similarity(sums, mean_width(tallies))))
        return found

    def _similarity(self, sums: Floats, width: float) -> Similarity:
        """From sums [R, S, 6] of (tokens, kept, kept in the other, intersection, union, Jaccard in units)."""
        tokens, kept, other, intersection, union, jaccard = np.moveaxis(sums.sum(0), -1, 0)
        low, high = self._interval(sums[..., 3], sums[..., 4])
        return Similarity(
            micro=ratio(intersection, union),
            token_mean=ratio(jaccard, tokens * PER_TOKEN_ONE),
            chance=chance_level(ratio(kept + other, 2 * tokens * width)),
            low=low,
            high=high,
        )

    def _interval(self, numerator: Floats, denominator: Floats) -> tuple[Floats, Floats]:
        """95 % interval [S] of sum numerator / sum denominator over resampled prompts, [R, S] each."""
        if self._weights is None:
            unknown = np.full(numerator.shape[1], np.nan)
            return unknown, unknown
        resampled = ratio(self._weights @ numerator, self._weights @ denominator)
        low, high = np.quantile(resampled, [0.025, 0.975], axis=0)
        return low, high


def mean_width(tallies: Sequence[SiteTally]) -> float:
    """Channels of a layer: layers may differ, but every forward feeds the same tokens to all of them."""
    return sum(tally.width for tally in tallies) / len(tallies)


def ratio(numerator: Floats, denominator: Floats) -> Floats:
    """Elementwise quotient, NaN where the denominator is 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(np.asarray(denominator) > 0, numerator / np.asarray(denominator), np.nan)


def quantile(histogram: Floats, level: float) -> Floats:
    """Quantile of the movement histogram(s) [..., bins], interpolated on the logarithmic scale; [...].

    NaN for an empty histogram; values outside the histogram's range come back as its ends.
    """
    edges = np.log10(change_edges().double().numpy())
    cumulated = histogram.cumsum(-1)
    total = cumulated[..., -1:]
    place: NDArray[np.int64] = (cumulated < level * total).sum(-1, keepdims=True)
    place = place.clip(0, histogram.shape[-1] - 1)
    inside = np.take_along_axis(histogram, place, -1)
    below = np.take_along_axis(cumulated, place, -1) - inside
    step = edges[1] - edges[0]
    fraction = np.where(inside > 0, (level * total - below) / np.maximum(inside, 1), 0.0)
    # Bin k lies between edges k - 1 and k; bin 0 is below the first edge.
    exponent = (edges[0] + (place - 1 + fraction) * step).clip(*np.log10(CHANGE_RANGE))
    return np.where(total > 0, 10.0**exponent, np.nan)[..., 0]
