"""Decisions of captured forwards: from the first one, then from all, never for a change that is not worth a capture."""

from __future__ import annotations

import pytest
import torch

from dllm_sparse.kernels.dispatch import MEASURED_FOR
from dllm_sparse.sparsity.graph_rows import GraphRows
from dllm_sparse.types import TokenClass

LAYERS, WIDTHS = 5, {"input": 100, "intermediate": 200}


def state(rows: int, density: float, *, or_dense: bool = False) -> GraphRows:
    """Settled by a first forward in which the rows kept the same share of every site."""
    made = GraphRows(LAYERS, WIDTHS, rows, torch.device("cpu"), listing=True, dense=False)
    forward(made, density)
    made.settle(always=False, on_gpu=True, or_dense=or_dense)
    made.reset()
    return made


def forward(made: GraphRows, density: float, layers: int = LAYERS) -> None:
    """A forward whose rows all keep the same channels, that many of the first layers' sites."""
    for place, width in enumerate(WIDTHS.values()):
        made.kept[:layers, place] = made.union[:layers, place, 0] = round(density * width)
    made.add(torch.full((made.rows,), TokenClass.MASKED))


def generation(made: GraphRows, density: float, *, or_dense: bool = False) -> None:
    """Four forwards; sites that run dense are left at what they count as."""
    made.reset()
    for _ in range(4):
        forward(made, density, 0 if made.dense[0][0] else LAYERS)
    made.decide_again(made.totals(), or_dense=or_dense)


@pytest.mark.parametrize("rows", [1, 8])
def test_lists_give_way_to_dense_products_and_come_back(rows: int) -> None:
    made = state(rows, 0.3)
    assert all(one for layer in made.listing for one in layer)
    generation(made, 0.32)
    assert not made.stale
    for _ in range(9):
        generation(made, 0.99)
    assert made.stale
    assert not any(one for layer in made.listing for one in layer)
    made.stale = False
    generation(made, 0.95)
    assert not made.stale
    for _ in range(30):  # where nothing is listed the union of several rows is judged by what they keep
        generation(made, 0.3)
    assert made.stale
    assert all(one for layer in made.listing for one in layer)


def test_one_changed_choice_in_twenty_is_not_worth_a_capture() -> None:
    made = GraphRows(20, WIDTHS, 1, torch.device("cpu"), listing=True, dense=False)
    forward(made, 0.3, 20)
    made.settle(always=False, on_gpu=True, or_dense=False)
    for _ in range(5):
        made.reset()
        forward(made, 0.3, 20)
        forward(made, 0.99, 1)
        made.decide_again(made.totals(), or_dense=False)
    assert not made.stale
    assert all(one for layer in made.listing for one in layer)


def test_what_cannot_be_listed_never_is() -> None:
    made = GraphRows(LAYERS, WIDTHS, 1, torch.device("cpu"), listing=True, dense=False)
    made.listable[2][1] = False
    forward(made, 0.1)
    made.settle(always=True, on_gpu=True, or_dense=False)
    assert [one for layer in made.listing for one in layer].count(False) == 1


def test_a_first_decision_stands_when_a_step_is_captured_again() -> None:
    made = state(1, 0.3)
    forward(made, 0.99)
    made.settle(always=False, on_gpu=True, or_dense=False)
    assert all(one for layer in made.listing for one in layer)


@pytest.mark.parametrize("rows", [1, 8])
def test_masks_only_where_they_pay_end_when_they_pay_no_more_and_are_tried_anew(rows: int) -> None:
    made = state(rows, 0.3, or_dense=True)
    assert not made.dense[0][0]
    for _ in range(8):
        generation(made, 0.3, or_dense=True)
    assert not made.stale
    while not made.stale:
        generation(made, 0.99, or_dense=True)
    for _ in range(2):  # the capture to come begins masked everywhere, and what it meets decides
        assert made.settled is None
        assert not made.dense[0][0]
        forward(made, 0.99)
        made.settle(always=False, on_gpu=True, or_dense=True)
        assert all(one for layer in made.dense for one in layer)
        made.stale = False
        for _ in range(MEASURED_FOR - 1):
            generation(made, 1.0, or_dense=True)
        assert not made.stale
        generation(made, 1.0, or_dense=True)
        assert made.stale


def test_forwards_too_long_for_lists_stay_dense() -> None:
    made = GraphRows(LAYERS, WIDTHS, 65, torch.device("cpu"), listing=True, dense=True)
    made.settle(always=False, on_gpu=True, or_dense=True)
    for _ in range(2 * MEASURED_FOR):
        generation(made, 1.0, or_dense=True)
    assert not made.stale
    assert all(one for layer in made.dense for one in layer)


def test_a_union_in_runs_is_one_number_once_its_site_runs_otherwise() -> None:
    made = GraphRows(LAYERS, WIDTHS, 8, torch.device("cpu"), listing=True, dense=False)
    made.kept[:] = 60
    made.union[:] = 5  # in each of the runs
    unions = made.union.sum(-1).tolist()
    made.settle(always=False, on_gpu=True, or_dense=False)
    assert made.union.sum(-1).tolist() == unions
    assert not made.union[..., 1:].any()
