"""Products that read only the listed rows of a weight, divided evenly however many rows are listed.

How many there are is known on the device alone. A fixed number of programs shares the (column block, chunk of listed
rows) pairs in one line, each a stretch of equal length: no mask can unbalance the processors. Where a block's chunks
fall to several programs, their sums meet in an fp32 workspace and the last to arrive adds them in program order.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from dllm_sparse.kernels.gpu.stream_matmul import activate


@triton.jit(do_not_specialize=["T", "SLOTS"])
def gather_matmul_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    workspace_ptr,
    arrivals_ptr,
    rows_ptr,
    count_ptr,
    T,
    N,
    K,
    stride_w,
    SLOTS,
    BT: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GATED: tl.constexpr,
    ACT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    SWAP: tl.constexpr,
    WAIT: tl.constexpr,
    TRIGGER: tl.constexpr,
    STAGES: tl.constexpr,
):
    # x [T, K] packed: x[:, j] belongs to row rows_ptr[j] of W, for j < count. GATED as in `stream_matmul_kernel`.
    # SLOTS: most programs that can share a column block.
    dtype = out_ptr.dtype.element_ty
    me = tl.program_id(0).to(tl.int64)
    programs = tl.num_programs(0).to(tl.int64)
    t = tl.arange(0, BT)
    if WAIT:
        gdc_wait()
    count = tl.load(count_ptr)
    chunks = tl.maximum(tl.cdiv(count, BK), 1)  # an empty list still has to write zeros
    work = tl.cdiv(N, BN).to(tl.int64) * chunks
    unit = me * work // programs
    stop = (me + 1) * work // programs
    while unit < stop:
        block = (unit // chunks).to(tl.int32)
        first = (unit % chunks).to(tl.int32)
        last = tl.minimum(chunks, first + (stop - unit).to(tl.int32))
        n = block * BN + tl.arange(0, BN)
        live_n = n < N
        if SWAP:
            acc = tl.zeros((BN, BT), tl.float32)
            up = tl.zeros((BN, BT), tl.float32)
        else:
            acc = tl.zeros((BT, BN), tl.float32)
            up = tl.zeros((BT, BN), tl.float32)
        for chunk in tl.range(first, last, num_stages=STAGES):
            j = chunk * BK + tl.arange(0, BK)
            live_j = j < count
            row = tl.load(rows_ptr + j, mask=live_j, other=0)
            x = tl.load(x_ptr + t[:, None] * K + j[None, :], mask=(t < T)[:, None] & live_j[None, :], other=0.0)
            offsets = row[:, None].to(tl.int64) * stride_w + n[None, :]
            live = live_j[:, None] & live_n[None, :]
            w = tl.load(w_ptr + offsets, mask=live, other=0.0, eviction_policy="evict_first")
            if SWAP:
                acc = tl.dot(tl.trans(w), tl.trans(x), acc, input_precision="ieee")
            else:
                acc = tl.dot(x, w, acc, input_precision="ieee")
            if GATED:
                w = tl.load(w_ptr + N + offsets, mask=live, other=0.0, eviction_policy="evict_first")
                if SWAP:
                    up = tl.dot(tl.trans(w), tl.trans(x), up, input_precision="ieee")
                else:
                    up = tl.dot(x, w, up, input_precision="ieee")
        if SWAP:
            acc_t = tl.trans(acc)
            up_t = tl.trans(up)
        else:
            acc_t = acc
            up_t = up
        place = t[:, None] * N + n[None, :]
        live_out = (t < T)[:, None] & live_n[None, :]
        # Program q's stretch begins at q * work // programs, so unit u is that of q = ((u + 1) * programs - 1) // work.
        begin = block.to(tl.int64) * chunks
        first_sharer = ((begin + 1) * programs - 1) // work
        sharers = (((begin + chunks) * programs - 1) // work - first_sharer + 1).to(tl.int32)
        done = True
        if sharers > 1:
            G: tl.constexpr = 2 if GATED else 1
            slab = T * N
            mine = workspace_ptr + (me - first_sharer) * slab * G + place
            tl.store(mine, acc_t, mask=live_out)
            if GATED:
                tl.store(mine + slab, up_t, mask=live_out)
            tl.debug_barrier()
            done = tl.atomic_add(arrivals_ptr + block, 1, sem="acq_rel") == sharers - 1
            if done:
                tl.store(arrivals_ptr + block, 0)
                acc_t = tl.zeros((BT, BN), tl.float32)
                up_t = tl.zeros((BT, BN), tl.float32)
                for s in range(0, sharers):
                    theirs = workspace_ptr + s * slab * G + place
                    acc_t += tl.load(theirs, mask=live_out, other=0.0, cache_modifier=".cg")
                    if GATED:
                        up_t += tl.load(theirs + slab, mask=live_out, other=0.0, cache_modifier=".cg")
        if done:
            y = acc_t
            if HAS_BIAS:
                y += tl.load(bias_ptr + n, mask=live_n, other=0.0).to(tl.float32)[None, :]
            y = y.to(dtype).to(tl.float32)
            if GATED:
                if HAS_BIAS:
                    up_t += tl.load(bias_ptr + N + n, mask=live_n, other=0.0).to(tl.float32)[None, :]
                y = activate(y, ACT).to(dtype).to(tl.float32) * up_t.to(dtype).to(tl.float32)
            if HAS_RESIDUAL:
                y += tl.load(residual_ptr + place, mask=live_out, other=0.0).to(tl.float32)
            tl.store(out_ptr + place, y.to(dtype), mask=live_out)
        unit += last - first
    if TRIGGER:
        gdc_launch_dependents()
