"""The bootstrap against brute force, and its coverage by simulation."""

from __future__ import annotations

import numpy as np
import pytest

from dllm_sparse.analysis.bootstrap import Array, ItemValues, interval, resample_counts
from dllm_sparse.analysis.critical import first_crossing, retention


def test_scores_of_resamples_equal_scores_of_drawn_items() -> None:
    random = np.random.default_rng(0)
    values = ItemValues(random.normal(size=(3, 7)), random.uniform(1, 5, size=7), "exp")
    counts = resample_counts(7, 20, "task")
    for row, scores in zip(counts, values.scores(counts), strict=True):
        drawn = np.repeat(np.arange(7), row.astype(int))
        expected = np.exp(values.numerator[:, drawn].sum(1) / values.denominator[drawn].sum())
        assert scores == pytest.approx(expected)


def test_links() -> None:
    numerator, denominator = np.array([[2.0, 4.0]]), np.array([1.0, 3.0])
    assert ItemValues(numerator, np.ones(2)).scores() == pytest.approx([3.0])
    assert ItemValues(numerator, denominator, "exp").scores() == pytest.approx([np.exp(1.5)])
    assert ItemValues(numerator, denominator, "bits").scores() == pytest.approx([1.5 / np.log(2)])


def test_counts_depend_on_name_items_and_seed_alone() -> None:
    one = resample_counts(10, 5, "a")
    assert (one.sum(1) == 10).all()
    assert (one == resample_counts(10, 5, "a")).all()
    assert (one != resample_counts(10, 5, "b")).any()
    assert (one != resample_counts(10, 5, "a", seed=1)).any()


def test_undefined_resamples_have_no_interval() -> None:
    assert interval(np.array([1.0, np.nan])) is None
    assert interval(np.linspace(0, 1, 1001)) == pytest.approx((0.025, 0.975))


def simulated(rng: np.random.Generator, sparsity: Array, items: int, accuracy: float) -> Array:
    """Right answers [K, N]: each item is lost beyond a sparsity of its own, some wrong ones turn right meanwhile."""
    lost_share = sparsity**4
    correct = rng.random(items) < accuracy
    changed = rng.random(items)[None] < lost_share[:, None]
    lucky = rng.random(items) < 0.3
    return np.where(correct[None], ~changed, changed & lucky[None]).astype(float)


def coverage(items: int, retain: float, simulations: int) -> tuple[float, float]:
    """How often the 95 % interval holds the true share kept at one point, and the true crossing."""
    rng = np.random.default_rng(5)
    sparsity, accuracy = np.linspace(0, 0.9, 19), 0.6
    truth = accuracy * (1 - sparsity**4) + (1 - accuracy) * 0.3 * sparsity**4
    kept_truth = truth / truth[0]
    crossing_truth = first_crossing(sparsity, kept_truth, retain)[0]
    hits = np.zeros(2)
    counts = resample_counts(items, 400, "simulation")  # the items are new in every simulation
    for _ in range(simulations):
        values = ItemValues(simulated(rng, sparsity, items, accuracy), np.ones(items))
        scores = values.scores(counts)
        kept = retention(scores, scores[:, 0])
        crossings, _ = first_crossing(sparsity, kept, retain)
        for place, (samples, true) in enumerate(((kept[:, 12], kept_truth[12]), (crossings, crossing_truth))):
            low, high = interval(samples) or (np.nan, np.nan)
            hits[place] += low <= true <= high
    return float(hits[0] / simulations), float(hits[1] / simulations)


@pytest.mark.parametrize(("items", "retain"), [(1000, 0.99), (500, 0.95)])
def test_coverage_is_nominal(items: int, retain: float) -> None:
    for found in coverage(items, retain, simulations=1000):
        assert 0.92 <= found <= 0.98
