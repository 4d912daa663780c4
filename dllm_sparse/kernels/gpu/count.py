"""What a captured forward kept, added to running totals in one launch."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["M"])
def count_kernel(
    kept_ptr,
    union_ptr,
    classes_ptr,
    entries_ptr,
    from_list_ptr,
    exact_ptr,
    kept_total_ptr,
    tokens_total_ptr,
    union_total_ptr,
    union_calls_ptr,
    sparsity_total_ptr,
    calls_ptr,
    M,
    SITES: tl.constexpr,
    RUNS: tl.constexpr,
    CLASSES: tl.constexpr,
    SLOTS: tl.constexpr,
    BM: tl.constexpr,
    ALONE: tl.constexpr,
):
    # Program layer * SITES + site: kept [L, S, M] of tokens with classes [M], of which class 0 is padding and counts
    # nowhere. The first program counts the tokens and the forward, too. The union is a sum of RUNS numbers, or, ALONE
    # (M = 1), what the row kept.
    place = tl.program_id(0)
    c = tl.arange(0, SLOTS)
    kept = tl.zeros((SLOTS,), tl.int64)
    tokens = tl.zeros((SLOTS,), tl.int64)
    for start in range(0, M, BM):
        m = start + tl.arange(0, BM)
        kind = tl.load(classes_ptr + m, mask=m < M, other=-1)
        entries = tl.load(kept_ptr + place.to(tl.int64) * M + m, mask=m < M, other=0)
        same = kind[:, None] == c[None, :]
        kept += tl.sum(tl.where(same, entries[:, None], 0).to(tl.int64), axis=0)
        tokens += tl.sum(same.to(tl.int64), axis=0)
    padding = tl.sum(tl.where(c == 0, tokens, 0), axis=0)
    kept = tl.where(c == 0, 0, kept)
    tokens = tl.where(c == 0, 0, tokens)
    live = tl.sum(tokens, axis=0)
    if live > 0:
        inside = c < CLASSES
        totals = kept_total_ptr + place * CLASSES + c
        tl.store(totals, tl.load(totals, mask=inside, other=0) + kept, mask=inside)
        width = tl.load(entries_ptr + place % SITES)
        share = tl.sum(kept, axis=0).to(tl.float64) / (live * width).to(tl.float64)
        tl.store(sparsity_total_ptr + place, tl.load(sparsity_total_ptr + place) + (1.0 - share))
        if (tl.load(exact_ptr + place) != 0) | ((tl.load(from_list_ptr + place) != 0) & (padding == 0)):
            if ALONE:
                union = tl.load(kept_ptr + place)
            else:
                union = tl.sum(tl.load(union_ptr + place * RUNS + tl.arange(0, RUNS)), axis=0)
            tl.store(union_total_ptr + place, tl.load(union_total_ptr + place) + union)
            tl.store(union_calls_ptr + place, tl.load(union_calls_ptr + place) + 1)
        if place == 0:
            totals = tokens_total_ptr + c
            tl.store(totals, tl.load(totals, mask=inside, other=0) + tokens, mask=inside)
            tl.store(calls_ptr, tl.load(calls_ptr) + 1)
