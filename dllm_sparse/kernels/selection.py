"""Top-p thresholds on a GPU: one Triton program per row, the whole row in registers where it fits, fp64 sums.

The plain twin sorts, in `sparsity/rules.py`; this one halves the ordered bit patterns of the scores, down to an entry
of the row, so both return the same threshold. `triton` is imported on first use, because the CPU build of torch does
not bring it.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

MAX_ROW = 1 << 15
"""Longest row, in entries, that fits the registers of one program; longer ones are read again for every halving."""

_PART = 4096  # entries of a long row in registers at once


@cache
def triton_installed() -> bool:
    """True where triton can be imported."""
    return find_spec("triton") is not None


def can_select(score: Tensor) -> bool:
    """True where `mass_threshold` runs: fp32 rows on a CUDA device with triton."""
    return score.is_cuda and score.dtype == torch.float32 and triton_installed()


def mass_threshold(score: Tensor, target: Tensor) -> Tensor:
    """Largest entry t of each row with sum(score[score >= t]) >= target: [R, n] fp32 >= 0, [R, 1] fp64 -> [R, 1].

    The row's maximum where the target is 0. Scores must be finite.
    """
    rows, width = score.shape
    score = score.contiguous()
    threshold = torch.empty_like(target, dtype=torch.float32)
    if rows and width > MAX_ROW:
        arguments = (score, target.contiguous(), threshold, width)
        _long_kernel()[(rows,)](*arguments, PARTS=-(-width // _PART), BLOCK=_PART, num_warps=16)
    elif rows:
        block = 1 << (width - 1).bit_length()
        warps = min(max(block // 256, 1), 32)
        _kernel()[(rows,)](score, target.contiguous(), threshold, width, BLOCK=block, num_warps=warps)
    return threshold


@cache
def _kernel() -> Any:
    import triton
    import triton.language as tl

    @triton.jit  # type: ignore[untyped-decorator]
    def mass_threshold_kernel(score_ptr, target_ptr, threshold_ptr, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        row = tl.program_id(0).to(tl.int64)
        offsets = tl.arange(0, BLOCK)
        score = tl.load(score_ptr + row * width + offsets, mask=offsets < width, other=0.0)
        bits = score.to(tl.int32, bitcast=True)
        wide = score.to(tl.float64)
        target = tl.load(target_ptr + row)
        low = tl.min(bits, axis=0) * 0
        high = tl.max(bits, axis=0) + 1
        # 31 halvings decide any fp32 pattern; the invariant is mass(>= low) >= target > mass(>= high).
        for _ in range(31):
            middle = low + ((high - low) >> 1)
            mass = tl.sum(tl.where(bits >= middle, wide, 0.0), axis=0)
            enough = mass >= target
            low = tl.where(enough, middle, low)
            high = tl.where(enough, high, middle)
        tl.store(threshold_ptr + row, low.to(tl.float32, bitcast=True))

    return mass_threshold_kernel


@cache
def _long_kernel() -> Any:
    import triton
    import triton.language as tl

    @triton.jit  # type: ignore[untyped-decorator]
    def long_mass_threshold_kernel(  # type: ignore[no-untyped-def]
        score_ptr, target_ptr, threshold_ptr, width, PARTS: tl.constexpr, BLOCK: tl.constexpr
    ):
        start = score_ptr + tl.program_id(0).to(tl.int64) * width
        offsets = tl.arange(0, BLOCK)
        largest = tl.zeros([BLOCK], dtype=tl.int32)
        for part in range(PARTS):
            place = part * BLOCK + offsets
            score = tl.load(start + place, mask=place < width, other=0.0)
            largest = tl.maximum(largest, score.to(tl.int32, bitcast=True))
        target = tl.load(target_ptr + tl.program_id(0))
        high = tl.max(largest, axis=0) + 1
        low = high * 0
        for _ in range(31):
            middle = low + ((high - low) >> 1)
            masses = tl.zeros([BLOCK], dtype=tl.float64)
            for part in range(PARTS):
                place = part * BLOCK + offsets
                score = tl.load(start + place, mask=place < width, other=0.0)
                masses += tl.where(score.to(tl.int32, bitcast=True) >= middle, score.to(tl.float64), 0.0)
            enough = tl.sum(masses, axis=0) >= target
            low = tl.where(enough, middle, low)
            high = tl.where(enough, high, middle)
        tl.store(threshold_ptr + tl.program_id(0), low.to(tl.float32, bitcast=True))

    return long_mass_threshold_kernel
