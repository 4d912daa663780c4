"""The pure decisions of a denoising step: which token, how sure, which positions. Tensors in, tensors out.

Shapes: B rows, T positions that compete, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor


def choose_tokens(logits: Tensor, temperature: float, uniform: Tensor | None) -> Tensor:
    """The token of every position, [B, T, V] -> [B, T]: argmax, or Gumbel sampling in fp64 at temperature > 0.

    `uniform` [B, T, V] fp64 is the noise in (0, 1); argmax of exp(l) / (-log u)^T is LLaDA's form of the Gumbel trick.
    """
    if uniform is None:
        return logits.argmax(-1)
    return (logits.double().exp() / (-uniform.log()) ** temperature).argmax(-1)


def token_probabilities(logits: Tensor, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """Softmax probability of the chosen tokens, [B, T, V], [B, T] -> [B, T] in `dtype`."""
    return logits.to(dtype).softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def pick_by_quota(confidence: Tensor, quota: list[int]) -> Tensor:
    """The quota[row] most confident positions, [B, T] -> [B, T] bool. Ineligible positions hold -inf."""
    picked = torch.zeros_like(confidence, dtype=torch.bool)
    for row, count in enumerate(quota):
        picked[row, confidence[row].topk(min(count, confidence.shape[1])).indices] = True
    return picked & (confidence > -torch.inf)


def pick_by_rank(confidence: Tensor, quota: Tensor) -> Tensor:
    """`pick_by_quota` with the quota [B] on the device and the lowest position first among equals: no host values."""
    order = confidence.argsort(dim=-1, descending=True, stable=True)
    rank = torch.arange(confidence.shape[-1], device=confidence.device).expand_as(order)
    return (torch.zeros_like(order).scatter_(1, order, rank) < quota[:, None]) & (confidence > -torch.inf)


def pick_by_threshold(confidence: Tensor, threshold: float) -> Tensor:
    """The most confident position of each row, and every other one with confidence >= threshold (Fast-dLLM)."""
    best = torch.zeros_like(confidence, dtype=torch.bool)
    best.scatter_(1, confidence.argmax(-1, keepdim=True), True)
    return (best | (confidence >= threshold)) & (confidence > -torch.inf)


def pick_by_factor(confidence: Tensor, factor: float) -> Tensor:
    """Fast-dLLM's factor rule: the i-th best (from 0) must reach 1 - factor / (i + 2), the first failure ends the list.

    The best one always passes. Kept as published: when only the last of the candidates fails, it is committed too.
    """
    ordered, order = confidence.sort(dim=-1, descending=True)
    eligible = ordered > -torch.inf
    number = eligible.sum(-1, keepdim=True)
    rank = torch.arange(confidence.shape[-1], device=confidence.device)[None]
    limit = 1 - factor / (rank + 2.0)
    passes = (ordered.double() >= limit) | (rank == 0)
    first_failure = torch.where(passes | ~eligible, number - 1, rank).amin(-1, keepdim=True).minimum(number - 1)
    count = first_failure + ((first_failure == 0) | (first_failure == number - 1))
    picked = torch.zeros_like(eligible).scatter_(1, order, rank < count)
    return picked & (confidence > -torch.inf)
