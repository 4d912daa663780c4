"""Medians, quantiles, marks."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dllm_sparse.bench.timing import Stopwatch, Timing, graphed, quantile, time_calls

CPU = torch.device("cpu")


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30), st.floats(0, 1))
def test_quantile_is_numpys(values: list[float], share: float) -> None:
    assert quantile(values, share) == pytest.approx(float(np.quantile(values, share)), rel=1e-9, abs=1e-9)


def test_timing_summarises() -> None:
    assert Timing.of([3.0, 1.0, 2.0, 5.0, 4.0, 6.0]).to_dict() == {
        "median": 3.5,
        "low": 2.0,
        "high": 5.0,
        "samples": 6,
    }


def test_marks_measure_the_wall_clock() -> None:
    watch = Stopwatch(CPU)
    begin = watch.mark()
    time.sleep(0.02)
    middle = watch.mark()
    end = watch.mark()
    assert watch.milliseconds(begin, middle) >= 20
    assert watch.milliseconds(begin, middle) + watch.milliseconds(middle, end) == pytest.approx(
        watch.milliseconds(begin, end)
    )


def test_variants_take_turns_and_the_warm_up_is_dropped() -> None:
    order: list[str] = []
    timings = time_calls({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, CPU, repeats=3, warm_up=2)
    assert order == ["a", "b"] * 5
    assert {name: timing.samples for name, timing in timings.items()} == {"a": 3, "b": 3}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_a_graph_replays_the_call() -> None:
    device = torch.device("cuda")
    counter = torch.zeros((), device=device)
    replay = graphed(lambda: counter.add_(1), device)
    before = float(counter)
    replay()
    assert float(counter) == before + 1
    assert time_calls({"replay": replay}, device)["replay"].median > 0
