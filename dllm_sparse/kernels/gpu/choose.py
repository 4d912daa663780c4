"""Greedy choice and its softmax probability in one pass over the logits, without a softmax over the vocabulary."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def choose_kernel(
    logits_ptr,
    token_ptr,
    probability_ptr,
    best_ptr,
    where_ptr,
    mass_ptr,
    arrivals_ptr,
    V,
    SPLITS,
    BLOCK: tl.constexpr,
    PADDED: tl.constexpr,
    WIDE: tl.constexpr,
    WAIT: tl.constexpr,
    TRIGGER: tl.constexpr,
):
    # Program (row, split). WIDE: exponentials and sums in fp64. Ties go to the lowest id.
    row = tl.program_id(0)
    split = tl.program_id(1)
    if TRIGGER:
        gdc_launch_dependents()
    if WAIT:
        gdc_wait()
    accumulator = tl.float64 if WIDE else tl.float32
    share = tl.cdiv(tl.cdiv(V, BLOCK), SPLITS) * BLOCK
    first = split * share
    last = tl.minimum(first + share, V)
    lane = tl.arange(0, BLOCK)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    where = tl.full((BLOCK,), 0x7FFFFFFF, tl.int32)
    mass = tl.zeros((BLOCK,), accumulator)
    for s in range(first, last, BLOCK):
        i = s + lane
        x = tl.load(logits_ptr + row.to(tl.int64) * V + i, mask=i < last, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(best, x)
        floor = tl.where(higher == float("-inf"), 0.0, higher)
        mass = mass * tl.exp(best.to(accumulator) - floor.to(accumulator))
        mass += tl.exp(x.to(accumulator) - floor.to(accumulator))
        where = tl.where(x > best, i, where)
        best = higher
    top = tl.max(best, axis=0)
    scale = tl.where(top == float("-inf"), 0.0, top)
    share_mass = tl.sum(mass * tl.exp(best.to(accumulator) - scale.to(accumulator)), axis=0)
    share_where = tl.min(tl.where(best == top, where, 0x7FFFFFFF), axis=0)
    place = row * SPLITS + split
    tl.store(best_ptr + place, top)
    tl.store(where_ptr + place, share_where)
    tl.store(mass_ptr + place, share_mass)
    tl.debug_barrier()
    if tl.atomic_add(arrivals_ptr + row, 1, sem="acq_rel") == SPLITS - 1:
        tl.store(arrivals_ptr + row, 0)
        i = tl.arange(0, PADDED)
        all_best = tl.load(best_ptr + row * SPLITS + i, mask=i < SPLITS, other=float("-inf"), cache_modifier=".cg")
        all_where = tl.load(where_ptr + row * SPLITS + i, mask=i < SPLITS, other=0x7FFFFFFF, cache_modifier=".cg")
        all_mass = tl.load(mass_ptr + row * SPLITS + i, mask=i < SPLITS, other=0.0, cache_modifier=".cg")
        top = tl.max(all_best, axis=0)
        scale = tl.where(top == float("-inf"), 0.0, top)
        total = tl.sum(all_mass * tl.exp(all_best.to(accumulator) - scale.to(accumulator)), axis=0)
        token = tl.min(tl.where(all_best == top, all_where, V - 1), axis=0)
        tl.store(token_ptr + row, token.to(tl.int64))
        # NaN and +Inf logits make the mass NaN, and the probability with it.
        tl.store(probability_ptr + row, 1.0 / total)
