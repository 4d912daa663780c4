"""Exact top-p selection on the device: masked rows, and the list of channels that some row kept, values packed to it.

The plain twin is `sparsity.rules.top_p_mask` on fp64; the kernels search the same ordered bit patterns. Nothing here
synchronises with the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dllm_sparse.kernels import reference, streaming
from dllm_sparse.kernels.histogram import MOST, Histogram
from dllm_sparse.kernels.listing import Listed, list_kept, run_space

RUNS = 16
"""Runs of a list of rows that were counted, each written by programs of its own."""

_CHUNK = 256  # channels of the list that a program writes
_PACKED_CHUNK, _PACKED_ROWS = 128, 8  # the same where several rows are packed, and how many it packs


class Selected:
    """Rows [M, n] after selection: `masked` [M, n] (None where only the list was made), `listed` (None where not)."""

    def __init__(self, masked: Tensor | None, listed: Listed | None) -> None:
        self.masked, self.listed = masked, listed


def select(
    x: Tensor,
    p: Tensor,
    guesses: Tensor,
    kept: Tensor,
    *,
    norm: tuple[Tensor, float] | None = None,
    listing: bool = True,
    count: Tensor | None = None,
    marks: Tensor | None = None,
    histogram: Histogram | None = None,
) -> Selected:
    """Keeps the largest entries of each 16-bit row [M, n] that hold at least p of its L1 mass; equals stay together.

    `p` [1] fp64 is on the device. `guesses` [M] fp32: the thresholds found last time as shares of their rows' masses
    (0 where none), replaced by the new ones. `kept` [M] int32 receives how many entries each row kept. With `norm`
    (weight [n], eps) the row is RMS-normalised first. With `listing` the channels that any row kept are listed and the
    rows packed to them; how many they are goes to `count` [1 or more] int32 too, if it is given and M > 1. Several rows
    mark the channels in `marks` [mark_words(n) or more] int32, which must be zero before; None makes them.

    Rows that `can_be_counted` are listed from the `histogram` of the product that made them, which receives the
    thresholds in place of `guesses`: one launch, no search. Their list lies in RUNS runs; `count` receives the lengths.
    """
    alone = None if count is None else count[:1]
    if not streaming.on_gpu(x):
        masked = reference.select(x if norm is None else reference.rms_norm(x, *norm), p)
        kept.copy_(masked.count_nonzero(-1))
        return Selected(masked, list_kept(masked, alone) if listing else None)
    if listing and histogram is not None and norm is None and can_be_counted(x):
        assert count is None or count.numel() == RUNS
        return Selected(None, _list_counted(x, p, histogram, kept, count))
    if listing and x.shape[0] == 1:
        return Selected(None, _list_one(x, p, guesses, kept, norm))
    if listing and marks is None:
        marks = torch.zeros(mark_words(x.shape[1]), dtype=torch.int32, device=x.device)
    masked = _mask(x, p, guesses, kept, norm, marks if listing else None)
    return Selected(masked, _pack(masked, marks, alone) if listing and marks is not None else None)


def can_be_counted(x: Tensor) -> bool:
    """True for rows [M, n] that are listed sooner from a `Histogram`: a few of bf16 on a GPU with the kernels.

    fp16 has too many values in the range that is counted.
    """
    return x.dtype == torch.bfloat16 and x.shape[0] <= MOST and streaming.on_gpu(x)


def mark_words(n: int) -> int:
    """Words of a bit a channel that `select` marks for rows of n entries."""
    return _block(n) // 32


def _mask(
    x: Tensor, p: Tensor, guesses: Tensor, kept: Tensor, norm: tuple[Tensor, float] | None, marks: Tensor | None
) -> Tensor:
    """Masked rows [M, n]; the channels they kept are marked if they are to be listed."""
    from dllm_sparse.kernels.gpu.select import mask_kernel

    (rows, n), (weight, eps) = x.shape, norm or (x, 0.0)
    masked = torch.empty_like(x)
    mask_kernel[(rows,)](
        x, weight, guesses, kept, masked, kept if marks is None else marks, p, n, eps,
        NORM=norm is not None, WORDS=marks is not None, **_shape(n), **_overlap(x),
    )  # fmt: skip
    return masked


def _list_one(x: Tensor, p: Tensor, guesses: Tensor, kept: Tensor, norm: tuple[Tensor, float] | None) -> Listed:
    from dllm_sparse.kernels.gpu.select import list_one_kernel

    n, (weight, eps) = x.shape[1], norm or (x, 0.0)
    values = torch.empty_like(x)
    index = torch.empty(n, dtype=torch.int32, device=x.device)
    list_one_kernel[(-(-n // _CHUNK),)](
        x, weight, guesses, kept, values, index, p, n, eps,
        CHUNK=_CHUNK, NORM=norm is not None, **_shape(n), **_overlap(x),
    )  # fmt: skip
    return Listed(values, index, kept)


def _pack(masked: Tensor, marks: Tensor, count: Tensor | None) -> Listed:
    from dllm_sparse.kernels.gpu.select import pack_kernel

    rows, n = masked.shape
    packed = torch.empty_like(masked)
    index = torch.empty(n, dtype=torch.int32, device=masked.device)
    count = torch.empty(1, dtype=torch.int32, device=masked.device) if count is None else count
    pack_kernel[(-(-n // _PACKED_CHUNK), -(-rows // _PACKED_ROWS))](
        masked, marks, packed, index, count, rows, n,
        BT=_PACKED_ROWS, WORDS=mark_words(n), CHUNK=_PACKED_CHUNK, num_warps=4, **_overlap(masked),
    )  # fmt: skip
    return Listed(packed, index, count)


def _list_counted(x: Tensor, p: Tensor, histogram: Histogram, kept: Tensor, lengths: Tensor | None) -> Listed:
    from dllm_sparse.kernels.gpu.histogram import list_counted_kernel

    (rows, n), space = x.shape, run_space(x.shape[1], RUNS)
    values = torch.empty_like(x)
    index = torch.empty(n, dtype=torch.int32, device=x.device)
    lengths = torch.empty(RUNS, dtype=torch.int32, device=x.device) if lengths is None else lengths
    list_counted_kernel[(RUNS, rows)](
        x, histogram.near, histogram.counts, histogram.lines, kept, values, index, lengths, p, rows, n, space,
        BT=1 << (rows - 1).bit_length(), BLOCK=1 << (space - 1).bit_length(), ROW=_block(n),
        num_warps=8, **_overlap(x),
    )  # fmt: skip
    return Listed(values, index, lengths)


def _block(n: int) -> int:
    return max(32, 1 << (n - 1).bit_length())


def _shape(n: int) -> dict[str, int]:
    block = _block(n)
    return {"BLOCK": block, "num_warps": 8 if block > 2048 else 4}


def _overlap(x: Tensor) -> dict[str, bool]:
    return streaming.overlapping(streaming.LISTS_OVERLAP, x.device)
