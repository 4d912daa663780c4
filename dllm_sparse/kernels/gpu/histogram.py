"""Top-p of a few bf16 rows that were counted while they were computed: one launch from the counts to a list.

The product that makes the rows counts, per row, how many entries have each of the keys around the last threshold, and
the mass of what lies above and of everything (`count_near`). From that any program finds the threshold without reading
the row. Masses are integers, in units of 2^-24 of the last threshold's octave, so their sums are exact but for entries
too small to matter; what the counts cannot settle is searched for in the row itself. From step to step 1 to 4 % of a
model's thresholds move by more than an octave, which is what is counted to either side.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from dllm_sparse.kernels import histogram
from dllm_sparse.kernels.gpu.threshold import infinite_key, magnitude_key, top_p_key

KEYS = tl.constexpr(histogram.KEYS)  # counted around the last threshold, the largest first
LINE = tl.constexpr(histogram.LINE)  # int64 of a row: the counts, two to one, then the six below
_GROUP = tl.constexpr(16)  # keys that are looked at together before one by one
_MASS = tl.constexpr(histogram.KEYS // 2)  # of all entries; the next three are made in one go
_ABOVE = tl.constexpr(histogram.KEYS // 2 + 1)  # of the entries above the counted keys
_MANY = tl.constexpr(histogram.KEYS // 2 + 2)  # how many these are
_ODD = tl.constexpr(histogram.KEYS // 2 + 3)  # not 0: there are entries too large to add, Inf or NaN
_NEAR = tl.constexpr(histogram.KEYS // 2 + 4)  # the key in the middle
_SEARCHED = tl.constexpr(histogram.SEARCHED)  # 1 where the counts did not settle the threshold

_FLAG = tl.constexpr(1 << 55)
_LEAST = tl.constexpr(32 << 7)  # the smallest key counts lie around: what has no units then has no mass
_LARGEST = tl.constexpr(38)  # octaves above a unit's mantissa that are added: 128 such entries stay below the flag
_NUMBER = tl.constexpr(16)  # bits of a number of entries, below a mass in a sum of both
_NUMBERS = tl.constexpr((1 << 16) - 1)
_MOST = tl.constexpr(1 << 46)  # a mass from here on has no room above a number


@triton.jit
def _octaves(key, near):
    """By how much the mantissa of bf16 entries with this key is shifted in units of 2^-24 of near's octave."""
    return (key >> 7) - (near >> 7) + 17


@triton.jit
def _units(key, near):
    """Entries with this bf16 key in those units as int64, rounded down; `near` is _LEAST or more."""
    octaves = _octaves(key, near)
    mantissa = ((key & 0x7F) | 0x80) >> tl.minimum(tl.maximum(-octaves, 0), 8)
    return mantissa.to(tl.int64) << tl.minimum(tl.maximum(octaves, 0), _LARGEST).to(tl.int64)


@triton.jit
def count_near(y, live, near, t, T, counts_ptr, lines_ptr, FIRST):
    """Adds entries y [t, n] bf16 to the rows' lines, around the keys `near` [t]; one program of a row is the FIRST.

    `counts_ptr` and `lines_ptr` are the same memory as int32 and as int64.
    """
    near = tl.maximum(near, _LEAST)
    key = magnitude_key(y)
    fits = (_octaves(key, near[:, None]) <= _LARGEST) & (key < infinite_key(y.dtype))
    units = tl.where(fits, _units(key, near[:, None]), _FLAG)
    j = near[:, None] + (KEYS // 2 - 1) - key
    line = lines_ptr + t * LINE
    tl.atomic_add(counts_ptr + (t * (2 * LINE))[:, None] + j, 1, mask=live & (j >= 0) & (j < KEYS), sem="relaxed")
    # The flags of the up to 128 entries of a tile fit above their masses: two sums find four numbers.
    every = tl.sum(tl.where(live, units, 0), axis=1)[:, None]
    above = tl.sum(tl.where(live & (j < 0), units + _FLAG, 0), axis=1)[:, None]
    field = tl.arange(0, 4)[None, :]
    sums = tl.where(field == 0, every % _FLAG, tl.where(field == 1, above % _FLAG, above // _FLAG))
    sums = tl.where(field == 3, (every >= _FLAG).to(tl.int64), sums)
    tl.atomic_add(line[:, None] + _MASS + field, sums, mask=(t < T)[:, None] & (sums > 0), sem="relaxed")
    if FIRST:
        tl.store(line + _NEAR, near.to(tl.int64), mask=t < T)


@triton.jit
def _both(counts, key, near):
    """Mass, and below it number, of so many entries with this key."""
    return counts.to(tl.int64) * ((_units(key, near) << _NUMBER) + 1)


@triton.jit
def _thresholds(x_ptr, counts_ptr, lines_ptr, p, t, T, n, ROW: tl.constexpr):
    """(k, kept, searched) [t] of T rows of n entries: those with key k at least are kept; 1 where no count says so."""
    line = lines_ptr + t * LINE
    real = t < T
    group, j = tl.arange(0, KEYS // _GROUP), tl.arange(0, _GROUP)
    counts_ptr += t * (2 * LINE)
    every = (group * _GROUP)[None, :, None] + j[None, None, :]
    counts = tl.load(counts_ptr[:, None, None] + every, mask=real[:, None, None], other=0)
    whole = tl.load(line + _MASS, mask=real, other=0)
    above = tl.load(line + _ABOVE, mask=real, other=0)
    many = tl.load(line + _MANY, mask=real, other=0)
    odd = tl.load(line + _ODD, mask=real, other=0)
    near = tl.maximum(tl.load(line + _NEAR, mask=real, other=0).to(tl.int32), _LEAST)
    largest = near + (KEYS // 2 - 1)
    target = tl.ceil(p * whole.to(tl.float64)).to(tl.int64) << _NUMBER
    over = (above << _NUMBER) + many
    # From above: the group of keys in which the target is reached, then the key.
    each = tl.sum(_both(counts, largest[:, None, None] - every, near[:, None, None]), axis=2)
    reached = tl.cumsum(each, axis=1) + over[:, None]
    short = reached < target[:, None]
    groups = tl.sum(short.to(tl.int32), axis=1)
    over = tl.max(tl.where(short, reached, over[:, None]), axis=1)
    first = tl.minimum(groups, KEYS // _GROUP - 1) * _GROUP
    every = first[:, None] + j[None, :]
    counts = tl.load(counts_ptr[:, None] + every, mask=real[:, None], other=0)
    reached = tl.cumsum(_both(counts, largest[:, None] - every, near[:, None]), axis=1) + over[:, None]
    short = reached < target[:, None]
    keys = tl.sum(short.to(tl.int32), axis=1)
    least = tl.min(tl.where(short, 0x7FFFFFFFFFFFFFFF, reached), axis=1)
    most = tl.max(tl.where(short, reached, over[:, None]), axis=1)
    k = tl.where(real, largest - first - keys, 0x7FFF)
    kept = (least & _NUMBERS).to(tl.int32)
    # Each entry is off by less than a unit. At p = 1 no mass is larger than the target.
    sure = (groups < KEYS // _GROUP) & (keys < _GROUP) & (whole < _MOST) & (n <= _NUMBERS) & (odd == 0)
    sure &= ((least - target) >> _NUMBER > n) & ((target - most) >> _NUMBER > n)
    searched = (real & (sure == 0)).to(tl.int32)
    if tl.sum(searched, axis=0) > 0:
        for row in range(0, T):
            if tl.sum(tl.where(t == row, searched, 0), axis=0) > 0:
                i = tl.arange(0, ROW)
                x = tl.load(x_ptr + row * n + i, mask=i < n, other=0.0)
                unknown = p.to(tl.float32) * 0
                its, _total = top_p_key(x, x_ptr + row * n, x_ptr, 1.0, n, p, unknown, False)
                k = tl.where(t == row, its, k)
                kept = tl.where(t == row, tl.sum((magnitude_key(x) >= its).to(tl.int32), axis=0), kept)
    return k, kept, searched


@triton.jit(do_not_specialize=["T"])
def list_counted_kernel(
    x_ptr,
    near_ptr,
    counts_ptr,
    lines_ptr,
    kept_ptr,
    values_ptr,
    rows_ptr,
    lengths_ptr,
    p_ptr,
    T,
    n,
    space,
    BT: tl.constexpr,
    BLOCK: tl.constexpr,
    ROW: tl.constexpr,
    WAIT: tl.constexpr,
    TRIGGER: tl.constexpr,
):
    # Program (run, row): lists what some row kept of a run of `space` channels, and packs its own row to the list.
    run, row = tl.program_id(0), tl.program_id(1)
    t = tl.arange(0, BT)
    i = run * space + tl.arange(0, BLOCK)
    inside = i < tl.minimum((run + 1) * space, n)
    if WAIT:
        gdc_wait()
    if TRIGGER:
        gdc_launch_dependents()
    entries = ()
    for one in tl.static_range(BT):
        entries += (tl.load(x_ptr + tl.minimum(T - 1, one) * n + i, mask=inside, other=0.0),)
    own = tl.load(x_ptr + row * n + i, mask=inside, other=0.0)
    k, kept, searched = _thresholds(x_ptr, counts_ptr, lines_ptr, tl.load(p_ptr), t, T, n, ROW)
    if run + row == 0:
        tl.store(near_ptr + t, k, mask=t < T)
        tl.store(kept_ptr + t, kept, mask=t < T)
        tl.store(lines_ptr + t * LINE + _SEARCHED, searched.to(tl.int64), mask=t < T)
    # Every thread needs all thresholds: four to a sum.
    words = ()
    for first in tl.static_range(0, BT, 4):
        part = k.to(tl.int64) << ((t % 4) * 16).to(tl.int64)
        words += (tl.sum(tl.where(t // 4 == first // 4, part, 0), axis=0),)
    some = tl.zeros((BLOCK,), tl.int32)
    for one in tl.static_range(BT):
        its = ((words[one // 4] >> (one % 4 * 16)) & 0x7FFF).to(tl.int32)
        some |= (magnitude_key(entries[one]) >= its).to(tl.int32)
    place = run * space + tl.cumsum(some, axis=0) - some
    if row == 0:
        tl.store(lengths_ptr + run, tl.sum(some, axis=0))
        tl.store(rows_ptr + place, i, mask=some > 0)
    its = tl.sum(tl.where(t == row, k, 0), axis=0)
    tl.store(values_ptr + row * n + place, tl.where(magnitude_key(own) >= its, own, 0.0), mask=some > 0)
