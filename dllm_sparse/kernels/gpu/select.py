"""Exact top-p selection of 16-bit rows: as masked rows, or as the list of channels that some row kept.

The list of a single row comes from one launch: every program searches the row and writes its part of the list, since
repeating the search takes less time than waiting for it. Of several rows the masks come first and then the list,
unless they were counted (`histogram.py`).
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from dllm_sparse.kernels.gpu.threshold import key_value, magnitude_key, normalised, top_p_key


@triton.jit
def _threshold(x_ptr, weight_ptr, guess_ptr, p_ptr, row, n, eps, BLOCK: tl.constexpr, NORM: tl.constexpr):
    """(entries, threshold, share of the mass that it is, scale of the norm) of one row."""
    # Everything is asked for at once: a load behind a sum would wait for that, too.
    i = tl.arange(0, BLOCK)
    x_ptr += row.to(tl.int64) * n
    x = tl.load(x_ptr + i, mask=i < n, other=0.0)
    last, p = tl.load(guess_ptr + row), tl.load(p_ptr)
    scale = last * 0.0 + 1.0
    if NORM:
        weight = tl.load(weight_ptr + i, mask=i < n, other=0.0)
        wide = x.to(tl.float32)
        scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / n + eps)
        x = normalised(x, weight, scale, i < n)
    k, total = top_p_key(x, x_ptr, weight_ptr, scale, n, p, last, NORM)
    share = tl.where(total > 0, key_value(k, x.dtype) / total, 0.0)
    return x, k, share, scale


@triton.jit
def mask_kernel(
    x_ptr,
    weight_ptr,
    guess_ptr,
    kept_ptr,
    out_ptr,
    words_ptr,
    p_ptr,
    n,
    eps,
    BLOCK: tl.constexpr,
    NORM: tl.constexpr,
    WORDS: tl.constexpr,
    WAIT: tl.constexpr,
    TRIGGER: tl.constexpr,
):
    # A program a row: its dropped entries zeroed, the new guess, how many it kept; with WORDS it marks the channels it
    # kept in bits that all rows share.
    row = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    if WAIT:
        gdc_wait()
    if TRIGGER:
        gdc_launch_dependents()
    x, k, share, _scale = _threshold(x_ptr, weight_ptr, guess_ptr, p_ptr, row, n, eps, BLOCK, NORM)
    keep = magnitude_key(x) >= k
    tl.store(out_ptr + row.to(tl.int64) * n + i, tl.where(keep, x, 0.0), mask=i < n)
    if WORDS:
        bits = tl.reshape(keep.to(tl.int32) << (i % 32), (BLOCK // 32, 32))
        tl.atomic_or(words_ptr + tl.arange(0, BLOCK // 32), tl.sum(bits, axis=1), sem="relaxed")
    tl.store(guess_ptr + row, share)
    tl.store(kept_ptr + row, tl.sum(keep.to(tl.int32), axis=0))


@triton.jit
def list_one_kernel(
    x_ptr,
    weight_ptr,
    guess_ptr,
    kept_ptr,
    values_ptr,
    rows_ptr,
    p_ptr,
    n,
    eps,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    NORM: tl.constexpr,
    WAIT: tl.constexpr,
    TRIGGER: tl.constexpr,
):
    # One row, a program a chunk.
    chunk = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    if WAIT:
        gdc_wait()
    if TRIGGER:
        gdc_launch_dependents()
    first = chunk * CHUNK
    mine = first + tl.arange(0, CHUNK)
    own = tl.load(x_ptr + mine, mask=mine < n, other=0.0)
    if NORM:
        weight = tl.load(weight_ptr + mine, mask=mine < n, other=0.0)
    x, k, share, scale = _threshold(x_ptr, weight_ptr, guess_ptr, p_ptr, chunk * 0, n, eps, BLOCK, NORM)
    keep = magnitude_key(x) >= k
    # The first program counts the whole row, where the others count what lies in front of their chunk.
    before = tl.sum((keep & (i < tl.where(chunk == 0, n, first))).to(tl.int32), axis=0)
    if chunk == 0:
        tl.store(guess_ptr, share)
        tl.store(kept_ptr, before)
        before = 0
    if NORM:
        own = normalised(own, weight, scale, mine < n)
    keep = magnitude_key(own) >= k
    place = before + tl.cumsum(keep.to(tl.int32), axis=0) - 1
    tl.store(rows_ptr + place, mine, mask=keep)
    tl.store(values_ptr + place, own, mask=keep)


@triton.jit
def _popcount(word):
    return tl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [word], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit(do_not_specialize=["T"])
def pack_kernel(
    x_ptr,
    words_ptr,
    out_ptr,
    rows_ptr,
    count_ptr,
    T,
    n,
    BT: tl.constexpr,
    WORDS: tl.constexpr,
    CHUNK: tl.constexpr,
    WAIT: tl.constexpr,
    TRIGGER: tl.constexpr,
):
    # The channels marked in `words`, ascending, and the masked rows packed to them: a program per CHUNK channels of BT
    # rows.
    if TRIGGER:
        gdc_launch_dependents()
    if WAIT:
        gdc_wait()
    first = tl.program_id(0) * CHUNK
    word = tl.arange(0, WORDS)
    i = first + tl.arange(0, CHUNK)
    t = tl.program_id(1) * BT + tl.arange(0, BT)[:, None]
    # The rows are read whole: to read only what was marked would wait for the marks.
    x = tl.load(x_ptr + t * n + i[None, :], mask=(t < T) & (i < n)[None, :], other=0.0)
    count = _popcount(tl.load(words_ptr + word))
    keep = (tl.load(words_ptr + i // 32, mask=i < n, other=0) >> (i % 32)) & 1
    before = tl.sum(tl.where(word < first // 32, count, 0), axis=0)
    place = before + tl.cumsum(keep, axis=0) - keep
    tl.store(out_ptr + t * n + place[None, :], x, mask=(t < T) & (keep > 0)[None, :])
    if tl.program_id(1) == 0:
        tl.store(rows_ptr + place, i, mask=keep > 0)
        if first == 0:
            tl.store(count_ptr, tl.sum(count, axis=0))
