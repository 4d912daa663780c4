"""Products of a few tokens with a weight that is read once: the kernel behind every linear layer at T <= 64.

out[T, N] = x[T, K] @ W[K, N], W row-contiguous ("stored by input"), so that an input channel that no token uses is
a row that need not be read. Tokens ride on the tensor cores, padded to 16; what costs is the weight traffic.
One program owns BN columns and a share of the rows; shares meet in an fp32 workspace and the last program to arrive
adds them in a fixed order, so the result does not depend on scheduling. No host synchronisation anywhere: under a
list of rows, how many there are is read from device memory.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from dllm_sparse.kernels.gpu.histogram import count_near


@triton.jit
def activate(gate, ACT: tl.constexpr):
    """The FFN's activation in fp32; ACT: 0 silu, 1 relu, 2 gelu, 3 gelu_tanh."""
    if ACT == 0:
        return gate * tl.sigmoid(gate)
    elif ACT == 1:
        return tl.maximum(gate, 0.0)
    elif ACT == 2:
        return 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    else:
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        return gate * tl.sigmoid(2.0 * inner)


@triton.jit
def _in_runs(k, begins, ends, shifts, RUNS: tl.constexpr):
    """(place, whether there is one) of entries k of a share: run r takes those from begins[r] on, shifted."""
    shift, end = shifts[0], ends[0]
    for r in tl.static_range(1, RUNS):
        shift = tl.where(k >= begins[r], shifts[r], shift)
        end = tl.where(k >= begins[r], ends[r], end)
    return tl.max_contiguous(tl.multiple_of(k + shift, 16), 16), k < end


@triton.jit
def _turned(acc, BO: tl.constexpr):
    """The first BO tokens of acc [BN, BT] as [BO, BN]: all of them, or half."""
    if acc.shape[1] > BO:
        acc, _rest = tl.split(tl.permute(tl.reshape(acc, (acc.shape[0], 2, BO)), (0, 2, 1)))
    return tl.trans(acc)


@triton.jit(do_not_specialize=["T", "SPLITS", "space16"])
def stream_matmul_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    workspace_ptr,
    arrivals_ptr,
    rows_ptr,
    count_ptr,
    near_ptr,
    counts_ptr,
    lines_ptr,
    T,
    N,
    K,
    stride_w,
    SPLITS,
    space16,
    BT: tl.constexpr,
    BO: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GATED: tl.constexpr,
    ACT: tl.constexpr,
    LISTED: tl.constexpr,
    RUNS: tl.constexpr,
    COUNT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ATOMIC: tl.constexpr,
    SWAP: tl.constexpr,
    WAIT: tl.constexpr,
    TRIGGER: tl.constexpr,
    STAGES: tl.constexpr,
):
    # The tensor cores see BT tokens, the result is made of BO. GATED: W is [K, 2N], gate columns first;
    # out = act(x @ gate) * (x @ up). LISTED: only rows_ptr[:count] of W are read, and x[:, j] belongs to row
    # rows_ptr[j]. With RUNS the list lies in runs of their own lengths, RUNS of them a share. COUNT: the result is
    # counted for a selection (histogram.py).
    dtype = out_ptr.dtype.element_ty
    column_blocks = tl.cdiv(N, BN)
    block = tl.program_id(0) % column_blocks
    split = tl.program_id(0) // column_blocks
    n = block * BN + tl.arange(0, BN)
    t = tl.arange(0, BT)
    live_n = n < N
    if WAIT:
        gdc_wait()
    t_out = tl.arange(0, BO)
    if COUNT:
        near = tl.load(near_ptr + t_out, mask=t_out < T, other=0)
    begins, ends, shifts = (), (), ()
    if RUNS:
        begin = 0
        end = 0
        for r in tl.static_range(RUNS):
            length = tl.load(count_ptr + split * RUNS + r)
            begins += (end,)
            ends += (end + length,)
            shifts += ((split * RUNS + r) * space16 * 16 - end,)
            end += tl.cdiv(length, 16) * 16
    else:
        total = K
        if LISTED:
            total = tl.load(count_ptr)
        share = tl.cdiv(tl.cdiv(total, BK), SPLITS) * BK
        begin = split * share
        end = tl.minimum(begin + share, total)
    # How many rows are listed is known to no compiler: a mask that ends at a multiple of 16 still lets it copy x in
    # wide, asynchronous pieces (K is such a multiple); what lies between is zeroed in registers. Worth 5 us of 31.
    edge = tl.cdiv(end, 16) * 16
    # With SWAP the tensor cores see the weights as the tall operand (Hopper's wgmma wants 64 rows; tokens are few).
    if SWAP:
        acc = tl.zeros((BN, BT), tl.float32)
        up = tl.zeros((BN, BT), tl.float32)
    else:
        acc = tl.zeros((BT, BN), tl.float32)
        up = tl.zeros((BT, BN), tl.float32)
    for i in tl.range(0, tl.maximum(tl.cdiv(end - begin, BK), 0), num_stages=STAGES):
        k = begin + i * BK + tl.arange(0, BK)
        live_k = k < end
        place_k = k
        if RUNS:
            place_k, live_k = _in_runs(k, begins, ends, shifts, RUNS)
        x = tl.load(x_ptr + t[:, None] * K + place_k[None, :], mask=(t < T)[:, None] & (k < edge)[None, :], other=0.0)
        rows = k
        if LISTED:
            x = tl.where(live_k[None, :], x, 0.0)
            rows = tl.load(rows_ptr + place_k, mask=live_k, other=0)
        offsets = rows[:, None].to(tl.int64) * stride_w + n[None, :]
        live = live_k[:, None] & live_n[None, :]
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
        acc = _turned(acc, BO)
        up = _turned(up, BO)
    if TRIGGER:
        gdc_launch_dependents()
    place = t_out[:, None] * N + n[None, :]
    live_out = (t_out < T)[:, None] & live_n[None, :]
    slab = T * N
    last = True
    if SPLITS > 1:
        if ATOMIC:
            tl.atomic_add(workspace_ptr + place, acc, mask=live_out, sem="relaxed")
            if GATED:
                tl.atomic_add(workspace_ptr + slab + place, up, mask=live_out, sem="relaxed")
        else:
            mine = workspace_ptr + split * slab * (2 if GATED else 1) + place
            tl.store(mine, acc, mask=live_out)
            if GATED:
                tl.store(mine + slab, up, mask=live_out)
        tl.debug_barrier()
        last = tl.atomic_add(arrivals_ptr + block, 1, sem="acq_rel") == SPLITS - 1
        if last:
            tl.store(arrivals_ptr + block, 0)
            if ATOMIC:
                acc = tl.load(workspace_ptr + place, mask=live_out, other=0.0, cache_modifier=".cg")
                if GATED:
                    up = tl.load(workspace_ptr + slab + place, mask=live_out, other=0.0, cache_modifier=".cg")
            else:
                acc = tl.zeros((BO, BN), tl.float32)
                up = tl.zeros((BO, BN), tl.float32)
                for s in range(0, SPLITS):
                    theirs = workspace_ptr + s * slab * (2 if GATED else 1) + place
                    acc += tl.load(theirs, mask=live_out, other=0.0, cache_modifier=".cg")
                    if GATED:
                        up += tl.load(theirs + slab, mask=live_out, other=0.0, cache_modifier=".cg")
    if last:
        # Rounded where the layer-by-layer computation rounds, so that both commit the same tokens.
        y = acc
        if HAS_BIAS:
            y += tl.load(bias_ptr + n, mask=live_n, other=0.0).to(tl.float32)[None, :]
        y = y.to(dtype).to(tl.float32)
        if GATED:
            if HAS_BIAS:
                up += tl.load(bias_ptr + N + n, mask=live_n, other=0.0).to(tl.float32)[None, :]
            y = activate(y, ACT).to(dtype).to(tl.float32) * up.to(dtype).to(tl.float32)
        if HAS_RESIDUAL:
            y += tl.load(residual_ptr + place, mask=live_out, other=0.0).to(tl.float32)
        y = y.to(dtype)
        tl.store(out_ptr + place, y, mask=live_out)
        if COUNT:
            count_near(y, live_out, near, t_out, T, counts_ptr, lines_ptr, block == 0)
