"""Checks of laws on simulated data: right forms kept, wrong ones found, knees and scale recovered."""

from __future__ import annotations

import numpy as np
import pytest

from dllm_sparse.analysis.law_checks import choose_form, fit_width_depth, scale_test, trend_p_value
from dllm_sparse.analysis.law_forms import PUBLISHED, Form, activation_law
from dllm_sparse.analysis.laws import bootstrap_band, bootstrap_fits, fit_activation_law
from dllm_sparse.types import UsageError

TOKENS = np.geomspace(2, 300, 14)  # as many as a run has checkpoints


def simulated(form: Form, size: str, seed: int, noise: float = 2e-4) -> np.ndarray:
    return activation_law(form, TOKENS, **PUBLISHED[form][size]) + np.random.default_rng(seed).normal(0, noise, 14)


@pytest.mark.parametrize("form", ["relu", "silu"])
def test_the_right_form_is_seldom_rejected(form: Form) -> None:
    """The lack-of-fit test keeps its level: at 5 % it refuses about 5 % of true laws."""
    refused = 0
    for seed in range(60):
        data = simulated(form, "0.8B", seed)
        refused += trend_p_value(fit_activation_law(TOKENS, data, form=form), TOKENS, data) < 0.05
    assert refused <= 9  # binomial(60, 0.05) exceeds 9 once in 3,000 times


@pytest.mark.parametrize(("true", "wrong"), [("relu", "silu"), ("silu", "relu")])
def test_the_wrong_form_is_rejected_and_the_right_one_chosen(true: Form, wrong: Form) -> None:
    rejected = chosen = 0
    for seed in range(20):
        choice = choose_form(TOKENS, simulated(true, "0.8B", seed))
        rejected += wrong in choice.rejected
        chosen += choice.best == true
        assert sum(choice.weights.values()) == pytest.approx(1.0)
    assert rejected >= 18
    assert chosen >= 19


@pytest.mark.parametrize("points", [4, 5, 6])
def test_few_points_still_have_weights(points: int) -> None:
    """The small-sample correction needs six points at least; below, the weights are those of the plain criterion."""
    choice = choose_form(TOKENS[:points], simulated("relu", "0.8B", 0)[:points])
    assert sum(choice.weights.values()) == pytest.approx(1.0)
    assert choice.weights[choice.best] == max(choice.weights.values())


def test_the_bootstrap_band_covers_the_truth_beyond_the_data() -> None:
    hits = 0
    for seed in range(20):
        data = simulated("silu", "0.2B", seed)
        fit = fit_activation_law(TOKENS, data)
        low, high = bootstrap_band("silu", bootstrap_fits(fit, TOKENS, data, samples=100), [3000.0])
        hits += bool(low[0] <= activation_law("silu", 3000.0, **PUBLISHED["silu"]["0.2B"])[0] <= high[0])
    assert hits >= 15


def test_the_bottleneck_is_found_where_it_was_put() -> None:
    ratios = np.array([4.0, 12.0, 24.0, 48.0, 74.0, 100.0, 160.0, 282.0, 500.0])
    truth = 0.08 + 0.0004 * np.minimum(ratios - 114, 0)
    data = truth + np.random.default_rng(0).normal(0, 2e-4, len(ratios))
    fit = fit_width_depth(ratios, data)
    assert fit.bottleneck == pytest.approx(114, rel=0.03)
    assert fit.level == pytest.approx(0.08, abs=5e-4)
    assert fit.slope == pytest.approx(4e-4, rel=0.05)
    assert fit.knee_p_value < 1e-3
    np.testing.assert_allclose(fit.predict(ratios), truth, atol=1e-3)
    covered = 0
    for seed in range(20):
        noisy = truth + np.random.default_rng(seed).normal(0, 1e-3, len(ratios))
        low, high = fit_width_depth(ratios, noisy).bottleneck_interval
        covered += (low or 0) <= 114 <= (high or np.inf)
    assert covered >= 16


def test_a_straight_line_has_no_proven_knee_and_noise_no_slope() -> None:
    ratios, noise = np.array([8.0, 16.0, 32.0, 64.0, 128.0]), np.random.default_rng(3).normal(0, 1e-3, 5)
    assert fit_width_depth(ratios, 0.1 + 0.001 * ratios + noise).knee_p_value > 0.05
    assert fit_width_depth(ratios, 0.1 + noise).slope_p_value > 0.05
    with pytest.raises(UsageError, match="4 different ratios"):
        fit_width_depth([1.0, 2.0, 2.0, 3.0], [0.1] * 4)


def test_scale_verdicts() -> None:
    sizes = [1e8, 2e8, 4e8, 8e8]
    flat = scale_test(sizes, [0.40, 0.401, 0.399, 0.4], [0.002] * 4)
    assert flat.insensitive is True
    assert flat.low < 0 < flat.high
    steep = scale_test(sizes, [0.40, 0.43, 0.46, 0.49], [0.002] * 4)
    assert steep.insensitive is False
    assert steep.per_decade == pytest.approx(0.0997, abs=1e-3)
    assert steep.p_value < 1e-6
    unsure = scale_test(sizes[:2], [0.40, 0.41], [0.02, 0.02])
    assert unsure.insensitive is None
    with pytest.raises(UsageError, match="3 runs"):
        scale_test(sizes[:2], [0.4, 0.4])


def test_the_published_limits_move_little_with_scale() -> None:
    """The paper's own claim, from its own coefficients: SiLU limits fall by 2 to 3 points over the decade."""
    sizes = {"0.1B": 1.08e8, "0.2B": 2.41e8, "0.4B": 4.52e8, "0.8B": 7.60e8, "1.2B": 1.18e9}
    limits = [PUBLISHED["silu"][size]["A0"] for size in sizes]
    found = scale_test(list(sizes.values()), limits)
    assert -0.035 < found.per_decade < -0.015
    relu = scale_test(list(sizes.values()), [PUBLISHED["relu"][size]["A0"] for size in sizes])
    assert 0.0 < relu.per_decade < 0.03
    assert relu.insensitive is True


def test_too_few_points_for_the_trend_test_is_said_by_nan() -> None:
    data = simulated("silu", "0.2B", 0)[:5]
    assert np.isnan(trend_p_value(fit_activation_law(TOKENS[:5], data), TOKENS[:5], data))
