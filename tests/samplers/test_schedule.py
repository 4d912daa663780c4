"""How many tokens a step commits."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dllm_sparse.samplers.schedule import block_spans, timestep_count, timestep_shares, transfer_counts


@given(st.integers(0, 500), st.integers(1, 200))
def test_counts_add_up_and_fall_by_at_most_one(masks: int, steps: int) -> None:
    counts = transfer_counts(masks, steps)
    assert len(counts) == steps
    assert sum(counts) == masks
    assert counts == sorted(counts, reverse=True)
    assert counts[0] - counts[-1] <= 1


def test_the_published_schedule_not_the_rounded_one() -> None:
    """dllm's sampler would give 6, 6, 7, 6, 7."""
    assert transfer_counts(32, 5) == [7, 7, 6, 6, 6]
    assert transfer_counts(3, 5) == [1, 1, 1, 0, 0]


def test_a_leading_step_takes_one_alone() -> None:
    assert transfer_counts(8, 4, lead=True) == [1, 3, 2, 2]
    assert transfer_counts(8, 2, lead=True) == [1, 7]
    assert transfer_counts(8, 1, lead=True) == [8]
    assert transfer_counts(0, 3, lead=True) == [0, 0, 0]


def test_shares_of_times_that_fall_evenly() -> None:
    shares = timestep_shares(4, 0.2)  # times 1, 0.8, 0.6, 0.4, 0.2
    assert shares == pytest.approx([0.2, 0.25, 1 / 3, 1.0])
    assert [timestep_count(17, 2, share) for share in shares] == [1, 2, 2, 8]


def test_blocks_are_counted_from_the_first_position() -> None:
    assert block_spans(6, 13, 4) == [(6, 8), (8, 12), (12, 13)]
    assert block_spans(8, 12, 4) == [(8, 12)]
    assert block_spans(0, 5, 4) == [(0, 4), (4, 5)]
