"""SparsityConfig: what it refuses, what it says, and the knob over the steps."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import dllm_sparse as ds
from dllm_sparse.sparsity.config import IDENTITY
from dllm_sparse.types import UsageError


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"p": 1.5}, "p is 1.5; allowed: 0 to 1"),
        ({"p": -0.1}, "p is -0.1; allowed: 0 to 1"),
        ({"p": float("nan")}, "p is nan; allowed: 0 to 1"),
        ({"p": float("inf"), "rule": "threshold"}, "p is inf; rule 'threshold' takes a magnitude of at least 0"),
        ({"p": 80, "rule": "top_k"}, "p is 80"),
        ({"p": -1.0, "rule": "threshold"}, "magnitude of at least 0"),
        ({"rule": "topp"}, "rule is 'topp'; allowed: top_p, top_k, max_p, threshold"),
        ({"sites": "output"}, "sites is 'output'; allowed: input, up, gate, intermediate, all_inputs, all_linear"),
        ({"scope": "batch"}, "allowed: token, sequence, group"),
        ({"score": "l2"}, "allowed: magnitude, weighted"),
        ({"backend": "cuda"}, "allowed: auto, reference, triton, cpu"),
        ({"ties": "drop"}, "allowed: keep, trim"),
        ({"ties": "trim", "rule": "top_k"}, "belongs to rule 'top_p'"),
        ({"group_size": 0}, "group_size is 0; it must be at least 1"),
        ({"refresh_every": 0}, "refresh_every is 0"),
        ({"schedule": ()}, "schedule needs"),
        ({"schedule": ((0.5, 0.9), (0.5, 0.8))}, "increasing fractions"),
        ({"schedule": ((0.0, 0.9), (2.0, 0.8))}, "step fraction is 2.0"),
        ({"schedule": ((0.0, 1.9),)}, "p is 1.9"),
        ({"schedule": "0.9"}, "schedule needs"),
    ],
)
def test_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ds.SparsityConfig(**values)


def test_a_threshold_may_exceed_one() -> None:
    assert ds.SparsityConfig(p=3.5, rule="threshold").p == 3.5


def test_a_scheduled_function_is_checked_when_it_is_called() -> None:
    config = ds.SparsityConfig(schedule=lambda fraction: 2 * fraction)
    assert config.p_at(0.25) == 0.5
    with pytest.raises(UsageError, match=r"p is 2.0"):
        config.p_at(1.0)


@given(
    st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=5, unique_by=lambda point: point[0]),
    st.floats(0, 1),
)
def test_scheduled_points_are_joined_by_straight_lines(points: list[tuple[float, float]], fraction: float) -> None:
    points = sorted(points)
    p = ds.SparsityConfig(schedule=points).p_at(fraction)
    if fraction <= points[0][0]:
        assert p == points[0][1]
    elif fraction >= points[-1][0]:
        assert p == points[-1][1]
    else:
        (x0, y0), (x1, y1) = next(pair for pair in itertools.pairwise(points) if pair[0][0] <= fraction <= pair[1][0])
        share = (fraction - x0) / (x1 - x0)
        assert p == pytest.approx((1 - share) * y0 + share * y1, abs=1e-12)


def test_dictionaries_go_round_through_json() -> None:
    for config in (
        ds.SparsityConfig(),
        ds.SparsityConfig(p=0.3, rule="max_p", sites="gate", scope="group", group_size=4, refresh_every=3),
        ds.SparsityConfig(schedule=((0.0, 0.5), (1.0, 0.9)), ties="trim"),
        ds.SparsityConfig(layers=(1, 3), layer_p=(0.5, 0.6)),
    ):
        assert ds.SparsityConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(UsageError, match="unknown sparsity option 'q'"):
        ds.SparsityConfig.from_dict({"q": 1})


def test_a_scheduled_function_is_named_in_the_dictionary() -> None:
    values = ds.SparsityConfig(schedule=abs).to_dict()
    assert "abs" in json.dumps(values)
    with pytest.raises(UsageError, match="schedule"):
        ds.SparsityConfig.from_dict(values)


def test_identity_values() -> None:
    assert IDENTITY == {"top_p": 1.0, "top_k": 1.0, "max_p": 0.0, "threshold": 0.0}
    assert ds.SparsityConfig(sites="all_inputs").site_names == ("input", "intermediate")
    assert ds.SparsityConfig(sites="gate").site_names == ("gate",)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"layers": ()}, "at least one"),
        ({"layers": (-1,)}, "from 0 on"),
        ({"layer_p": (0.5, 1.5)}, "allowed: 0 to 1"),
        ({"layer_p": (0.5,), "schedule": ((0.0, 0.5),)}, "give one of them"),
    ],
)
def test_layers_outside_what_is_allowed(values: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        ds.SparsityConfig(**values)
