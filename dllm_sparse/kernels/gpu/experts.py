"""Rows sorted by expert times the weights of their experts, in one launch whatever the routing was."""

import triton
import triton.language as tl

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
    GATED: tl.constexpr,
    ACT: tl.constexpr,
):
    # out[m] = x[row of m] @ w[expert of m].T; w [E, N, K], with GATED [E, 2N, K], gate rows first, and
    # out = act(gate) * up. With GATHER the row of x is order_ptr[m] // PLACES, else m. Program (columns, rows): block
    # `mine` of BM rows, counted through the experts in order, an expert's last block being cut at ends_ptr[e]; programs
    # beyond the last block do nothing. The weights are the tall operand of the tensor cores: rows are few.
    e = tl.arange(0, EXPERTS)
    ends = tl.load(ends_ptr + e, mask=e < E, other=0)
    begins = tl.load(ends_ptr + e - 1, mask=(e > 0) & (e < E), other=0)
    blocks = tl.cdiv(ends - begins, BM)
    until = tl.cumsum(blocks, axis=0)
    mine = tl.program_id(1)
    expert = tl.sum((until <= mine).to(tl.int32), axis=0)
    if expert >= E:
        return
    here = e == expert
    first = tl.sum(tl.where(here, begins + (mine - until + blocks) * BM, 0), axis=0)
    stop = tl.sum(tl.where(here, ends, 0), axis=0)
    m = first + tl.arange(0, BM)
    live_m = m < stop
    row = m
    if GATHER:
        row = tl.load(order_ptr + m, mask=live_m, other=0) // PLACES
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    live_n = n < N
    dtype = out_ptr.dtype.element_ty
    x_rows = x_ptr + row.to(tl.int64) * K
    columns = N
    if GATED:
        columns = 2 * N
    w_rows = w_ptr + (expert.to(tl.int64) * columns + n) * K
    acc = tl.zeros((BN, BM), tl.float32)
    up = tl.zeros((BN, BM), tl.float32)
    for step in range(0, K, BK):
        k = step + tl.arange(0, BK)
        live_k = k < K
        x = tl.load(x_rows[None, :] + k[:, None], mask=live_k[:, None] & live_m[None, :], other=0.0)
        live = live_n[:, None] & live_k[None, :]
        w = tl.load(w_rows[:, None] + k[None, :], mask=live, other=0.0)
        acc = tl.dot(w, x, acc, input_precision="ieee")
        if GATED:
            w = tl.load((w_rows + N * K)[:, None] + k[None, :], mask=live, other=0.0)
            up = tl.dot(w, x, up, input_precision="ieee")
    # Rounded where the layer-by-layer computation rounds.
    y = acc.to(dtype).to(tl.float32)
    if GATED:
        y = activate(y, ACT).to(dtype).to(tl.float32) * up.to(dtype).to(tl.float32)
    place = m.to(tl.int64)[None, :] * N + n[:, None]
    tl.store(out_ptr + place, y.to(dtype), mask=live_n[:, None] & live_m[None, :])
