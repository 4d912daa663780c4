"""The search for a law's parameters: Levenberg-Marquardt from a grid of starts."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import optimize

from dllm_sparse.analysis.law_forms import POSITIVE, Array, Form, curve, derivatives


class Found(NamedTuple):
    """An optimum: its parameters [k], and half the sum of squared residuals there."""

    theta: Array
    cost: float


def descend(form: Form, d: Array, a: Array, start: Array, evaluations: int = 4000) -> Found | None:
    """The optimum the parameters `start` [k] lead to; None where the search runs off to infinity."""

    def residual(free: Array) -> Array:
        return np.nan_to_num(curve(form, d, _from_free(form, free)) - a, nan=1e6, posinf=1e6, neginf=-1e6)

    # The tightest tolerances MINPACK accepts: laws with tiny c have long flat valleys.
    tight = 4 * np.finfo(np.float64).eps
    tolerances = {"xtol": tight, "ftol": tight, "gtol": tight, "max_nfev": evaluations}
    result = optimize.least_squares(
        residual,
        _to_free(form, start),
        lambda free: derivatives(form, d, _from_free(form, free)),
        method="lm",
        **tolerances,
    )
    if not np.all(np.isfinite(result.x)) or result.cost >= 1e6:
        return None
    return Found(_from_free(form, result.x), float(result.cost))


def starts(form: Form, d: Array, a: Array) -> list[Array]:
    """A grid over alpha and the limit; the other parameters follow from the first and last point."""
    span = max(float(a.max() - a.min()), 1e-6)
    found = []
    for alpha in (0.1, 0.3, 0.6, 1.0, 1.5):
        for margin in (0.02, 0.3, 1.0):
            if form == "silu":
                limit = float(a.max()) + margin * span
                c = max((limit - a[0]) * d[0] ** alpha, 1e-9)
                found.append(np.array([alpha, c, limit]))
                continue
            limit = float(a.min()) - margin * span
            first, last = np.log(max(a[0] - limit, 1e-9)), np.log(max(a[-1] - limit, 1e-9))
            c = max((first - last) / (d[-1] ** alpha - d[0] ** alpha), 1e-9)
            found.append(np.array([alpha, first + c * d[0] ** alpha, c, limit]))
    return found


def _to_free(form: Form, theta: Array) -> Array:
    """alpha and c are positive: the search runs over their logarithms."""
    free = theta.copy()
    free[POSITIVE[form]] = np.log(theta[POSITIVE[form]])
    return free


def _from_free(form: Form, free: Array) -> Array:
    theta = free.copy()
    theta[POSITIVE[form]] = np.exp(np.clip(free[POSITIVE[form]], -60, 60))
    return theta
