"""Top-p of a few bf16 rows that were counted while they were computed: one launch from the counts to a list.

The product that makes the rows counts, per row, how many entries have each of the keys around the last threshold, and
the mass of what lies above and of everything (`count_near`). From that any program finds the threshold without reading
the row. Masses are integers, in units of a power of two 2^-24 of the last threshold, so their sums are exact but for
entries too small to matter; what the counts cannot settle is searched for in the row itself. From step to step 1 to 4 %
of a model's thresholds move by more than an octave, which is what is counted to either side.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from dllm_sparse.kernels import histogram
from dllm_sparse.kernels.gpu.threshold import infinite_key, key_value, magnitude_key, top_p_key

KEYS = tl.constexpr(histogram.KEYS)  # counted around the last threshold: an octave to either side
_GROUP = tl.constexpr(16)  # keys that lie in one octave, where values rise evenly
LINE = tl.constexpr(histogram.LINE)  # int64 of a row: the counts, two to one, then the six below
_MASS = tl.constexpr(histogram.KEYS // 2)  # of all entries
_ABOVE = tl.constexpr(histogram.KEYS // 2 + 1)  # of the entries above the counted keys
_MANY = tl.constexpr(histogram.KEYS // 2 + 2)  # how many these are
_ODD = tl.constexpr(histogram.KEYS // 2 + 3)  # not 0: there are entries too large to add, or NaN
_NEAR = tl.constexpr(histogram.KEYS // 2 + 4)  # the key in the middle
_SEARCHED = tl.constexpr(histogram.SEARCHED)  # 1 where the counts did not settle the threshold

_FLAG = tl.constexpr(1 << 55)
_LEAST = tl.constexpr(24 << 7)  # a smaller threshold has no unit in fp32


@triton.jit
def _unit(k):
    """The power of two that takes values with the bf16 key k to [2^24, 2^25)."""
    return ((127 + 24 + 127 - (k >> 7)) << 23).to(tl.float32, bitcast=True)


@triton.jit
def count_near(y, live, near, t, T, counts_ptr, lines_ptr, FIRST):
    """Adds entries y [t, n] bf16 to the rows' lines, around the keys `near` [t]; one program of a row is the FIRST.

    `counts_ptr` and `lines_ptr` are the same memory as int32 and as int64.
    """
    near = tl.maximum(near, _LEAST) // _GROUP * _GROUP
    scaled = tl.abs(y.to(tl.float32)) * _unit(near)[:, None]
    fits = scaled < 1.0e14
    units = tl.where(fits, scaled + 0.5, 0.0).to(tl.int64) + tl.where(fits, 0, _FLAG).to(tl.int64)
    j = magnitude_key(y) - near[:, None] + KEYS // 2
    line = lines_ptr + t * LINE
    tl.atomic_add(counts_ptr + (t * (2 * LINE))[:, None] + j, 1, mask=live & (j >= 0) & (j < KEYS), sem="relaxed")
    # The flags of the up to 128 entries of a tile fit above their masses: two sums find four numbers.
    every = tl.sum(tl.where(live, units, 0), axis=1)
    above = tl.sum(tl.where(live & (j >= KEYS), units + _FLAG, 0), axis=1)
    real = t < T
    tl.atomic_add(line + _MASS, every % _FLAG, mask=real, sem="relaxed")
    tl.atomic_add(line + _ODD, 1, mask=real & (every >= _FLAG), sem="relaxed")
    tl.atomic_add(line + _ABOVE, above % _FLAG, mask=real & (above > 0), sem="relaxed")
    tl.atomic_add(line + _MANY, above // _FLAG, mask=real & (above > 0), sem="relaxed")
    if FIRST:
        tl.store(line + _NEAR, near.to(tl.int64), mask=real)


@triton.jit
def _thresholds(x_ptr, counts_ptr, lines_ptr, p, t, T, n, ROW: tl.constexpr):
    """(k, kept, searched) [t] of T rows of n entries: those with key k at least are kept; 1 where no count says so."""
    kind = x_ptr.dtype.element_ty
    line = lines_ptr + t * LINE
    counts_ptr += t * (2 * LINE)
    real = t < T
    group, j = tl.arange(0, KEYS // _GROUP), tl.arange(0, _GROUP)
    every = (group * _GROUP)[None, :, None] + j[None, None, :]
    counts = tl.load(counts_ptr[:, None, None] + every, mask=real[:, None, None], other=0)
    whole = tl.load(line + _MASS, mask=real, other=0)
    above = tl.load(line + _ABOVE, mask=real, other=0)
    many = tl.load(line + _MANY, mask=real, other=0).to(tl.int32)
    odd = tl.load(line + _ODD, mask=real, other=0)
    near = tl.load(line + _NEAR, mask=real, other=0).to(tl.int32)
    lowest, unit = near - KEYS // 2, _unit(near)
    target = tl.ceil(p * whole.to(tl.float64)).to(tl.int64)
    # The group of keys in which the target is reached, from above, then the key.
    start = tl.maximum(lowest[:, None] + (group * _GROUP)[None, :], 0)
    value = (key_value(start, kind) * unit[:, None]).to(tl.int64)
    rise = (key_value(start + 1, kind) * unit[:, None]).to(tl.int64) - value
    inside = tl.sum(counts, axis=2)
    mass = inside * value + tl.sum(counts * j[None, None, :], axis=2) * rise
    reached = tl.cumsum(mass, axis=1, reverse=True) + above[:, None]
    enough = reached >= target[:, None]
    m = tl.sum(enough.to(tl.int32), axis=1)
    above = tl.max(tl.where(enough, above[:, None], reached), axis=1)
    many += tl.sum(tl.where(group[None, :] >= m[:, None], inside, 0), axis=1)
    found = m > 0
    first = tl.maximum(m - 1, 0) * _GROUP
    counts = tl.load(counts_ptr[:, None] + first[:, None] + j[None, :], mask=real[:, None], other=0)
    value = (key_value(tl.maximum((lowest + first)[:, None] + j[None, :], 0), kind) * unit[:, None]).to(tl.int64)
    reached = tl.cumsum(counts * value, axis=1, reverse=True) + above[:, None]
    enough = reached >= target[:, None]
    m = tl.sum(enough.to(tl.int32), axis=1)
    least = tl.min(tl.where(enough, reached, 0x7FFFFFFFFFFFFFFF), axis=1)
    most = tl.max(tl.where(enough, above[:, None], reached), axis=1)
    k = tl.where(real, lowest + first + m - 1, 0x7FFF)
    kept = many + tl.sum(tl.where(j[None, :] >= m[:, None] - 1, counts, 0), axis=1)
    # Small entries are off by half a unit each. At p = 1 no mass is larger than the target.
    sure = found & (m > 0) & (least - target > n) & (target - most > n)
    sure &= (near > _LEAST) & (lowest + KEYS < infinite_key(kind)) & (odd == 0)
    searched = (real & (sure == 0)).to(tl.int32)
    if tl.sum(searched, axis=0) > 0:
        for row in range(0, T):
            if tl.sum(tl.where(t == row, searched, 0), axis=0) > 0:
                i = tl.arange(0, ROW)
                x = tl.load(x_ptr + row * n + i, mask=i < n, other=0.0)
                its, _total = top_p_key(x, x_ptr + row * n, x_ptr, p, n, p, p.to(tl.float32) * 0, False)
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
    PACKED: tl.constexpr,
    WAIT: tl.constexpr,
    TRIGGER: tl.constexpr,
):
    # Program (run, group): lists what some row kept of a run of `space` channels, and packs PACKED rows to the list.
    run, group = tl.program_id(0), tl.program_id(1)
    t = tl.arange(0, BT)
    i = run * space + tl.arange(0, BLOCK)
    inside = i < tl.minimum((run + 1) * space, n)
    if WAIT:
        gdc_wait()
    if TRIGGER:
        gdc_launch_dependents()
    entries = ()
    for row in tl.static_range(BT):
        entries += (tl.load(x_ptr + tl.minimum(T - 1, row) * n + i, mask=inside, other=0.0),)
    k, kept, searched = _thresholds(x_ptr, counts_ptr, lines_ptr, tl.load(p_ptr), t, T, n, ROW)
    if run + group == 0:
        tl.store(near_ptr + t, k, mask=t < T)
        tl.store(kept_ptr + t, kept, mask=t < T)
        tl.store(lines_ptr + t * LINE + _SEARCHED, searched.to(tl.int64), mask=t < T)
    # Every thread needs all thresholds: four to a sum.
    words = ()
    for first in tl.static_range(0, BT, 4):
        part = k.to(tl.int64) << ((t % 4) * 16).to(tl.int64)
        words += (tl.sum(tl.where(t // 4 == first // 4, part, 0), axis=0),)
    keys = ()
    some = tl.zeros((BLOCK,), tl.int32)
    for row in tl.static_range(BT):
        keys += (((words[row // 4] >> (row % 4 * 16)) & 0x7FFF).to(tl.int32),)
        some |= (magnitude_key(entries[row]) >= keys[row]).to(tl.int32)
    place = run * space + tl.cumsum(some, axis=0) - some
    if group == 0:
        tl.store(lengths_ptr + run, tl.sum(some, axis=0))
        tl.store(rows_ptr + place, i, mask=some > 0)
    for row in tl.static_range(BT):
        if (group == row // PACKED) & (row < T):
            x = tl.where(magnitude_key(entries[row]) >= keys[row], entries[row], 0.0)
            tl.store(values_ptr + row * n + place, x, mask=some > 0)
