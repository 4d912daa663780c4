"""The exact top-p threshold of one 16-bit row, found by one program with the row in registers.

|v| of a 16-bit float, read as an integer, is in the order of the magnitudes: thresholds are such keys. The search adds
magnitudes as integers, in units of a power of two near 2^-30 of the row's mass: such sums are exact in any order but
for entries below 2^-20 of it, and Hopper adds them across a warp in one instruction. Where those entries could matter,
sums in fp64 decide.
"""

import triton
import triton.language as tl

_COARSE = tl.constexpr(4096)  # from so many units on, a 16-bit float is a whole number of them


@triton.jit
def magnitude_key(x):
    """Bits of |x| of a 16-bit float as int32: ordered like the magnitudes."""
    return x.to(tl.int16, bitcast=True).to(tl.int32) & 0x7FFF


@triton.jit
def key_value(k, kind: tl.constexpr):
    """The magnitude with key k, in fp32."""
    return k.to(tl.int16).to(kind, bitcast=True).to(tl.float32)


@triton.jit
def infinite_key(kind: tl.constexpr):
    """The key of Inf; those of NaN are larger."""
    return 0x7C00 if kind == tl.float16 else 0x7F80


@triton.jit
def row_entries(x_ptr, weight_ptr, scale, i, n, NORM: tl.constexpr):
    """Entries i of one row, as the layer sees them: times `scale` and the norm's weight if the row is normalised."""
    x = tl.load(x_ptr + i, mask=i < n, other=0.0)
    if NORM:
        x = normalised(x, tl.load(weight_ptr + i, mask=i < n, other=0.0), scale, i < n)
    return x


@triton.jit
def normalised(x, weight, scale, live):
    """x times `scale` and the norm's weight, rounded where RMSNorm rounds; 0 behind the row, even if that is NaN."""
    x = ((x.to(tl.float32) * scale).to(x.dtype).to(tl.float32) * weight.to(tl.float32)).to(x.dtype)
    return tl.where(live, x, 0.0)


@triton.jit
def _unit(total):
    """The power of two that takes `total` to [2^29, 2^30)."""
    exponent = (total.to(tl.int32, bitcast=True) >> 23) & 0xFF
    return ((283 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _in_units(k, unit, kind: tl.constexpr):
    return tl.minimum(key_value(k, kind) * unit + 0.5, 2.0e9).to(tl.int32)


@triton.jit
def _search(units, whole, target, guess, unit, kind: tl.constexpr):
    """Neighbouring keys (k, k + 1) with mass(>= k) >= target > mass(>= k + 1), as (k, both masses), all in units."""
    low = guess * 0
    high = low + infinite_key(kind)
    mass_low = whole
    mass_high = low
    k = guess
    width = 8
    passes = 0
    while high - low > 1:
        k = tl.minimum(tl.maximum(k, low), high - 1)
        k2 = tl.minimum(k + width, high)
        mass = tl.sum(tl.where(units >= _in_units(k, unit, kind), units, 0), axis=0)
        mass2 = tl.sum(tl.where(units >= _in_units(k2, unit, kind), units, 0), axis=0)
        enough, enough2 = mass >= target, mass2 >= target
        low = tl.where(enough2, k2, tl.where(enough, k, low))
        mass_low = tl.where(enough2, mass2, tl.where(enough, mass, mass_low))
        high = tl.where(enough2, high, tl.where(enough, k2, k))
        mass_high = tl.where(enough2, mass_high, tl.where(enough, mass2, mass))
        # Between two masses that were met, interpolate; before that, Newton's step along the slope of the last pair.
        inner = tl.fdiv((mass_low - target).to(tl.float32), (mass_low - mass_high).to(tl.float32))
        between = low + (inner * (high - low).to(tl.float32)).to(tl.int32)
        missing = (tl.where(enough2, mass2, mass) - target).to(tl.float32)
        step = tl.floor(tl.fdiv(missing * (k2 - k).to(tl.float32), (mass - mass2).to(tl.float32)))
        newton = tl.where(enough2, k2, k) + tl.minimum(tl.maximum(step, -32768.0), 32768.0).to(tl.int32)
        met = (low > 0) & (mass_high > 0)
        passes += 1
        k = tl.where(met | (mass == mass2), between, newton)
        k = tl.where(passes < 6, k, (low + high) // 2)  # both have had their chance: at most 15 more
        width = 1
    return low, mass_low, mass_high


@triton.jit
def settled_key(k, x_ptr, weight_ptr, scale, n, p, NORM: tl.constexpr, CHUNK: tl.constexpr):
    """The threshold by sums in fp64, walking from k over the keys that the row has."""
    settled = False
    while not settled:
        whole = tl.zeros((CHUNK,), tl.float64)
        reached = tl.zeros((CHUNK,), tl.float64)
        above_k = tl.zeros((CHUNK,), tl.float64)
        below = tl.zeros((CHUNK,), tl.int32)
        above = tl.full((CHUNK,), 0x7FFF, tl.int32)
        top = tl.zeros((CHUNK,), tl.int32)
        for first in range(0, n, CHUNK):
            x = row_entries(x_ptr, weight_ptr, scale, first + tl.arange(0, CHUNK), n, NORM)
            key = magnitude_key(x)
            mass = tl.abs(x.to(tl.float64))
            whole += mass
            reached += tl.where(key >= k, mass, 0.0)
            above_k += tl.where(key > k, mass, 0.0)
            below = tl.maximum(below, tl.where(key < k, key, 0))
            above = tl.minimum(above, tl.where(key > k, key, 0x7FFF))
            top = tl.maximum(top, key)
        lower, higher = tl.max(below, axis=0), tl.min(above, axis=0)
        target = tl.sum(whole, axis=0) * p
        up = (tl.sum(above_k, axis=0) >= target) & (higher < 0x7FFF)
        down = (tl.sum(reached, axis=0) < target) & (lower > 0)
        new = tl.where(down, lower, tl.where(up, higher, k))
        infinite = infinite_key(x_ptr.dtype.element_ty)
        new = tl.where(tl.max(top, axis=0) == infinite, infinite, new)
        settled = new == k
        k = new
    return k


@triton.jit
def top_p_key(x, x_ptr, weight_ptr, scale, n, p, last, NORM: tl.constexpr):
    """(k, total): a row's entries whose key is at least k are kept, k >= 1; total is its L1 mass in fp32.

    `x` is the whole row as `row_entries` gives it; `last` the threshold of the step before as a share of its row's
    mass, or 0. Zeros are never kept. A row with Inf keeps only that, one with NaN all it has.
    """
    magnitude = tl.abs(x.to(tl.float32))
    total = tl.sum(magnitude, axis=0)
    k = tl.program_id(0) * 0 + 1
    sure = p >= 1
    if (total > 1e-28) & (total < 3e38) & (p < 1):
        # For a Gaussian row the threshold is close to 1.9 sqrt(1 - p) times the mean magnitude.
        share = tl.where(last > 0, last, 1.9 * tl.sqrt((1.0 - p).to(tl.float32)) / n)
        unit = _unit(total)
        units = (magnitude * unit + 0.5).to(tl.int32)
        whole = total * unit
        target = p * whole.to(tl.float64)
        guess = magnitude_key((share * total).to(x.dtype))
        k, enough, short = _search(units, whole.to(tl.int32), tl.maximum(target.to(tl.int32), 1), guess, unit, x.dtype)
        coarse = _in_units(k, unit, x.dtype) >= _COARSE
        # The mass in fp32 is off by at most 2^-24 for each of its partial sums, small entries by half a unit each.
        doubt = n // 2 + 8192
        sure = coarse & (enough - target > doubt) & (target - short > doubt)
        if coarse & (not sure):
            target = p * tl.sum(units, axis=0).to(tl.float64)
            doubt = tl.sum((units < _COARSE).to(tl.int32), axis=0) // 2 + 1
            sure = (enough - target > doubt) & (target - short > doubt)
    if not sure:
        k = settled_key(k, x_ptr, weight_ptr, scale, n, p, NORM, 1024)
    return tl.maximum(k, 1), total
