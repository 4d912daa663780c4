"""Which experts a token goes to, and the pairs (token, expert) in the order of the experts. Plain torch.

Nothing here synchronises with the host. Shapes: M tokens, E experts, k experts a token, P = M * k pairs.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor


class RouterRule(NamedTuple):
    """How scores become experts and weights.

    Scores are the `kind` of the logits. With `groups` > 1 experts compete only inside the `groups_per_token` groups
    whose two best scores sum highest. `renormalise` divides the weights by their sum (a lone sigmoid score stays as it
    is), `scaling` multiplies them.
    Sources: OLMoE and LLaDA-MoE (softmax); DeepSeek-V3 (arXiv 2412.19437, sec. 2.1.2) and LLaDA2.0 (sigmoid, groups).
    """

    kind: Literal["softmax", "sigmoid"]
    experts_per_token: int
    groups: int = 1
    groups_per_token: int = 1
    renormalise: bool = False
    scaling: float = 1.0


class Routing(NamedTuple):
    """experts [M, k] int64, best first, and weights [M, k] fp32."""

    experts: Tensor
    weights: Tensor


class Pairs(NamedTuple):
    """The pairs in the order of the experts, equal experts by token.

    order [P] int64: pair m * k + place at each position; ends [E] int32: where the pairs of each expert end.
    """

    order: Tensor
    ends: Tensor


def choose_experts(logits: Tensor, bias: Tensor | None, rule: RouterRule) -> Routing:
    """The experts of every token from router logits [M, E].

    `bias` [E] fp32 is added to the scores for the choice only; weights come from the scores without it.
    """
    wide = logits.float()
    scores = wide.softmax(-1) if rule.kind == "softmax" else wide.sigmoid()
    competing = scores if bias is None else scores + bias
    if rule.groups > 1:
        grouped = competing.view(len(competing), rule.groups, -1)
        strength = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)
        entered = torch.zeros_like(strength, dtype=torch.bool)
        entered.scatter_(-1, strength.topk(rule.groups_per_token, dim=-1).indices, True)
        competing = grouped.masked_fill(~entered.unsqueeze(-1), -torch.inf).flatten(-2)
    experts = competing.topk(rule.experts_per_token, dim=-1).indices
    weights = scores.gather(-1, experts)
    if rule.renormalise and (rule.kind == "softmax" or rule.experts_per_token > 1):
        weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-20)
    return Routing(experts, weights * rule.scaling)


def sort_pairs(experts: Tensor, count: int) -> Pairs:
    """The pairs of experts [M, k] int64 in the order of the `count` experts."""
    ordered, order = experts.flatten().sort(stable=True)
    numbers = torch.arange(count, device=experts.device)
    return Pairs(order, torch.searchsorted(ordered, numbers, right=True, out_int32=True))
