"""From tokens to pairs in the order of the experts: three small launches, none of which waits for the host.

Shares of the router's product, a program each; scores, choice and weights, a program a token; every pair's place in
the order, a program per few pairs.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

NOTHING = tl.constexpr(-(1 << 31))
"""Below every key."""


@triton.jit(do_not_specialize=["M"])
def logits_kernel(
    x_ptr,
    w_ptr,
    shares_ptr,
    M,
    E,
    K,
    BT: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    WAIT: tl.constexpr,
    TRIGGER: tl.constexpr,
):
    # Program (share, experts, tokens): shares[share] = x @ w.T over BK inputs, in fp32; x [M, K], w [E, K]. Products of
    # two 16-bit numbers are exact in fp32, so that tensor cores give what casting both to fp32 would.
    share = tl.program_id(0)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    t = tl.program_id(2) * BT + tl.arange(0, BT)
    k = share * BK + tl.arange(0, BK)
    live_k = (k < K)[None, :]
    w = tl.load(w_ptr + n[:, None] * K + k[None, :], mask=(n < E)[:, None] & live_k, other=0.0)
    if WAIT:
        gdc_wait()
    if TRIGGER:
        gdc_launch_dependents()
    x = tl.load(x_ptr + t[:, None] * K + k[None, :], mask=(t < M)[:, None] & live_k, other=0.0)
    logits = tl.dot(x, tl.trans(w), input_precision="ieee")
    place = (share * M + t)[:, None] * E + n[None, :]
    tl.store(shares_ptr + place, logits, mask=(t < M)[:, None] & (n < E)[None, :])


@triton.jit
def _key(x):
    """int32 in the order of the floats x: NaN above all, NOTHING below."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(x == x, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)


@triton.jit
def _value(key):
    """The float of a key."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _enters(key, GROUPS: tl.constexpr, ENTERED: tl.constexpr, BG: tl.constexpr, BE: tl.constexpr, PAIRED: tl.constexpr):
    """Which rows of keys [BG, BE] are the ENTERED of GROUPS whose two best values sum highest, of equals the lowest."""
    i = tl.arange(0, BE)[None, :]
    best = tl.max(key, axis=1)
    strength = _value(best)
    if PAIRED:
        where = tl.min(tl.where(key == best[:, None], i, BE), axis=1)
        strength += _value(tl.max(tl.where(i == where[:, None], NOTHING, key), axis=1))
    g = tl.arange(0, BG)
    strength = tl.where(g < GROUPS, _key(strength), NOTHING)
    one = strength[:, None]
    other = strength[None, :]
    better = (other > one) | ((other == one) & (g[None, :] < g[:, None]))
    return tl.sum(better.to(tl.int32), axis=1) < ENTERED


@triton.jit(do_not_specialize=["M", "scaling"])
def route_kernel(
    shares_ptr,
    bias_ptr,
    experts_ptr,
    weights_ptr,
    M,
    scaling,
    SHARES: tl.constexpr,
    AT_ONCE: tl.constexpr,
    EXPERTS: tl.constexpr,
    GROUPS: tl.constexpr,
    ENTERED: tl.constexpr,
    BG: tl.constexpr,
    BE: tl.constexpr,
    PLACES: tl.constexpr,
    SIGMOID: tl.constexpr,
    ROUNDED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RENORMALISE: tl.constexpr,
    WAIT: tl.constexpr,
    TRIGGER: tl.constexpr,
):
    # Program: a token. Its logits are the sum of `shares`, some loaded AT_ONCE, ROUNDED: 0 not at all, 1 to bf16, 2 to
    # fp16; they lie as BG groups of BE experts. The best PLACES are taken one by one, of equals the lowest id. NaN is
    # better than everything: it is chosen, and its weight is NaN.
    token = tl.program_id(0)
    size: tl.constexpr = EXPERTS // GROUPS
    lane = tl.arange(0, BG * BE)
    e = lane // BE * size + lane % BE
    live = (lane // BE < GROUPS) & (lane % BE < size)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + e, mask=live, other=0.0)
    if WAIT:
        gdc_wait()
    if TRIGGER:
        gdc_launch_dependents()
    logits = tl.zeros((BG * BE,), tl.float32)
    for first in tl.static_range(0, SHARES, AT_ONCE):
        share = first + tl.arange(0, AT_ONCE)[:, None]
        places = shares_ptr + (share * M + token) * EXPERTS + e[None, :]
        logits += tl.sum(tl.load(places, mask=live[None, :] & (share < SHARES), other=0.0), axis=0)
    if ROUNDED == 1:
        logits = logits.to(tl.bfloat16).to(tl.float32)
    elif ROUNDED == 2:
        logits = logits.to(tl.float16).to(tl.float32)
    if SIGMOID:
        score = 1.0 / (1.0 + tl.exp(-logits))
    else:
        logits = tl.where(live, logits, float("-inf"))
        score = tl.exp(logits - tl.max(logits, axis=0))
        score = score / tl.sum(score, axis=0)
    competing = score
    if HAS_BIAS:
        competing = score + bias
    key = tl.where(live, _key(competing), NOTHING)
    if GROUPS > 1:
        by_group = tl.reshape(key, (BG, BE))
        enters = _enters(by_group, GROUPS, ENTERED, BG, BE, size > 1)
        key = tl.reshape(tl.where(enters[:, None], by_group, NOTHING), (BG * BE,))
    rank = tl.full((BG * BE,), PLACES, tl.int32)
    for place in range(PLACES):
        best = tl.max(key, axis=0)
        chosen = lane == tl.min(tl.where(key == best, lane, BG * BE), axis=0)
        rank = tl.where(chosen, place, rank)
        key = tl.where(chosen, NOTHING, key)
    if RENORMALISE:
        total = tl.sum(tl.where(rank < PLACES, score, 0.0), axis=0)
        score = score / tl.where(total < 1e-20, 1e-20, total)
    out = token * PLACES + rank
    tl.store(experts_ptr + out, e.to(tl.int64), mask=rank < PLACES)
    tl.store(weights_ptr + out, score * scaling, mask=rank < PLACES)


@triton.jit(do_not_specialize=["P"])
def pairs_kernel(
    experts_ptr,
    order_ptr,
    ends_ptr,
    P,
    E,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    WAIT: tl.constexpr,
    TRIGGER: tl.constexpr,
):
    # Program: CHUNK pairs, and as many experts. Where a pair goes is how many come before it, where an expert ends is
    # how many are its own or lower ones': P is small, and counting all of them again takes less time than to share.
    if WAIT:
        gdc_wait()
    if TRIGGER:
        gdc_launch_dependents()
    mine = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    own = tl.load(experts_ptr + mine, mask=mine < P, other=0).to(tl.int32)[:, None]
    place = tl.zeros((CHUNK,), tl.int32)
    end = tl.zeros((CHUNK,), tl.int32)
    for start in range(0, P, BLOCK):
        q = start + tl.arange(0, BLOCK)
        other = tl.load(experts_ptr + q, mask=q < P, other=E).to(tl.int32)[None, :]
        before = (other < own) | ((other == own) & (q[None, :] < mine[:, None]))
        place += tl.sum(before.to(tl.int32), axis=1)
        end += tl.sum((other <= mine[:, None]).to(tl.int32), axis=1)
    tl.store(order_ptr + place, mine.to(tl.int64), mask=mine < P)
    tl.store(ends_ptr + mine, end, mask=mine < E)
