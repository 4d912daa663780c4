"""Attention over a static cache for a forward of few tokens, and the rotary step that fills the cache."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dllm_sparse.kernels import reference, streaming
from dllm_sparse.kernels.streaming import Scratch, on_gpu

_MAX_QUERIES = 64
"""Most query rows of one program of the split kernel."""


class Span(NamedTuple):
    """What the queries may see, on the device: positions begin[b] .. end[0] of a cache of S positions.

    begin [B] int64 (left padding), end [1] int64; `padded` tells the host whether any begin is not 0. `block`: in a
    prefill from position 0, queries see nothing behind their own block of so many positions (1: causal attention, 0:
    they see everything); the queries of one block need no more than `end`.
    """

    begin: Tensor
    end: Tensor
    padded: bool
    block: int
    whole: bool  # end is S: no position behind the last is hidden


def rotate_and_store(
    qkv: Tensor,
    tables: tuple[Tensor, Tensor],
    positions: Tensor,
    slots: Tensor,
    keys: Tensor,
    values: Tensor,
    norms: tuple[Tensor, Tensor, float] | None = None,
) -> Tensor:
    """Splits qkv [B * T, (H + 2 KV) * d]; writes keys and values [B, KV, S, d] at slots [T]; returns q [B, H, T, d].

    Rotated in fp32 by `tables` (cos, sin) [positions, r / 2] fp32 at `positions` [B * T] int64, the first r <= d
    features. `norms`: weights of the query and key norm (Qwen3) and their epsilon.
    """
    if not on_gpu(qkv):
        return reference.rotate_and_store(qkv, tables, positions, slots, keys, values, norms)
    from dllm_sparse.kernels.gpu.layers import rope_kernel

    batch, kv_heads, length, dim = keys.shape
    tokens = slots.shape[0]
    heads = qkv.shape[1] // dim - 2 * kv_heads
    q = torch.empty((batch, heads, tokens, dim), dtype=qkv.dtype, device=qkv.device)
    q_norm, k_norm, eps = norms if norms is not None else (qkv, qkv, 0.0)
    block = 16
    rope_kernel[(batch * tokens, -(-(heads + 2 * kv_heads) // block))](
        qkv,
        *tables,
        positions,
        slots,
        q_norm,
        k_norm,
        q,
        keys,
        values,
        tokens,
        length,
        eps,
        HEADS=heads,
        KV_HEADS=kv_heads,
        HALF=dim // 2,
        TURNED=tables[0].shape[1],
        PAD=1 << (dim // 2 - 1).bit_length(),
        BH=block,
        QK_NORM=norms is not None,
        num_warps=4,
        **streaming.overlapping(streaming.LAYERS_OVERLAP, q.device),
    )
    return q


def attend(q: Tensor, keys: Tensor, values: Tensor, span: Span, scratch: Scratch) -> Tensor:
    """Softmax attention of q [B, H, T, d] over keys, values [B, KV, S, d] -> [B * T, H * d]."""
    batch, heads, tokens, dim = q.shape
    group = heads // keys.shape[1]
    prefill = 0 < span.block < tokens
    if on_gpu(q) and dim in (16, 32, 64, 128) and tokens <= _MAX_QUERIES and not prefill:
        shared = next(
            parts for parts in range(1, group + 1) if tokens * group <= _MAX_QUERIES * parts and not group % parts
        )
        # Where nothing is hidden the library, which needs no mask then, reads keys once for all heads that share them.
        if shared == 1 or span.padded or not span.whole:
            return _attend_split(q, keys, values, span, scratch, shared)
    if prefill:
        keys, values = keys[:, :, :tokens], values[:, :, :tokens]
    mask, causal = None, prefill and span.block == 1 and not span.padded
    if not causal and (span.padded or prefill or not span.whole):
        place = torch.arange(keys.shape[2], device=q.device)
        mask = (place >= span.begin[:, None, None, None]) & (place < span.end)
        if prefill:  # a padding query sees itself, or its softmax would have no entry at all
            row = torch.arange(tokens, device=q.device)[:, None]
            mask = mask & (place // span.block <= row // span.block) | (place == row)
    y = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, is_causal=causal, enable_gqa=group > 1)
    return y.transpose(1, 2).reshape(batch * tokens, heads * dim)


def _attend_split(q: Tensor, keys: Tensor, values: Tensor, span: Span, scratch: Scratch, shared: int) -> Tensor:
    """`shared` programs share the heads of one kv head."""
    from dllm_sparse.kernels.gpu.attention import attention_kernel

    batch, heads, tokens, dim = q.shape
    sets, length = keys.shape[1] * shared, keys.shape[2]
    rows = max(16, 1 << (tokens * heads // sets - 1).bit_length())
    pairs = batch * sets
    splits = max(min(-(-length // 128), streaming.processors(q.device) // pairs), 1)
    out = torch.empty((batch * tokens, heads * dim), dtype=q.dtype, device=q.device)
    space = scratch.space(splits * pairs * rows * (dim + 2))
    attention_kernel[(pairs, splits)](
        q,
        keys,
        values,
        span.begin,
        span.end,
        out,
        space,
        space[splits * pairs * rows * dim :],
        scratch.counters,
        tokens,
        length,
        math.log2(math.e) / math.sqrt(dim),
        splits,
        HEADS=heads,
        SETS=sets,
        SHARED=shared,
        HEAD_DIM=dim,
        BM=rows,
        BS=64,
        num_warps=4,
        **streaming.overlapping(streaming.LAYERS_OVERLAP, q.device),
    )
    return out
