"""What skipping could buy, by hand: a model of 4,480 weights, of which the FFNs hold 2,304 and the head 640."""

from __future__ import annotations

import pytest

from dllm_sparse.bench.floors import Fed, Rates, forward_costs, total
from dllm_sparse.bench.prediction import beside_dense, predicted_speed_up, sparse_cost, union_density
from tests.helpers import tiny_lm

CONFIG = tiny_lm().config
UNIONS = {4: {"input": 0.5, "intermediate": 0.25}, 1: {"input": 0.75, "intermediate": 0.75}}
BANDWIDTH, FLOPS = Rates(1.0, 1e9, "made up"), Rates(1e9, 1.0, "made up")
BLOCK, TOKEN = Fed(1, 4, 4, 4), Fed(1, 1, 1, 1)


def test_the_skipped_weights_are_neither_read_nor_multiplied() -> None:
    """Of gate and up (two thirds) half, of down a quarter: 5/12 of 2,304 are 960 weights."""
    dense, sparse = total(forward_costs(CONFIG, BLOCK, 2)), sparse_cost(CONFIG, BLOCK, 2, UNIONS[4])
    assert dense.bytes == 2 * 4480
    assert sparse.bytes == 2 * (4480 - 960)
    assert dense.flops - sparse.flops == 2 * 960 * 4


def test_the_prediction_is_the_ratio_of_the_floors() -> None:
    assert predicted_speed_up(CONFIG, [BLOCK], 2, UNIONS, BANDWIDTH) == pytest.approx(4480 / 3520)
    both = predicted_speed_up(CONFIG, [BLOCK, TOKEN], 2, UNIONS, BANDWIDTH)  # a token alone saves 1,728 weights
    assert both == pytest.approx(2 * 4480 / (3520 + 2752))
    attention = 2 * 4 * 4 * 4 * 16  # two layers' products of four tokens with four keys
    assert predicted_speed_up(CONFIG, [BLOCK], 2, UNIONS, FLOPS) == pytest.approx(
        (2 * 4 * 4480 + attention) / (2 * 4 * 3520 + attention)
    )


def test_unions_of_other_numbers_of_tokens_say_nothing() -> None:
    assert predicted_speed_up(CONFIG, [Fed(1, 8, 8, 8)], 2, UNIONS, BANDWIDTH) is None
    assert predicted_speed_up(CONFIG, [Fed(2, 2, 2, 2)], 2, UNIONS, BANDWIDTH) is not None  # two rows of two tokens
    assert union_density([BLOCK, Fed(1, 8, 8, 8)], UNIONS) is None
    assert union_density([BLOCK, TOKEN], UNIONS) == {"input": 0.375, "intermediate": 0.5}


def test_measured_beside_predicted() -> None:
    def row(milliseconds: float, predicted: float | None) -> dict:
        step = {"forward": "cached", "tokens": 4.0, "ms": {"median": milliseconds}}
        return {"steps": [{**step, "union_density": {"input": 0.5}, "predicted_speed_up": predicted}]}

    (found,) = beside_dense(row(3.0, None), row(2.0, 1.8))
    assert found["measured_speed_up"] == 1.5
    assert found["predicted_speed_up"] == 1.8
    assert (found["dense_ms"], found["ms"]) == (3.0, 2.0)
