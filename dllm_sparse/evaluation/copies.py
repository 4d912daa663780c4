"""The masked copies a diffusion likelihood is estimated from, and the weight of each. Pure.

Every estimator is a weighted sum over copies of sum log p(masked tokens | the rest). Copies masked alike are one row
with their summed weight. Shapes: L target tokens, R rows.
"""

from __future__ import annotations

from functools import cache
from itertools import combinations
from math import comb

import torch
from torch import Tensor

from dllm_sparse.evaluation.options import ScoringOptions
from dllm_sparse.evaluation.requests import Pair
from dllm_sparse.samplers.likelihood import stratified_masks

_MOST_SUBSETS = 4096  # of one size that are listed; of more, a repeated draw is rare


def masks_and_weights(pair: Pair, options: ScoringOptions) -> tuple[Tensor, Tensor]:
    """Masked target positions [R, L] bool and the weight [R] of a masked token's log-likelihood.

    Monte Carlo: L / (number masked) / mc_num, so that the weighted sum is the official estimate; random numbers are
    drawn in its order. Pseudo: one position a row, weight 1. One token: one row, exact.
    """
    length = len(pair.target)
    if length == 1 or options.estimator == "pseudo":
        return torch.eye(length, dtype=torch.bool), torch.ones(length)
    generator = torch.Generator().manual_seed(pair.seed(options.seed))
    if options.estimator == "distinct":
        return distinct_masks(length, options.mc_num, generator)
    masks, copies = merged(drawn_masks(length, options, generator)[0])
    return masks, copies * (length / masks.sum(-1) / options.mc_num)


def drawn_masks(length: int, options: ScoringOptions, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The official masks [mc_num, L] as drawn, repeats and all, and the weight [mc_num] of each."""
    groups = options.mc_num // options.group
    masks = torch.cat([stratified_masks(length, options.group, generator) for _ in range(groups)])
    return masks, length / masks.sum(-1) / options.mc_num


def distinct_masks(length: int, copies: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Masks [R, L] of at most `copies` rows, and weights [R], for an unbiased estimate of LLaDA's bound.

    The bound is the mean over sizes k = 1..L of L / k times the mean loss of the masks of that size (arXiv 2502.09992,
    eq. 6). Every size gets its share of the copies, and of each size different masks are drawn, all of them where
    there are no more. Against n draws with replacement from the N masks of a size that lowers the variance by the
    factor (N - n) / (N - 1). The official sizes are rounded numbers, which favours some sizes; these are exact.
    """
    if copies < length:  # equally spaced sizes from a random one on: each is as likely
        first = int(torch.randint(length, (), generator=generator))
        numbers = {(first + place * length // copies) % length + 1: 1 for place in range(copies)}
    else:
        each, left = divmod(copies, length)
        fuller = sorted(range(1, length + 1), key=lambda size: -comb(length, size))[:left]
        numbers = {size: each + (size in fuller) for size in range(1, length + 1)}
    masks, weights = [], []
    for size, number in sorted(numbers.items()):
        rows, share = _drawn(length, size, number, generator)
        masks.append(rows)
        weights.append(share * (length / size / len(numbers)))
    return torch.cat(masks), torch.cat(weights)


def _drawn(length: int, size: int, number: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """At most `number` masks of one size, and the share [rows] of the mean over them each stands for."""
    total = comb(length, size)
    if total <= _MOST_SUBSETS:
        rows = _subsets(length, size)[torch.randperm(total, generator=generator)[:number]]
        return rows, torch.full((len(rows),), 1 / len(rows))
    orders = torch.stack([torch.randperm(length, generator=generator) for _ in range(number)])
    rows, repeats = merged(orders < size)
    return rows, repeats / number


def merged(masks: Tensor) -> tuple[Tensor, Tensor]:
    """The different rows of [R, L] bool, ordered as binary numbers, and how often each occurs [rows] int64."""
    length = masks.shape[1]
    if length > 62:  # two equal rows are rare, and the number would not fit
        return masks, torch.ones(len(masks), dtype=torch.int64)
    numbers, copies = torch.unique((masks << torch.arange(length)).sum(-1), return_counts=True)
    return (numbers[:, None] >> torch.arange(length) & 1).bool(), copies


@cache
def _subsets(length: int, size: int) -> Tensor:
    """Every mask [C(L, size), L] of `size` positions."""
    chosen = torch.tensor(list(combinations(range(length), size)))
    return torch.zeros(len(chosen), length, dtype=torch.bool).scatter_(1, chosen, True)
