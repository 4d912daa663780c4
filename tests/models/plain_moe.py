"""A mixture-of-experts transformer as loops and explicit matrices, independent of the package: fp32, one sequence.

Written from the published layouts; slow and obvious on purpose.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last axis."""
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def glu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """down(silu(gate x) * up x) of one vector."""
    opened = gate @ x
    return down @ (opened * torch.sigmoid(opened) * (up @ x))


def chosen(scores: Tensor, bias: Tensor, count: int, groups: int, entered: int) -> list[int]:
    """The best experts of one token, by score plus bias, among the best groups (sum of their two best).

    Of equal groups and equal experts the lower ones.
    """
    competing = (scores + bias).tolist()
    size = len(competing) // groups
    members = [list(range(group * size, group * size + size)) for group in range(groups)]
    strength = [sum(sorted((competing[e] for e in group), reverse=True)[:2]) for group in members]
    best = sorted(range(groups), key=lambda group: -strength[group])[:entered]
    allowed = [expert for group in sorted(best) for expert in members[group]]
    return sorted(allowed, key=lambda expert: -competing[expert])[:count]


def mixture(x: Tensor, weights: Mapping[str, Tensor], root: str, config: Mapping[str, Any]) -> Tensor:
    """One token through router and experts. `config` has experts, count, and the optional facts of a router."""
    logits = weights[f"{root}.gate.weight"] @ x
    scores = torch.sigmoid(logits) if config.get("sigmoid") else logits.exp() / logits.exp().sum()
    bias = weights.get(f"{root}.gate.expert_bias", torch.zeros_like(scores))
    experts = chosen(scores, bias, config["count"], config.get("groups", 1), config.get("entered", 1))
    shares = [float(scores[expert]) for expert in experts]
    if config.get("renormalise") and not (config.get("sigmoid") and len(shares) == 1):
        shares = [share / sum(shares) for share in shares]
    out = torch.zeros_like(x)
    for expert, share in zip(experts, shares, strict=True):
        out += config.get("scaling", 1.0) * share * expert_of(x, weights, f"{root}.experts.{expert}")
    shared = f"{root}.shared_experts"
    return out + expert_of(x, weights, shared) if f"{shared}.up_proj.weight" in weights else out


def expert_of(x: Tensor, weights: Mapping[str, Tensor], root: str) -> Tensor:
    """The GLU under a name."""
    return glu(x, *(weights[f"{root}.{name}_proj.weight"] for name in ("gate", "up", "down")))


def rotated(x: Tensor, position: int, theta: float, dim: int) -> Tensor:
    """One head's vector: pairs (i, i + dim / 2) of its first `dim` features turned by position / theta^(2i / dim)."""
    out = x.clone()
    for i in range(dim // 2):
        angle = torch.tensor(position / theta ** (2 * i / dim))
        a, b = x[i], x[i + dim // 2]
        out[i], out[i + dim // 2] = a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()
    return out


def attention(queries: Tensor, keys: Tensor, values: Tensor, seen: Tensor, theta: float, dim: int) -> Tensor:
    """[T, H, d], [T, KV, d] twice -> [T, H * d]; `seen` [T, T] bool. Rotates queries and keys."""
    tokens, heads, width = queries.shape
    out = torch.zeros(tokens, heads, width)
    for head in range(heads):
        source = head * keys.shape[1] // heads
        turned = torch.stack([rotated(keys[s, source], s, theta, dim) for s in range(tokens)])
        for t in range(tokens):
            scores = turned @ rotated(queries[t, head], t, theta, dim) / width**0.5
            scores = scores.masked_fill(~seen[t], -torch.inf)
            out[t, head] = scores.softmax(-1) @ values[:, source]
    return out.flatten(1)


def llada_moe_logits(ids: Tensor, weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> Tensor:
    """[T] ids -> [T, V]: every position sees every other."""
    eps, heads = config["rms_norm_eps"], config["num_attention_heads"]
    width = config["hidden_size"] // heads
    facts = {"count": config["num_experts_per_tok"], "renormalise": config["norm_topk_prob"]}
    seen = torch.ones(len(ids), len(ids), dtype=torch.bool)
    x = weights["model.embed_tokens.weight"][ids]
    for layer in range(config["num_hidden_layers"]):
        root = f"model.layers.{layer}"
        h = norm(x, weights[f"{root}.input_layernorm.weight"], eps)
        query, key, value = (
            (h @ weights[f"{root}.self_attn.{name}_proj.weight"].T).view(len(ids), heads, width) for name in "qkv"
        )
        query = norm(query, weights[f"{root}.self_attn.q_norm.weight"], eps)
        key = norm(key, weights[f"{root}.self_attn.k_norm.weight"], eps)
        mixed = attention(query, key, value, seen, config["rope_theta"], width)
        x = x + mixed @ weights[f"{root}.self_attn.o_proj.weight"].T
        h = norm(x, weights[f"{root}.post_attention_layernorm.weight"], eps)
        x = x + torch.stack([mixture(token, weights, f"{root}.mlp", facts) for token in h])
    return norm(x, weights["model.norm.weight"], eps) @ weights["lm_head.weight"].T


def llada2_logits(ids: Tensor, weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> Tensor:
    """[T] ids -> [T, V]: a position sees its block of 32 (or `block_size`) and every block before."""
    eps, heads, sharing, width = (
        config[name] for name in ("rms_norm_eps", "num_attention_heads", "num_key_value_heads", "head_dim")
    )
    facts = {
        "count": config["num_experts_per_tok"],
        "sigmoid": True,
        "groups": config["n_group"],
        "entered": config["topk_group"],
        "renormalise": True,
        "scaling": config["routed_scaling_factor"],
    }
    block = torch.arange(len(ids)) // config.get("block_size", 32)
    seen = block[None, :] <= block[:, None]
    rotary = int(width * config["partial_rotary_factor"])
    x = weights["model.word_embeddings.weight"][ids]
    for layer in range(config["num_hidden_layers"]):
        root = f"model.layers.{layer}"
        h = norm(x, weights[f"{root}.input_layernorm.weight"], eps)
        fused = (h @ weights[f"{root}.attention.query_key_value.weight"].T).view(len(ids), -1, width)
        query, key, value = fused[:, :heads], fused[:, heads : heads + sharing], fused[:, heads + sharing :]
        query = norm(query, weights[f"{root}.attention.query_layernorm.weight"], eps)
        key = norm(key, weights[f"{root}.attention.key_layernorm.weight"], eps)
        mixed = attention(query, key, value, seen, config["rope_theta"], rotary)
        x = x + mixed @ weights[f"{root}.attention.dense.weight"].T
        h = norm(x, weights[f"{root}.post_attention_layernorm.weight"], eps)
        if layer < config["first_k_dense_replace"]:
            x = x + torch.stack([expert_of(token, weights, f"{root}.mlp") for token in h])
        else:
            x = x + torch.stack([mixture(token, weights, f"{root}.mlp", facts) for token in h])
    return norm(x, weights["model.norm.weight"], eps) @ weights["lm_head.weight"].T
