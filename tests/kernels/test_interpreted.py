"""The GPU kernels' indexing and masks in Triton's interpreter."""

from __future__ import annotations

import numpy as np
import pytest

from tests.helpers import interpreted

triton = pytest.importorskip("triton")
BEFORE_3_9 = tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 9)
OLD = BEFORE_3_9 and np.lib.NumpyVersion(np.__version__) >= "2.4.0"


@pytest.mark.skipif(OLD, reason="the interpreter of triton before 3.9 cannot loop to a loaded bound under numpy 2.4")
def test_kernels_agree_with_their_twins_in_the_interpreter() -> None:
    printed = interpreted(
        "from tests.kernels.interpreted import CHECKS, run; from tests.kernels.interpreted_edges import EDGES; "
        "run((*CHECKS, *EDGES))"
    )
    plain = ["products", "layers", "attention", "choice", "selection", "list_of_one_row", "counting"]
    assert printed.split() == [*plain, "lists", "norms", "one_key", "choices", "odd_rows", "unions"]
