"""The activation laws of Sparsing Law: how the share of active neurons moves with training tokens. Pure numbers.

ReLU models: A(D) = exp(-c D^alpha + b) + A0, falling (eq. 4). SiLU models: A(D) = A0 - c / D^alpha, rising (eq. 5).
D is in billions of tokens, A a fraction. Source: arXiv 2411.02335, sec. 4 and app. G.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

from dllm_sparse.types import UsageError

Form = Literal["relu", "silu"]
Array = NDArray[np.float64]

_POLISHED = 4
_HUGE = 1e50  # stands for "anything" where the data do not speak; its square is still a number

PARAMETERS: dict[Form, tuple[str, ...]] = {"relu": ("alpha", "b", "c", "A0"), "silu": ("alpha", "c", "A0")}

PUBLISHED: dict[Form, dict[str, dict[str, float]]] = {
    "relu": {
        "0.1B": {"alpha": 0.101, "b": -0.0151, "c": 3.20, "A0": 0.0614},
        "0.2B": {"alpha": 0.449, "b": -3.05, "c": 0.286, "A0": 0.0674},
        "0.4B": {"alpha": 0.683, "b": -3.46, "c": 0.0790, "A0": 0.0690},
        "0.8B": {"alpha": 1.01, "b": -3.49, "c": 0.00797, "A0": 0.0721},
        "1.2B": {"alpha": 1.33, "b": -3.89, "c": 0.000903, "A0": 0.0782},
        "2.4B": {"alpha": 1.53, "b": -3.46, "c": 0.000156, "A0": 0.0648},
    },
    "silu": {
        "0.1B": {"alpha": 0.479, "c": 0.102, "A0": 0.409},
        "0.2B": {"alpha": 0.844, "c": 0.208, "A0": 0.390},
        "0.4B": {"alpha": 1.03, "c": 0.420, "A0": 0.385},
        "0.8B": {"alpha": 0.995, "c": 0.562, "A0": 0.383},
        "1.2B": {"alpha": 0.967, "c": 0.538, "A0": 0.382},
    },
}
"""The paper's fitted coefficients by form and model size (app. G)."""


@dataclass(frozen=True, slots=True)
class LawFit:
    """A fitted law. `covariance` [k, k] follows the order of `parameters`; residuals and predictions are fractions."""

    form: Form
    parameters: dict[str, float]
    covariance: Array
    rms_residual: float
    points: int
    aic: float
    runs_p_value: float

    @property
    def limit(self) -> float:
        """A0: the activation ratio at infinite training."""
        return self.parameters["A0"]

    @property
    def standard_errors(self) -> dict[str, float]:
        """One standard error of each parameter."""
        return dict(zip(self.parameters, np.sqrt(np.diag(self.covariance)).tolist(), strict=True))

    def predict(self, tokens_billions: float | Sequence[float] | Array) -> Array:
        """Activation ratio at D, in billions of tokens."""
        return activation_law(self.form, tokens_billions, **self.parameters)

    def jacobian(self, tokens_billions: Sequence[float] | Array) -> Array:
        """Derivatives [n, k] of the curve at D by each parameter."""
        d = np.asarray(tokens_billions, dtype=np.float64)
        return _numeric_jacobian(lambda t: _curve(self.form, d, t), np.array(list(self.parameters.values())))

    def band(self, tokens_billions: float | Sequence[float] | Array, level: float = 0.95) -> tuple[Array, Array]:
        """Confidence band of the curve by the delta method, also beyond the data."""
        d = np.atleast_1d(np.asarray(tokens_billions, dtype=np.float64))
        gradient = self.jacobian(d)
        # Through the correlations: with variances of very different size the plain quadratic form can turn negative.
        scale = np.maximum(np.sqrt(np.diag(self.covariance)), 1 / _HUGE)
        sizes, directions = np.linalg.eigh(self.covariance / np.outer(scale, scale))
        error = np.linalg.norm((gradient * scale) @ (directions * np.sqrt(np.maximum(sizes, 0.0))), axis=1)
        width = stats.t.ppf(0.5 + level / 2, max(self.points - len(self.parameters), 1)) * error
        middle = self.predict(d)
        return middle - width, middle + width

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {
            "form": self.form,
            "parameters": self.parameters,
            "standard_errors": self.standard_errors,
            "covariance": self.covariance.tolist(),
            "rms_residual": self.rms_residual,
            "points": self.points,
            "aic": self.aic,
            "runs_p_value": self.runs_p_value,
        }


def activation_law(form: Form, tokens_billions: float | Sequence[float] | Array, **parameters: float) -> Array:
    """The law itself: activation ratio [n] at D billions of tokens [n]."""
    d = np.atleast_1d(np.asarray(tokens_billions, dtype=np.float64))
    return _curve(form, d, np.array([parameters[name] for name in PARAMETERS[form]]))


def fit_activation_law(
    tokens_billions: Sequence[float] | Array, activation_ratio: Sequence[float] | Array, form: Form = "silu"
) -> LawFit:
    """Least-squares fit by Levenberg-Marquardt from many starts; the best optimum wins.

    `tokens_billions` [n] > 0 and `activation_ratio` [n] in [0, 1], more points than parameters. `runs_p_value` is
    the Wald-Wolfowitz test of the residual signs: small where the form is wrong. Raises UsageError for data that cannot
    be fitted.
    """
    if form not in PARAMETERS:
        raise UsageError(f"form is {form!r}; allowed: {', '.join(PARAMETERS)}")
    d, a = _checked(tokens_billions, activation_ratio, len(PARAMETERS[form]))
    rough = (_levenberg_marquardt(form, d, a, start, evaluations=60) for start in _starts(form, d, a))
    ranked = sorted((result for result in rough if result is not None), key=lambda result: result.cost)
    # A rough pass ranks the valleys; only the deepest are worth following to the end.
    polished = (_levenberg_marquardt(form, d, a, _to_free(form, result.x)) for result in ranked[:_POLISHED])
    found = [result for result in polished if result is not None]
    if not found:
        raise UsageError(f"the {form} law could not be fitted to these {len(d)} points from any start")
    return _describe(form, d, a, min(found, key=lambda result: result.cost).x)


def bootstrap_fits(fit: LawFit, tokens_billions: Array, activation_ratio: Array, samples: int, seed: int = 0) -> Array:
    """Parameters [samples, k] refitted to residual-bootstrap data, from the fit's own optimum."""
    d, a = _checked(tokens_billions, activation_ratio, len(fit.parameters))
    theta = np.array(list(fit.parameters.values()))
    curve = _curve(fit.form, d, theta)
    # Leverage makes raw residuals too small by (1 - k/n) on average.
    residuals = (a - curve) / np.sqrt(1 - len(theta) / len(d))
    generator = np.random.default_rng(seed)
    rows = []
    for _ in range(samples):
        noisy = curve + generator.choice(residuals, len(d))
        # From the fit's own optimum; resamples that wander off along a flat valley need not reach its end.
        result = _levenberg_marquardt(fit.form, d, noisy, _to_free(fit.form, theta), evaluations=200)
        rows.append(theta if result is None else result.x)
    return np.stack(rows)


def bootstrap_band(
    form: Form, samples: Array, tokens_billions: Sequence[float] | Array, level: float = 0.95
) -> tuple[Array, Array]:
    """Percentile band [n] of the curves of resampled parameters [R, k]: what the delta method cannot bend."""
    d = np.atleast_1d(np.asarray(tokens_billions, dtype=np.float64))
    curves = np.stack([_curve(form, d, theta) for theta in samples])
    low, high = np.quantile(curves, [0.5 - level / 2, 0.5 + level / 2], axis=0)
    return low, high


def _curve(form: Form, d: Array, theta: Array) -> Array:
    # Absurd exponents on the way give infinities, which the search turns into a large residual.
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        if form == "relu":
            alpha, b, c, limit = theta
            return np.asarray(np.exp(b - c * d**alpha) + limit)
        alpha, c, limit = theta
        return np.asarray(limit - c / d**alpha)


def _derivatives(form: Form, d: Array, theta: Array) -> Array:
    """Jacobian [n, k] of the curve by the searched parameters (logarithms of alpha and c)."""
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        alpha, c = theta[0], theta[_positive(form)[1]]
        power, log_d = d**alpha, np.log(d)
        if form == "relu":
            rise = np.exp(theta[1] - c * power)
            columns = [-rise * c * power * log_d * alpha, rise, -rise * c * power, np.ones_like(d)]
        else:
            columns = [c / power * log_d * alpha, -c / power, np.ones_like(d)]
    return np.asarray(np.nan_to_num(np.stack(columns, axis=-1), nan=0.0, posinf=1e6, neginf=-1e6))


def _to_free(form: Form, theta: Array) -> Array:
    """alpha and c are positive: the search runs over their logarithms."""
    free = theta.copy()
    for place in _positive(form):
        free[place] = np.log(theta[place])
    return free


def _from_free(form: Form, free: Array) -> Array:
    theta = free.copy()
    for place in _positive(form):
        theta[place] = np.exp(np.clip(free[place], -60, 60))
    return theta


def _positive(form: Form) -> tuple[int, int]:
    names = PARAMETERS[form]
    return names.index("alpha"), names.index("c")


def _levenberg_marquardt(
    form: Form, d: Array, a: Array, start: Array, evaluations: int = 4000
) -> optimize.OptimizeResult | None:
    def residual(free: Array) -> Array:
        return np.nan_to_num(_curve(form, d, _from_free(form, free)) - a, nan=1e6, posinf=1e6, neginf=-1e6)

    # The tightest tolerances MINPACK accepts: laws with tiny c have long flat valleys.
    tight = 4 * np.finfo(np.float64).eps
    tolerances = {"xtol": tight, "ftol": tight, "gtol": tight, "max_nfev": evaluations}
    result = optimize.least_squares(
        residual, start, lambda free: _derivatives(form, d, _from_free(form, free)), method="lm", **tolerances
    )
    if not np.all(np.isfinite(result.x)) or result.cost >= 1e6:
        return None
    result.x = _from_free(form, result.x)
    return result


def _starts(form: Form, d: Array, a: Array) -> list[Array]:
    """A grid over alpha and the limit; the other parameters follow from the first and last point."""
    span = max(float(a.max() - a.min()), 1e-6)
    starts = []
    for alpha in (0.1, 0.3, 0.6, 1.0, 1.5):
        for margin in (0.02, 0.3, 1.0):
            if form == "silu":
                limit = float(a.max()) + margin * span
                c = max((limit - a[0]) * d[0] ** alpha, 1e-9)
                starts.append(_to_free(form, np.array([alpha, c, limit])))
                continue
            limit = float(a.min()) - margin * span
            first, last = np.log(max(a[0] - limit, 1e-9)), np.log(max(a[-1] - limit, 1e-9))
            c = max((first - last) / (d[-1] ** alpha - d[0] ** alpha), 1e-9)
            starts.append(_to_free(form, np.array([alpha, first + c * d[0] ** alpha, c, limit])))
    return starts


def _describe(form: Form, d: Array, a: Array, theta: Array) -> LawFit:
    residuals = a - _curve(form, d, theta)
    n, k = len(d), len(theta)
    squares = float(residuals @ residuals)
    jacobian = _numeric_jacobian(lambda t: _curve(form, d, t), theta)
    covariance = _inverse_square(jacobian) * squares / max(n - k, 1)
    return LawFit(
        form=form,
        parameters=dict(zip(PARAMETERS[form], theta.tolist(), strict=True)),
        covariance=covariance,
        rms_residual=float(np.sqrt(squares / n)),
        points=n,
        aic=n * float(np.log(max(squares / n, np.finfo(np.float64).tiny))) + 2 * (k + 1),
        runs_p_value=_runs_test(residuals),
    )


def _inverse_square(jacobian: Array) -> Array:
    """(J^T J)^-1 [k, k], positive whatever J: a direction the data leave open gets a huge variance, not none."""
    scale = np.linalg.norm(jacobian, axis=0)
    scale[scale == 0] = 1.0
    _, sizes, directions = np.linalg.svd(jacobian / scale, full_matrices=False)
    sizes = np.maximum(sizes, 1e-7 * max(float(sizes[0]), 1e-7))
    half = np.clip(directions / sizes[:, None] / np.maximum(scale, 1e-100), -_HUGE, _HUGE)
    return np.asarray(half.T @ half)


def _numeric_jacobian(function: Callable[[Array], Array], theta: Array) -> Array:
    """Central differences, [n, k]."""
    columns = []
    for place in range(len(theta)):
        step = np.zeros_like(theta)
        step[place] = 1e-6 * max(abs(theta[place]), 1e-6)
        with np.errstate(over="ignore", invalid="ignore"):
            columns.append((function(theta + step) - function(theta - step)) / (2 * step[place]))
    return np.asarray(np.nan_to_num(np.stack(columns, axis=-1), nan=0.0, posinf=1e150, neginf=-1e150))


def _runs_test(residuals: Array) -> float:
    """One-sided Wald-Wolfowitz p-value for too few sign changes (a form that bends away from the data)."""
    signs = residuals > 0
    positive, negative = int(signs.sum()), int((~signs).sum())
    if min(positive, negative) == 0:
        return 1.0
    n = positive + negative
    runs = 1 + int((signs[1:] != signs[:-1]).sum())
    mean = 2 * positive * negative / n + 1
    variance = (mean - 1) * (mean - 2) / (n - 1)
    return float(stats.norm.cdf((runs + 0.5 - mean) / np.sqrt(variance))) if variance > 0 else 1.0


def _checked(tokens: Any, ratio: Any, parameters: int) -> tuple[Array, Array]:
    d, a = np.asarray(tokens, dtype=np.float64), np.asarray(ratio, dtype=np.float64)
    if d.ndim != 1 or d.shape != a.shape:
        raise UsageError(f"tokens and activation ratios must be two lists of one length; got {d.shape} and {a.shape}")
    if len(d) <= parameters:
        raise UsageError(f"{len(d)} points cannot determine {parameters} parameters; give at least {parameters + 1}")
    if not (np.isfinite(d).all() and np.isfinite(a).all() and (d > 0).all() and ((a >= 0) & (a <= 1)).all()):
        raise UsageError("tokens must be above 0 and activation ratios between 0 and 1, all finite")
    order = np.argsort(d, kind="stable")
    return d[order], a[order]
