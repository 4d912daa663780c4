"""Verdicts say what the interval supports, and no more."""

from __future__ import annotations

import numpy as np
import pytest

from dllm_sparse.analysis.differences import difference

NAMES = ("ours", "theirs")


def resamples(center: float, spread: float, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(center, spread, 1000)


def test_a_clear_winner_is_named_with_its_interval() -> None:
    found = difference(NAMES, (0.6, 0.5), (resamples(0.6, 0.01, 0), resamples(0.5, 0.01, 1)))
    assert found.separated
    assert found.verdict.startswith("ours tolerates 10.0 points more sparsity than theirs")
    swapped = difference(NAMES[::-1], (0.5, 0.6), (resamples(0.5, 0.01, 1), resamples(0.6, 0.01, 0)))
    assert swapped.verdict.startswith("ours tolerates 10.0 points more sparsity than theirs")


def test_an_interval_with_zero_separates_nothing() -> None:
    found = difference(NAMES, (0.52, 0.5), (resamples(0.52, 0.05, 0), resamples(0.5, 0.05, 1)))
    assert not found.separated
    assert found.verdict.startswith("Not separated: ours minus theirs is +2.0 points")


def test_caveats_forbid_a_verdict() -> None:
    samples = (resamples(0.6, 0.01, 0), resamples(0.5, 0.01, 1))
    found = difference(NAMES, (0.6, 0.5), samples, caveats=["theirs is at chance"])
    assert not found.separated
    assert found.verdict.startswith("Not decided (theirs is at chance)")


def test_a_bound_ahead_is_a_lead_of_at_least_that_and_behind_decides_nothing() -> None:
    samples = (resamples(0.6, 0.01, 0), resamples(0.5, 0.01, 1))
    ahead = difference(NAMES, (0.6, 0.5), samples, censored=(True, False))
    assert ahead.separated
    assert ahead.verdict.startswith("ours tolerates at least 10.0 points more")
    behind = difference(NAMES, (0.6, 0.5), samples, censored=(False, True))
    assert not behind.separated
    assert behind.verdict.startswith("Not decided (theirs never falls below the line)")


def test_paired_resamples_narrow_the_interval() -> None:
    shared = resamples(0.0, 0.05, 3)
    found = difference(NAMES, (0.52, 0.5), (0.52 + shared, 0.5 + shared))
    assert found.low == pytest.approx(0.02)
    assert found.separated


def test_undefined_resamples_are_said() -> None:
    found = difference(NAMES, (0.6, 0.5), (np.array([np.nan, 0.6]), np.array([0.5, 0.5])))
    assert found.low is None
    assert found.verdict.startswith("No interval")
