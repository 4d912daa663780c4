"""Whether a law holds: lack of fit, choice of form, width against depth, and how much scale matters. Pure numbers.

Source of the claims tested: Sparsing Law (arXiv 2411.02335), sec. 4.2 to 4.4. N runs or points.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.polynomial import legendre
from scipy import optimize, stats

from dllm_sparse.analysis.law_forms import Array, Form
from dllm_sparse.analysis.laws import LawFit, fit_activation_law
from dllm_sparse.types import UsageError

_TREND_DEGREE = 3
REJECTED = 0.01
"""A form whose lack-of-fit p-value is below this is called wrong."""


def trend_p_value(fit: LawFit, tokens_billions: Sequence[float] | Array, ratio: Sequence[float] | Array) -> float:
    """F test for a smooth trend left in the residuals: small where the form bends away from the data.

    The alternative adds a cubic in log D; what the form's own parameters could absorb does not count. Residuals are
    taken as independent and of equal variance. NaN where too few points are left for it.
    """
    d, a = np.asarray(tokens_billions, dtype=np.float64), np.asarray(ratio, dtype=np.float64)
    residuals = a - fit.predict(d)
    basis, _ = np.linalg.qr(fit.jacobian(d))
    x = np.log(d)
    x = 2 * (x - x.min()) / (x.max() - x.min()) - 1
    extra = legendre.legvander(x, _TREND_DEGREE)
    extra -= basis @ (basis.T @ extra)
    # Directions the law can follow itself are gone now; keep what is left of full rank.
    left, sizes, _ = np.linalg.svd(extra, full_matrices=False)
    directions = left[:, sizes > 1e-3 * np.sqrt(len(d))]
    residuals = residuals - basis @ (basis.T @ residuals)
    explained = float(((directions.T @ residuals) ** 2).sum())
    free = len(d) - len(fit.parameters) - directions.shape[1]
    if free < 1 or not directions.shape[1]:
        return float("nan")
    rest = max(float(residuals @ residuals) - explained, np.finfo(np.float64).tiny)
    return float(stats.f.sf(explained / directions.shape[1] / (rest / free), directions.shape[1], free))


@dataclass(frozen=True, slots=True)
class FormChoice:
    """Both forms on the same points: Akaike weights and lack of fit; `best` has the larger weight.

    The weights are corrected for small samples, but where no form has the points for that (fewer than 6).
    """

    fits: dict[Form, LawFit]
    weights: dict[Form, float]
    trend_p_values: dict[Form, float]
    best: Form

    @property
    def rejected(self) -> list[Form]:
        """Forms the lack-of-fit test refuses."""
        return [form for form, p in self.trend_p_values.items() if p < REJECTED]


def choose_form(tokens_billions: Sequence[float] | Array, ratio: Sequence[float] | Array) -> FormChoice:
    """Fits both forms; raises UsageError where neither can be fitted."""
    fits: dict[Form, LawFit] = {}
    problems = []
    for form in ("relu", "silu"):
        try:
            fits[form] = fit_activation_law(tokens_billions, ratio, form=form)
        except UsageError as error:
            problems.append(str(error))
    if not fits:
        raise UsageError("; ".join(problems))
    scores = {form: corrected_aic(fit) for form, fit in fits.items()}
    if not np.isfinite(min(scores.values())):
        scores = {form: fit.aic for form, fit in fits.items()}
    lowest = min(scores.values())
    raw = {form: float(np.exp((lowest - value) / 2)) for form, value in scores.items()}
    weights = {form: value / sum(raw.values()) for form, value in raw.items()}
    trends = {form: trend_p_value(fit, tokens_billions, ratio) for form, fit in fits.items()}
    return FormChoice(fits, weights, trends, max(weights, key=lambda form: weights[form]))


def corrected_aic(fit: LawFit) -> float:
    """AICc: the AIC with its small-sample correction; the noise counts as a parameter."""
    k = len(fit.parameters) + 1
    room = fit.points - k - 1
    return fit.aic + (2 * k * (k + 1) / room if room > 0 else np.inf)


@dataclass(frozen=True, slots=True)
class WidthDepthFit:
    """A = level + slope * min(ratio - bottleneck, 0): a line up to the bottleneck, constant beyond it.

    `bottleneck_interval` (95 %, profile) is None at an end the data leave open. `knee_p_value` compares with a straight
    line, `slope_p_value` with a constant; NaN where too few points are left.
    """

    level: float
    slope: float
    bottleneck: float
    bottleneck_interval: tuple[float | None, float | None]
    knee_p_value: float
    slope_p_value: float
    rms_residual: float
    points: int

    def predict(self, ratio: Sequence[float] | Array) -> Array:
        """Activation ratio at width / depth."""
        return np.asarray(self.level + self.slope * np.minimum(np.asarray(ratio) - self.bottleneck, 0.0))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {name: None if value != value else value for name, value in asdict(self).items()}


def fit_width_depth(ratio: Sequence[float] | Array, activation: Sequence[float] | Array) -> WidthDepthFit:
    """Least squares over slope, level and bottleneck; at least 4 different ratios. Raises UsageError for fewer.

    Source: Sparsing Law, sec. 4.3: linear in d_model / n_layers up to a bottleneck (about 114 at 0.1B).
    """
    r, a = np.asarray(ratio, dtype=np.float64), np.asarray(activation, dtype=np.float64)
    if r.shape != a.shape or r.ndim != 1 or len(np.unique(r)) < 4:
        raise UsageError(f"a width-depth fit needs at least 4 different ratios with one activation each; got {r.size}")
    if not (np.isfinite(r).all() and np.isfinite(a).all() and (r > 0).all()):
        raise UsageError("width-depth ratios must be above 0 and activations finite")
    knees = np.geomspace(np.sort(np.unique(r))[1], r.max(), 400)
    squares = np.array([_kneed(r, a, knee)[1] for knee in knees])
    place = int(squares.argmin())
    low, high = knees[max(place - 1, 0)], knees[min(place + 1, len(knees) - 1)]
    refined = optimize.minimize_scalar(lambda knee: _kneed(r, a, knee)[1], bounds=(low, high), method="bounded")
    knee = float(refined.x) if refined.fun < squares[place] else float(knees[place])
    (level, slope), best = _kneed(r, a, knee)
    n = len(r)
    line = _squares(np.stack((np.ones(n), r), axis=1), a)
    flat = float(((a - a.mean()) ** 2).sum())
    return WidthDepthFit(
        level=level,
        slope=slope,
        bottleneck=knee,
        bottleneck_interval=_profile(knees, squares, best, n - 3),
        knee_p_value=_f_test(line, best, 1, n - 3),
        slope_p_value=_f_test(flat, best, 2, n - 3),
        rms_residual=float(np.sqrt(best / n)),
        points=n,
    )


def _kneed(r: Array, a: Array, knee: float) -> tuple[tuple[float, float], float]:
    design = np.stack((np.ones(len(r)), np.minimum(r - knee, 0.0)), axis=1)
    solution, *_ = np.linalg.lstsq(design, a, rcond=None)
    return (float(solution[0]), float(solution[1])), _squares(design, a)


def _squares(design: Array, a: Array) -> float:
    solution, *_ = np.linalg.lstsq(design, a, rcond=None)
    residuals = a - design @ solution
    return float(residuals @ residuals)


def _f_test(small: float, large: float, parameters: int, free: int) -> float:
    """p-value of the larger model's improvement; NaN without degrees of freedom."""
    if free < 1:
        return float("nan")
    large = max(large, np.finfo(np.float64).tiny)
    return float(stats.f.sf(max(small - large, 0.0) / parameters / (large / free), parameters, free))


def _profile(knees: Array, squares: Array, best: float, free: int) -> tuple[float | None, float | None]:
    if free < 1:
        return None, None
    inside = np.flatnonzero(squares <= best * (1 + stats.f.ppf(0.95, 1, free) / free))
    if not inside.size:
        return None, None
    low, high = int(inside[0]), int(inside[-1])
    return (None if low == 0 else float(knees[low])), (None if high == len(knees) - 1 else float(knees[high]))


@dataclass(frozen=True, slots=True)
class ScaleTest:
    """How the limit A0 moves when a model grows tenfold, in activation ratio, with a 95 % interval.

    `insensitive`: the interval lies within +-`margin` (then scale matters little is a finding), beyond it, or neither
    (None: these runs cannot tell).
    """

    per_decade: float
    low: float
    high: float
    p_value: float  # of no dependence at all
    margin: float
    insensitive: bool | None
    runs: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {name: None if value != value else value for name, value in asdict(self).items()}


def scale_test(
    parameters: Sequence[float], limits: Sequence[float], errors: Sequence[float] | None = None, margin: float = 0.03
) -> ScaleTest:
    """Regresses limits on log10(parameters), weighted by their standard errors where there are any.

    With errors known the interval is normal (two runs suffice); without, Student's t over the residuals (three runs).
    Source of the claim: Sparsing Law, sec. 4.4. Raises UsageError for too few sizes.
    """
    x, y = np.log10(np.asarray(parameters, dtype=np.float64)), np.asarray(limits, dtype=np.float64)
    needed = 2 if errors is not None else 3
    if len(np.unique(x)) < 2 or len(x) < needed:
        raise UsageError(f"the scale test needs {needed} runs of different size; got {len(x)}")
    sigma = np.ones(len(x)) if errors is None else np.maximum(np.asarray(errors, dtype=np.float64), 1e-12)
    design = np.stack((np.ones(len(x)), x), axis=1) / sigma[:, None]
    covariance = np.linalg.inv(design.T @ design)
    solution = covariance @ design.T @ (y / sigma)
    residuals = y / sigma - design @ solution
    free = len(x) - 2
    if errors is None:
        covariance = covariance * float(residuals @ residuals) / free
        reference = stats.t(free)
    else:
        # Errors that are too small for the scatter are widened, never narrowed.
        inflation = max(float(residuals @ residuals) / free, 1.0) if free > 0 else 1.0
        covariance = covariance * inflation
        reference = stats.norm()
    slope, error = float(solution[1]), float(np.sqrt(covariance[1, 1]))
    reach = float(reference.ppf(0.975)) * error
    low, high = slope - reach, slope + reach
    verdict = True if -margin < low and high < margin else False if low > margin or high < -margin else None
    p_value = 2 * float(reference.sf(abs(slope) / max(error, 1e-300)))
    return ScaleTest(slope, low, high, p_value, margin, verdict, len(x))
