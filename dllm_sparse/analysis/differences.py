"""Differences of critical sparsities with an interval, and a verdict in words that the interval supports. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dllm_sparse.analysis.bootstrap import Array, interval
from dllm_sparse.analysis.critical import finite


@dataclass(frozen=True, slots=True)
class Difference:
    """first - second, as shares in [-1, 1], with the interval of the paired resamples and what may be said."""

    first: str
    second: str
    value: float
    low: float | None
    high: float | None
    separated: bool
    verdict: str

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {**asdict(self), "value": finite(self.value)}


def difference(
    names: tuple[str, str],
    values: tuple[float, float],
    resamples: tuple[Array, Array],
    *,
    censored: tuple[bool, bool] = (False, False),
    caveats: Sequence[str] = (),
) -> Difference:
    """Compares two critical sparsities; `resamples` [R] each, drawn with the same counts of the same items.

    `censored` marks values that are lower bounds: nothing measured fell below the line. The model that is ahead may be
    censored, its lead is then a lower bound; a censored model behind decides nothing. `caveats` disqualify a curve.
    """
    gap = values[0] - values[1]
    ends = interval(resamples[0] - resamples[1])
    low, high = ends or (None, None)
    ahead = 0 if gap > 0 else 1
    doubts = [*caveats, *([f"{names[1 - ahead]} never falls below the line"] if censored[1 - ahead] else [])]
    separated = ends is not None and (ends[0] > 0 or ends[1] < 0) and not doubts
    words = _verdict(names, gap, ends, doubts, at_least=censored[ahead])
    return Difference(*names, gap, low, high, separated, words)


def _verdict(
    names: tuple[str, str], gap: float, ends: tuple[float, float] | None, doubts: Sequence[str], *, at_least: bool
) -> str:
    """One sentence. It names a winner only where the interval excludes zero and nothing disqualifies the curves."""
    if ends is None:
        return f"No interval: a resample without a defined score; {names[0]} and {names[1]} cannot be compared here."
    span = f"{100 * ends[0]:+.1f} to {100 * ends[1]:+.1f} points"
    if doubts:
        return f"Not decided ({'; '.join(doubts)}): difference {100 * gap:+.1f} points, 95 % interval {span}."
    if ends[0] > 0 or ends[1] < 0:
        more, less = names if gap > 0 else names[::-1]
        sign = 1 if gap > 0 else -1
        low, high = sorted((sign * ends[0], sign * ends[1]))
        return (
            f"{more} tolerates {'at least ' if at_least else ''}{100 * abs(gap):.1f} points more sparsity than {less} "
            f"(95 % interval {100 * low:.1f} to {100 * high:.1f})."
        )
    return (
        f"Not separated: {names[0]} minus {names[1]} is {100 * gap:+.1f} points and the 95 % interval, {span}, "
        f"contains 0."
    )
