"""Exact top-p selection of 16-bit rows in registers: RMSNorm in front of it if asked, compaction behind it.

|v| of a 16-bit float, read as an integer, is in the order of the magnitudes; so the threshold is an integer between
0 and 0x7FFF, found by interpolation between masses, from where the threshold of the step before lay among the row's
mass if there is one. Masses are summed in fp32; where the target lies within their error of one, fp64 decides. The
bracket is closed only by two neighbouring integers on either side of the target, so a bad guess costs time and never
exactness.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _add_pairs(a, b, c, d):
    return a + c, b + d


@triton.jit
def _add_and_max(a, b, c, d):
    return a + c, tl.maximum(b, d)


@triton.jit
def magnitude_key(x):
    """Bits of |x| of a 16-bit float as int32: ordered like the magnitudes."""
    return x.to(tl.int16, bitcast=True).to(tl.int32) & 0x7FFF


@triton.jit
def find_threshold(key, mass, total, top, target, guess):
    """Largest key k with mass(>= k) >= target of one row, mass(>= k) and mass(> k); `mass` is 0 where padded.

    `top` is the largest key; sums are in the type of `mass`.
    """
    high = top + 1
    low = high * 0
    mass_low = total
    mass_high = total * 0.0
    k = guess
    width = 2
    passes = 0
    gallop = 48
    while high - low > 1:
        k = tl.minimum(tl.maximum(k, low), high - 1)
        k2 = tl.minimum(k + width, high)
        mass_k, mass_k2 = tl.reduce((tl.where(key >= k, mass, 0.0), tl.where(key >= k2, mass, 0.0)), 0, _add_pairs)
        enough = mass_k >= target
        mass_low = tl.where(enough & (k > low), mass_k, mass_low)
        low = tl.where(enough, tl.maximum(k, low), low)
        mass_high = tl.where(enough, mass_high, mass_k)
        high = tl.where(enough, high, k)
        enough2 = mass_k2 >= target
        mass_low = tl.where(enough2 & (k2 > low), mass_k2, mass_low)
        low = tl.where(enough2, tl.maximum(k2, low), low)
        closer = (mass_k2 < target) & (k2 < high)
        mass_high = tl.where(closer, mass_k2, mass_high)
        high = tl.where(closer, k2, high)
        passes += 1
        share = ((mass_low - target) / (mass_low - mass_high)).to(tl.float32)
        k = low + (share * (high - low).to(tl.float32)).to(tl.int32)
        # Keys from 0 on are mostly empty: walk down in growing strides until something lies on both sides.
        k = tl.where(low == 0, high - gallop, k)
        gallop = gallop * 4
        # Interpolation has had its chance; halving ends after at most 15 more.
        k = tl.where(passes >= 8, (low + high) // 2, k)
        k = tl.where(high - low <= 3, low + 1, k)
        width = 1
    return low, mass_low, mass_high


@triton.jit
def exact_threshold(key, magnitude, total, top, p, guess, DOUBT: tl.constexpr):
    """The fp64 rule's threshold: searched in fp32, whose sums are off by at most DOUBT * total, then checked."""
    target = total * p.to(tl.float32)
    k, enough, short = find_threshold(key, magnitude, total, top, target, guess)
    if tl.minimum(enough - target, target - short) < DOUBT * total:
        mass = magnitude.to(tl.float64)
        over = tl.where(key >= k, mass, 0.0) - p * mass
        under = tl.where(key > k, mass, 0.0) - p * mass
        over, under = tl.reduce((over, under), 0, _add_pairs)
        if (over < 0) | (under >= 0):
            whole = tl.sum(mass, axis=0)
            k, _enough, _short = find_threshold(key, mass, whole, top, whole * p, k)
    return tl.maximum(tl.minimum(k, top), 1)  # p = 0 keeps the largest; zeros are never kept


@triton.jit
def _row(x_ptr, weight_ptr, scale, i, n, NORM: tl.constexpr):
    """Entries i of one row, as the layer sees them: times `scale` and the norm's weight if the row is normalised."""
    x = tl.load(x_ptr + i, mask=i < n, other=0.0)
    if NORM:
        weight = tl.load(weight_ptr + i, mask=i < n, other=0.0)
        x = ((x.to(tl.float32) * scale).to(x.dtype).to(tl.float32) * weight.to(tl.float32)).to(x.dtype)
    return x


@triton.jit
def select_kernel(
    x_ptr,
    weight_ptr,
    guess_ptr,
    kept_ptr,
    out_ptr,
    words_ptr,
    rows_ptr,
    p_ptr,
    n,
    eps,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    DOUBT: tl.constexpr,
    NORM: tl.constexpr,
    PACK: tl.constexpr,
    WORDS: tl.constexpr,
    WAIT: tl.constexpr,
    TRIGGER: tl.constexpr,
):
    # Program (row, chunk) searches the whole row; guess_ptr[row] is the last threshold as a share of its row's mass,
    # which changes less from step to step than the threshold does, and is replaced by the new one.
    # PACK (one row only): chunk c writes its part of the ascending list of kept channels and their values. Every
    # chunk repeats the search, which takes less time than waiting for another program to finish it.
    # Otherwise (one chunk): writes the row with dropped entries zeroed, and one bit a channel into words_ptr.
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    if WAIT:
        gdc_wait()
    if TRIGGER:
        gdc_launch_dependents()
    last = tl.load(guess_ptr + row)
    p = tl.load(p_ptr)
    scale = 1.0
    if NORM:
        wide = tl.load(x_ptr + row * n + i, mask=i < n, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / n + eps)
    x = _row(x_ptr + row * n, weight_ptr, scale, i, n, NORM)
    key = magnitude_key(x)
    magnitude = tl.abs(x.to(tl.float32))
    total, top = tl.reduce((magnitude, key), 0, _add_and_max)
    # For a Gaussian row the threshold is close to 1.9 sqrt(1 - p) times the mean magnitude.
    share = tl.where(last > 0, last, 1.9 * tl.sqrt((1.0 - p).to(tl.float32)) / n)
    k = exact_threshold(key, magnitude, total, top, p, magnitude_key((share * total).to(x.dtype)), DOUBT)
    keep = (key >= k).to(tl.int32)
    if PACK:
        first = tl.program_id(1) * CHUNK
        kept, before = tl.reduce((keep, tl.where(i < first, keep, 0)), 0, _add_pairs)
        i = first + tl.arange(0, CHUNK)
        x = _row(x_ptr, weight_ptr, scale, i, n, NORM)
        keep = (magnitude_key(x) >= k).to(tl.int32)
        place = before + tl.cumsum(keep, axis=0) - keep
        tl.store(rows_ptr + place, i, mask=keep > 0)
        tl.store(out_ptr + place, x, mask=keep > 0)
    else:
        kept = tl.sum(keep, axis=0)
        tl.store(out_ptr + row * n + i, tl.where(keep > 0, x, 0.0), mask=i < n)
        if WORDS:
            bits = tl.reshape(keep << (i % 32), (BLOCK // 32, 32))
            word = tl.arange(0, BLOCK // 32)
            tl.store(words_ptr + row * (BLOCK // 32) + word, tl.sum(bits, axis=1))
    if tl.program_id(1) == 0:
        value = k.to(tl.int16).to(x.dtype, bitcast=True).to(tl.float32)
        tl.store(guess_ptr + row, tl.where(total > 0, value / total, 0.0))
        tl.store(kept_ptr + row, kept)


@triton.jit
def _either(a, b):
    return a | b


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
    # The channels that any of T rows kept, ascending, and the masked rows packed to them: a program per CHUNK channels.
    if TRIGGER:
        gdc_launch_dependents()
    if WAIT:
        gdc_wait()
    first = tl.program_id(0) * CHUNK
    word = tl.arange(0, WORDS)[None, :]
    i = first + tl.arange(0, CHUNK)
    inside = (i < n)[None, :]
    words = tl.zeros((1, WORDS), tl.int32)
    mine = tl.zeros((1, CHUNK), tl.int32)
    for start in range(0, T, BT):
        t = start + tl.arange(0, BT)[:, None]
        here = tl.load(words_ptr + t * WORDS + word, mask=t < T, other=0)
        words |= tl.reduce(here, 0, _either)[None, :]
        here = tl.load(words_ptr + t * WORDS + (i // 32)[None, :], mask=(t < T) & inside, other=0)
        mine |= tl.reduce(here, 0, _either)[None, :]
    count = _popcount(words)
    before = tl.sum(tl.sum(tl.where(word < first // 32, count, 0), axis=1), axis=0)
    keep = (tl.reshape(mine, (CHUNK,)) >> (i % 32)) & 1
    place = before + tl.cumsum(keep, axis=0) - keep
    tl.store(rows_ptr + place, i, mask=keep > 0)
    for start in range(0, T, BT):
        t = start + tl.arange(0, BT)[:, None]
        live = (t < T) & inside & (keep > 0)[None, :]
        x = tl.load(x_ptr + t * n + i[None, :], mask=live, other=0.0)
        tl.store(out_ptr + t * n + place[None, :], x, mask=live)
    if tl.program_id(0) == 0:
        tl.store(count_ptr, tl.sum(tl.sum(count, axis=1), axis=0))
