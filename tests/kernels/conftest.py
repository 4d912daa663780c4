"""Kernels must write what they return."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned(request: pytest.FixtureRequest) -> Iterator[None]:
    """On a GPU memory comes filled with NaN and the largest integers, so that an entry never written shows."""
    if request.node.get_closest_marker("gpu") is None:
        yield
        return
    request.node.add_marker(pytest.mark.filterwarnings("ignore:.*eterministic"))
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
