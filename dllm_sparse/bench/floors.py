"""The least time a forward can take: what it must read, what it must multiply, and how fast the device does either.

Pure. Bytes: every weight a forward uses and every cached key and value, once; of a mixture the experts that some token
chose. FLOPs: two per weight and token, and the two products of attention. Activations, norms and the embedding rows are
left out: they are below 1 % of a forward.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from dllm_sparse.models.config import MoEConfig, TransformerConfig


@dataclass(frozen=True, slots=True)
class Rates:
    """What a device sustains: bytes/s read from its memory, FLOP/s of a large matrix product in one type."""

    bandwidth: float
    flops: float
    source: str


KNOWN_RATES: Mapping[tuple[str, str], Rates] = MappingProxyType(
    {
        # A read-only sum of 4 GiB reaches 4.36 TB/s; large cuBLAS products 790 TFLOP/s.
        ("H200", "bfloat16"): Rates(4.3e12, 790e12, "measured before on an NVIDIA H200"),
    }
)
"""By a part of the device's name and the type of the weights. Anything else is measured on the spot."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Bytes that must be read and FLOPs that must be done."""

    bytes: float
    flops: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.bytes + other.bytes, self.flops + other.flops)


@dataclass(frozen=True, slots=True)
class Fed:
    """One forward: `tokens` per row attend to `keys` positions; `head_rows` of them get logits; `batch` rows.

    With `block` the tokens fed are whole blocks of so many, each of which sees itself and what is before it (1: causal
    attention). With 0 every token sees all keys.
    """

    batch: int
    tokens: int
    keys: int
    head_rows: int
    block: int = 0


def expected_experts(moe: MoEConfig, tokens: int) -> float:
    """Distinct experts that `tokens` tokens choose in a layer when each chooses at random, alone and evenly."""
    return moe.experts * (1 - (1 - moe.experts_per_token / moe.experts) ** tokens)


def forward_costs(
    config: TransformerConfig, fed: Fed, element_bytes: int, active_experts: float | None = None
) -> dict[str, Cost]:
    """The cost of one forward by component: attention_linears, attention, ffn, head.

    `active_experts` is the mean number of distinct experts chosen per mixture layer; None takes `expected_experts`.
    """
    tokens = fed.batch * fed.tokens
    attention_weights = config.width * (sum(config.qkv_widths) + config.heads * config.head_dim)
    cached = max(fed.keys - fed.tokens, 0)  # keys and values of this forward's own tokens are not read from memory
    # Besides what is cached, a token sees on average half of the blocks fed with it and half of its own.
    seen = cached + (fed.tokens + fed.block) / 2 if fed.block else fed.keys
    products = 4 * tokens * seen * config.heads * config.head_dim
    stored = 2 * fed.batch * cached * config.kv_heads * config.head_dim * element_bytes
    head_weights = config.vocab_size * config.width
    layers = config.layers
    return {
        "attention_linears": _linear(layers * attention_weights, tokens, element_bytes),
        "attention": Cost(layers * stored, layers * products),
        "ffn": _ffn_cost(config, tokens, element_bytes, active_experts),
        "head": _linear(head_weights if fed.head_rows else 0, fed.batch * fed.head_rows, element_bytes),
    }


def _ffn_cost(config: TransformerConfig, tokens: int, element_bytes: int, active: float | None) -> Cost:
    """Dense layers, and of mixtures the router, the shared experts and the active ones."""
    cost = _linear(config.dense_layers * 3 * config.width * config.ffn_width, tokens, element_bytes)
    moe = config.moe
    if moe is None:
        return cost
    layers, expert = config.layers - config.dense_layers, 3 * config.width * moe.expert_width
    common = moe.experts * config.width + moe.shared_experts * expert
    active = expected_experts(moe, tokens) if active is None else active
    routed = Cost(active * expert * element_bytes, 2 * expert * tokens * moe.experts_per_token)
    return cost + _linear(layers * common, tokens, element_bytes) + Cost(layers * routed.bytes, layers * routed.flops)


def _linear(weights: int, tokens: int, element_bytes: int) -> Cost:
    return Cost(weights * element_bytes, 2 * weights * tokens)


def total(costs: Mapping[str, Cost]) -> Cost:
    """The sum over components."""
    result = Cost(0.0, 0.0)
    for cost in costs.values():
        result += cost
    return result


def floor_seconds(cost: Cost, rates: Rates) -> float:
    """The larger of bytes / bandwidth and FLOPs / rate."""
    return max(cost.bytes / rates.bandwidth, cost.flops / rates.flops)


def bound_by(cost: Cost, rates: Rates) -> str:
    """Which of the two is the larger: "bandwidth" or "flops"."""
    return "bandwidth" if cost.bytes / rates.bandwidth >= cost.flops / rates.flops else "flops"
