"""The small layers between the products, one launch each: RMSNorm, SwiGLU, rotary positions with the cache write."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from dllm_sparse.kernels.gpu.stream_matmul import activate


@triton.jit
def add_norm_kernel(
    x_ptr,
    delta_ptr,
    weight_ptr,
    sum_ptr,
    out_ptr,
    n,
    eps,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
    WAIT: tl.constexpr,
    TRIGGER: tl.constexpr,
):
    # out = RMSNorm(x + delta), sum = x + delta; without ADD just the norm of x.
    row = tl.program_id(0).to(tl.int64) * n
    i = tl.arange(0, BLOCK)
    inside = i < n
    dtype = out_ptr.dtype.element_ty
    if TRIGGER:
        gdc_launch_dependents()
    weight = tl.load(weight_ptr + i, mask=inside, other=0.0).to(tl.float32)
    if WAIT:
        gdc_wait()
    x = tl.load(x_ptr + row + i, mask=inside, other=0.0)
    if ADD:
        x = (x.to(tl.float32) + tl.load(delta_ptr + row + i, mask=inside, other=0.0).to(tl.float32)).to(dtype)
        tl.store(sum_ptr + row + i, x, mask=inside)
    wide = x.to(tl.float32)
    wide = wide * tl.rsqrt(tl.sum(wide * wide, axis=0) / n + eps)
    tl.store(out_ptr + row + i, (weight * wide.to(dtype).to(tl.float32)).to(dtype), mask=inside)


@triton.jit
def glu_kernel(
    gate_up_ptr, out_ptr, n, ACT: tl.constexpr, BLOCK: tl.constexpr, WAIT: tl.constexpr, TRIGGER: tl.constexpr
):
    # out[row] = act(gate_up[row, :n]) * gate_up[row, n:], rounded where the separate operations round.
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    if TRIGGER:
        gdc_launch_dependents()
    if WAIT:
        gdc_wait()
    gate = tl.load(gate_up_ptr + row * 2 * n + i, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * 2 * n + n + i, mask=inside, other=0.0).to(tl.float32)
    dtype = out_ptr.dtype.element_ty
    tl.store(out_ptr + row * n + i, (activate(gate, ACT).to(dtype).to(tl.float32) * up).to(dtype), mask=inside)


@triton.jit(do_not_specialize=["T", "S"])
def rope_kernel(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    position_ptr,
    slot_ptr,
    q_norm_ptr,
    k_norm_ptr,
    q_ptr,
    key_ptr,
    value_ptr,
    T,
    S,
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    TURNED: tl.constexpr,
    PAD: tl.constexpr,
    BH: tl.constexpr,
    QK_NORM: tl.constexpr,
    WAIT: tl.constexpr,
    TRIGGER: tl.constexpr,
):
    # Program (token, BH heads) of qkv [B * T, (HEADS + 2 KV_HEADS) * 2 HALF]: queries to q [B, HEADS, T, .], keys and
    # values to slot_ptr[t] of [B, KV_HEADS, S, .]; of every head the first 2 TURNED features are rotated by halves in
    # fp32 at rotary position position_ptr[b, t]. Lane i works on features `one` and `two`: a pair that turns together,
    # or, beyond, two that pass.
    token = tl.program_id(0)
    b = token // T
    t = token % T
    dtype = q_ptr.dtype.element_ty
    if TRIGGER:
        gdc_launch_dependents()
    if WAIT:
        gdc_wait()
    head = (tl.program_id(1) * BH + tl.arange(0, BH))[:, None]
    i = tl.arange(0, PAD)[None, :]
    inside = (i < HALF) & (head < HEADS + 2 * KV_HEADS)
    is_q = head < HEADS
    is_k = (head >= HEADS) & (head < HEADS + KV_HEADS)
    is_v = head >= HEADS + KV_HEADS
    one = tl.where(i < TURNED, i, i + TURNED)
    two = tl.where(i < TURNED, i + TURNED, i + HALF)
    source = qkv_ptr + (token.to(tl.int64) * (HEADS + 2 * KV_HEADS) + head) * 2 * HALF
    first = tl.load(source + one, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + two, mask=inside, other=0.0).to(tl.float32)
    position = tl.load(position_ptr + token)
    cos = tl.load(cos_ptr + position * TURNED + i, mask=i < TURNED, other=1.0)
    sin = tl.load(sin_ptr + position * TURNED + i, mask=i < TURNED, other=0.0)
    rope_first = first
    rope_second = second
    if QK_NORM:
        square = tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)
        scale = tl.rsqrt(square / (2 * HALF) + eps)[:, None]
        q1 = tl.load(q_norm_ptr + one, mask=i < HALF, other=0.0).to(tl.float32)
        q2 = tl.load(q_norm_ptr + two, mask=i < HALF, other=0.0).to(tl.float32)
        k1 = tl.load(k_norm_ptr + one, mask=i < HALF, other=0.0).to(tl.float32)
        k2 = tl.load(k_norm_ptr + two, mask=i < HALF, other=0.0).to(tl.float32)
        rope_first = (tl.where(is_q, q1, k1) * (first * scale).to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
        rope_second = (tl.where(is_q, q2, k2) * (second * scale).to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
    first = tl.where(is_v, first, rope_first * cos - rope_second * sin).to(dtype)
    second = tl.where(is_v, second, rope_second * cos + rope_first * sin).to(dtype)
    slot = tl.load(slot_ptr + t)
    to_q = q_ptr + ((b * HEADS + head).to(tl.int64) * T + t) * 2 * HALF
    tl.store(to_q + one, first, mask=inside & is_q)
    tl.store(to_q + two, second, mask=inside & is_q)
    to_k = key_ptr + ((b * KV_HEADS + head - HEADS).to(tl.int64) * S + slot) * 2 * HALF
    tl.store(to_k + one, first, mask=inside & is_k)
    tl.store(to_k + two, second, mask=inside & is_k)
    to_v = value_ptr + ((b * KV_HEADS + head - HEADS - KV_HEADS).to(tl.int64) * S + slot) * 2 * HALF
    tl.store(to_v + one, first, mask=inside & is_v)
    tl.store(to_v + two, second, mask=inside & is_v)
