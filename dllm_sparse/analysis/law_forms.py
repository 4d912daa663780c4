"""The functional forms of the activation laws, their derivatives, and the coefficients the paper publishes for them.

ReLU models: A(D) = exp(-c D^alpha + b) + A0, falling (eq. 4). SiLU models: A(D) = A0 - c / D^alpha, rising (eq. 5).
D is in billions of tokens, A a fraction. Source: arXiv 2411.02335, sec. 4 and app. G.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Form = Literal["relu", "silu"]
Array = NDArray[np.float64]

PARAMETERS: dict[Form, tuple[str, ...]] = {"relu": ("alpha", "b", "c", "A0"), "silu": ("alpha", "c", "A0")}

POSITIVE: dict[Form, list[int]] = {form: [names.index("alpha"), names.index("c")] for form, names in PARAMETERS.items()}
"""Places of the parameters that are positive; the search runs over their logarithms."""

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


def activation_law(form: Form, tokens_billions: float | Sequence[float] | Array, **parameters: float) -> Array:
    """The law itself: activation ratio [n] at D billions of tokens [n]."""
    d = np.atleast_1d(np.asarray(tokens_billions, dtype=np.float64))
    return curve(form, d, np.array([parameters[name] for name in PARAMETERS[form]]))


def curve(form: Form, d: Array, theta: Array) -> Array:
    """Activation ratio [n] at D [n] for parameters [k] in the order of `PARAMETERS`."""
    # Absurd exponents on the way give infinities, which the search turns into a large residual.
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        if form == "relu":
            alpha, b, c, limit = theta
            return np.asarray(np.exp(b - c * d**alpha) + limit)
        alpha, c, limit = theta
        return np.asarray(limit - c / d**alpha)


def derivatives(form: Form, d: Array, theta: Array) -> Array:
    """Jacobian [n, k] of the curve by the searched parameters (logarithms of alpha and c), finite whatever they are."""
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        alpha, c = theta[POSITIVE[form]]
        power, log_d = d**alpha, np.log(d)
        if form == "relu":
            rise = np.exp(theta[1] - c * power)
            columns = [-rise * c * power * log_d * alpha, rise, -rise * c * power, np.ones_like(d)]
        else:
            columns = [c / power * log_d * alpha, -c / power, np.ones_like(d)]
    return np.asarray(np.nan_to_num(np.stack(columns, axis=-1), nan=0.0, posinf=1e6, neginf=-1e6))
