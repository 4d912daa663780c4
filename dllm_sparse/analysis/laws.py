"""Fits of the activation laws of Sparsing Law: how the share of active neurons moves with training tokens.

D is in billions of tokens, A a fraction. Source: arXiv 2411.02335, sec. 4 and app. G.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from dllm_sparse.analysis.law_forms import PARAMETERS, Array, Form, activation_law, curve
from dllm_sparse.analysis.law_search import descend, starts
from dllm_sparse.types import UsageError

_POLISHED = 4
_HUGE = 1e50  # stands for "anything" where the data do not speak; its square is still a number


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
        return _numeric_jacobian(lambda t: curve(self.form, d, t), np.array(list(self.parameters.values())))

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
    rough = [descend(form, d, a, start, evaluations=60) for start in starts(form, d, a)]
    ranked = sorted((found for found in rough if found is not None), key=lambda found: found.cost)
    # A rough pass ranks the valleys; only the deepest are worth following to the end.
    polished = [descend(form, d, a, found.theta) for found in ranked[:_POLISHED]]
    ends = [found for found in polished if found is not None]
    if not ends:
        raise UsageError(f"the {form} law could not be fitted to these {len(d)} points from any start")
    return _describe(form, d, a, min(ends, key=lambda found: found.cost).theta)


def bootstrap_fits(fit: LawFit, tokens_billions: Array, activation_ratio: Array, samples: int, seed: int = 0) -> Array:
    """Parameters [samples, k] refitted to residual-bootstrap data, from the fit's own optimum."""
    d, a = _checked(tokens_billions, activation_ratio, len(fit.parameters))
    theta = np.array(list(fit.parameters.values()))
    fitted = curve(fit.form, d, theta)
    # Leverage makes raw residuals too small by (1 - k/n) on average.
    residuals = (a - fitted) / np.sqrt(1 - len(theta) / len(d))
    generator = np.random.default_rng(seed)
    rows = []
    for _ in range(samples):
        noisy = fitted + generator.choice(residuals, len(d))
        # From the fit's own optimum; resamples that wander off along a flat valley need not reach its end.
        found = descend(fit.form, d, noisy, theta, evaluations=200)
        rows.append(theta if found is None else found.theta)
    return np.stack(rows)


def bootstrap_band(form: Form, samples: Array, tokens_billions: Sequence[float] | Array) -> tuple[Array, Array]:
    """95 % percentile band [n] of the curves of resampled parameters [R, k]: what the delta method cannot bend."""
    d = np.atleast_1d(np.asarray(tokens_billions, dtype=np.float64))
    curves = np.stack([curve(form, d, theta) for theta in samples])
    low, high = np.quantile(curves, [0.025, 0.975], axis=0)
    return low, high


def _describe(form: Form, d: Array, a: Array, theta: Array) -> LawFit:
    residuals = a - curve(form, d, theta)
    n, k = len(d), len(theta)
    squares = float(residuals @ residuals)
    jacobian = _numeric_jacobian(lambda t: curve(form, d, t), theta)
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
