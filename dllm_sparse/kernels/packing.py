"""Exact top-p selection on the device: masked rows, and the list of channels that some row kept, values packed to it.

The plain twin is `sparsity.rules.top_p_mask` on fp64; the kernels search the same ordered bit patterns. Nothing here
synchronises with the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dllm_sparse.kernels import reference, streaming
from dllm_sparse.kernels.listing import Listed, list_kept

_CHUNK = 256  # channels of the list a program writes


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
) -> Selected:
    """Keeps the largest entries of each 16-bit row [M, n] that hold at least p of its L1 mass; equals stay together.

    `p` [1] fp64 is on the device. `guesses` [M] fp32: the thresholds found last time as shares of their rows' masses
    (0 where none), replaced by the new ones. `kept` [M] int32 receives how many entries each row kept. With `norm`
    (weight [n], eps) the row is RMS-normalised first. With `listing` the channels that any row kept are listed and the
    rows packed to them; how many they are goes to `count` [1] int32 too, if it is given and there are several rows.
    """
    if not streaming.on_gpu(x):
        masked = reference.select(x if norm is None else reference.rms_norm(x, *norm), p)
        kept.copy_(masked.count_nonzero(-1))
        return Selected(masked, list_kept(masked, count) if listing else None)
    from dllm_sparse.kernels.gpu.select import pack_kernel, select_kernel

    rows, n = x.shape
    block = max(32, 1 << (n - 1).bit_length())
    alone = listing and rows == 1
    values = torch.empty_like(x)
    index = torch.empty(n if listing else 1, dtype=torch.int32, device=x.device)
    words = torch.empty((rows, block // 32) if listing and not alone else (1, 1), dtype=torch.int32, device=x.device)
    overlap = streaming.overlapping(streaming.LISTS_OVERLAP, x.device)
    warps = 8 if block > 2048 else 4
    select_kernel[(rows, -(-n // _CHUNK) if alone else 1)](
        x,
        norm[0] if norm is not None else x,
        guesses,
        kept,
        values,
        words,
        index,
        p,
        n,
        norm[1] if norm is not None else 0.0,
        BLOCK=block,
        CHUNK=_CHUNK,
        DOUBT=_doubt(block, warps),
        NORM=norm is not None,
        PACK=alone,
        WORDS=listing,
        num_warps=warps,
        **overlap,
    )
    if alone:
        return Selected(None, Listed(values, index, kept))
    if not listing:
        return Selected(values, None)
    packed = torch.empty_like(x)
    count = torch.empty(1, dtype=torch.int32, device=x.device) if count is None else count
    pack_kernel[(-(-n // _CHUNK),)](
        values,
        words,
        packed,
        index,
        count,
        rows,
        n,
        BT=8,
        WORDS=block // 32,
        CHUNK=_CHUNK,
        num_warps=4,
        **overlap,
    )
    return Selected(values, Listed(packed, index, count))


def _doubt(block: int, warps: int) -> float:
    """Twice the relative error of an fp32 sum over a row: entries of a thread one after the other, then a tree."""
    return 2 * (block / (32 * warps) + 16) * 2.0**-24
