"""How many tokens a step commits."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dllm_sparse.samplers.schedule import transfer_counts


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
