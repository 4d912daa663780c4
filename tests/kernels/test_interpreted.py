"""The GPU kernels' indexing and masks in Triton's interpreter."""

from __future__ import annotations

import pytest

from dllm_sparse.doctor.kernel_checks import interpreter_loops
from tests.helpers import interpreted

pytest.importorskip("triton")


@pytest.mark.skipif(
    not interpreter_loops(), reason="the interpreter of triton before 3.9 cannot loop to a loaded bound under numpy 2.4"
)
def test_kernels_agree_with_their_twins_in_the_interpreter() -> None:
    printed = interpreted(
        "from tests.kernels.interpreted import CHECKS, run; from tests.kernels.interpreted_edges import EDGES; "
        "run((*CHECKS, *EDGES))"
    )
    plain = [
        "products",
        "layers",
        "attention",
        "choice",
        "selection",
        "ties_and_broken_rows",
        "list_of_one_row",
        "counting",
    ]
    assert printed.split() == [*plain, "lists", "norms", "one_key", "choices", "odd_rows", "unions"]


@pytest.mark.skipif(
    not interpreter_loops(), reason="the interpreter of triton before 3.9 cannot loop to a loaded bound under numpy 2.4"
)
def test_selection_from_counts_agrees_with_its_twin_in_the_interpreter() -> None:
    printed = interpreted(
        "from tests.kernels.interpreted import run; from tests.kernels.interpreted_counts import COUNTS; run(COUNTS)"
    )
    assert printed.split() == ["counted_lists", "rows_that_counts_do_not_settle", "lists_in_runs"]
