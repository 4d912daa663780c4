"""A forward of the transformer with fixed shapes and no host synchronisation: what a CUDA graph can hold.

The same computation as `Transformer.forward`, on the same weights, with the small layers fused and the few-token
products streamed. Where it sits on the canvas comes from device tensors, so one capture serves every block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dllm_sparse.engine.aside import Aside
from dllm_sparse.kernels.cached_attention import Span, attend, rotate_and_store
from dllm_sparse.kernels.histogram import Histogram
from dllm_sparse.kernels.storage import store_by_input
from dllm_sparse.kernels.streaming import (
    SIXTEEN_BIT,
    Scratch,
    add_norm,
    can_stream,
    glu,
    linear,
    stream_matmul,
)
from dllm_sparse.models.feed_forward import FeedForward
from dllm_sparse.models.kv_cache import KVCache
from dllm_sparse.models.moe import MoEFeedForward
from dllm_sparse.models.transformer import Attention, Block, Transformer


@dataclass(slots=True)
class Window:
    """Where B x T tokens sit, on the device: slots [T] canvas positions, positions [B * T] rotary positions, int64."""

    slots: Tensor
    positions: Tensor
    span: Span


class FFNRunner(Protocol):
    """Replaces the norm and FFN of every layer in forwards that may be captured."""

    def reset(self) -> list[int]:
        """A generation begins: forgets what was counted; returns the row counts M whose capture is out of date."""

    def begin(self, classes: Tensor) -> None:
        """A forward of tokens with these classes [B, T] begins; launched aside."""

    def __call__(self, block: Block, x: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """One layer, on rows x [M, D] plus a pending delta [M, D]; returns the same pair for the next."""

    def end(self) -> None:
        """The forward ended."""

    def settle(self, rows: int) -> None:
        """A forward of M rows ran plainly and may be captured: the first time, decide what depends on what it met."""


class FixedForward:
    """Runs one transformer over static buffers. A cache of one layer serves all of them where nothing is kept."""

    def __init__(self, net: Transformer, length: int) -> None:
        self.net = net
        device = net.embedding.weight.device
        self.scratch = Scratch(device)
        self.aside = Aside(device)
        positions = torch.arange(length, device=device)
        angles = positions[:, None].float() * net.frequencies.to(device)
        self.tables = (angles.cos(), angles.sin())
        if device.type == "cuda" and net.embedding.weight.dtype in SIXTEEN_BIT:
            for block in net.blocks:
                for layer in _products(block):
                    store_by_input(layer)

    def __call__(
        self, ids: Tensor, window: Window, cache: KVCache, rows: Tensor, ffn: FFNRunner | None = None
    ) -> Tensor:
        """Logits [R, V] of the flat rows [R] of ids [B, T], which may be none; keys and values of all T are cached."""
        x = F.embedding(ids, self.net.embedding.weight).flatten(0, 1)
        delta: Tensor | None = None
        run_ffn = ffn or self.dense_ffn
        for layer, block in enumerate(self.net.blocks):
            assert isinstance(block, Block)
            place = layer if len(cache.keys) > 1 else 0
            x, delta = self._attention(block, x, delta, window, cache.keys[place], cache.values[place])
            x, delta = run_ffn(block, x, delta)
        if not len(rows):
            return x.new_empty(0, self.net.config.vocab_size)
        x = x[rows]
        _, normed = add_norm(x, None if delta is None else delta[rows], self.net.norm.weight, self.net.norm.eps)
        logits = F.linear(normed, self.net.head.weight)
        return logits.float() if self.net.config.float32_logits else logits

    def dense_ffn(self, block: Block, x: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The dense norm and FFN of one layer; see `FFNRunner`."""
        x, normed = add_norm(x, delta, block.ffn_norm.weight, block.ffn_norm.eps)
        if isinstance(block.ffn, MoEFeedForward):
            return x, self.mixed(block.ffn, normed)
        return self.residual(self.gated(block.ffn, normed), block.ffn.down_proj, x)

    def mixed(self, ffn: MoEFeedForward, x: Tensor) -> Tensor:
        """A mixture of experts on rows [M, D] -> [M, D]."""
        out: Tensor = ffn.experts(x[None], ffn.router(x))[0]
        if ffn.shared is None:
            return out
        return linear(self.gated(ffn.shared, x), ffn.shared.down_proj, self.scratch, residual=out)

    def gated(self, ffn: FeedForward, x: Tensor, counted: Histogram | None = None) -> Tensor:
        """act(gate) * up of rows [M, D] -> [M, F]; where it is streamed, it may be counted."""
        layer, activation = ffn.gate_up_proj, self.net.config.activation
        if can_stream(x, layer.weight.t()):
            return stream_matmul(
                x, layer.weight.t(), self.scratch, activation=activation, bias=layer.bias, histogram=counted
            )
        return glu(layer(x), activation)

    def residual(self, values: Tensor, layer: nn.Linear, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x plus the layer's output, or the output as a delta for the next norm to add."""
        if can_stream(values, layer.weight.t()):
            return linear(values, layer, self.scratch, residual=x), None
        return x, layer(values)

    def _attention(
        self, block: Block, x: Tensor, delta: Tensor | None, window: Window, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        attention: Attention = block.attention
        x, normed = add_norm(x, delta, block.attention_norm.weight, block.attention_norm.eps)
        qkv = linear(normed, attention.qkv_proj, self.scratch)
        norms = None
        if self.net.config.qk_norm:
            norms = (attention.q_norm.weight, attention.k_norm.weight, attention.q_norm.eps)
        q = rotate_and_store(qkv, self.tables, window.positions, window.slots, keys, values, norms)
        return self.residual(attend(q, keys, values, window.span, self.scratch), attention.o_proj, x)


def _products(block: nn.Module) -> Iterator[nn.Linear]:
    assert isinstance(block, Block)
    yield from (block.attention.qkv_proj, block.attention.o_proj)
    for ffn in block.ffn.parts:
        if isinstance(ffn, FeedForward):
            yield from (ffn.gate_up_proj, ffn.down_proj)
