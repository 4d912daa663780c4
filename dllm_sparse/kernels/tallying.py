"""What is counted of a mask, on a GPU, in one reading of it: entries kept per token class, and unions of runs.

The plain twins are `SparsityCounts.add` and `union_counts`, which read a mask a dozen times. `triton` is imported on
first use, because the CPU build of torch does not bring it.
Shapes: B rows, T tokens, n features, C token classes, S programs.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dllm_sparse.kernels.selection import MAX_ROW, triton_installed
from dllm_sparse.types import TokenClass

CLASSES = len(TokenClass)
SHORT, LONG = 8, 32
"""Lengths of the runs whose unions are counted."""


class MaskTally(NamedTuple):
    """Sums over one mask; padding counts nowhere."""

    kept: Tensor  # [C] int64
    tokens: Tensor  # [C] int64
    unions: Tensor  # [2, 2] int64: per length (channels a whole run of real tokens kept, such runs)
    union: Tensor  # [n] bool: kept by some real token


def can_tally(keep: Tensor) -> bool:
    """True where `tally` runs: a contiguous mask with rows of at most MAX_ROW entries on a CUDA device with triton."""
    return keep.is_cuda and 0 < keep.shape[-1] <= MAX_ROW and keep.is_contiguous() and triton_installed()


def tally(keep: Tensor, token_class: Tensor) -> MaskTally:
    """Counts a mask [B, T, n] bool whose tokens have the classes [B, T]. Runs start at each row's first token."""
    rows, tokens, width = keep.shape
    runs = -(-tokens // LONG)
    sums = torch.zeros(rows * runs, 2 * CLASSES + 4, dtype=torch.int32, device=keep.device)
    unions = torch.zeros(rows * runs, width, dtype=torch.uint8, device=keep.device)
    if len(sums):
        block = max(1 << (width - 1).bit_length(), 16)
        arguments = (keep.view(torch.uint8), token_class.contiguous(), sums, unions, tokens, width, runs)
        sizes = {"CLASSES": CLASSES, "SLOTS": 1 << (CLASSES - 1).bit_length(), "SHORT": SHORT, "LONG": LONG}
        _kernel()[(rows * runs,)](*arguments, **sizes, BLOCK=block, num_warps=min(max(block // 512, 1), 16))
    total = sums.sum(0)
    kept, members = total[:CLASSES], total[CLASSES : 2 * CLASSES]
    return MaskTally(kept, members, total[2 * CLASSES :].view(2, 2), unions.any(0))


@cache
def _kernel() -> Any:
    import triton
    import triton.language as tl

    @triton.jit  # type: ignore[untyped-decorator]
    def tally_kernel(  # type: ignore[no-untyped-def]
        keep_ptr, class_ptr, sums_ptr, union_ptr, tokens, width, runs,
        CLASSES: tl.constexpr, SLOTS: tl.constexpr, SHORT: tl.constexpr, LONG: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        program = tl.program_id(0).to(tl.int64)
        row, first = program // runs, (program % runs) * LONG
        offsets = tl.arange(0, BLOCK)
        inside = offsets < width
        slots = tl.arange(0, SLOTS)
        kept = tl.zeros([SLOTS], dtype=tl.int32)
        members = tl.zeros([SLOTS], dtype=tl.int32)
        union = tl.zeros([BLOCK], dtype=tl.int32)
        short_kept = tl.sum(members, axis=0)
        short_runs = short_kept
        real_tokens = short_kept
        for part in range(LONG // SHORT):
            together = tl.zeros([BLOCK], dtype=tl.int32)
            real_here = short_kept * 0
            for step in range(SHORT):
                place = first + part * SHORT + step
                there = place < tokens
                kind = tl.load(class_ptr + row * tokens + place, mask=there, other=0).to(tl.int32)
                real = kind > 0
                line = keep_ptr + (row * tokens + place) * width
                keep = tl.load(line + offsets, mask=offsets < tl.where(real, width, 0), other=0).to(tl.int32)
                here = tl.where((slots == kind) & real, 1, 0)
                kept += here * tl.sum(keep, axis=0)
                members += here
                together |= keep
                real_here += real.to(tl.int32)
            whole = (real_here == SHORT).to(tl.int32)
            short_kept += tl.sum(together, axis=0) * whole
            short_runs += whole
            real_tokens += real_here
            union |= together
        out = sums_ptr + program * (2 * CLASSES + 4)
        tl.store(out + slots, kept, mask=slots < CLASSES)
        tl.store(out + CLASSES + slots, members, mask=slots < CLASSES)
        whole = (real_tokens == LONG).to(tl.int32)
        tl.store(out + 2 * CLASSES, short_kept)
        tl.store(out + 2 * CLASSES + 1, short_runs)
        tl.store(out + 2 * CLASSES + 2, tl.sum(union, axis=0) * whole)
        tl.store(out + 2 * CLASSES + 3, whole)
        tl.store(union_ptr + program * width + offsets, union.to(tl.uint8), mask=inside)

    return tally_kernel
