"""Grid maximum, first crossing, flags and the search, on curves whose answers are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dllm_sparse.analysis.bootstrap import ItemValues, interval
from dllm_sparse.analysis.critical import Critical, Estimate, critical, first_crossing, flags, grid_maximum, retention
from dllm_sparse.analysis.curves import average_curve, task_curve
from dllm_sparse.analysis.search import Evaluated, next_p
from dllm_sparse.types import UsageError

SPARSITY = np.array([0.0, 0.2, 0.4, 0.6, 0.8])


def test_first_crossing_interpolates_and_grid_maximum_may_lie_beyond() -> None:
    kept = np.array([1.0, 1.0, 0.98, 0.995, 0.5])
    value, crossed = first_crossing(SPARSITY, kept, 0.99)
    assert bool(crossed)
    assert value == pytest.approx(0.3)
    assert grid_maximum(SPARSITY, kept, 0.99) == pytest.approx(0.6)


def test_a_score_on_the_line_passes() -> None:
    kept = np.array([1.0, 0.99, 0.5, 0.4, 0.3])
    assert grid_maximum(SPARSITY, kept, 0.99) == pytest.approx(0.2)
    result, _ = critical(SPARSITY, kept, kept[None], 0.99)
    assert result.crossing.value == pytest.approx(0.2)
    assert result.bracket == (0.2, 0.4)
    last = np.array([1.0, 1.0, 1.0, 1.0, 0.99])
    assert critical(SPARSITY, last, last[None], 0.99)[0].censored


def test_intervals_are_percentiles_of_the_crossings_of_the_resamples() -> None:
    kept = np.array([1.0, 0.9, 0.8, 0.7, 0.6])
    resampled = np.stack([1 - slope * SPARSITY for slope in np.linspace(0.02, 0.2, 101)])
    for level in (0.95, 0.5):
        result, crossings = critical(SPARSITY, kept, resampled, 0.99, level)
        assert crossings == pytest.approx(0.01 / np.linspace(0.02, 0.2, 101))
        assert (result.crossing.low, result.crossing.high) == interval(crossings, level)
        assert result.bracket == (0.0, 0.2)
        assert not result.censored
        maxima = grid_maximum(SPARSITY, resampled, 0.99)
        assert set(maxima) == {0.0, 0.2, 0.4}
        assert result.grid_max == Estimate(0.0, *interval(maxima, level))


def test_curves_of_a_batch_are_read_apart() -> None:
    kept = np.array([[1.0] * 5, [1.0, 0.995, 0.5, 0.4, 0.3]])
    assert grid_maximum(SPARSITY, kept, 0.99) == pytest.approx([0.8, 0.2])
    assert first_crossing(SPARSITY, kept, 0.99)[1].tolist() == [False, True]
    assert retention(np.array([[0.2, 0.4], [0.9, 0.3]]), np.array([0.4, 0.6])) == pytest.approx(
        np.array([[0.5, 1.0], [1.5, 0.5]])
    )


def test_resamples_without_a_dense_score_leave_the_others_their_crossing() -> None:
    value, crossed = first_crossing(
        SPARSITY, np.array([[np.nan] * 5, [1.0, 0.98, 0.9, 0.9, 0.9], [1.0, 0.98, *[np.nan] * 3]]), 0.99
    )
    assert value == pytest.approx([np.nan, 0.1, np.nan], nan_ok=True)
    assert crossed.tolist() == [False, True, False]


def test_what_json_has_no_number_for_is_none() -> None:
    nothing = Estimate(math.nan, None, None)
    assert Critical(nothing, Estimate(0.5, 0.4, 0.6), False, (0.0, None)).to_dict() == {
        "grid_max": {"value": None, "low": None, "high": None},
        "crossing": {"value": 0.5, "low": 0.4, "high": 0.6},
        "censored": False,
        "bracket": (0.0, None),
    }


def test_a_curve_that_never_falls_is_censored() -> None:
    result, _ = critical(SPARSITY, np.ones(5), np.ones((100, 5)), 0.99)
    assert result.censored
    assert result.crossing.value == pytest.approx(0.8)
    assert result.bracket == (0.8, None)


def test_a_dense_score_of_zero_gives_no_number() -> None:
    kept = retention(np.zeros((1, 5)), np.zeros(1))[0]
    assert np.isnan(first_crossing(SPARSITY, kept, 0.99)[0])
    assert np.isnan(grid_maximum(SPARSITY, kept, 0.99))


def test_lower_is_better_inverts_the_share() -> None:
    assert retention(np.array([10.0, 20.0]), np.array(10.0), higher_is_better=False) == pytest.approx([1.0, 0.5])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((0.26, 0.24, 0.25, 0.99, 500), ["at chance", "few deciding items"]),
        ((0.354, 0.28, 0.0, 0.99, 164), ["below resolution"]),  # HumanEval
        ((0.7, 0.68, 0.25, 0.99, 1000), []),
        ((0.7, None, 0.25, 0.99, 1000), []),
        ((0.25, None, 0.25, 0.5, 100), ["at chance"]),
        ((0.3, 0.25, 0.25, 0.5, 100), ["at chance"]),
        ((1.0, None, 0.25, 0.5, 2), ["few deciding items"]),  # one
        ((1.0, None, 0.25, 0.5, 10), []),  # five
    ],
)
def test_flags(arguments: tuple[float, float, float, float, int], expected: list[str]) -> None:
    assert flags(*arguments) == expected


def curve(name: str, right: list[list[float]], chance: float | None = 0.25) -> object:
    values = ItemValues(np.array(right), np.ones(len(right[0])))
    sparsity = {"element": [0.0, 0.3, 0.6], "hook_mean": [0.0, 0.2, 0.7]}
    return task_curve(name, values, [1.0, 0.9, 0.5], sparsity, higher_is_better=True, chance=chance, resamples=100)  # type: ignore[arg-type]


def test_average_is_unweighted_and_leaves_perplexities_out() -> None:
    one = curve("one", [[1, 1, 1, 1], [1, 1, 1, 0], [0, 0, 0, 0]])
    two = curve("two", [[1, 0], [1, 0], [1, 0]])
    text = curve("text", [[1, 0], [1, 0], [1, 0]], chance=None)
    average = average_curve([one, two, text])  # type: ignore[list-item]
    assert average is not None
    assert average.scores == pytest.approx([0.75, 0.625, 0.25])
    assert average.items == 6
    assert average_curve([text]) is None  # type: ignore[list-item]


def test_both_averages_have_their_own_critical_sparsity() -> None:
    one = curve("one", [[1] * 10, [1] * 9 + [0], [0] * 10])
    element, hooks = (one.critical(average, 0.95)[0] for average in ("element", "hook_mean"))  # type: ignore[attr-defined]
    assert element.crossing.value == pytest.approx(0.15)
    assert hooks.crossing.value == pytest.approx(0.1)


def searched(sparsity_of: dict[float, float] | None, shape: float, crossing: float) -> list[Evaluated]:
    """Runs the search on a model whose sparsity is u ** shape and whose score crosses 99 % at `crossing`."""

    def sparsity(p: float) -> float:
        u = math.erf(math.sqrt(-math.log(p))) if p > 0 else 1.0
        return float(u**shape)

    points = [Evaluated(1.0, 0.0, 1.0)]
    while len(points) < 20 and (p := next_p("top_p", points, 0.99)) is not None:
        points.append(Evaluated(p, sparsity(p), 1 - 0.01 * (sparsity(p) / crossing) ** 4))
    return points


@given(shape=st.floats(0.5, 1.5), crossing=st.floats(0.1, 0.95))
def test_search_needs_at_most_eight_evaluations_for_one_point_of_sparsity(shape: float, crossing: float) -> None:
    points = sorted(searched(None, shape, crossing), key=lambda point: point.sparsity)
    assert len(points) <= 8
    place = next(index for index, point in enumerate(points) if point.kept < 0.99)
    assert points[place].sparsity - points[place - 1].sparsity <= 0.02
    assert points[place - 1].sparsity <= crossing <= points[place].sparsity


def test_search_is_a_function_of_its_points_and_knows_when_to_stop() -> None:
    points = searched(None, 1.0, 0.4)
    assert next_p("top_p", list(reversed(points[:4])), 0.99) == points[4].p
    assert next_p("top_p", points, 0.99) is None
    assert next_p("top_p", [Evaluated(1.0, 0.0, float("nan"))], 0.99) is None


def test_search_refuses_an_unbounded_knob() -> None:
    with pytest.raises(UsageError, match="bounded"):
        next_p("threshold", [Evaluated(0.0, 0.0, 1.0)], 0.99)
