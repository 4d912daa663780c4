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
        return logits.max(-1).indices  # the first of equals, as argmax, in a third of its time on a CPU
    return (logits.double().exp() / (-uniform.log()) ** temperature).argmax(-1)


def guide(logits: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance in LLaDA's form: logits [2B, ...], behind those of the rows those of their unconditional
    copies -> [B, ...]."""
    conditional, unconditional = logits.chunk(2)
    return unconditional + (scale + 1) * (conditional - unconditional)


def token_probabilities(logits: Tensor, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """Softmax probability of the chosen tokens, [B, T, V], [B, T] -> [B, T] in `dtype`."""
    return logits.to(dtype).softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def keep_likely(logits: Tensor, top_p: float | None = None, top_k: int | None = None) -> Tensor:
    """Logits [..., V] with -inf for all but the fewest most likely tokens whose probability exceeds `top_p`, then for
    all but the `top_k` largest (ties stay)."""
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        enough = ordered.softmax(-1).cumsum(-1) > top_p
        beyond = torch.nn.functional.pad(enough[..., :-1], (1, 0))  # the token that crosses top_p stays
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter_(-1, order, beyond), -torch.inf)
    if top_k is not None:
        least = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    return logits


def sureness(probabilities: Tensor, tokens: Tensor, measure: str) -> Tensor:
    """Dream's confidences, [..., V], [...] -> [...]: the negative "entropy", the "topk_margin" between the two most
    likely tokens, else the probability of the token."""
    if measure == "entropy":
        return (probabilities * (probabilities + 1e-10).log()).sum(-1)
    if measure == "topk_margin":
        best = probabilities.topk(2, dim=-1).values
        return best[..., 0] - best[..., 1]
    return probabilities.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def race(weights: Tensor, noise: Tensor) -> Tensor:
    """Weights over exponential noise, both [..., n]: the largest entry is a draw in proportion to the weights, the k
    largest are k draws without replacement. It is what torch.multinomial computes."""
    return weights / noise


def pick_by_quota(confidence: Tensor, quota: list[int]) -> Tensor:
    """The quota[row] most confident positions, [B, T] -> [B, T] bool. Ineligible positions hold -inf."""
    picked = torch.zeros_like(confidence, dtype=torch.bool)
    for row, count in enumerate(quota):
        picked[row, confidence[row].topk(min(count, confidence.shape[1])).indices] = True
    return picked & (confidence > -torch.inf)


def pick_by_rank(confidence: Tensor, quota: Tensor, threshold: float | None = None) -> Tensor:
    """`pick_by_quota`, or `pick_by_budget` with a threshold, for quotas [B] on the device: no host values.

    Among equals the lowest position is first.
    """
    order = confidence.argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(confidence.shape[-1], device=confidence.device).expand_as(order)
    rank = torch.zeros_like(order).scatter_(1, order, places)
    picked = (rank < quota[:, None]) & (confidence > -torch.inf)
    return picked if threshold is None else picked & ((confidence >= threshold) | (rank == 0))


def pick_by_threshold(confidence: Tensor, threshold: float) -> Tensor:
    """The most confident position of each row, and every other one with confidence >= threshold (Fast-dLLM)."""
    best = torch.zeros_like(confidence, dtype=torch.bool)
    best.scatter_(1, confidence.argmax(-1, keepdim=True), True)
    return (best | (confidence >= threshold)) & (confidence > -torch.inf)


def pick_by_budget(confidence: Tensor, threshold: float, budget: list[int]) -> Tensor:
    """Of the budget[row] most confident positions those with confidence >= threshold, and always the best."""
    picked = torch.zeros_like(confidence, dtype=torch.bool)
    for row, count in enumerate(budget):
        best = confidence[row].topk(min(count, confidence.shape[1]))
        sure = best.values >= threshold
        sure[:1] = True
        picked[row, best.indices[sure]] = True
    return picked & (confidence > -torch.inf)


def pick_by_threshold_or_quota(confidence: Tensor, threshold: float, quota: list[int] | Tensor) -> Tensor:
    """All positions with confidence > threshold where they are at least quota[row] many, else the quota[row] best.

    The rule of LLaDA2 and SDAR; unlike Fast-dLLM's it is strict, and a step has a planned least number of tokens.
    With the quota [B] on the device there are no host values, as in `pick_by_rank`.
    """
    high = confidence > threshold
    if isinstance(quota, Tensor):
        best, least = pick_by_rank(confidence, quota), quota
    else:
        best, least = pick_by_quota(confidence, quota), torch.tensor(quota, device=confidence.device)
    return torch.where((high.sum(-1) >= least)[:, None], high, best)


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
