"""Adaptive search for a critical sparsity: which value of the knob to evaluate next. Pure, hence resumable.

The bracket is halved in sparsity, the quantity we report, not in p: a value of p is guessed for the middle of the
bracket from the points measured so far. The guess works in u = erf(sqrt(-ln p)), the sparsity that top-p gives on
normally distributed values (kept mass exp(-t^2/2), kept share erfc(t/sqrt 2)); for other shapes, heavy tails included,
the log-odds of the measured sparsity are close to a straight line in the log-odds of u.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from scipy.special import erfinv

from dllm_sparse.types import UsageError


class Evaluated(NamedTuple):
    """One finished point: the knob, the measured sparsity in [0, 1], and the share of the dense score that is left."""

    p: float
    sparsity: float
    kept: float


def next_p(rule: str, points: Sequence[Evaluated], retain: float, tolerance: float = 0.01) -> float | None:
    """The knob to evaluate next, or None when the crossing is known to +-`tolerance`.

    `points` must hold the dense run. Raises UsageError for a rule whose knob has no known range (threshold).
    """
    ordered = sorted(points, key=lambda point: (point.sparsity, -point.p))
    failed = next((place for place, point in enumerate(ordered) if not point.kept >= retain), None)
    if failed == 0:
        return None
    low = ordered[(failed or len(ordered)) - 1]
    high = ordered[failed] if failed is not None else Evaluated(_from_u(rule, 1.0), 1.0, 0.0)
    if high.sparsity - low.sparsity <= 2 * tolerance:
        return None
    start, stop = _to_u(rule, low.p), _to_u(rule, high.p)
    aim = _expected_u(rule, low, high, (low.sparsity + high.sparsity) / 2)
    # Never more than a 6:1 split, so that a wrong guess still shrinks the bracket.
    share = min(max((aim - start) / (stop - start), 1 / 7), 6 / 7)
    p = round(_from_u(rule, start + (stop - start) * share), 8)
    return None if any(point.p == p for point in points) else p


def _expected_u(rule: str, low: Evaluated, high: Evaluated, sparsity: float) -> float:
    """Where a sparsity is expected, from a straight line in log-odds of u and of sparsity through the bracket's ends.

    An end at 0 or 1 has no log-odds; with one end left the line has slope 1, with none u is the sparsity itself.
    """
    inner = [
        (_log_odds(point.sparsity), _log_odds(_to_u(rule, point.p)))
        for point in (low, high)
        if 0 < point.sparsity < 1 and 0 < _to_u(rule, point.p) < 1
    ]
    if not inner:
        return sparsity
    slope = 1.0
    if len(inner) == 2:
        slope = (inner[1][1] - inner[0][1]) / (inner[1][0] - inner[0][0])
    return 1 / (1 + math.exp(-(inner[0][1] + slope * (_log_odds(sparsity) - inner[0][0]))))


def _log_odds(share: float) -> float:
    return math.log(share / (1 - share))


def _to_u(rule: str, p: float) -> float:
    """Expected sparsity of a knob, increasing from 0 (dense) to 1."""
    if rule == "top_p":
        return math.erf(math.sqrt(-math.log(p))) if p > 0 else 1.0
    if rule == "top_k":
        return 1 - p
    if rule == "max_p":
        return p
    raise UsageError(f"rule {rule!r} has no bounded knob to search; give a grid of values instead")


def _from_u(rule: str, u: float) -> float:
    if rule == "top_p":
        return math.exp(-(float(erfinv(u)) ** 2)) if u < 1 else 0.0
    return 1 - u if rule == "top_k" else u
