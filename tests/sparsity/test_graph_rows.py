"""Decisions of captured forwards: from the first one, then from all, never for a change that is not worth a capture."""

from __future__ import annotations

import pytest
import torch

from dllm_sparse.sparsity.graph_rows import GraphRows
from dllm_sparse.types import TokenClass

LAYERS, WIDTHS = 5, {"input": 100, "intermediate": 200}


def state(rows: int, density: float) -> GraphRows:
    """Settled by a first forward in which the rows kept the same share of every site."""
    made = GraphRows(LAYERS, WIDTHS, rows, torch.device("cpu"), listing=True, dense=False)
    forward(made, density)
    made.settle(always=False, on_gpu=True, or_dense=False)
    made.reset()
    return made


def forward(made: GraphRows, density: float, layers: int = LAYERS) -> None:
    """A forward whose rows all keep the same channels, that many of the first layers' sites."""
    for place, width in enumerate(WIDTHS.values()):
        made.kept[:layers, place] = made.union[:layers, place] = round(density * width)
    made.add(torch.full((made.rows,), TokenClass.MASKED))


def generation(made: GraphRows, density: float, layers: int = LAYERS) -> None:
    made.reset()
    for _ in range(4):
        forward(made, density, layers)
    made.decide_again()


@pytest.mark.parametrize("rows", [1, 8])
def test_lists_give_way_to_dense_products_and_come_back(rows: int) -> None:
    made = state(rows, 0.3)
    assert all(one for layer in made.listing for one in layer)
    generation(made, 0.32)
    assert not made.stale
    for _ in range(3):
        generation(made, 0.99)
    assert made.stale
    assert not any(one for layer in made.listing for one in layer)
    made.stale = False
    generation(made, 0.95)
    assert not made.stale
    for _ in range(20):  # where nothing is listed the union of several rows is judged by what they keep
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
        made.decide_again()
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
