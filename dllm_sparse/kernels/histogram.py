"""What a product counts of its result, so that selecting from it needs no search: see `packing.select`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

KEYS = 256
"""Magnitudes that are counted, around a threshold."""

LINE = KEYS // 2 + 8
"""Numbers kept of a row; what they are says `kernels/gpu/histogram.py`."""

SEARCHED = KEYS // 2 + 5
"""Where in a line stands whether its row had to be searched after all."""

MOST = 8
"""Rows that are worth counting: more are searched in the time that it takes."""


class Histogram(NamedTuple):
    """`lines` [M, LINE] int64, zero before the rows are made; `near` [M] int32, bits of the last thresholds or 0."""

    lines: Tensor
    near: Tensor

    @property
    def counts(self) -> Tensor:
        """The same memory [M, 2 LINE] int32: of each row, the KEYS counts come first."""
        return self.lines.view(torch.int32)


def new_histogram(rows: int, device: torch.device) -> Histogram:
    """One that has seen nothing."""
    lines = torch.zeros((rows, LINE), dtype=torch.int64, device=device)
    return Histogram(lines, torch.zeros(rows, dtype=torch.int32, device=device))
