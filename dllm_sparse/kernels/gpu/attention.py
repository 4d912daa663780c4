"""Attention of a few queries over a static cache, keys split over programs (flash decoding, deterministic merge)."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit(do_not_specialize=["T", "S", "SPLITS"])
def attention_kernel(
    q_ptr,
    key_ptr,
    value_ptr,
    begin_ptr,
    end_ptr,
    out_ptr,
    partial_ptr,
    stats_ptr,
    arrivals_ptr,
    T,
    S,
    scale,
    SPLITS,
    HEADS: tl.constexpr,
    SETS: tl.constexpr,
    SHARED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BM: tl.constexpr,
    BS: tl.constexpr,
    WAIT: tl.constexpr,
    TRIGGER: tl.constexpr,
):
    # q [B, HEADS, T, HEAD_DIM]; key, value [B, SETS / SHARED, S, HEAD_DIM]; out [B, T, HEADS * HEAD_DIM]. Row b sees
    # the positions begin_ptr[b] .. end_ptr[0]. Program (b * SETS + set, split): all queries of a set of heads, SHARED
    # sets having one kv head in common. `scale` includes log2(e): the softmax is taken in powers of two.
    GROUP: tl.constexpr = HEADS // SETS
    pair = tl.program_id(0)
    b = pair // SETS
    split = tl.program_id(1)
    m = tl.arange(0, BM)
    head = (pair % SETS) * GROUP + m // T
    t = m % T
    live = m < T * GROUP
    d = tl.arange(0, HEAD_DIM)
    dtype = out_ptr.dtype.element_ty
    if TRIGGER:
        gdc_launch_dependents()
    if WAIT:
        gdc_wait()
    start = tl.load(begin_ptr + b)
    stop = tl.load(end_ptr)
    q_rows = ((b * HEADS + head).to(tl.int64) * T + t) * HEAD_DIM
    q = tl.load(q_ptr + q_rows[:, None] + d[None, :], mask=live[:, None], other=0.0)
    share = tl.cdiv(tl.cdiv(stop - start, BS), SPLITS) * BS
    first = start + split * share
    last = tl.minimum(first + share, stop)
    largest = tl.full((BM,), -1.0e30, tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, HEAD_DIM), tl.float32)
    for step in range(first, last, BS):
        i = step + tl.arange(0, BS)
        seen = i < last
        place = ((pair // SHARED).to(tl.int64) * S + i[:, None]) * HEAD_DIM + d[None, :]
        k = tl.load(key_ptr + place, mask=seen[:, None], other=0.0)
        v = tl.load(value_ptr + place, mask=seen[:, None], other=0.0)
        score = tl.where(seen[None, :], tl.dot(q, tl.trans(k), input_precision="ieee") * scale, -1.0e30)
        higher = tl.maximum(largest, tl.max(score, axis=1))
        weight = tl.exp2(score - higher[:, None])
        shrink = tl.exp2(largest - higher)
        total = total * shrink + tl.sum(weight, axis=1)
        acc = acc * shrink[:, None] + tl.dot(weight.to(dtype), v, input_precision="ieee")
        largest = higher
    out = ((b * T + t).to(tl.int64) * HEADS + head)[:, None] * HEAD_DIM + d[None, :]
    if SPLITS == 1:
        tl.store(out_ptr + out, (acc / tl.maximum(total, 1e-30)[:, None]).to(dtype), mask=live[:, None])
    else:
        slab = tl.num_programs(0) * BM
        row = pair * BM + m
        tl.store(partial_ptr + (split * slab + row)[:, None] * HEAD_DIM + d[None, :], acc)
        tl.store(stats_ptr + (split * slab + row) * 2, largest)
        tl.store(stats_ptr + (split * slab + row) * 2 + 1, total)
        tl.debug_barrier()
        if tl.atomic_add(arrivals_ptr + pair, 1, sem="acq_rel") == SPLITS - 1:
            tl.store(arrivals_ptr + pair, 0)
            largest = tl.full((BM,), -1.0e30, tl.float32)
            total = tl.zeros((BM,), tl.float32)
            acc = tl.zeros((BM, HEAD_DIM), tl.float32)
            for s in range(0, SPLITS):
                theirs = s * slab + row
                high = tl.load(stats_ptr + theirs * 2, cache_modifier=".cg")
                part = tl.load(partial_ptr + theirs[:, None] * HEAD_DIM + d[None, :], cache_modifier=".cg")
                higher = tl.maximum(largest, high)
                shrink = tl.exp2(largest - higher)
                grow = tl.exp2(high - higher)
                total = total * shrink + tl.load(stats_ptr + theirs * 2 + 1, cache_modifier=".cg") * grow
                acc = acc * shrink[:, None] + part * grow[:, None]
                largest = higher
            tl.store(out_ptr + out, (acc / tl.maximum(total, 1e-30)[:, None]).to(dtype), mask=live[:, None])
