"""The list of channels that some row kept, made on any device without waiting for it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Listed(NamedTuple):
    """Rows of a weight that are read, and the inputs packed to them.

    values [M, K] of which the first `length` columns mean something, rows [K] int32 ascending, length [1] int32. With
    length [R] the list lies in R runs of these lengths, which begin at multiples of `run_space(K, R)`.
    """

    values: Tensor
    rows: Tensor
    length: Tensor


def run_space(k: int, runs: int) -> int:
    """Channels from the beginning of one run of a list of K channels to that of the next."""
    return -(-k // (16 * runs)) * 16


def list_kept(masked: Tensor, length: Tensor | None = None) -> Listed:
    """Lists the channels with a nonzero in some row of `masked` [M, K]; `length` [1] int32 receives how many.

    The others follow behind the list, so that every entry of `rows` is a channel and none is there twice.
    """
    kept = (masked != 0).any(0)
    place = torch.arange(len(kept), device=masked.device)
    rank = kept.cumsum(0)
    count = rank[-1:]
    target = torch.where(kept, rank - 1, count + place - rank)
    rows = torch.empty_like(place).scatter_(0, target, place).int()
    length = count.int() if length is None else length.copy_(count)
    return Listed(masked.index_select(1, rows), rows, length)
