"""ONE transformer for every native family: bidirectional, causal or block-causal, with or without a KV cache.

A masked-diffusion model and its autoregressive baseline run the same code, so a comparison compares models.
Shapes: B rows, T tokens of this forward, S cached length, D width, F FFN width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dllm_sparse.kernels.reference import rms_norm, rotate
from dllm_sparse.models.config import TransformerConfig
from dllm_sparse.models.feed_forward import FeedForward
from dllm_sparse.models.kv_cache import KVCache
from dllm_sparse.models.moe import Experts, MoEFeedForward
from dllm_sparse.models.rope import rope_frequencies, rope_tables
from dllm_sparse.types import SiteName, StepContext


class AttentionOverride(Protocol):
    """Replaces the projections of one layer's attention."""

    def project(self, attention: Attention, site: SiteName, values: Tensor, context: StepContext | None) -> Tensor:
        """The projection behind a site on its values [B, T, n] -> [B, T, N]."""
        ...


class RMSNorm(nn.Module):
    """Normalises in fp32, casts back, then scales (LLaDA's and Llama's order of operations)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> the same shape and dtype."""
        return rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    """Multi-head attention with grouped keys and values; the three input projections are one matrix.

    `override`, when set, computes both projections instead, as in `FeedForward`.
    """

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.qkv_proj = nn.Linear(config.width, sum(config.qkv_widths), bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.heads * config.head_dim, config.width, bias=config.output_bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.norm_eps)
        self.override: AttentionOverride | None = None

    def projection(self, site: SiteName) -> nn.Linear:
        """What reads the values of a site."""
        return self.qkv_proj if site == "attention_input" else self.o_proj

    def column_norms(self, site: SiteName, expert: int = -1) -> Tensor:
        """L2 norm [n] fp32 of the weight column each value of a site meets."""
        norms: Tensor = self.projection(site).weight.float().norm(dim=0)
        return norms

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        bias: Tensor | None,
        start: int,
        visible: int,
        cache: KVCache | None,
        context: StepContext | None = None,
    ) -> Tensor:
        """[B, T, D] -> [B, T, D]; `bias` is a bool mask broadcastable to [B, heads, T, S], True where a key is seen."""
        batch, tokens, _ = x.shape
        heads = self._project("attention_input", x, context).view(batch, tokens, -1, self.config.head_dim)
        counts = [self.config.heads, self.config.kv_heads, self.config.kv_heads]
        query, key, value = torch.split(heads, counts, dim=2)
        if self.config.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))
        query, key = rotate(query, *rope), rotate(key, *rope)
        if cache is not None:
            key, value = cache.update(self.layer, start, key, value, visible)
        causal = self.config.causal and bias is None and tokens > 1
        grouped = self.config.kv_heads != self.config.heads
        y = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, is_causal=causal, enable_gqa=grouped)
        return self._project("attention_output", y.transpose(1, 2).reshape(batch, tokens, -1), context)

    def _project(self, site: SiteName, values: Tensor, context: StepContext | None) -> Tensor:
        if self.override is not None:
            return self.override.project(self, site, values, context)
        out: Tensor = self.projection(site)(values)
        return out


class Block(nn.Module):
    """Pre-norm attention and FFN, each with a residual."""

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.attention = Attention(config, layer)
        self.ffn_norm = RMSNorm(config.width, config.norm_eps)
        dense = layer < config.dense_layers
        self.ffn = FeedForward(config, layer) if dense else MoEFeedForward(config, layer)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        bias: Tensor | None,
        start: int,
        visible: int,
        cache: KVCache | None,
        context: StepContext | None,
    ) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        x = x + self.attention(self.attention_norm(x), rope, bias, start, visible, cache, context)
        x = x + self.ffn(self.ffn_norm(x), context)
        return x


class Transformer(nn.Module):
    """Embedding, blocks, final norm, head. Source: LLaDA (arXiv 2502.09992, app. B) and Llama share this stack."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        if config.tied:
            self.head.weight = self.embedding.weight
        # Not a buffer: `module.to(bfloat16)` must not round the frequencies.
        self.frequencies = rope_frequencies(config)

    @property
    def ffns(self) -> Sequence[FeedForward | Experts]:
        """The FFNs, in the order of the layers; a layer with shared experts has two."""
        return [ffn for block in self.blocks for ffn in block.ffn.parts]  # type: ignore[union-attr]

    @property
    def attentions(self) -> Sequence[Attention]:
        """The attention of every layer, in order."""
        return [block.attention for block in self.blocks]  # type: ignore[misc]

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        return self.embedding.weight.device

    @property
    def shares_prefixes(self) -> bool:
        """Whether a cached prefix can be handed to several rows, and continued by several tokens at once."""
        return True

    def new_cache(self, batch: int, length: int) -> KVCache:
        """An empty cache for `batch` rows of `length` canvas positions."""
        return KVCache(self.config, batch, length, self.device, self.embedding.weight.dtype)

    def forward(
        self,
        ids: Tensor,
        *,
        start: int = 0,
        attention_mask: Tensor | None = None,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
        rows: slice | Tensor = slice(None),
        context: StepContext | None = None,
    ) -> Tensor:
        """Logits [B, rows, V] for ids [B, T] that sit at canvas positions start .. start+T.

        `attention_mask` [B, S] marks real tokens (1) and padding (0) over all positions attended to: S = start+T for
        a causal or block-causal model, the cache's length for a bidirectional one. `positions` [B, T] overrides the
        rotary positions (default: canvas positions). `rows` selects which tokens need logits: a slice of the T tokens
        of each row, or flat indices [N] into B * T, and then the logits are [N, V].
        """
        tokens = ids.shape[1]
        visible = start + tokens
        if self.config.attention == "bidirectional" and cache is not None:
            visible = cache.length
        if positions is None:
            positions = torch.arange(start, start + tokens, device=ids.device)[None]
        self.frequencies = self.frequencies.to(ids.device)
        cos, sin = rope_tables(self.frequencies, positions)
        rope = (cos.unsqueeze(1), sin.unsqueeze(1))
        bias = attention_bias(self.config, attention_mask, start, tokens, visible, ids.device)
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x, rope, bias, start, visible, cache, context)
        x = x[:, rows] if isinstance(rows, slice) else x.flatten(0, 1)[rows]
        logits: Tensor = self.head(self.norm(x))
        return logits.float() if self.config.float32_logits else logits


def attention_bias(
    config: TransformerConfig,
    attention_mask: Tensor | None,
    start: int,
    tokens: int,
    visible: int,
    device: torch.device,
) -> Tensor | None:
    """Bool mask [B or 1, 1, T, S], True where a key is seen; None where plain (causal) attention is already right.

    Block-causal attention is causal attention between blocks. A padded row's blocks begin at its first real token.
    """
    real = None if attention_mask is None or bool(attention_mask.all()) else attention_mask[:, :visible]
    if config.attention == "bidirectional":
        return None if real is None else real[:, None, None].bool()
    length = config.block_length or 1
    whole = tokens == 1 or start == 0 if config.causal else start // length == (visible - 1) // length
    if real is None and whole:
        return None
    places = torch.arange(visible, device=device)
    rank = places[None] if real is None else real.cumsum(-1) - 1
    block = rank.clamp_min(0) // length
    queries = slice(start, start + tokens)
    seen = block[:, None, None] <= block[:, None, queries, None]
    if real is not None:
        # A padding query sees itself, or its softmax would have no entry at all.
        seen = seen & real[:, None, None].bool() | (places == places[queries, None])
    return seen
