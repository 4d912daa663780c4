"""The activation laws: golden fits, published coefficients recovered, wrong forms found out, honest errors."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dllm_sparse as ds
from dllm_sparse.analysis.law_forms import PUBLISHED, Form, activation_law
from dllm_sparse.analysis.laws import bootstrap_fits

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "cett.json").read_text())["scaling_laws"]
TOKENS = np.geomspace(1.5, 300, 40)


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["name"])
def test_golden_fits(case: dict[str, Any]) -> None:
    fit = ds.fit_activation_law(case["D_billion_tokens"], case["A"], form=case["law"])
    for name, value in case["true"].items():
        assert fit.parameters[name] == pytest.approx(value, abs=case["tolerance"][name])
    assert fit.rms_residual <= case["rms_residual"] * 1.0001 + 1e-13
    prediction = case["prediction"]
    assert fit.predict(prediction["D"])[0] == pytest.approx(prediction["A"], abs=prediction["tolerance"])


@pytest.mark.parametrize(("form", "size"), [(form, size) for form, sizes in PUBLISHED.items() for size in sizes])
def test_published_coefficients_are_recovered_within_their_errors(form: Form, size: str) -> None:
    true = PUBLISHED[form][size]
    noise = np.random.default_rng(7).normal(0, 1e-5, len(TOKENS))
    fit = ds.fit_activation_law(TOKENS, activation_law(form, TOKENS, **true) + noise, form=form)
    for name, value in true.items():
        assert abs(fit.parameters[name] - value) <= 5 * fit.standard_errors[name] + 1e-9


def test_published_values_give_the_papers_figures() -> None:
    """Values at D = 100 that match the axes of the paper's fig. 4, in percent."""
    expected = {
        "relu": {"0.1B": 6.74, "0.2B": 7.23, "0.4B": 7.40, "0.8B": 8.53, "1.2B": 9.17},
        "silu": {"0.1B": 39.8, "0.2B": 38.6, "0.4B": 38.1, "0.8B": 37.7, "1.2B": 37.6},
    }
    for form, sizes in PUBLISHED.items():
        for size in expected[form]:
            value = 100 * float(activation_law(form, 100, **sizes[size])[0])
            assert value == pytest.approx(expected[form][size], abs=0.06)


def test_standard_errors_cover_the_truth() -> None:
    true, hits, trials = PUBLISHED["silu"]["0.2B"], 0, 60
    clean = activation_law("silu", TOKENS, **true)
    for seed in range(trials):
        noise = np.random.default_rng(seed).normal(0, 2e-4, len(TOKENS))
        fit = ds.fit_activation_law(TOKENS, clean + noise, form="silu")
        hits += abs(fit.limit - true["A0"]) <= 2.03 * fit.standard_errors["A0"]
    assert 0.85 <= hits / trials <= 1.0


def test_a_wrong_form_is_rejected() -> None:
    noise = np.random.default_rng(3).normal(0, 1e-4, len(TOKENS))
    data = activation_law("relu", TOKENS, **PUBLISHED["relu"]["0.8B"]) + noise
    right, wrong = (ds.fit_activation_law(TOKENS, data, form=form) for form in ("relu", "silu"))
    assert right.aic < wrong.aic - 10
    assert wrong.runs_p_value < 0.001 < 0.05 < right.runs_p_value


def test_the_band_widens_beyond_the_data() -> None:
    noise = np.random.default_rng(5).normal(0, 2e-4, len(TOKENS))
    fit = ds.fit_activation_law(TOKENS, activation_law("silu", TOKENS, **PUBLISHED["silu"]["0.1B"]) + noise)
    (low_in, low_out), (high_in, high_out) = fit.band([100.0, 3000.0])
    assert low_in < fit.predict(100.0)[0] < high_in
    assert high_out - low_out > high_in - low_in


def test_bootstrap_agrees_with_the_covariance() -> None:
    noise = np.random.default_rng(9).normal(0, 2e-4, len(TOKENS))
    data = activation_law("silu", TOKENS, **PUBLISHED["silu"]["0.4B"]) + noise
    fit = ds.fit_activation_law(TOKENS, data)
    spread = bootstrap_fits(fit, TOKENS, data, samples=120).std(axis=0)
    for value, error in zip(spread, fit.standard_errors.values(), strict=True):
        assert 0.7 * error < value < 1.4 * error


@pytest.mark.parametrize(
    ("tokens", "ratio"),
    [
        ([1, 2, 3], [0.1, 0.2, 0.3]),
        ([1, 2, 3, 4, 5], [0.1] * 4),
        ([0, 2, 3, 4, 5], [0.1] * 5),
        ([1, 2, 3, 4, 5], [2.0] * 5),
    ],
)
def test_data_that_cannot_be_fitted(tokens: list[float], ratio: list[float]) -> None:
    with pytest.raises(ValueError, match=r"points|length|between"):
        ds.fit_activation_law(tokens, ratio)


def test_what_the_data_leave_open_gets_a_huge_error_and_no_nan() -> None:
    """A flat, noisy or falling run determines neither exponent nor amplitude of some form."""
    noise = np.random.default_rng(1).normal(0, 1e-3, len(TOKENS))
    for form, trend in itertools.product(("relu", "silu"), (0.0, 0.02, -0.02)):
        data = 0.4 + noise + trend * np.log(TOKENS)
        fit = ds.fit_activation_law(TOKENS, data, form=form)  # type: ignore[arg-type]
        errors = fit.standard_errors
        assert all(np.isfinite(error) and error >= 0 for error in errors.values())
        assert trend or errors["alpha"] > abs(fit.parameters["alpha"])
        json.dumps(fit.to_dict(), allow_nan=False)
        low, high = fit.band([50.0, 5e4])
        assert bool((low <= fit.predict([50.0, 5e4])).all() and (fit.predict([50.0, 5e4]) <= high).all())
