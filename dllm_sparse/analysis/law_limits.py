"""What a run says about the limit A0 of its law: a profile interval, and whether the run determines it. Pure numbers.

Standard errors trust a parabola around the optimum. Where the exponent runs to 0 there is none: the relu form becomes a
power law, exp(-c D^alpha + b) -> K D^-s, the silu form a logarithm without a limit. The profile goes through both.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import optimize, stats

from dllm_sparse.analysis.law_forms import Array
from dllm_sparse.analysis.laws import LawFit, fit_activation_law

Interval = tuple[float | None, float | None]

LOOSEST_EXPONENT = 0.5
"""An exponent whose standard error is more than this share of it is left open: its 95 % interval reaches 0."""
_STEPS = 24
_EXPONENTS = (0.05, 0.7, 2.5)


def limit_interval(fit: LawFit, tokens_billions: Sequence[float] | Array, ratio: Sequence[float] | Array) -> Interval:
    """Ends of A0 beyond which the F test refuses the best fit with that A0 (p < 0.05); None where [0, 1] has none.

    All other parameters are fitted anew at every A0. None at both ends where A0 itself lies outside [0, 1].
    """
    d, a = np.asarray(tokens_billions, dtype=np.float64), np.asarray(ratio, dtype=np.float64)
    free = len(d) - len(fit.parameters)
    best = fit.rms_residual**2 * len(d)
    if not 0 <= fit.limit <= 1 or free < 1:
        return None, None
    highest = max(best, np.finfo(np.float64).tiny) * (1 + float(stats.f.ppf(0.95, 1, free)) / free)
    x = np.log(d) - np.log(d).mean()
    # Twice the standard error is about right where it means anything at all.
    first = float(np.clip(2 * fit.standard_errors["A0"], 1e-6, 0.05))
    return _end(fit, x, a, highest, 0.0, -first), _end(fit, x, a, highest, 1.0, first)


def _end(fit: LawFit, x: Array, a: Array, highest: float, last: float, step: float) -> float | None:
    """Walks from the estimate towards `last` in growing steps until the profile crosses `highest`, then bisects."""

    def excess(limit: float) -> float:
        return _profile(fit, x, a, limit) - highest

    inside = fit.limit
    for _ in range(_STEPS):
        outside = min(inside + step, last) if step > 0 else max(inside + step, last)
        if excess(outside) > 0:
            # A perfect fit leaves no room inside: the estimate is its own end.
            return float(optimize.brentq(excess, inside, outside, rtol=1e-4)) if excess(inside) < 0 else inside
        if outside == last:
            return None
        inside, step = outside, 2 * step
    return None


def _profile(fit: LawFit, x: Array, a: Array, limit: float) -> float:
    """Least sum of squares with A0 fixed; x is log D, centred.

    Searched over height, steepness at the middle and exponent: these stay finite when the exponent goes to 0.
    """
    slopes = np.stack((np.ones_like(x), -x), axis=1)

    def falling(theta: Array) -> Array:
        bent = np.expm1(theta[2] * x) / theta[2]  # (D^alpha - 1) / alpha, log D at alpha = 0
        return np.asarray(limit + np.exp(np.clip(theta[0] - theta[1] * bent, -700, 50)))

    def falling_slopes(theta: Array) -> Array:
        exponent, power = theta[2], np.exp(theta[2] * x)
        bent = np.expm1(exponent * x) / exponent
        inner = np.stack((np.ones_like(x), -bent, -theta[1] * (power * x - bent) / exponent), axis=1)
        return np.asarray((falling(theta) - limit)[:, None] * inner)

    def rising(theta: Array) -> Array:
        return np.asarray(limit - np.exp(np.clip(theta[0] - theta[1] * x, -700, 50)))

    def rising_slopes(theta: Array) -> Array:
        return np.asarray((rising(theta) - limit)[:, None] * slopes)

    height = float(np.log(max(abs(float(np.median(a)) - limit), 1e-6)))
    costs = []
    for exponent in _EXPONENTS:
        if fit.form == "relu":
            form, slope = falling, falling_slopes
            start, low, high = [height, 1.0, exponent], [-60.0, 0.0, 1e-4], [20.0, 100.0, 50.0]
        else:
            form, slope = rising, rising_slopes
            start, low, high = [height, exponent], [-60.0, 0.0], [20.0, 50.0]
        found = optimize.least_squares(
            lambda theta, form=form: form(theta) - a, start, slope, (low, high), x_scale="jac", max_nfev=100
        )
        costs.append(2 * float(found.cost))
    return min(costs)


def open_questions(
    fit: LawFit, interval: Interval, tokens_billions: Sequence[float] | Array, ratio: Sequence[float] | Array
) -> list[str]:
    """Why the run does not determine its limit, in words; empty where it does.

    Asked: is A0 a ratio, is its interval closed and narrower than what the run itself covered, is the exponent fixed,
    and does the limit outlive the first quarter of the points (the paper drops warm-up, of unstated length)?
    """
    if not 0 <= fit.limit <= 1:
        return ["its best limit is no ratio"]
    d, a = np.asarray(tokens_billions, dtype=np.float64), np.asarray(ratio, dtype=np.float64)
    reasons = []
    low, high = interval
    if low is None or high is None:
        reasons.append("the interval of its limit is open")
    elif high - low > np.ptp(a):
        reasons.append("its limit is less certain than the range the run covered")
    elif not _holds_later(fit, low, high, d, a):
        reasons.append("its limit rests on the first quarter of the points")
    alpha, error = fit.parameters["alpha"], fit.standard_errors["alpha"]
    if not error <= LOOSEST_EXPONENT * alpha:
        edge = "a power law" if fit.form == "relu" else "a logarithm without limit"
        reasons.append(f"its exponent is left open ({edge} may fit as well)")
    return reasons


def _holds_later(fit: LawFit, low: float, high: float, d: Array, a: Array) -> bool:
    """Whether the later points alone allow a limit in [low, high]; True where too few are left to ask."""
    later = np.argsort(d, kind="stable")[len(d) // 4 :]
    if len(later) < len(fit.parameters) + 2:
        return True
    again = fit_activation_law(d[later], a[later], form=fit.form)
    if not 0 <= again.limit <= 1:
        return False
    lowest, highest = limit_interval(again, d[later], a[later])
    return (lowest is None or lowest <= high) and (highest is None or highest >= low)
