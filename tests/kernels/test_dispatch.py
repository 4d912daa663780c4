"""Choices that were made once are changed only where the density has clearly moved."""

from __future__ import annotations

import pytest
import torch

from dllm_sparse.kernels import streaming
from dllm_sparse.kernels.dispatch import HYSTERESIS, listing_pays, still_pays, union_density


@pytest.mark.parametrize("rows", [1, 8, 32, 64])
def test_a_choice_changes_beyond_a_margin_and_not_within(rows: int) -> None:
    even = max(d / 1000 for d in range(1001) if listing_pays(rows, d / 1000))
    for listing in (False, True):
        assert still_pays(rows, even - 2 * HYSTERESIS, listing)
        assert not still_pays(rows, even + 2 * HYSTERESIS, listing)
        for within in (-0.9, 0.9):
            assert still_pays(rows, even + within * HYSTERESIS, listing) == listing


def test_the_likely_union_is_that_of_as_many_independent_rows() -> None:
    kept, rows = torch.tensor([0.1, 0.5]), 4
    union = 1 - (1 - kept) ** rows
    torch.testing.assert_close(union_density(kept, union, kept), union)  # where both were measured, what was measured
    torch.testing.assert_close(union_density(torch.full((2,), 0.3), union, kept), torch.full((2,), 1 - 0.7**rows))
    shared = union_density(torch.tensor([0.2]), torch.tensor([0.4]), torch.tensor([0.4]))
    torch.testing.assert_close(shared, torch.tensor([0.2]))  # rows that kept the same go on doing so
    extreme = union_density(torch.tensor([0.0, 1.0, 0.5]), torch.tensor([1.0, 1.0, 0.0]), torch.tensor([1.0, 0.5, 0.0]))
    assert bool(((extreme >= 0) & (extreme <= 1)).all())


def test_gpus_before_hopper_launch_one_kernel_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    for capability, kept in ((8, False), (9, True), (10, True)):
        monkeypatch.setattr(streaming, "_capability", lambda _device, found=capability: found)
        options = streaming.overlapping(streaming.LAYERS_OVERLAP, torch.device("cuda"))
        assert options == {"WAIT": kept, "TRIGGER": False, "launch_pdl": kept}
