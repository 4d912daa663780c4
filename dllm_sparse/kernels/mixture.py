"""A mixture of experts on few tokens, in six launches that wait for nothing: the twins are in `routing`, `experts`.

Shapes: M tokens, E experts, k experts a token, P = M * k pairs, D width, F width of an expert.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dllm_sparse.kernels.experts import combine, expert_ffn, fuses_on, grouped_product, wants_gradient
from dllm_sparse.kernels.routing import Pairs, RouterRule, Routing, choose_experts, sort_pairs
from dllm_sparse.kernels.streaming import LISTS_OVERLAP, overlapping
from dllm_sparse.kernels.tuning import padded_tokens

MAX_TOKENS = 1024
"""Most tokens of the fused launches, which at so many take 0.5 to 0.8 of the plain ones' time on an H200."""

_SHARE, _CHUNK, _LANES = 256, 8, 512
"""Bytes of a router's row in a share of its product; pairs of a program that orders them; most experts of a warp."""

_OVERLAP = LISTS_OVERLAP
_ROUNDED = {torch.bfloat16: 1, torch.float16: 2}


def can_mix(x: Tensor, weight: Tensor, *others: Tensor) -> bool:
    """True where the fused launches run: few rows of up to fp32 on a CUDA GPU with triton, no gradient asked for."""
    few = 0 < len(x) <= MAX_TOKENS and x.is_contiguous() and not wants_gradient(x, weight, *others)
    return few and x.dtype == weight.dtype and fuses_on(x.device, x.dtype)


def route(x: Tensor, weight: Tensor, bias: Tensor | None, rule: RouterRule, *, fused: bool | None = None) -> Routing:
    """Experts and weights of tokens [M, D] by a router [E, D], whose `bias` [E] fp32 is for the choice only.

    The logits of a softmax are rounded to the model's dtype, those of a sigmoid stay fp32. `fused` asks for two
    launches or against them. Of equal scores these take the lowest id; torch promises nothing.
    """
    if not (can_mix(x, weight) if fused is None else fused):
        wide = rule.kind == "sigmoid"
        logits = F.linear(x.float(), weight.float()) if wide else F.linear(x, weight)
        return choose_experts(logits, bias, rule)
    return choose_shared(share_logits(x, weight), x.dtype, bias, rule)


def share_logits(x: Tensor, weight: Tensor) -> Tensor:
    """x [M, D] times a router [E, D] in shares of the inputs -> [shares, M, E] fp32, whose sum are the logits."""
    from dllm_sparse.kernels.gpu.route import logits_kernel

    (tokens, width), experts = x.shape, len(weight)
    inputs = _SHARE // x.element_size()
    shares = torch.empty((-(-width // inputs), tokens, experts), dtype=torch.float32, device=x.device)
    rows, columns = min(padded_tokens(tokens), 64), 32 if experts > 64 else 16
    logits_kernel[(len(shares), -(-experts // columns), -(-tokens // rows))](
        x,
        weight,
        shares,
        tokens,
        experts,
        width,
        BT=rows,
        BN=columns,
        BK=inputs,
        **overlapping(_OVERLAP, x.device),
    )
    return shares


def choose_shared(shares: Tensor, dtype: torch.dtype, bias: Tensor | None, rule: RouterRule) -> Routing:
    """`choose_experts` in one launch, from shares [S, M, E] fp32 of logits that a softmax router rounds to `dtype`."""
    from dllm_sparse.kernels.gpu.route import route_kernel

    (_, tokens, experts), places = shares.shape, rule.experts_per_token
    assert places <= experts // rule.groups * rule.groups_per_token
    chosen = torch.empty((tokens, places), dtype=torch.int64, device=shares.device)
    weights = torch.empty((tokens, places), dtype=torch.float32, device=shares.device)
    groups, members = _padded(rule.groups), _padded(experts // rule.groups)
    warps = max(groups * members // _LANES, 1)  # one, if it can: the choice is a chain of short reductions
    route_kernel[(tokens,)](
        shares,
        shares if bias is None else bias,
        chosen,
        weights,
        tokens,
        rule.scaling,
        SHARES=len(shares),
        AT_ONCE=min(_padded(len(shares)), max(4096 * warps // (groups * members), 1)),
        EXPERTS=experts,
        GROUPS=rule.groups,
        ENTERED=rule.groups_per_token,
        BG=groups,
        BE=members,
        PLACES=places,
        SIGMOID=rule.kind == "sigmoid",
        ROUNDED=_ROUNDED.get(dtype, 0) if rule.kind == "softmax" else 0,
        HAS_BIAS=bias is not None,
        RENORMALISE=rule.renormalise and (rule.kind == "softmax" or places > 1),
        num_warps=warps,
        **overlapping(_OVERLAP, shares.device),
    )
    return Routing(chosen, weights)


def order_pairs(experts: Tensor, count: int) -> Pairs:
    """`sort_pairs` in one launch."""
    from dllm_sparse.kernels.gpu.route import pairs_kernel

    pairs = experts.numel()
    order = torch.empty(pairs, dtype=torch.int64, device=experts.device)
    ends = torch.empty(count, dtype=torch.int32, device=experts.device)
    pairs_kernel[(-(-max(pairs, count) // _CHUNK),)](
        experts.contiguous(),
        order,
        ends,
        pairs,
        count,
        BLOCK=min(max(_padded(pairs), 16), 256),
        CHUNK=_CHUNK,
        **overlapping(_OVERLAP, experts.device),
    )
    return Pairs(order, ends)


def combine_pairs(rows: Tensor, weights: Tensor) -> Tensor:
    """rows [P, D] by pair, weighted by weights [M, k] and summed in fp32, place after place -> [M, D]."""
    from dllm_sparse.kernels.gpu.experts import combine_kernel

    (tokens, places), width = weights.shape, rows.shape[1]
    out = torch.empty((tokens, width), dtype=rows.dtype, device=rows.device)
    block = min(_padded(width), 512)
    combine_kernel[(tokens, -(-width // block))](
        rows,
        weights,
        out,
        width,
        PLACES=places,
        BLOCK=block,
        num_warps=2,
        **overlapping(_OVERLAP, rows.device),
    )
    return out


def mixture(
    x: Tensor, routing: Routing, gate_up: Tensor, down: Tensor, activation: str, *, fused: bool | None = None
) -> Tensor:
    """The weighted sum of down(act(gate x) * up x) over the experts of each token, [M, D] -> [M, D].

    gate_up [E, 2F, D], gate rows first, and down [E, D, F]. `fused` asks for four launches or against them.
    """
    if not (can_mix(x, gate_up, down, routing.weights) if fused is None else fused):
        pairs = sort_pairs(routing.experts, len(gate_up))
        return combine(expert_ffn(x, pairs, gate_up, down, activation), pairs.order, routing.weights)
    pairs = order_pairs(routing.experts, len(gate_up))
    hidden = grouped_product(x, gate_up, pairs, activation=activation, gather=True)
    outputs = grouped_product(hidden, down, pairs, scatter=True, tokens=len(x))
    return combine_pairs(outputs, routing.weights)


def _padded(size: int) -> int:
    return 1 << (size - 1).bit_length()
