"""What a run says of its limit: intervals that cover, and degenerate fits that are called so."""

from __future__ import annotations

import numpy as np
import pytest

from dllm_sparse.analysis.law_forms import PUBLISHED, Form, activation_law
from dllm_sparse.analysis.law_limits import Interval, limit_interval, open_questions
from dllm_sparse.analysis.laws import LawFit, fit_activation_law

TOKENS = np.geomspace(2, 300, 14)


def noisy(curve: np.ndarray, seed: int, noise: float = 3e-4) -> np.ndarray:
    return np.asarray(curve + np.random.default_rng(seed).normal(0, noise, len(curve)))


def asked(data: np.ndarray, form: Form) -> tuple[LawFit, Interval, list[str]]:
    fit = fit_activation_law(TOKENS, data, form=form)
    interval = limit_interval(fit, TOKENS, data)
    return fit, interval, open_questions(fit, interval, TOKENS, data)


@pytest.mark.parametrize("form", ["relu", "silu"])
def test_the_profile_covers_the_true_limit_and_true_laws_pass(form: Form) -> None:
    true, covered, passed = PUBLISHED[form]["0.4B"], 0, 0
    for seed in range(8):
        data = noisy(activation_law(form, TOKENS, **true), seed)
        _, (low, high), reasons = asked(data, form)
        covered += (low or 0.0) <= true["A0"] <= (1.0 if high is None else high)
        passed += not reasons
    assert covered >= 6  # binomial(8, 0.95) is below 6 six times in 1,000
    assert passed >= 6


def test_the_profile_agrees_with_the_standard_error_where_the_law_is_well_determined() -> None:
    data = noisy(activation_law("silu", TOKENS, **PUBLISHED["silu"]["0.4B"]), 1, 1e-4)
    fit = fit_activation_law(TOKENS, data)
    low, high = limit_interval(fit, TOKENS, data)
    assert low is not None
    assert high is not None
    assert (high - low) / 2 == pytest.approx(2.2 * fit.standard_errors["A0"], rel=0.15)


def test_a_power_law_leaves_the_exponent_of_the_relu_form_open() -> None:
    fit, _, reasons = asked(noisy(0.03 + 0.05 * TOKENS**-0.7, 2, 1e-3), "relu")
    assert fit.parameters["alpha"] < 0.3
    assert any("power law" in reason for reason in reasons)


def test_growth_by_the_logarithm_has_no_limit() -> None:
    _, _, reasons = asked(noisy(0.2 + 0.03 * np.log(TOKENS), 3, 2e-3), "silu")
    assert reasons


def test_a_limit_that_rests_on_the_first_points_is_found_out() -> None:
    """A jump at the start looks like saturation; what follows grows by the logarithm."""
    data = noisy(0.22 + 0.012 * np.log(TOKENS), 0, 2e-3)
    data[:3] = 0.12, 0.13, 0.19
    fit, _, reasons = asked(data, "silu")
    assert 0 < fit.limit < 1
    assert reasons == ["its limit rests on the first quarter of the points"]


def test_an_impossible_limit_has_no_interval() -> None:
    fit = LawFit("silu", {"alpha": 1e-3, "c": 100.0, "A0": 100.3}, np.eye(3), 1e-3, 14, 0.0, 0.5)
    data = np.linspace(0.1, 0.3, 14)
    assert limit_interval(fit, TOKENS, data) == (None, None)
    assert open_questions(fit, (None, None), TOKENS, data) == ["its best limit is no ratio"]


def test_an_interval_that_is_open_or_wider_than_the_run_is_said() -> None:
    fit = LawFit("silu", {"alpha": 1.0, "c": 0.1, "A0": 0.3}, np.eye(3) * 1e-6, 1e-3, 14, 0.0, 0.5)
    data = fit.predict(TOKENS)
    assert open_questions(fit, (None, 0.4), TOKENS, data) == ["the interval of its limit is open"]
    assert open_questions(fit, (0.1, 0.5), TOKENS, data) == ["its limit is less certain than the range the run covered"]
    few = TOKENS[:6]  # the last five cannot be asked again
    assert open_questions(fit, (0.299, 0.301), few, data[:6]) == []
