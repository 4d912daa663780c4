"""Masked copies and their weights, against the bound summed over every mask there is."""

from __future__ import annotations

from itertools import product
from math import comb

import pytest
import torch
from torch import Tensor

from dllm_sparse.evaluation.copies import distinct_masks, masks_and_weights, merged
from dllm_sparse.evaluation.options import ScoringOptions
from dllm_sparse.evaluation.requests import Pair
from dllm_sparse.samplers.likelihood import stratified_masks


def losses(masks: Tensor) -> Tensor:
    """Any function of a mask: a sum over the masked positions of values that depend on the whole mask, [R] fp64."""
    length = masks.shape[1]
    code = (masks * 2 ** torch.arange(length)).sum(-1).double()
    return (masks * torch.cos(code[:, None] * torch.arange(1, length + 1))).sum(-1)


def bound(length: int) -> float:
    """Mean over sizes k of L / k times the mean loss of the masks of that size."""
    every = torch.tensor([mask for mask in product((False, True), repeat=length) if any(mask)])
    size = every.sum(-1)
    weights = torch.tensor([1 / k / comb(length, k) for k in size.tolist()], dtype=torch.float64)
    return float((weights * losses(every)).sum())


def estimates(kind: str, length: int, copies: int, seeds: int) -> Tensor:
    options = ScoringOptions(mc_num=copies, estimator=kind)  # type: ignore[arg-type]
    found = []
    for seed in range(seeds):
        masks, weights = masks_and_weights(Pair((seed,), tuple(range(length))), options)
        found.append(float((weights.double() * losses(masks)).sum()))
    return torch.tensor(found, dtype=torch.float64)


def test_merging_equal_copies_changes_no_sum() -> None:
    masks = stratified_masks(6, 64, torch.Generator().manual_seed(0))
    rows, copies = merged(masks)
    assert len(rows) < 64
    assert len({tuple(row) for row in rows.tolist()}) == len(rows)
    assert int(copies.sum()) == 64
    assert float((copies * losses(rows)).sum()) == pytest.approx(float(losses(masks).sum()), abs=1e-9)


def test_the_official_estimate_is_the_weighted_sum() -> None:
    pair = Pair((7, 8), (1, 2, 3, 4, 5, 6))
    masks, weights = masks_and_weights(pair, ScoringOptions(mc_num=32))
    drawn = stratified_masks(6, 32, torch.Generator().manual_seed(pair.seed(0)))
    official = (losses(drawn) * 6 / drawn.sum(-1)).mean()
    assert float((weights.double() * losses(masks)).sum()) == pytest.approx(float(official), rel=1e-6)


@pytest.mark.parametrize("length", [2, 3, 5])
def test_enough_distinct_copies_are_exact(length: int) -> None:
    copies = length * max(comb(length, size) for size in range(length + 1)) + 1
    found = estimates("distinct", length, copies, 3)
    assert found.tolist() == pytest.approx([bound(length)] * 3, abs=1e-6)


@pytest.mark.parametrize(("length", "copies"), [(5, 10), (7, 23), (7, 4), (16, 32)])
def test_distinct_copies_are_unbiased(length: int, copies: int) -> None:
    found = estimates("distinct", length, copies, 800)
    assert abs(float(found.mean()) - bound(length)) < 4 * float(found.std()) / 800**0.5


def test_distinct_copies_have_less_noise() -> None:
    official, distinct = (estimates(kind, 7, 64, 400) for kind in ("monte_carlo", "distinct"))
    assert float(distinct.std()) < 0.8 * float(official.std())


def test_masks_are_different_and_no_more_than_asked_for() -> None:
    for length, copies in ((6, 64), (9, 40), (9, 4), (20, 64), (70, 16)):
        masks, weights = distinct_masks(length, copies, torch.Generator().manual_seed(1))
        assert len(masks) <= copies
        assert len({tuple(row) for row in masks.tolist()}) == len(masks)
        # The loss "number masked" is L / k * k for every mask: the estimate must be exactly L.
        assert float((weights * masks.sum(-1)).sum()) == pytest.approx(length, rel=1e-5)
