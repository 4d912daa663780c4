"""Rows sorted by expert times the weights of their experts, in one launch whatever the routing was; their sum."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from dllm_sparse.kernels.gpu.stream_matmul import activate


@triton.jit(do_not_specialize=["PLACES"])
def grouped_kernel(
    x_ptr,
    w_ptr,
    order_ptr,
    ends_ptr,
    out_ptr,
    N,
    K,
    E,
    PLACES,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EXPERTS: tl.constexpr,
    GATHER: tl.constexpr,
    SCATTER: tl.constexpr,
    GATED: tl.constexpr,
    ACT: tl.constexpr,
    STAGES: tl.constexpr,
    WAIT: tl.constexpr,
    TRIGGER: tl.constexpr,
):
    # out[m] = x[row of m] @ w[expert of m].T; w [E, N, K], with GATED [E, 2N, K], gate rows first, and
    # out = act(gate) * up. With GATHER the row of x is order_ptr[m] // PLACES, else m; with SCATTER the row of out is
    # order_ptr[m], else m. Tile (rows, columns): block `mine` of BM rows, counted through the experts in order, an
    # expert's last block being cut at ends_ptr[e]. How many tiles there are is known to the device alone: a program
    # takes every so-manieth. The weights are the tall operand of the tensor cores: rows are few.
    e = tl.arange(0, EXPERTS)
    if WAIT:
        gdc_wait()
    if TRIGGER:
        gdc_launch_dependents()
    ends = tl.load(ends_ptr + e, mask=e < E, other=0)
    begins = tl.load(ends_ptr + e - 1, mask=(e > 0) & (e < E), other=0)
    blocks = tl.where(e < E, tl.cdiv(ends - begins, BM), 0)
    until = tl.cumsum(blocks, axis=0)
    column_blocks = tl.cdiv(N, BN)
    tiles = tl.max(until, axis=0) * column_blocks
    dtype = out_ptr.dtype.element_ty
    # Gated, half of a tile's rows of w are those of the gate and half those of up: one product serves both.
    rows: tl.constexpr = 2 * BN if GATED else BN
    r = tl.arange(0, rows)
    tile = tl.program_id(0)
    while tile < tiles:
        mine = tile // column_blocks
        first_column = (tile % column_blocks) * BN
        expert = tl.sum((until <= mine).to(tl.int32), axis=0)
        here = e == expert
        first = tl.sum(tl.where(here, begins + (mine - until + blocks) * BM, 0), axis=0)
        stop = tl.sum(tl.where(here, ends, 0), axis=0)
        m = first + tl.arange(0, BM)
        live_m = m < stop
        pair = m
        if GATHER or SCATTER:
            pair = tl.load(order_ptr + m, mask=live_m, other=0)
        source = m
        if GATHER:
            source = pair.to(tl.int32) // PLACES
        x_rows = x_ptr + source.to(tl.int64) * K
        column = first_column + r % BN
        w_row = column + (r // BN) * N
        live_n = column < N
        columns = 2 * N if GATED else N
        w_rows = w_ptr + (expert.to(tl.int64) * columns + w_row) * K
        acc = tl.zeros((rows, BM), tl.float32)
        for step in tl.range(0, K, BK, num_stages=STAGES):
            k = step + tl.arange(0, BK)
            live_k = k < K
            live = live_n[:, None] & live_k[None, :]
            w = tl.load(w_rows[:, None] + k[None, :], mask=live, other=0.0, eviction_policy="evict_first")
            x = tl.load(x_rows[None, :] + k[:, None], mask=live_k[:, None] & live_m[None, :], other=0.0)
            acc = tl.dot(w, x, acc, input_precision="ieee")
        # Rounded where the layer-by-layer computation rounds.
        y = acc.to(dtype).to(tl.float32)
        if GATED:
            gate, up = tl.split(tl.permute(tl.reshape(y, (2, BN, BM)), (1, 2, 0)))
            y = activate(gate, ACT).to(dtype).to(tl.float32) * up
        n = first_column + tl.arange(0, BN)
        target = m
        if SCATTER:
            target = pair
        place = target.to(tl.int64)[None, :] * N + n[:, None]
        tl.store(out_ptr + place, y.to(dtype), mask=(n < N)[:, None] & live_m[None, :])
        tile += tl.num_programs(0)


@triton.jit
def combine_kernel(
    rows_ptr,
    weights_ptr,
    out_ptr,
    n,
    PLACES: tl.constexpr,
    BLOCK: tl.constexpr,
    WAIT: tl.constexpr,
    TRIGGER: tl.constexpr,
):
    # Program (token, columns): out[token] = the sum of weights[token, place] * rows[token, place], in fp32, in order.
    token = tl.program_id(0)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if WAIT:
        gdc_wait()
    if TRIGGER:
        gdc_launch_dependents()
    total = tl.zeros((BLOCK,), tl.float32)
    for place in tl.static_range(PLACES):
        pair = (token * PLACES + place).to(tl.int64)
        row = tl.load(rows_ptr + pair * n + i, mask=i < n, other=0.0).to(tl.float32)
        total += row * tl.load(weights_ptr + pair)
    tl.store(out_ptr + token.to(tl.int64) * n + i, total.to(out_ptr.dtype.element_ty), mask=i < n)
