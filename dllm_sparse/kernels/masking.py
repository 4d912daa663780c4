"""The whole top-p rule on a GPU in one pass: values in, mask out, one Triton program per row, fp64 sums.

The plain twin is `top_p_mask` in `sparsity/rules.py`. Done step by step that rule reads and writes a row nine times
(magnitude, fp32 copy, sum, check, threshold, comparison); here it is read once and its mask written.
`triton` is imported on first use, because the CPU build of torch does not bring it.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from dllm_sparse.kernels.selection import MAX_ROW, triton_installed

# Low bits of the fp32 pattern that are zero for every value of the type: halvings that need not be done.
_UNUSED_BITS = {torch.float32: 0, torch.bfloat16: 16, torch.float16: 13}


def can_mask(v: Tensor) -> bool:
    """True where `mass_mask` runs: on a CUDA device with triton, rows of at most MAX_ROW entries up to fp32."""
    return v.is_cuda and v.dtype in _UNUSED_BITS and 0 < v.shape[-1] <= MAX_ROW and triton_installed()


def mass_mask(v: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """The smallest set of largest |v| holding a share p < 1 of each row's sum, ties kept: ([..., n] bool, bad [1]).

    p=0 keeps the largest entries; an all-zero row keeps nothing. `bad` is not 0 where a value was NaN or Inf, and the
    mask then means nothing.
    """
    width = v.shape[-1]
    rows = v.reshape(-1, width)
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    keep = torch.empty(v.shape, dtype=torch.bool, device=v.device)
    bad = torch.zeros(1, dtype=torch.int32, device=v.device)
    if len(rows):
        block = 1 << (width - 1).bit_length()
        warps = min(max(block // 512, 1), 32)
        share = torch.full((1,), p, dtype=torch.float64, device=v.device)  # a float argument would arrive as fp32
        arguments = (rows, keep.view(torch.uint8), bad, share, width, rows.stride(0))
        _kernel()[(len(rows),)](*arguments, UNUSED=_UNUSED_BITS[v.dtype], BLOCK=block, num_warps=warps)
    return keep, bad


@cache
def _kernel() -> Any:
    import triton
    import triton.language as tl

    @triton.jit  # type: ignore[untyped-decorator]
    def mass_mask_kernel(  # type: ignore[no-untyped-def]
        v_ptr, keep_ptr, bad_ptr, share_ptr, width, stride, UNUSED: tl.constexpr, BLOCK: tl.constexpr
    ):
        row = tl.program_id(0).to(tl.int64)
        offsets = tl.arange(0, BLOCK)
        inside = offsets < width
        score = tl.abs(tl.load(v_ptr + row * stride + offsets, mask=inside, other=0.0).to(tl.float32))
        # The order of non-negative floats is the order of their bit patterns.
        bits = score.to(tl.int32, bitcast=True) >> UNUSED
        wide = score.to(tl.float64)
        share = tl.load(share_ptr)
        total = tl.sum(wide, axis=0)
        target = share * total
        largest = tl.max(bits, axis=0)
        tl.store(bad_ptr, 1, mask=largest >= (0x7F800000 >> UNUSED))
        # Entries below (1 - p) / n of the sum cannot together miss more than a share 1 - p of it: never a threshold.
        least = (1.0 - share) * total / width * (1.0 - 1e-6)
        low = least.to(tl.float32).to(tl.int32, bitcast=True) >> UNUSED
        high = largest + 1
        # The invariant is mass(>= low) >= target, and > mass(>= high) unless the target is 0.
        while high - low > 1:
            middle = low + ((high - low) >> 1)
            enough = tl.sum(tl.where(bits >= middle, wide, 0.0), axis=0) >= target
            low = tl.where(enough, middle, low)
            high = tl.where(enough, high, middle)
        keep = (bits >= low) & (bits > 0)
        tl.store(keep_ptr + row * width + offsets, keep.to(tl.uint8), mask=inside)

    return mass_mask_kernel
